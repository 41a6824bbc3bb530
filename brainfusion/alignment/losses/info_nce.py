"""Contrastive losses: exact at any batch size and any number of processes.

Symmetric InfoNCE (van den Oord 2018, arXiv 1807.03748; both directions as in CLIP, Radford 2021,
arXiv 2103.00020) over N pairs, with S = s a b', P_i the positives of pair i (itself, and the other
pairs of its person; Khosla 2020, arXiv 2004.11362, L_out) and the sums over its positives and
negatives only:

    r_i = logsumexp_j S_ij,  c_j = logsumexp_i S_ij
    L   = 1/2N sum_i (r_i - mean_{p in P_i} S_ip) + (c_i - mean_{p in P_i} S_pi)
    G   = dL/dS = (exp(S - r_i) + exp(S - c_j))/2N - [j in P_i]/(N |P_i|)
    da  = s G b,  db = s G' a,  dL/ds = sum_i a_i . (G b)_i

One constant k bounds all of S, so one exp(S - k) serves rows and columns alike. Tiles of S are
made, summed and forgotten (all but the first 64 MiB), and made again in backward: memory is
O(N d + tile^2), plus the ids.

Shape legend: n pairs of this process, m pairs of all processes, d width.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from brainfusion.alignment.losses.candidates import find_candidates
from brainfusion.alignment.losses.exchange import ExchangeName, Gather, Ring
from brainfusion.alignment.losses.open_clip import open_clip_loss, open_clip_losses
from brainfusion.alignment.losses.pair_ids import PairIds
from brainfusion.alignment.losses.peers import Peers, default_group, meet
from brainfusion.alignment.losses.tiles import (
    HAS_CUDA_BFLOAT16,
    TILE,
    Kept,
    Tiling,
    exp_sums,
    gradients,
    log_sums,
)
from brainfusion.runtime.errors import UserError, nearest

__all__ = ["ContrastiveLoss", "LossName", "contrastive_loss", "info_nce", "open_clip_losses"]

LossName = Literal["info_nce", "clip", "siglip"]
Precision = Literal["float32", "bfloat16"]
ContrastiveLoss = Callable[..., Tensor]
"""A function of (a, b, logit_scale, logit_bias, ids=None)."""

_BITS = math.log2(math.e)


def info_nce(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "n d"],
    logit_scale: Float[Tensor, ""] | float,
    *,
    normalize: bool = False,
    ids: PairIds | None = None,
    tile: int | None = None,
    precision: Precision = "float32",
    exchange: ExchangeName = "gather",
    group: dist.ProcessGroup | None = None,
    local: bool = False,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE of the pairs (a_i, b_i); every other pair of the batch is a negative.

    In a process group, each rank gives its own pairs (counts may differ, and be 0) and the loss is
    that of the union, the same number on every rank. Backward delivers `world_size` times the
    gradient, so that the mean over ranks (what DDP takes) is exact for every parameter, logit scale
    included.

    Args:
        a: Embeddings of one modality; unit rows, unless `normalize`. Exact for rows of any norm.
        b: Embeddings of the other, row-paired with `a`.
        logit_scale: The multiplier of the cosine (the exponential of the learnt log scale).
        normalize: Scale the rows of `a` and `b` to unit norm first.
        ids: Which pairs are of one person (positives), and which are no negatives of each other.
            A pair that has no negative contributes nothing. On all ranks or on none.
        tile: Rows and columns of the block of S that exists at any time; 1,024 if omitted, on CUDA
            8,192. Results do not depend on it.
        precision: "bfloat16" rounds what enters the matrix products to 8 bits, with sums in
            float32. On a CPU only those of backward: the loss stays as it is and the gradients are
            within 0.4% in norm (within 1% where all rows share one direction). Nothing is done to
            float64 inputs.
        exchange: How ranks see each other's pairs. "gather" copies all of `b` to each: m d numbers.
            "ring" passes the ranks' shares of it around: six shares at a time, whatever the number
            of ranks, in more messages.
        group: The ranks that share the loss; the default group if omitted, as in
            torch.distributed. One process if no group has been started.
        local: Leave other ranks out of it, whatever has been started.

    Returns:
        The loss in nats; log(m) where nothing is told apart. At least 0 without several positives.

    Raises:
        ValueError: `a` and `b` are not two matrices of one shape, `ids` is of other pairs, an
            option is unknown, or there is no pair at all.
        UserError: The ranks of the group call with different kinds of ids or options.
    """
    _check(a, b, ids, tile, precision, exchange)
    if normalize:
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    if ids is not None:
        ids = ids.to(a.device)
        if ids.within is not None:
            # The loss does not depend on the order; in this one, most tiles hold no candidate.
            order = ids.within.argsort(stable=True)
            a, b, ids = a[order], b[order], ids.take(order)
    scale = torch.as_tensor(logit_scale, device=a.device)
    options = {
        "ids": ids,
        "tile": TILE.get(a.device.type, 1024) if tile is None else tile,
        "half": precision == "bfloat16",
        "exchange": exchange,
        "group": None if local else default_group(group),
        "keep": torch.is_grad_enabled() and any(x.requires_grad for x in (a, b, scale)),
    }
    return _InfoNCE.apply(a, b, scale, options)  # type: ignore[return-value]


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor, options: dict[str, Any]) -> Tensor:
        # Autocast would run the tiles in half precision: logits of up to 100 need float32.
        with torch.autocast(a.device.type, enabled=False):
            dtype = torch.float64 if a.dtype == b.dtype == torch.float64 else torch.float32
            ctx.dtypes = a.dtype, b.dtype, scale.dtype
            a, b, factor = a.to(dtype), b.to(dtype), float(scale) * _BITS
            peers, bound = meet(a, b, options["group"], _facts(a, options))
            if not peers.n_pairs:
                raise ValueError("info_nce: no pairs at all; expected one or more on some rank.")
            ctx.tiling = tiling = Tiling(
                options["tile"],
                peers.offset,
                find_candidates(options["ids"], peers, dtype),
                options["half"] and dtype == torch.float32,
            )
            alone = peers.world_size == 1
            ctx.exchange = (
                Gather(peers) if alone or options["exchange"] == "gather" else Ring(peers)
            )
            keys = ctx.exchange.load(b)
            kept = Kept(a.device, keep=options["keep"])
            sums = _sums(tiling, a * factor, keys, abs(factor) * bound, ctx.exchange, kept)
            rows, columns, positives, ctx.shift = sums
            per_pair = (rows + columns) / 2 - positives
            loss = peers.sum(per_pair.double().sum()).to(dtype) / (peers.n_pairs * _BITS)
            ctx.save_for_backward(a, keys, rows, columns, *kept.tiles)
            ctx.factor = factor
            return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        a, keys, rows, columns, *kept = ctx.saved_tensors
        peers: Peers = ctx.exchange.peers
        grad_a, tiles = torch.zeros_like(a), iter(kept)

        def task(keys: Tensor, start: int, columns: Tensor | None) -> Tensor:
            assert columns is not None
            logs = rows, columns
            return gradients(ctx.tiling, a, ctx.factor, keys, start, logs, ctx.shift, grad_a, tiles)

        with torch.autocast(a.device.type, enabled=False):
            grad_b = ctx.exchange.sum(task, keys, columns)
            factor = grad_outputs[0].to(a.dtype) * (peers.world_size / (2 * peers.n_pairs))
            grad_a *= factor
            grad_scale = (a * grad_a).sum()
            grad_a *= ctx.factor / _BITS
            grad_b *= factor * (ctx.factor / _BITS)
        types = ctx.dtypes
        return grad_a.to(types[0]), grad_b.to(types[1]), grad_scale.to(types[2]), None


def _sums(
    tiling: Tiling,
    scaled: Tensor,
    keys: Tensor,
    bound: float,
    exchange: Gather | Ring,
    kept: Kept,
) -> tuple[Tensor, Tensor, Tensor, float | None]:
    """log2 of the row and column sums of this rank's pairs, mean positive logits, and the shift.

    The shift is None where one constant did not serve all rows and columns.
    """
    # 2^headroom summed over 1e7 pairs stays finite. `floor` is where terms that were flushed to
    # 0 could have mattered: at least 1e8 above the smallest normal number, per pair.
    headroom, floor = (860.0, 1e-290) if scaled.dtype == torch.float64 else (100.0, 1e-30)
    shift = max(0.0, bound - headroom)
    peers = exchange.peers
    rows, positives = scaled.new_zeros(len(scaled)), scaled.new_zeros(len(scaled))

    def summed(keys: Tensor, start: int, _: Tensor | None) -> Tensor:
        return exp_sums(tiling, scaled, keys, start, shift, rows, positives, kept)

    columns = exchange.sum(summed, keys)
    if not shift:
        return rows.log2_(), columns.log2_(), positives, shift
    lost = (rows < floor * peers.n_pairs).sum() + (columns < floor * peers.n_pairs).sum()
    if not bool(peers.sum(lost)):
        return rows.log2_().add_(shift), columns.log2_().add_(shift), positives, shift
    kept.tiles.clear()
    rows.fill_(-torch.inf)
    positives.zero_()

    def logged(keys: Tensor, start: int, _: Tensor | None) -> Tensor:
        return log_sums(tiling, scaled, keys, start, rows, positives)

    return rows, exchange.log_sum(logged, keys), positives, None


def _check(
    a: Tensor, b: Tensor, ids: PairIds | None, tile: int | None, precision: str, exchange: str
) -> None:
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(
            f"info_nce: a is {tuple(a.shape)} and b is {tuple(b.shape)}; expected two matrices of "
            "one shape, row i of each from the same person."
        )
    if tile is not None and tile < 1:
        raise ValueError(f"info_nce: tile={tile}; expected a positive number of rows.")
    if ids is not None and not ids.empty and len(ids) != len(a):
        raise ValueError(f"info_nce: ids of {len(ids)} pairs for {len(a)} rows; expected as many.")
    _check_options(precision, exchange)
    if precision == "bfloat16" and a.device.type == "cuda" and not HAS_CUDA_BFLOAT16:
        raise UserError(
            f"precision 'bfloat16' on CUDA wants torch 2.8 or newer, got {torch.__version__}: "
            "update torch, or use float32."
        )


def _check_options(precision: str, exchange: str) -> None:
    for name, value, known in (
        ("precision", precision, get_args(Precision)),
        ("exchange", exchange, get_args(ExchangeName)),
    ):
        if value not in known:
            raise UserError(f"{name} '{value}' is unknown. {nearest(value, known)}")


def _facts(a: Tensor, options: dict[str, Any]) -> dict[str, int]:
    """What every rank must have alike, lest the collectives wait for one another."""
    ids: PairIds = PairIds() if options["ids"] is None else options["ids"]
    return {
        "the width": a.shape[1],
        "float64": a.dtype == torch.float64,
        "the bfloat16 precision": options["half"],
        "the ring exchange": options["exchange"] == "ring",
        "ids of persons": ids.person is not None,
        "the number of columns of excluded ids": (
            0 if ids.excluded is None else ids.excluded.shape[1]
        ),
        "ids to stay within": ids.within is not None,
    }


def contrastive_loss(
    name: LossName, *, exchange: ExchangeName = "gather", precision: Precision = "float32"
) -> ContrastiveLoss:
    """The loss called `name`, as a function of (a, b, logit_scale, logit_bias, ids=None).

    `info_nce` is ours; `clip` and `siglip` are open_clip's, with the flags under which the mean of
    the gradients over ranks is exact. Rows are of unit norm. In a process group the value of
    open_clip's losses is this rank's part: its mean over ranks is the loss of the union.

    Raises:
        UserError: What only info_nce can do is asked of another: ids (when called), an exchange, a
            precision.
    """
    _check_options(precision, exchange)
    if name == "info_nce":
        return lambda a, b, scale, bias, ids=None: info_nce(
            a, b, scale, ids=ids, precision=precision, exchange=exchange
        )
    if exchange != "gather" or precision != "float32":
        option = f"exchange={exchange}" if exchange != "gather" else f"precision={precision}"
        raise UserError(
            f"--loss {name} is open_clip's, which knows no {option}: leave it out, or use --loss "
            "info_nce."
        )
    loss = open_clip_loss(name)

    def evaluate(
        a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None, ids: PairIds | None = None
    ) -> Tensor:
        if ids is not None and not ids.empty:
            raise UserError(
                f"--loss {name} is open_clip's, which takes every other pair for a negative; got "
                "ids of persons, families or sites: use --loss info_nce, or --negatives all."
            )
        return loss(a, b, scale, bias)

    return evaluate
