"""How the rows of b reach all ranks and how what is summed over ranks comes home.

Shape legend: n pairs of this rank, m of all, q of the block at hand, d width.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from brainfusion.alignment.losses.peers import Peers

ExchangeName = Literal["gather", "ring"]
Task = Callable[[Tensor, int, Tensor | None], Tensor]
"""From keys [q, d], the place of the first among all pairs and what else is known about each [q]
to this rank's part of a result [q] or [q, d]."""


class Gather:
    """Every rank holds the keys of all: m d numbers, two large collectives a step."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers

    def load(self, b: Tensor) -> Tensor:
        """What a rank keeps of the keys [n, d] between forward and backward."""
        return self.peers.gather(b)

    def sum(self, task: Task, keys: Tensor, known: Tensor | None = None) -> Tensor:
        """The sum over ranks of the results of `task`, for the keys of this rank."""
        known = None if known is None else self.peers.gather(known)
        return self.peers.scatter_sum(task(keys, 0, known))

    def log_sum(self, task: Task, keys: Tensor) -> Tensor:
        """The same for results [q] that are log2 of what is to be summed."""
        logs = task(keys, 0, None)
        top, start = self.peers.max(logs), self.peers.offset
        own = top[start : start + self.peers.counts[self.peers.rank]]
        return self.peers.scatter_sum((logs - top).exp2_()).log2_().add_(own)


class Ring:
    """The keys of each rank travel past all others, and the sums follow them.

    While a rank works on one block, the next is on its way to it (Liu 2023, arXiv 2310.01889). A
    sum leaves one step after its block, with this rank's part added, and is home and complete
    after as many steps as there are ranks. A rank holds at most its own keys, the block at hand,
    the next, and the sums that leave, arrive and are being made: 6 max(n) d numbers.
    """

    def __init__(self, peers: Peers) -> None:
        self.peers = peers

    def load(self, b: Tensor) -> Tensor:
        """What a rank keeps of the keys [n, d] between forward and backward."""
        return b.contiguous()

    def sum(self, task: Task, keys: Tensor, known: Tensor | None = None) -> Tensor:
        """The sum over ranks of the results of `task`, for the keys of this rank."""
        return self._around(task, keys, known, torch.add)

    def log_sum(self, task: Task, keys: Tensor) -> Tensor:
        """The same for results [q] that are log2 of what is to be summed."""
        return self._around(task, keys, None, torch.logaddexp2)

    def _around(
        self,
        task: Task,
        keys: Tensor,
        known: Tensor | None,
        merge: Callable[..., Tensor],
    ) -> Tensor:
        peers = self.peers
        block = [keys] if known is None else [keys, known]
        leaving: Tensor | None = None
        partial: Tensor | None = None
        following: list[dist.Work] = []
        for step in range(peers.world_size):
            at, next_at = ((peers.rank - t) % peers.world_size for t in (step, step + 1))
            arriving, travelling = block, []
            if step + 1 < peers.world_size:
                arriving = [x.new_empty(peers.counts[next_at], *x.shape[1:]) for x in block]
                travelling = self._pass_on(block, arriving, tag=0)
            own = task(block[0], peers.start(at), block[1] if len(block) > 1 else None)
            for work in following:
                work.wait()
            leaving = own if partial is None else merge(own, partial, out=own)
            partial = own.new_empty(peers.counts[next_at], *own.shape[1:])
            following = self._pass_on([leaving], [partial], tag=len(block))
            for work in travelling:
                work.wait()
            block = arriving
        for work in following:
            work.wait()
        del leaving  # sent, and needed until now
        assert partial is not None
        return partial

    def _pass_on(self, out: list[Tensor], into: list[Tensor], *, tag: int) -> list[dist.Work]:
        """Start sending to the next rank and receiving from the one before; empty ones stay."""
        group = self.peers.group
        assert group is not None
        after, before = (
            dist.get_global_rank(group, (self.peers.rank + d) % self.peers.world_size)
            for d in (1, -1)
        )
        wanted = [(dist.isend, x, after, tag + k) for k, x in enumerate(out)]
        wanted += [(dist.irecv, x, before, tag + k) for k, x in enumerate(into)]
        ops = [dist.P2POp(op, x, peer, group, t) for op, x, peer, t in wanted if x.numel()]
        return dist.batch_isend_irecv(ops) if ops else []
