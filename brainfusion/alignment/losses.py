"""Contrastive losses: exact at any batch size and any number of processes.

Symmetric InfoNCE (van den Oord 2018, arXiv 1807.03748; both directions as in CLIP, Radford 2021,
arXiv 2103.00020) over N pairs, with S = s a b':

    r_i = logsumexp_j S_ij,  c_j = logsumexp_i S_ij
    L   = mean_i (r_i + c_i)/2 - S_ii
    G   = dL/dS = (exp(S - r_i) + exp(S - c_j))/2N - [i = j]/N
    da  = s G b,  db = s G' a,  dL/ds = sum_i a_i . (G b)_i

One constant k bounds all of S, so one exp(S - k) serves rows and columns alike. Tiles of S are
made, summed and forgotten, and made again in backward: memory is O(N d + tile^2).

Shape legend: n pairs of this process, m pairs of all processes, d width.
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from brainfusion.runtime.errors import UserError

LossName = Literal["info_nce", "clip", "siglip"]
ContrastiveLoss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def info_nce(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "n d"],
    logit_scale: Float[Tensor, ""] | float,
    *,
    normalize: bool = False,
    tile: int = 1024,
    group: dist.ProcessGroup | None = None,
    local: bool = False,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE of the pairs (a_i, b_i); every other pair of the batch is a negative.

    In a process group, each rank gives its own pairs (counts may differ) and the loss is that of
    the union, the same number on every rank. Backward delivers `world_size` times the gradient, so
    that the mean over ranks (what DDP takes) is exact for every parameter, logit scale included.

    Args:
        a: Embeddings of one modality; unit rows, unless `normalize`. Exact for rows of any norm.
        b: Embeddings of the other, row-paired with `a`.
        logit_scale: The multiplier of the cosine (the exponential of the learnt log scale).
        normalize: Scale the rows of `a` and `b` to unit norm first.
        tile: Rows and columns of the block of S that exists at any time.
        group: The ranks that share the loss; the default group if omitted, as in
            torch.distributed. One process if no group has been started.
        local: Leave other ranks out of it, whatever has been started.

    Returns:
        The loss in nats, at least 0; log(m) where nothing is told apart.

    Raises:
        ValueError: `a` and `b` are not two matrices of one shape, or `tile` is not positive.
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(
            f"info_nce: a is {tuple(a.shape)} and b is {tuple(b.shape)}; expected two matrices of "
            "one shape, row i of each from the same person."
        )
    if tile < 1:
        raise ValueError(f"info_nce: tile={tile}; expected a positive number of rows.")
    if normalize:
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    scale = torch.as_tensor(logit_scale, device=a.device)
    return _InfoNCE.apply(a, b, scale, tile, None if local else _group(group))  # type: ignore[return-value]


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, tile: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        # Autocast would run the tiles in half precision: logits of up to 100 need float32.
        with torch.autocast(a.device.type, enabled=False):
            dtype = torch.float64 if a.dtype == b.dtype == torch.float64 else torch.float32
            ctx.dtypes = a.dtype, b.dtype, scale.dtype
            a, b, s = a.to(dtype), b.to(dtype), float(scale)
            peers, bound = _meet(a, b, group)
            keys = peers.gather(b)
            sums = _log_sums(a * s, keys, abs(s) * bound, peers, tile)
            own = slice(peers.offset, peers.offset + len(a))
            per_pair = (sums.rows + sums.columns[own]) / 2 - s * (a * b).sum(1)
            loss = peers.sum(per_pair.sum()) / peers.n_pairs
            ctx.save_for_backward(a, keys, sums.rows, sums.columns)
            ctx.s, ctx.shift, ctx.tile, ctx.peers = s, sums.shift, tile, peers
            return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        a, keys, rows, columns = ctx.saved_tensors
        peers: _Peers = ctx.peers
        with torch.autocast(a.device.type, enabled=False):
            grad_a, grad_keys = _weighted_sums(a, keys, rows, columns, ctx)
            factor = grad_outputs[0].to(a.dtype) * (peers.world_size / (2 * peers.n_pairs))
            grad_a *= factor
            grad_scale = (a * grad_a).sum()
            grad_a *= ctx.s
            grad_b = peers.scatter_sum(grad_keys).mul_(factor * ctx.s)
        types = ctx.dtypes
        return grad_a.to(types[0]), grad_b.to(types[1]), grad_scale.to(types[2]), None, None


# -- tiles ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LogSums:
    """Log of the row and column sums of exp(S); `shift` is k, or None where k did not serve."""

    rows: Tensor
    columns: Tensor
    shift: float | None


def _tiles(n_rows: int, n_columns: int, tile: int) -> Iterator[tuple[slice, slice]]:
    for i in range(0, n_rows, tile):
        for j in range(0, n_columns, tile):
            yield slice(i, min(i + tile, n_rows)), slice(j, min(j + tile, n_columns))


def _log_sums(scaled: Tensor, keys: Tensor, bound: float, peers: "_Peers", tile: int) -> _LogSums:
    # exp(headroom) summed over 1e7 pairs stays finite. `floor` is where terms that were flushed to
    # 0 could have mattered: at least 1e8 above the smallest normal number, per pair.
    headroom, floor = (600.0, 1e-290) if scaled.dtype == torch.float64 else (70.0, 1e-30)
    shift = max(0.0, bound - headroom)
    row_sums = scaled.new_zeros(len(scaled))
    # One more entry carries the count of rows that underflowed: one collective for both.
    column_sums = scaled.new_zeros(len(keys) + 1)
    buffer = scaled.new_empty(min(tile, len(scaled)) * min(tile, len(keys)))
    for i, j in _tiles(len(scaled), len(keys), tile):
        block = _logits(scaled[i], keys[j], buffer)
        if shift:
            block.sub_(shift)
        block.exp_()
        row_sums[i] += block.sum(1)
        column_sums[j] += block.sum(0)
    floor *= peers.n_pairs
    if shift:
        column_sums[-1] = (row_sums < floor).sum()
    column_sums = peers.sum(column_sums)
    if shift and bool((column_sums[-1] > 0) | (column_sums[:-1] < floor).any()):
        return _log_sums_by_maximum(scaled, keys, peers, tile, buffer)
    return _LogSums(row_sums.log_().add_(shift), column_sums[:-1].log_().add_(shift), shift)


def _log_sums_by_maximum(
    scaled: Tensor, keys: Tensor, peers: "_Peers", tile: int, buffer: Tensor
) -> _LogSums:
    """The same sums under a maximum of each row and column: for logits that spread over 100."""
    infinite = -torch.inf
    row_top, row_sum = scaled.new_full((len(scaled),), infinite), scaled.new_zeros(len(scaled))
    top, total = scaled.new_full((len(keys),), infinite), scaled.new_zeros(len(keys))
    for i, j in _tiles(len(scaled), len(keys), tile):
        block = _logits(scaled[i], keys[j], buffer)
        new = torch.maximum(row_top[i], block.amax(1))
        row_sum[i] = row_sum[i] * (row_top[i] - new).exp() + (block - new[:, None]).exp_().sum(1)
        row_top[i] = new
        new = torch.maximum(top[j], block.amax(0))
        total[j] = total[j] * (top[j] - new).exp() + block.sub_(new).exp_().sum(0)
        top[j] = new
    highest = peers.max(top)
    total = peers.sum(total * (top - highest).exp())
    return _LogSums(row_sum.log_() + row_top, total.log_() + highest, None)


def _weighted_sums(
    a: Tensor, keys: Tensor, rows: Tensor, columns: Tensor, ctx: Any
) -> tuple[Tensor, Tensor]:
    """2N G b and 2N G' a, by tiles; the second is this rank's share of it."""
    shift, tile, offset = ctx.shift, ctx.tile, ctx.peers.offset
    scaled = a * ctx.s
    grad_a, grad_keys = torch.zeros_like(a), torch.zeros_like(keys)
    buffer = a.new_empty(min(tile, len(a)) * min(tile, len(keys)))
    spare = torch.empty_like(buffer)
    if shift is not None:
        rows, columns = (shift - rows).exp(), (shift - columns).exp()
    for i, j in _tiles(len(a), len(keys), tile):
        block = _logits(scaled[i], keys[j], buffer)
        other = spare[: block.numel()].view_as(block)
        if shift is not None:
            if shift:
                block.sub_(shift)
            torch.add(rows[i, None], columns[None, j], out=other)
            block.exp_().mul_(other)
        else:
            torch.sub(block, columns[None, j], out=other)
            block.sub_(rows[i, None]).exp_().add_(other.exp_())
        diagonal = offset + i.start - j.start
        if -block.shape[0] < diagonal < block.shape[1]:
            block.diagonal(diagonal).sub_(2.0)
        grad_a[i].addmm_(block, keys[j])
        grad_keys[j].addmm_(block.T, a[i])
    return grad_a, grad_keys


def _logits(scaled: Tensor, keys: Tensor, buffer: Tensor) -> Tensor:
    out = buffer[: len(scaled) * len(keys)].view(len(scaled), len(keys))
    return torch.mm(scaled, keys.T, out=out)


# -- ranks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Peers:
    """The ranks that share a loss and how many pairs each of them holds."""

    group: dist.ProcessGroup | None
    rank: int
    counts: tuple[int, ...]

    @property
    def world_size(self) -> int:
        return len(self.counts)

    @property
    def n_pairs(self) -> int:
        return sum(self.counts)

    @property
    def offset(self) -> int:
        return sum(self.counts[: self.rank])

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in rank order; shorter ranks are padded on the way."""
        if self.world_size == 1:
            return rows
        padded = rows.new_zeros(max(self.counts), rows.shape[1])
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
        if self.world_size > 1:
            dist.all_reduce(value, group=self.group)
        return value

    def max(self, value: Tensor) -> Tensor:
        if self.world_size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return value


def _group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    return group if group is not None and dist.get_world_size(group) > 1 else None


def _meet(a: Tensor, b: Tensor, group: dist.ProcessGroup | None) -> tuple[_Peers, float]:
    """Who is there, and a bound of |a_i . b_j| over all of them."""
    longest = [float(x.detach().norm(dim=1).amax()) if len(x) else 0.0 for x in (a, b)]
    if group is None:
        return _Peers(None, 0, (len(a),)), longest[0] * longest[1]
    mine = torch.tensor([len(a), *longest], dtype=torch.float64, device=a.device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    table = torch.stack(parts).cpu()
    peers = _Peers(group, dist.get_rank(group), tuple(int(n) for n in table[:, 0]))
    return peers, float(table[:, 1].max() * table[:, 2].max())


# -- open_clip -----------------------------------------------------------------------------------


@cache
def open_clip_losses() -> ModuleType:
    """open_clip's loss module alone; importing the package would pull torchvision and timm.

    Raises:
        UserError: open_clip is not installed.
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "open_clip is not installed, which --loss clip and --loss siglip take their losses "
            "from: pip install --no-deps open_clip_torch, or use --loss info_nce."
        )
    path = Path(spec.submodule_search_locations[0]) / "loss.py"
    loss_spec = importlib.util.spec_from_file_location("brainfusion._open_clip_loss", path)
    assert loss_spec is not None
    assert loss_spec.loader is not None
    module = importlib.util.module_from_spec(loss_spec)
    loss_spec.loader.exec_module(module)
    return module


def contrastive_loss(name: LossName) -> ContrastiveLoss:
    """The loss called `name`, as a function of (a, b, logit_scale, logit_bias).

    `info_nce` is ours; `clip` and `siglip` are open_clip's, with the flags under which the mean of
    the gradients over ranks is exact. Rows are of unit norm. In a process group the value of
    open_clip's losses is this rank's part: its mean over ranks is the loss of the union.
    """
    if name == "info_nce":
        return lambda a, b, scale, bias: info_nce(a, b, scale)
    world = _group(None)
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()} if world else {}
    if name == "clip":
        loss = open_clip_losses().ClipLoss(local_loss=True, gather_with_grad=True, **place)
    else:
        loss = open_clip_losses().SigLipLoss(**place)

    def evaluate(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        # On unequal counts open_clip's collectives end the process without a message.
        peers, _ = _meet(a, b, world)
        if len(set(peers.counts)) > 1:
            raise UserError(
                f"--loss {name} needs as many pairs on each rank, got {peers.counts}: use a batch "
                "size that the number of processes divides, or --loss info_nce."
            )
        with warnings.catch_warnings():
            # torch 2.13 deprecates the gather that open_clip calls; its result is still exact.
            warnings.simplefilter("ignore", FutureWarning)
            return loss(a, b, scale, bias)

    return evaluate
