"""How tiles are made: memory, products, what is kept of them, and bfloat16."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from brainfusion.alignment.losses import tiles
from brainfusion.alignment.losses.info_nce import info_nce
from tests.oracles.contrastive import info_nce_oracle


def rows(n: int, d: int, *, seed: int, noise: float | None = None) -> torch.Tensor:
    """Unit rows, those of seed 0 under noise if given."""
    generator = torch.Generator().manual_seed(seed)
    drawn = F.normalize(torch.randn(n, d, generator=generator), dim=1)
    return drawn if noise is None else F.normalize(rows(n, d, seed=0) + noise * drawn, dim=1)


def loss_and_gradients(a, b, scale, **options):
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    s = torch.tensor(float(scale), requires_grad=True)
    loss = info_nce(a, b, s, **options)
    return loss.detach(), *torch.autograd.grad(loss, (a, b, s))


def test_no_matrix_of_all_pairs_is_ever_made_with_or_without_ids():
    # 8,000 pairs: the matrix would take 256 MB in float32, 64 MB as a mask.
    code = """
import resource, torch
from brainfusion.alignment.losses import tiles
from brainfusion.alignment.losses.info_nce import info_nce
from brainfusion.alignment.losses.pair_ids import PairIds
torch.set_num_threads(1)
tiles._KEPT_BYTES = {}
n = 8_000
a, b = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1).requires_grad_() for _ in "ab")
s = torch.tensor(10.0, requires_grad=True)
pairs = torch.arange(n)
ids = PairIds(person=pairs // 2, excluded=torch.stack([pairs // 3, -pairs], 1), within=pairs % 2)
info_nce(a[:64], b[:64], s).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
info_nce(a, b, s).backward()
info_nce(a, b, s, ids=ids).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) / 1024 < 50  # MiB: a few tiles of 4, and what compares their ids


@pytest.mark.parametrize("scale", [5.0, 100.0])
def test_keeping_tiles_changes_no_bit(monkeypatch, scale):
    a, b = rows(50, 8, seed=0), rows(50, 8, seed=1, noise=2.0)
    with_kept = loss_and_gradients(a, b, scale, tile=16)
    monkeypatch.setattr(tiles, "_KEPT_BYTES", {"cpu": 5 * 16 * 16 * 4})  # five tiles of sixteen
    with_few = loss_and_gradients(a, b, scale, tile=16)
    monkeypatch.setattr(tiles, "_KEPT_BYTES", {})
    without = loss_and_gradients(a, b, scale, tile=16)
    for first, second, third in zip(with_kept, with_few, without, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)


def test_backward_can_be_run_twice():
    a, b = rows(20, 8, seed=0).requires_grad_(), rows(20, 8, seed=1)
    loss = info_nce(a, b, 9.0, tile=8)
    (first,) = torch.autograd.grad(loss, a, retain_graph=True)
    (second,) = torch.autograd.grad(loss, a)
    assert torch.equal(first, second)


def test_without_gradients_nothing_is_kept(monkeypatch):
    kept = []
    add = tiles.Kept.add

    def noted(self, block):
        add(self, block)
        kept.append(len(self.tiles))

    monkeypatch.setattr(tiles.Kept, "add", noted)
    a, b = rows(20, 8, seed=0).requires_grad_(), rows(20, 8, seed=1)
    with torch.no_grad():
        quiet = info_nce(a, b, 9.0)
    torch.testing.assert_close(quiet, info_nce(a, b, 9.0).detach(), rtol=0, atol=0)
    assert kept == [0, 1]


@pytest.mark.parametrize(("r", "c", "d"), [(5, 7, 3), (64, 33, 100), (0, 4, 3), (4, 0, 3)])
def test_products_are_exact_for_rows_and_for_transposed_ones(r, c, d):
    x, y = torch.randn(r, d), torch.randn(c, d)
    truth = x.double() @ y.double().T
    for left in (x, x.T.contiguous().T):
        for right in (y, y.T.contiguous().T):
            got = tiles.product(left, right)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_same_where_there_is_no_onednn(monkeypatch):
    a, b = rows(60, 16, seed=0), rows(60, 16, seed=1, noise=2.0)
    expected = loss_and_gradients(a, b, 14.0, tile=32)
    monkeypatch.setattr(tiles, "_HAS_ONEDNN", False)
    for got, x in zip(loss_and_gradients(a, b, 14.0, tile=32), expected, strict=True):
        torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("scale", "noise"), [(1.0, None), (14.0, None), (100.0, None), (14.0, 0.5), (100.0, 2.0)]
)
def test_bfloat16_is_within_4e_3_of_the_gradient_and_exact_in_the_loss(scale, noise):
    a, b = rows(300, 64, seed=0), rows(300, 64, seed=1, noise=noise)
    truth = info_nce_oracle(a, b, scale)
    loss, *gradients = loss_and_gradients(a, b, scale, tile=128, precision="bfloat16")
    assert loss == info_nce(a, b, scale, tile=128)
    for got, expected in zip(gradients[:2], truth[1:3], strict=True):
        error = (got.double() - expected).norm() / expected.norm()
        # 2^-9 for each of the two factors, at random; were nothing rounded, it would be 1e-6.
        assert 1e-4 < error < 4e-3


def test_bfloat16_leaves_float64_as_it_is():
    a, b = rows(20, 8, seed=0).double(), rows(20, 8, seed=1).double()
    assert info_nce(a, b, 9.0, precision="bfloat16") == info_nce(a, b, 9.0)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_a_gpu_loss_and_gradients_are_those_of_the_oracle(precision):
    a, b = rows(700, 64, seed=0), rows(700, 64, seed=1, noise=2.0)
    truth = info_nce_oracle(a, b, 14.0)
    got = loss_and_gradients(a.cuda(), b.cuda(), 14.0, tile=256, precision=precision)
    for x, expected in zip(got, truth, strict=True):
        error = (x.double().cpu() - expected).norm() / expected.norm()
        assert error < (1e-5 if precision == "float32" else 2e-2)
