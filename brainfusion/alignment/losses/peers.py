"""The ranks that share a loss: how many pairs each holds, and what they must agree on."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from brainfusion.runtime.errors import UserError


@dataclass(frozen=True)
class Peers:
    """The ranks that share a loss and how many pairs each of them holds."""

    group: dist.ProcessGroup | None
    rank: int
    counts: tuple[int, ...]

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return len(self.counts)

    @property
    def n_pairs(self) -> int:
        """The pairs of all of them."""
        return sum(self.counts)

    @property
    def offset(self) -> int:
        """Where this rank's pairs begin among those of all."""
        return self.start(self.rank)

    def start(self, rank: int) -> int:
        """Where the pairs of `rank` begin among those of all."""
        return sum(self.counts[:rank])

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in rank order; shorter ranks are padded on the way."""
        if self.world_size == 1:
            return rows
        padded = rows.new_zeros(max(self.counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        # The list form: the others are deprecated in torch 2.13, or absent before it.
        parts = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:n] for part, n in zip(parts, self.counts, strict=True)])

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """Sum over ranks, of which this rank gets its own rows."""
        if self.world_size == 1:
            return rows
        if dist.get_backend(self.group) == "nccl" and len(set(self.counts)) == 1:
            own = torch.empty_like(rows[: self.counts[0]])
            dist.reduce_scatter(own, list(rows.split(self.counts)), group=self.group)
            return own
        dist.all_reduce(rows, group=self.group)
        return rows[self.offset : self.offset + self.counts[self.rank]].clone()

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(value, group=self.group)
        return value

    def max(self, value: Tensor) -> Tensor:
        """Largest over ranks."""
        if self.world_size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return value


def default_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """`group`, or the group of all ranks if one has been started; None for a group of one."""
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    return group if group is not None and dist.get_world_size(group) > 1 else None


def meet(
    a: Tensor, b: Tensor, group: dist.ProcessGroup | None, facts: Mapping[str, int] | None = None
) -> tuple[Peers, float]:
    """Who is there, and a bound of |a_i . b_j| over all of them.

    Args:
        a: [n, d] rows of this rank.
        b: [n, d] rows paired with them.
        group: From `default_group`.
        facts: Named numbers that every rank must have alike.

    Raises:
        UserError: On all ranks; a fact differs between two of them.
    """
    longest = [float(x.detach().norm(dim=1).amax()) if len(x) else 0.0 for x in (a, b)]
    if group is None:
        return Peers(None, 0, (len(a),)), longest[0] * longest[1]
    facts = facts or {}
    mine = torch.tensor([len(a), *longest, *facts.values()], dtype=torch.float64, device=a.device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    table = torch.stack(parts).cpu()
    for name, values in zip(facts, table.T[3:], strict=True):
        if len(values.unique()) > 1:
            raise UserError(
                f"{name} differs between processes: {[int(x) for x in values]}, by rank; every "
                "process must call the loss alike, with ids of the same kinds."
            )
    peers = Peers(group, dist.get_rank(group), tuple(int(n) for n in table[:, 0]))
    return peers, float(table[:, 1].max() * table[:, 2].max())
