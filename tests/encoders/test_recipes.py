"""Recipes: the published values, sized by the cohort, and their curves at every step."""

import json
import math
from pathlib import Path

import pytest

from brainfusion.encoders.optimiser import schedule, target_momentum
from brainfusion.encoders.pretrain_config import OptimConfig
from brainfusion.encoders.recipes import recipe
from brainfusion.runtime.errors import UserError

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens/jepa_schedules.json").read_text())


def test_brainjepas_published_recipe_at_every_optimiser_step():
    """The reference's formulas: warm-up 40 of 300 epochs, both schedules over all steps."""
    made = recipe("brainjepa", "base")
    assert (made.efficiency.accumulation, made.efficiency.precision) == (8, "bfloat16")
    optim = made.optim.sized(512 * 25)
    assert (optim.steps, optim.epochs, optim.batch_size) == (7500, 0.0, 512)
    n_warmup = 1000
    for k in range(1, 7501):
        lr, decay = schedule(optim, k - 1)
        if k <= n_warmup:
            expected = 5e-5 + (1e-3 - 5e-5) * k / n_warmup
        else:
            share = (k - n_warmup) / (7500 - n_warmup)
            expected = 1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * share))
        assert lr == pytest.approx(expected, rel=1e-9)
        expected = 0.4 + (0.04 - 0.4) * 0.5 * (1 + math.cos(math.pi * k / 7500))
        assert decay == pytest.approx(expected, rel=1e-9)
    assert target_momentum(optim, 7499) == 1.0


def test_brainjepas_published_recipe_gives_the_stored_curves():
    """The stored ones are of 30 epochs with 4 of warm-up: the same shares of 375 steps."""
    published = GOLDENS["pretraining"]
    base = recipe("brainjepa", "base").optim
    assert base.warmup_share == pytest.approx(published["config"]["warmup"] / 30)
    optim = base.sized(512 * 375 // 300)
    assert optim.steps == published["T_max"]
    for column, key in enumerate(("lr", "weight_decay")):
        for k, value in published[key].items():
            if int(k) <= optim.steps:
                assert schedule(optim, int(k) - 1)[column] == pytest.approx(value, rel=1e-12)


def test_brainlms_published_recipe_at_every_optimiser_step():
    """A linear warm-up from 0 over 5%, one cosine to 0; entry k of the reference is our k - 1."""
    made = recipe("brainlm", "5m")
    assert (made.efficiency.accumulation, made.efficiency.precision) == (32, "float32")
    optim = made.optim.sized(768)
    assert (optim.steps, optim.batch_size, optim.clip) == (1500, 256, 1.0)
    for k in range(1, 1501):
        share = k / 75 if k < 75 else 0.5 * (1 + math.cos(math.pi * (k - 75) / (1500 - 75)))
        assert schedule(optim, k - 1) == (pytest.approx(1e-3 * share, abs=1e-15), 0.05)


def test_epochs_become_steps_over_the_cohort_and_steps_stay_steps():
    assert OptimConfig(steps=0, epochs=2.5, batch_size=16).sized(100).steps == 15
    assert OptimConfig(steps=0, epochs=1.0, batch_size=64).sized(3).steps == 1
    given = OptimConfig(steps=7)
    assert given.sized(1000) is given


@pytest.mark.parametrize("model", ["brainlm", "brainjepa"])
def test_any_recipe_trains_any_preset(model):
    assert recipe(model, "tiny").optim.steps > 0
    published = recipe(model, "tiny", "published")
    assert published.encoder == recipe(model, "tiny").encoder
    assert published.optim.epochs > 0
    with pytest.raises(UserError, match=r"unknown recipe 'publishd'. Did you mean 'published'"):
        recipe(model, "tiny", "publishd")
