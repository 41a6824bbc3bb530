"""Exact gradients of one contrastive loss over a batch that does not fit into the graph.

Gradient caching: Gao et al. 2021 (arXiv 2101.06983). A loss that contrasts all rows with all others
cannot be added up over micro-batches, but the way from parameters to rows can:

    1. f_k = embed(k) for each micro-batch k, without a graph
    2. L(f_1, ..., f_K), once; dL/df_k, and the gradients of what the loss itself holds (the scale)
    3. embed(k) again, under the random state that it had in 1, and backward of <f_k, dL/df_k>

The sum over k of the gradients in 3 is dL/dtheta, by the chain rule and not approximately. Memory
is one micro-batch's graph and all embeddings; time is one more forward pass of all micro-batches
but the last, whose graph is kept from 1. With one micro-batch this is plain autograd.

Several processes: each has micro-batches of its own, as many as it likes. `info_nce` gives each
the loss of the union, and gradients whose mean over processes is exact: `average_gradients`, once,
after the last micro-batch. No gradient is exchanged before, which is what DDP's `no_sync` is for.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET = 2**24
"""Gradients that one collective carries, in numbers: 64 MiB of float32."""


def call_order(n_parts: int) -> list[int]:
    """The micro-batches in the order in which `cached_backward` asks for them.

    For those who read ahead: 0, ..., n - 1, then 0, ..., n - 2 a second time.
    """
    return [*range(n_parts), *range(n_parts - 1)]


def cached_backward(
    embed: Callable[[int], tuple[Tensor, ...]],
    n_parts: int,
    loss: Callable[..., Tensor],
    *,
    device: torch.device | None = None,
) -> Tensor:
    """Add the gradients of `loss`, taken over the rows of all micro-batches, to all parameters.

    Torch's random state is put back for the second pass of a micro-batch and is, when this returns,
    what one pass over all of them leaves. Whatever else `embed(k)` depends on must be the same on
    both calls; running statistics of a BatchNorm would be updated twice.

    Args:
        embed: Rows of micro-batch k: a tuple of tensors [n_k, d] (one a modality), called in
            `call_order`. Its graph must reach the parameters whose gradients are wanted.
        n_parts: Micro-batches of this process, at least one.
        loss: Given each modality's rows of all micro-batches, in order: a scalar. Parameters that
            it holds itself, such as the logit scale, get their gradient once.
        device: Where random numbers are drawn; the CPU if omitted.

    Returns:
        The loss, detached.
    """
    assert n_parts >= 1
    states: list[tuple[Tensor, Tensor | None]] = []
    found: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for k in range(n_parts - 1):
            states.append(_random_state(device))
            found.append(embed(k))
    with torch.enable_grad():
        last = embed(n_parts - 1)
    after = _random_state(device)
    found.append(tuple(rows.detach() for rows in last))
    counts = [len(rows[0]) for rows in found]
    leaves = [torch.cat(rows).requires_grad_() for rows in zip(*found, strict=True)]
    del found
    with torch.enable_grad():
        value = loss(*leaves)
    value.backward()
    # gradients[k][m]: of micro-batch k's rows of modality m
    each = (_gradient(leaf).split(counts) for leaf in leaves)
    gradients = list(zip(*each, strict=True))
    _push(last, gradients[-1])
    del last
    for k, state in enumerate(states):
        _set_random_state(state, device)
        with torch.enable_grad():
            rows = embed(k)
        _push(rows, gradients[k])
        del rows
    _set_random_state(after, device)
    return value.detach()


def average_gradients(parameters: Iterable[nn.Parameter], world_size: int) -> None:
    """Replace each gradient by its mean over processes, in few collectives; without DDP.

    All processes must have gradients of the same parameters, in the same order.
    """
    if world_size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        flat /= world_size
        sizes = [gradient.numel() for gradient in bucket]
        for gradient, part in zip(bucket, flat.split(sizes), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one type, some at a time."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        full = sum(other.numel() for other in bucket) + gradient.numel() > _BUCKET
        if bucket and (full or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _push(rows: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
    """Backward of <rows, gradients>, through those modalities that have a graph."""
    alive = [x.requires_grad for x in rows]
    roots = [x for x, use in zip(rows, alive, strict=True) if use]
    weights = [x for x, use in zip(gradients, alive, strict=True) if use]
    if roots:
        torch.autograd.backward(roots, weights)


def _random_state(device: torch.device | None) -> tuple[Tensor, Tensor | None]:
    if device is None or device.type != "cuda":
        return torch.get_rng_state(), None
    return torch.get_rng_state(), torch.cuda.get_rng_state(device)


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device | None) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        assert device is not None
        torch.cuda.set_rng_state(state[1], device)
