"""Two real processes: the mean over ranks of the gradients is that of one process on the union."""

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from brainfusion.alignment.losses import contrastive_loss, info_nce
from brainfusion.runtime.errors import UserError
from tests.ranks import run_ranks

CASES = {  # name: (loss, pairs of each rank, start of the scale)
    "even": ("info_nce", (8, 8), 14.25),
    "uneven": ("info_nce", (11, 5), 14.25),
    "underflow": ("info_nce", (9, 7), 3000.0),
    "empty rank": ("info_nce", (16, 0), 14.25),
    "clip": ("clip", (8, 8), 14.25),
    "siglip": ("siglip", (8, 8), 10.0),
}


class Towers(nn.Module):
    def __init__(self, scale: float, *, biased: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 4), nn.Linear(5, 4)
        self.log_scale = nn.Parameter(torch.tensor(scale).log())
        bias = nn.Parameter(torch.tensor(-1.0)) if biased else None
        self.register_parameter("bias", bias)
        self.double()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = F.normalize(self.a(x), dim=1), F.normalize(self.b(y), dim=1)
        return a, b, self.log_scale.exp(), None if self.bias is None else 1.0 * self.bias


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(16, 5, generator=generator, dtype=torch.float64)


def gradients(name: str, rank: int | None) -> dict[str, Any]:
    loss_name, counts, scale = CASES[name]
    model = Towers(scale, biased=loss_name == "siglip")
    x, y = data()
    if rank is not None:
        start = sum(counts[:rank])
        x, y = (z[start : start + counts[rank]] for z in (x, y))
    towers = model if rank is None else nn.parallel.DistributedDataParallel(model)
    a, b, s, bias = towers(x, y)
    loss = contrastive_loss(loss_name)(a, b, s, bias)
    loss.backward()
    return {
        "loss": loss.item(),
        "gradients": {key: p.grad for key, p in model.named_parameters()},
    }


def everything(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {name: gradients(name, rank) for name in CASES}
    x, y = data()
    results["local"] = info_nce(x[:, :5], y, 1.0, local=True).item() if rank == 0 else None
    try:
        contrastive_loss("clip")(x[: 3 + rank], x[: 3 + rank], torch.tensor(1.0), None)
    except UserError as error:
        results["refused"] = str(error)
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(everything)


@pytest.mark.parametrize("name", CASES)
def test_mean_gradient_over_two_ranks_equals_one_process_on_the_union(ranks, name):
    alone = gradients(name, None)
    for rank in ranks:
        got = rank[name]["gradients"]
        for key, expected in alone["gradients"].items():
            torch.testing.assert_close(got[key], expected, rtol=1e-12, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", CASES)
def test_loss_over_two_ranks_equals_one_process_on_the_union(ranks, name):
    values = [rank[name]["loss"] for rank in ranks]
    if CASES[name][0] == "info_nce":
        assert values[0] == values[1]
    assert sum(values) / 2 == pytest.approx(gradients(name, None)["loss"], rel=1e-12)


def test_a_local_loss_in_a_process_group_waits_for_nobody(ranks):
    x, y = data()
    assert ranks[0]["local"] == info_nce(x[:, :5], y, 1.0).item()


def test_open_clip_losses_refuse_unequal_ranks_in_one_line(ranks):
    for rank in ranks:
        assert "as many pairs on each rank, got (3, 4)" in rank["refused"]
