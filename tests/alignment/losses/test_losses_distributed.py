"""Real processes: the mean over ranks of the gradients is that of one process on the union."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from brainfusion.alignment.losses.info_nce import contrastive_loss, info_nce
from brainfusion.alignment.losses.pair_ids import PairIds
from brainfusion.alignment.projector import Projector
from brainfusion.runtime.errors import UserError
from tests.oracles.contrastive import info_nce_of_matrix, siglip_oracle
from tests.ranks import run_ranks


@dataclass(frozen=True)
class Case:
    counts: tuple[int, ...]
    loss: str = "info_nce"
    scale: float = 14.25
    kinds: str = ""
    exchange: str = "gather"


ALL = "person excluded within"
CASES = {  # of two ranks, as a group within three; or of all three
    "even": Case((9, 9)),
    "uneven": Case((12, 6)),
    "underflow": Case((10, 8), scale=3000.0),
    "empty rank": Case((18, 0)),
    "persons": Case((12, 6), kinds="person"),
    "exclusions": Case((12, 6), kinds="excluded"),
    "sites": Case((9, 9), kinds="within"),
    "all ids": Case((5, 13), kinds=ALL),
    "all ids, empty rank": Case((0, 18), kinds=ALL),
    "all ids, underflow": Case((8, 10), kinds=ALL, scale=3000.0),
    "three": Case((3, 9, 6), kinds=ALL),
    "three, one empty": Case((6, 0, 12), kinds=ALL),
    "three, underflow": Case((2, 5, 11), scale=3000.0),
    "clip": Case((6, 6, 6), "clip"),
    "siglip": Case((6, 6, 6), "siglip", scale=10.0),
}
CASES |= {
    f"{name}, ring": replace(case, exchange="ring")
    for name, case in CASES.items()
    if case.loss == "info_nce"
}


class Towers(nn.Module):
    def __init__(self, scale: float, *, biased: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (Projector(d, 4, dim_hidden=7, dropout=0.0) for d in (6, 5))
        self.log_scale = nn.Parameter(torch.tensor(scale).log())
        bias = nn.Parameter(torch.tensor(-1.0)) if biased else None
        self.register_parameter("bias", bias)
        self.double()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = F.normalize(self.a(x), dim=1), F.normalize(self.b(y), dim=1)
        return a, b, self.log_scale.exp(), None if self.bias is None else 1.0 * self.bias


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(18, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(18, 5, generator=generator, dtype=torch.float64)


def some_ids(kinds: str) -> PairIds | None:
    generator = torch.Generator().manual_seed(5)
    made = {
        "person": torch.randint(-1, 9, (18,), generator=generator),
        "excluded": torch.randint(-1, 9, (18, 2), generator=generator),
        "within": torch.randint(0, 2, (18,), generator=generator),
    }
    return PairIds(**{kind: made[kind] for kind in kinds.split()}) if kinds else None


def alone(case: Case) -> dict[str, Any]:
    """Loss and gradients of one process that holds all pairs and all of S."""
    model = Towers(case.scale, biased=case.loss == "siglip")
    a, b, s, bias = model(*data())
    if case.loss == "siglip":
        loss = siglip_oracle(a, b, s, bias)
    else:
        loss = info_nce_of_matrix(s * a @ b.T, some_ids(case.kinds))
    return outcome(loss, model)


def shared(case: Case, rank: int, pair: dist.ProcessGroup | None) -> dict[str, Any]:
    """Loss of this rank's share, and gradients after DDP's mean over the ranks of the case."""
    group = pair if len(case.counts) == 2 else None
    model = Towers(case.scale, biased=case.loss == "siglip")
    towers = nn.parallel.DistributedDataParallel(model, process_group=group)
    start = sum(case.counts[:rank])
    own = slice(start, start + case.counts[rank])
    x, y = data()
    ids = some_ids(case.kinds)
    ids = None if ids is None else ids.take(own)
    a, b, s, bias = towers(x[own], y[own])
    if group is not None:
        loss = info_nce(a, b, s, ids=ids, exchange=case.exchange, group=group, tile=4)
    else:
        loss = contrastive_loss(case.loss, exchange=case.exchange)(a, b, s, bias, ids)
    return outcome(loss, model)


def outcome(loss: torch.Tensor, model: nn.Module) -> dict[str, Any]:
    loss.backward()
    return {
        "loss": loss.item(),
        "gradients": {key: p.grad for key, p in model.named_parameters()},
    }


def everything(rank: int, world_size: int) -> dict[str, Any]:
    pair = dist.new_group([0, 1])
    results: dict[str, Any] = {
        name: shared(case, rank, pair) for name, case in CASES.items() if rank < len(case.counts)
    }
    x, y = data()
    results["local"] = info_nce(x[:, :5], y, 1.0, local=True).item() if rank == 0 else None
    try:
        contrastive_loss("clip")(x[: 3 + rank], x[: 3 + rank], torch.tensor(1.0), None)
    except UserError as error:
        results["refused"] = str(error)
    try:
        info_nce(x, x, 1.0, ids=PairIds(person=torch.arange(18)) if rank else None)
    except UserError as error:
        results["alone without ids"] = str(error)
    own = (slice(0, 10), slice(10, 11), slice(11, 18))[rank]
    for exchange in ("gather", "ring"):
        for precision in ("float32", "bfloat16"):
            a, b = (F.normalize(z[own, :5].float(), dim=1).requires_grad_() for z in (x, y))
            loss = info_nce(a, b, 5.0, exchange=exchange, precision=precision, tile=3 + rank)
            loss.backward()
            results[exchange, precision] = loss.item(), a.grad, b.grad
    return results


@pytest.fixture(scope="module")
def ranks() -> dict[str, list[dict[str, Any]]]:
    """Results by case, then by rank."""
    by_rank = run_ranks(everything, world_size=3)
    return {name: [rank[name] for rank in by_rank if name in rank] for name in by_rank[0]}


@pytest.mark.parametrize("name", CASES)
def test_mean_gradient_over_ranks_equals_one_process_on_the_union(ranks, name):
    case, truth = CASES[name], alone(CASES[name])["gradients"]
    assert len(ranks[name]) == len(case.counts)
    for rank in ranks[name]:
        for key, expected in truth.items():
            got = rank["gradients"][key]
            # Logits of s carry s * 2^-53 of rounding, and gradients are times s.
            tolerance = {"rtol": 1e-10, "atol": 1e-12 * max(1.0, case.scale)}
            torch.testing.assert_close(got, expected, **tolerance, msg=lambda m, k=key: f"{k}: {m}")
    assert truth["log_scale"].abs() > 1e-3  # or else the comparison would show nothing


@pytest.mark.parametrize("name", CASES)
def test_loss_over_ranks_equals_one_process_on_the_union(ranks, name):
    values = [rank["loss"] for rank in ranks[name]]
    if CASES[name].loss == "info_nce":
        assert len(set(values)) == 1
    assert sum(values) / len(values) == pytest.approx(alone(CASES[name])["loss"], rel=1e-12)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_ring_gives_what_the_gather_gives_in_lower_precisions(ranks, precision):
    tolerance = 1e-6 if precision == "float32" else 2e-2
    for ring, gather in zip(ranks["ring", precision], ranks["gather", precision], strict=True):
        assert ring[0] == pytest.approx(gather[0], rel=1e-6)
        for x, expected in zip(ring[1:], gather[1:], strict=True):
            assert (x - expected).norm() < tolerance * expected.norm()


def test_a_local_loss_in_a_process_group_waits_for_nobody(ranks):
    x, y = data()
    assert ranks["local"][0] == info_nce(x[:, :5], y, 1.0).item()


def test_open_clip_losses_refuse_unequal_ranks_in_one_line(ranks):
    for message in ranks["refused"]:
        assert "as many pairs on each rank, got (3, 4, 5)" in message


def test_ranks_that_call_with_other_ids_are_refused_on_all_of_them(ranks):
    for message in ranks["alone without ids"]:
        assert "ids of persons differs between processes: [0, 1, 1], by rank" in message
