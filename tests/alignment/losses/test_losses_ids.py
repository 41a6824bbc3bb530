"""Positives, exclusions and sites: equal to a brute force over all pairs of pairs."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from brainfusion.alignment.losses.info_nce import contrastive_loss, info_nce
from brainfusion.alignment.losses.pair_ids import PairIds
from brainfusion.runtime.errors import UserError
from tests.oracles.contrastive import info_nce_oracle, relations

KINDS = ["person", "excluded", "within", "person excluded", "person within", "excluded within"]
KINDS += ["person excluded within", ""]


def unit_rows(n: int, d: int, *, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def some_ids(n: int, kinds: str, *, seed: int = 0) -> PairIds:
    """Persons of about two scans, two kinds of families with holes, three sites."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *size: int) -> torch.Tensor:
        return torch.randint(-1, max(high, 1), size, generator=generator)

    made = {
        "person": draw(n // 2, n),
        "excluded": draw(n // 2, n, 2),
        "within": draw(2, n),
    }
    return PairIds(**{kind: made[kind] for kind in kinds.split()})


def loss_and_gradients(a, b, scale, **options):
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    s = torch.tensor(float(scale), dtype=a.dtype, requires_grad=True)
    loss = info_nce(a, b, s, **options)
    return loss.detach(), *torch.autograd.grad(loss, (a, b, s))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 30),
    tile=st.sampled_from([1, 2, 3, 7, 16, 64]),
    scale=st.sampled_from([0.0, 1.0, 14.25, 100.0, 700.0, 3000.0]),
    kinds=st.sampled_from(KINDS),
    seed=st.integers(0, 999),
)
def test_loss_and_gradients_with_ids_equal_the_brute_force(n, tile, scale, kinds, seed):
    a, b = unit_rows(n, 5, seed=seed), unit_rows(n, 5, seed=seed + 1)
    ids = some_ids(n, kinds, seed=seed)
    truth = info_nce_oracle(a, b, scale, ids)
    got = loss_and_gradients(a, b, scale, ids=ids, tile=tile)
    for x, expected in zip(got, truth, strict=True):
        # Logits of s carry s * 2^-53 of rounding, and gradients are times s.
        torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-13 * max(1.0, scale))


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("scale", [1.0, 14.25, 100.0])
def test_ids_in_float32_are_within_1e_6_of_the_brute_force(kinds, scale):
    a = unit_rows(120, 32, seed=0, dtype=torch.float32)
    b = F.normalize(a + 1.5 * unit_rows(120, 32, seed=1, dtype=torch.float32), dim=1)
    ids = some_ids(120, kinds)
    truth = info_nce_oracle(a, b, scale, ids)
    for x, expected in zip(loss_and_gradients(a, b, scale, ids=ids, tile=50), truth, strict=True):
        error = (x.double() - expected).norm() / expected.norm()
        assert error < 1e-6 * max(1.0, scale / 10)


def test_pairs_of_one_person_pull_and_relatives_are_left_alone():
    a, b = unit_rows(4, 6, seed=0), unit_rows(4, 6, seed=1)
    ids = PairIds(person=torch.tensor([0, 0, 1, 2]), excluded=torch.tensor([[-1], [-1], [7], [7]]))
    s = 3.0 * a @ b.T
    # Pair 2 is a relative of pair 3: neither sees the other.
    rows = [s[0].logsumexp(0), s[1].logsumexp(0), s[2, :3].logsumexp(0)]
    rows.append(s[3, [0, 1, 3]].logsumexp(0))
    columns = [s[:, 0].logsumexp(0), s[:, 1].logsumexp(0), s[:3, 2].logsumexp(0)]
    columns.append(s[[0, 1, 3], 3].logsumexp(0))
    pulled = [(s[0, 0] + s[0, 1]) / 2, (s[1, 0] + s[1, 1]) / 2, s[2, 2], s[3, 3]]
    pulled_back = [(s[0, 0] + s[1, 0]) / 2, (s[0, 1] + s[1, 1]) / 2, s[2, 2], s[3, 3]]
    expected = (sum(rows) + sum(columns) - sum(pulled) - sum(pulled_back)) / 8
    torch.testing.assert_close(info_nce(a, b, 3.0, ids=ids), expected)


def test_a_pair_without_any_negative_contributes_nothing():
    a, b = unit_rows(5, 3, seed=0), unit_rows(5, 3, seed=1)
    alone = PairIds(within=torch.arange(5))
    for value in loss_and_gradients(a, b, 20.0, ids=alone, tile=2):
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-14)
    # The fifth pair is of another site: the loss is that of four, as a mean over five.
    ids = PairIds(within=torch.tensor([3, 3, 3, 3, 9]))
    torch.testing.assert_close(info_nce(a, b, 2.0, ids=ids), info_nce(a[:4], b[:4], 2.0) * 4 / 5)


def test_a_whole_batch_of_one_person_has_the_entropy_of_its_scans_as_its_least_loss():
    a = unit_rows(1, 4, seed=0).expand(12, 4)
    ids = PairIds(person=torch.zeros(12, dtype=torch.int64))
    loss, *gradients = loss_and_gradients(a, a, 50.0, ids=ids, tile=5)
    assert loss.item() == pytest.approx(math.log(12), rel=1e-12)
    for gradient in gradients:
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_collapsed_batch_at_scale_100_gives_the_logarithm_of_the_candidates(dtype):
    a = unit_rows(1, 8, seed=0, dtype=dtype).expand(60, 8)
    ids = PairIds(excluded=torch.arange(60)[:, None] // 2)  # all are twins: 59 candidates
    loss, grad_a, _, grad_scale = loss_and_gradients(a, -a, 100.0, ids=ids, tile=16)
    assert loss.item() == pytest.approx(math.log(59), rel=1e-5)
    assert grad_a.abs().max() < 1e-4
    assert abs(grad_scale) < 1e-5


def test_ids_that_match_nobody_change_no_bit():
    a, b = unit_rows(40, 8, seed=0), unit_rows(40, 8, seed=1)
    ids = PairIds(
        person=torch.arange(40),
        excluded=torch.stack([torch.full((40,), -1), torch.arange(40)], dim=1),
        within=torch.full((40,), 5),
    )
    for got, expected in zip(
        loss_and_gradients(a, b, 9.0, ids=ids, tile=16),
        loss_and_gradients(a, b, 9.0, tile=16),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_the_order_of_the_pairs_does_not_matter():
    a, b, ids = unit_rows(30, 6, seed=0), unit_rows(30, 6, seed=1), some_ids(30, KINDS[6])
    order = torch.randperm(30, generator=torch.Generator().manual_seed(4))
    loss, grad_a, grad_b, _ = loss_and_gradients(a, b, 9.0, ids=ids, tile=8)
    mixed = loss_and_gradients(a[order], b[order], 9.0, ids=ids.take(order), tile=8)
    torch.testing.assert_close(mixed[0], loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(mixed[1], grad_a[order], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(mixed[2], grad_b[order], rtol=1e-12, atol=1e-14)


def test_taking_the_scale_gradient_from_the_rows_stays_exact_with_ids():
    a, b, ids = unit_rows(20, 4, seed=0), unit_rows(20, 4, seed=1), some_ids(20, KINDS[6])
    _, grad_a, grad_b, grad_scale = loss_and_gradients(a, b, 7.0, ids=ids, tile=6)
    torch.testing.assert_close((a * grad_a).sum() / 7.0, grad_scale)
    torch.testing.assert_close((b * grad_b).sum() / 7.0, grad_scale)


def test_gradients_with_ids_pass_gradcheck():
    a, b = (unit_rows(7, 3, seed=seed).requires_grad_() for seed in (0, 1))
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    ids = some_ids(7, KINDS[6], seed=5)
    positives, candidates = relations(7, ids)
    assert not candidates.all()
    assert positives.sum() > 7
    assert torch.autograd.gradcheck(lambda *x: info_nce(*x, ids=ids, tile=3), (a, b, scale))


def test_sites_one_after_another_leave_most_tiles_unmade(monkeypatch):
    from brainfusion.alignment.losses import tiles

    made = []
    monkeypatch.setattr(tiles, "product", lambda x, y, half=False: made.append(1) or x @ y.T)
    a, b = unit_rows(80, 4, seed=0), unit_rows(80, 4, seed=1)
    info_nce(a, b, 2.0, ids=PairIds(within=torch.arange(80) % 8), tile=10)
    assert len(made) == 8  # of 64 tiles


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_open_clip_losses_refuse_ids_exchanges_and_precisions(name):
    a = unit_rows(4, 3, seed=0)
    loss = contrastive_loss(name)
    with pytest.raises(UserError, match="use --loss info_nce, or --negatives all"):
        loss(a, a, torch.tensor(1.0), torch.tensor(0.0), PairIds(person=torch.arange(4)))
    with pytest.raises(UserError, match="knows no exchange=ring"):
        contrastive_loss(name, exchange="ring")
    with pytest.raises(UserError, match="knows no precision=bfloat16"):
        contrastive_loss(name, precision="bfloat16")


def test_ids_of_other_shapes_or_types_are_refused():
    a = unit_rows(4, 3, seed=0)
    with pytest.raises(ValueError, match="ids of 3 pairs for 4 rows"):
        info_nce(a, a, 1.0, ids=PairIds(person=torch.arange(3)))
    with pytest.raises(ValueError, match=r"within is \(4,\) of torch.float32; expected int64"):
        PairIds(within=torch.zeros(4))
    with pytest.raises(ValueError, match="expected int64 of 2 dimensions"):
        PairIds(excluded=torch.arange(4))
    with pytest.raises(ValueError, match="ids of 3 and of 4 pairs"):
        PairIds(person=torch.arange(4), within=torch.arange(3))


def test_an_unknown_exchange_or_precision_names_the_nearest_one():
    a = unit_rows(4, 3, seed=0)
    with pytest.raises(UserError, match=r"exchange 'rign' is unknown\. Did you mean 'ring'"):
        info_nce(a, a, 1.0, exchange="rign")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"precision 'bfloat' is unknown\. Did you mean 'bfloat16'"):
        contrastive_loss("info_nce", precision="bfloat")  # type: ignore[arg-type]


def test_ids_can_be_taken_and_moved():
    ids = some_ids(6, KINDS[6])
    assert len(ids) == 6
    assert ids.person is not None
    assert torch.equal(ids.take(slice(2, 4)).to("cpu").person, ids.person[2:4])
    assert PairIds().empty
    assert not PairIds(person=torch.zeros(0, dtype=torch.int64)).empty
