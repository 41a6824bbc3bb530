"""Gradients through micro-batches against plain autograd, in float64: one process and two."""

import weakref
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from brainfusion.alignment.finetuning.grad_cache import (
    average_gradients,
    cached_backward,
    call_order,
)
from brainfusion.alignment.losses.info_nce import info_nce
from brainfusion.alignment.model import AlignmentModel
from tests.ranks import run_ranks

N, SCALE = 21, 9.0
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}  # float64: rounding of sums in another order


class Model(nn.Module):
    """An encoder with dropout before an alignment model with dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.encoder = nn.Sequential(
            nn.Linear(7, 12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 6)
        )
        self.alignment = AlignmentModel(
            {"brain": 6, "dna": 5}, dim_out=8, dim_hidden=16, dropout=dropout, init_scale=SCALE
        )
        self.double()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.alignment.embed("brain", self.encoder(x)), self.alignment.embed("dna", y)


def data(n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 7, generator=generator, dtype=torch.float64)
    return x, torch.randn(n, 5, generator=generator, dtype=torch.float64)


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def cached(
    dropout: float, sizes: tuple[int, ...], start: int = 0, seed: int = 0, world_size: int = 1
) -> dict[str, Any]:
    """Loss and gradients through micro-batches of these sizes, from row `start` on."""
    model = Model(dropout).train()
    x, y = data()
    xs, ys = (z[start : start + sum(sizes)].split(sizes) for z in (x, y))
    torch.manual_seed(seed)
    calls: list[int] = []

    def embed(k: int) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(k)
        return model(xs[k], ys[k])

    loss = cached_backward(
        embed, len(sizes), lambda a, b: info_nce(a, b, model.alignment.logit_scale, tile=8)
    )
    after = torch.rand(1)
    average_gradients(model.parameters(), world_size)
    assert calls == call_order(len(sizes))
    return {"loss": loss.item(), "gradients": gradients_of(model), "after": after}


def plain(dropout: float, parts: list[tuple[int, tuple[int, ...]]]) -> dict[str, Any]:
    """The same with everything in one graph and the loss by its definition.

    Args:
        dropout: Of the model.
        parts: (seed, sizes) of each process: what its generator is seeded with, then draws.
    """
    model = Model(dropout).train()
    x, y = data()
    rows, start = [], 0
    for seed, sizes in parts:
        torch.manual_seed(seed)
        for size in sizes:
            rows.append(model(x[start : start + size], y[start : start + size]))
            start += size
    a, b = (torch.cat(side) for side in zip(*rows, strict=True))
    logits = model.alignment.logit_scale * a @ b.T
    right = torch.arange(len(a))
    loss = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    loss.backward()
    return {"loss": loss.item(), "gradients": gradients_of(model), "after": torch.rand(1)}


def check(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-12)
    assert got["gradients"].keys() == expected["gradients"].keys()
    assert "alignment.log_scale" in got["gradients"]
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(got["gradients"][name], gradient, **TOLERANCE, msg=name)


@pytest.mark.parametrize("sizes", [(21,), (7, 7, 7), (4, 4, 4, 4, 4, 1), (1,) * 21, (20, 1)])
def test_micro_batches_give_the_gradients_of_one_big_batch(sizes):
    check(cached(0.0, sizes), plain(0.0, [(0, (N,))]))


@pytest.mark.parametrize("sizes", [(21,), (7, 7, 7), (4, 4, 4, 4, 4, 1)])
def test_dropout_is_the_same_in_both_passes_of_a_micro_batch(sizes):
    expected = plain(0.4, [(5, sizes)])
    got = cached(0.4, sizes, seed=5)
    check(got, expected)
    # And the generator goes on as after one pass.
    torch.testing.assert_close(got["after"], expected["after"], rtol=0, atol=0)
    # The masks matter: other ones give another loss.
    assert abs(got["loss"] - plain(0.0, [(0, (N,))])["loss"]) > 1e-3


def test_gradients_are_added_to_those_that_are_there():
    model = Model(0.0)
    x, y = data()

    def backward() -> None:
        cached_backward(
            lambda k: model(x[k * 7 : k * 7 + 7], y[k * 7 : k * 7 + 7]),
            3,
            lambda a, b: info_nce(a, b, model.alignment.logit_scale),
        )

    backward()
    once = gradients_of(model)
    backward()
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, 2 * once[name], **TOLERANCE, msg=name)


def test_a_side_without_a_graph_is_left_out_and_the_other_is_exact():
    model = Model(0.0)
    x, y = data()
    model.alignment.projectors["dna"].requires_grad_(False)
    cached_backward(
        lambda k: model(x[k * 7 : k * 7 + 7], y[k * 7 : k * 7 + 7]),
        3,
        lambda a, b: info_nce(a, b, model.alignment.logit_scale),
    )
    expected = plain(0.0, [(0, (N,))])["gradients"]
    for name, parameter in model.named_parameters():
        if "projectors.dna" in name:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name], **TOLERANCE, msg=name)


# -- two processes ---------------------------------------------------------------------------------

SHARES = {  # name: sizes of each rank's micro-batches
    "even batches": ((5, 5), (5, 6)),
    "uneven": ((4, 4, 4, 4), (3, 2)),
    "one micro-batch against many": ((15,), (1, 1, 1, 1, 1, 1)),
}


def everything(rank: int, world_size: int) -> dict[str, Any]:
    found = {}
    for name, shares in SHARES.items():
        start = sum(sum(sizes) for sizes in shares[:rank])
        for dropout in (0.0, 0.4):
            found[name, dropout] = cached(
                dropout, shares[rank], start, seed=10 + rank, world_size=world_size
            )
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    return run_ranks(everything)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", SHARES)
def test_two_processes_give_the_gradients_of_one_big_batch(ranks, name, dropout):
    shares = SHARES[name]
    expected = plain(dropout, [(10 + rank, sizes) for rank, sizes in enumerate(shares)])
    for rank in ranks:
        check(rank[name, dropout], expected)


# -- memory ----------------------------------------------------------------------------------------


class PeakMemory(TorchDispatchMode):
    """Most bytes of tensors alive at once, by following every storage that an operation makes.

    Those given are not counted.
    """

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def peak_bytes(n_parts: int) -> int:
    """Of an encoder over 64 rows of 96 tokens."""
    torch.manual_seed(0)
    encoder = nn.Sequential(*[
        layer for _ in range(6) for layer in (nn.Linear(32, 32), nn.GELU())
    ])  # fmt: skip
    x, y = torch.randn(64, 96, 32), F.normalize(torch.randn(64, 32), dim=1)
    parts = list(zip(x.chunk(n_parts), y.chunk(n_parts), strict=True))
    with PeakMemory(x, y) as memory:
        cached_backward(
            lambda k: (F.normalize(encoder(parts[k][0]).mean(1), dim=1), parts[k][1]),
            n_parts,
            lambda a, b: info_nce(a, b, 10.0),
        )
    return memory.peak


def test_memory_is_that_of_a_micro_batch_and_not_of_the_batch():
    whole, eighth = peak_bytes(1), peak_bytes(8)
    # 12 activations of 64 x 96 x 32 floats, 9.4 MB, are alive in the graph of all rows.
    assert whole > 9e6
    assert eighth < whole / 7, (whole, eighth)
