import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from brainfusion.alignment.losses.info_nce import contrastive_loss, info_nce, open_clip_losses
from tests.oracles.contrastive import info_nce_oracle, siglip_oracle


def unit_rows(n: int, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def ours(a, b, scale, **options):
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    s = torch.tensor(float(scale), dtype=a.dtype, requires_grad=True)
    loss = info_nce(a, b, s, **options)
    return loss.detach(), *torch.autograd.grad(loss, (a, b, s))


@pytest.mark.parametrize("scale", [0.0, 1.0, 14.25, 100.0, 2000.0])
@pytest.mark.parametrize(
    ("n", "d", "tile"), [(1, 3, 1024), (2, 1, 1), (7, 4, 3), (33, 16, 8), (64, 8, 64), (65, 8, 64)]
)
def test_info_nce_equals_the_brute_force_oracle_in_float64(n, d, tile, scale):
    a, b = unit_rows(n, d), unit_rows(n, d, seed=1)
    truth = info_nce_oracle(a, b, scale)
    for got, expected in zip(ours(a, b, scale, tile=tile), truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13 * max(1.0, scale))


@pytest.mark.parametrize("scale", [1.0, 14.25, 100.0])
def test_info_nce_in_float32_is_within_1e_6_of_the_oracle(scale):
    # Partners resemble each other, so that the loss is neither 0 nor log n.
    a = unit_rows(300, 32, dtype=torch.float32)
    b = F.normalize(a + 1.5 * unit_rows(300, 32, seed=1, dtype=torch.float32), dim=1)
    truth = info_nce_oracle(a, b, scale)
    for got, expected in zip(ours(a, b, scale, tile=128), truth, strict=True):
        # Logits of 100 carry 100 * 2^-24 = 6e-6 of rounding, whatever is done with them.
        error = (got.double() - expected).norm() / expected.norm()
        assert error < 1e-6 * max(1.0, scale / 10)


def test_info_nce_gradients_pass_gradcheck():
    a, b = (unit_rows(6, 3, seed=seed).requires_grad_() for seed in (0, 1))
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: info_nce(*x, tile=4), (a, b, scale))


def test_rows_of_any_norm_are_exact_and_normalize_makes_them_unit():
    a, b = 30 * unit_rows(9, 4), 7 * unit_rows(9, 4, seed=1)
    torch.testing.assert_close(info_nce(a, b, 3.0, tile=4), info_nce_oracle(a, b, 3.0)[0])
    unit = info_nce_oracle(a / 30, b / 7, 3.0)[0]
    torch.testing.assert_close(info_nce(a, b, 3.0, normalize=True), unit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_rows_at_scale_100_give_log_n(dtype):
    a = unit_rows(1, 8, dtype=dtype).expand(50, 8)
    loss, grad_a, grad_b, _ = ours(a, a, 100.0, tile=16)
    assert loss.item() == pytest.approx(math.log(50), rel=1e-5)
    # Everyone pulls and pushes alike, so nothing moves: rounding of logits of 100 is left.
    assert grad_a.abs().max() < 1e-4
    assert grad_b.abs().max() < 1e-4


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_sums_that_underflow_fall_back_to_a_running_maximum(scale):
    # All of b points away from all of a: every exp(S - k) is 0 in float32.
    a = unit_rows(20, 8, dtype=torch.float32)
    a = F.normalize(a * 0.05 + unit_rows(1, 8, seed=2, dtype=torch.float32), dim=1)
    b = -a.flip(0)
    truth = info_nce_oracle(a, b, scale)
    for got, expected in zip(ours(a, b, scale, tile=6), truth, strict=True):
        # Logits of -1,000 carry 1,000 * 2^-24 = 6e-5 of rounding each; gradients are times scale.
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-6 * scale)


def test_one_row_that_underflows_is_enough_to_fall_back():
    a = unit_rows(20, 8, dtype=torch.float32)
    b = F.normalize(a + 0.01, dim=1)
    direction = F.normalize(b.mean(0), dim=0)
    b = F.normalize(b * 0.2 + direction, dim=1)
    a = torch.cat([a[:-1], -direction[None]])
    truth = info_nce_oracle(a, b, 100.0)
    got = ours(a, b, 100.0, tile=8)
    torch.testing.assert_close(got[0].double(), truth[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(got[1].double(), truth[1], rtol=1e-4, atol=1e-5)


def test_autocast_does_not_lower_the_precision_of_the_tiles():
    a, b = (unit_rows(40, 16, seed=seed, dtype=torch.float32) for seed in (0, 1))
    plain = ours(a, b, 50.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = ours(a, b, 50.0)
    for got, expected in zip(under, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_scale_gradient_equals_the_identity_of_row_gradients():
    a, b = unit_rows(12, 5), unit_rows(12, 5, seed=1)
    _, grad_a, grad_b, grad_scale = ours(a, b, 7.0, tile=5)
    torch.testing.assert_close((a * grad_a).sum() / 7.0, grad_scale)
    torch.testing.assert_close((b * grad_b).sum() / 7.0, grad_scale)


@pytest.mark.parametrize(("a", "b"), [((3, 2), (4, 2)), ((3,), (3,)), ((3, 2), (3, 5))])
def test_shapes_that_are_not_pairs_are_refused(a, b):
    with pytest.raises(ValueError, match="expected two matrices of one shape"):
        info_nce(torch.zeros(a), torch.zeros(b), 1.0)


def test_no_pairs_at_all_are_refused():
    with pytest.raises(ValueError, match="no pairs at all"):
        info_nce(torch.zeros(0, 3), torch.zeros(0, 3), 1.0)


def test_open_clip_loss_equals_ours_in_one_process():
    a, b = (unit_rows(64, 16, seed=seed, dtype=torch.float32) for seed in (0, 1))
    results = []
    for name in ("info_nce", "clip"):
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        s = torch.tensor(14.25, requires_grad=True)
        loss = contrastive_loss(name)(x, y, s, None)
        results.append([loss.detach(), *torch.autograd.grad(loss, (x, y, s))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_open_clip_siglip_loss_equals_its_formula():
    a, b = unit_rows(32, 16), unit_rows(32, 16, seed=1)
    bias = torch.tensor(-10.0, dtype=torch.float64)
    scale = torch.tensor(10.0, dtype=torch.float64)
    got = contrastive_loss("siglip")(a, b, scale, bias)
    torch.testing.assert_close(got, siglip_oracle(a, b, scale, bias))


def test_open_clip_losses_are_loaded_without_open_clip_itself():
    code = (
        "import sys; from brainfusion.alignment import open_clip_losses as f; "
        "assert f().ClipLoss; assert not {'open_clip', 'torchvision', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert open_clip_losses() is open_clip_losses()
