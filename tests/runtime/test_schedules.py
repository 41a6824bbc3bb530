"""Schedules against closed forms, and against the published curves of Brain-JEPA."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainfusion.encoders.optimiser import schedule
from brainfusion.encoders.pretrain_config import OptimConfig
from brainfusion.runtime.schedules import cosine, linear, warmup_cosine

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens/jepa_schedules.json").read_text())
PUBLISHED = GOLDENS["pretraining"]
FIXED = {"start": 0.1, "peak": 1.0, "end": 0.2, "n_warmup": 5, "n_steps": 25}


@pytest.mark.parametrize(("step", "value"), [(-1, 2), (0, 2), (1, 3), (2.5, 4.5), (4, 6), (99, 6)])
def test_linear_by_hand(step, value):
    assert linear(step, 2.0, 6.0, 4) == pytest.approx(value)


@pytest.mark.parametrize(
    ("step", "value"),
    [(-1, 6), (0, 6), (1, 4 + math.sqrt(2)), (2, 4), (3, 4 - math.sqrt(2)), (4, 2)],
)  # fmt: skip
def test_cosine_by_hand(step, value):
    assert cosine(step, 6.0, 2.0, 4) == pytest.approx(value)
    assert cosine(99, 6.0, 2.0, 4) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("step", "value"),
    [(0, 0.1), (1, 0.28), (4, 0.82), (5, 1), (10, 0.6 + 0.4 * 0.5**0.5), (15, 0.6), (99, 0.2)],
)  # fmt: skip
def test_warmup_cosine_by_hand(step, value):
    assert warmup_cosine(step, **FIXED) == pytest.approx(value)


def test_schedules_without_any_steps_are_at_their_end():
    assert linear(0, 1.0, 3.0, 0) == cosine(0, 1.0, 3.0, 0) == 3.0
    assert warmup_cosine(0, start=0.0, peak=1.0, end=0.5, n_warmup=0, n_steps=10) == 1.0
    assert warmup_cosine(7, start=0.0, peak=1.0, end=0.5, n_warmup=10, n_steps=10) == 0.7


@given(
    n_warmup=st.integers(0, 50),
    n_decay=st.integers(1, 200),
    step=st.floats(0, 300),
    end=st.floats(0, 1),
    start=st.floats(0, 1),
)
def test_warmup_rises_and_decay_falls_and_both_stay_in_range(n_warmup, n_decay, step, end, start):
    settings = {"start": start, "peak": 1.0, "end": end, "n_warmup": n_warmup}
    now = warmup_cosine(step, **settings, n_steps=n_warmup + n_decay)
    later = warmup_cosine(step + 0.5, **settings, n_steps=n_warmup + n_decay)
    assert min(start, end) - 1e-12 <= now <= 1.0 + 1e-12
    if step + 0.5 < n_warmup:
        assert later >= now
    elif step >= n_warmup:
        assert later <= now + 1e-12


def published_optim() -> OptimConfig:
    given = PUBLISHED["config"]
    return OptimConfig(
        steps=PUBLISHED["T_max"],
        lr=given["lr"],
        lr_end=given["final_lr"],
        warmup_share=given["warmup"] / given["epochs"],
        weight_decay=given["weight_decay"],
        weight_decay_end=given["final_weight_decay"],
    )


def test_brainjepas_published_learning_rate_and_weight_decay_at_every_stored_step():
    """Entry k is what the k-th optimiser step, from 1, is taken with; ours count from 0."""
    optim = published_optim()
    assert optim.warmup_share * optim.steps == pytest.approx(PUBLISHED["warmup_steps"])
    for key, column in (("lr", 0), ("weight_decay", 1)):
        stored = {int(k): value for k, value in PUBLISHED[key].items()}
        assert {1, 2, 49, 50, 51, 188, 374, 375} <= stored.keys()
        for k, value in stored.items():
            if k <= PUBLISHED["T_max"]:
                # Both are float64; sums in another order.
                assert schedule(optim, k - 1)[column] == pytest.approx(value, rel=1e-12), (key, k)


def test_past_the_last_step_ours_stay_where_the_references_turn_back():
    optim, last = published_optim(), PUBLISHED["T_max"]
    for key, column in (("lr", 0), ("weight_decay", 1)):
        end = PUBLISHED[key][str(last)]
        for k in (last + 1, last + 2):
            mirrored = schedule(optim, 2 * last - k - 1)[column]
            assert PUBLISHED[key][str(k)] == pytest.approx(mirrored, rel=1e-12)
            assert schedule(optim, k - 1)[column] == pytest.approx(end, rel=1e-12)


@pytest.mark.parametrize("name", GOLDENS["fine_tune_lr"])
def test_brainjepas_fine_tuning_learning_rate_at_every_stored_epoch(name):
    case = GOLDENS["fine_tune_lr"][name]
    given = case["args"]
    for epoch, value in case["lr_at_epoch"].items():
        ours = warmup_cosine(
            float(epoch),
            start=0.0,
            peak=given["lr"],
            end=given["min_lr"],
            n_warmup=given["warmup_epochs"],
            n_steps=given["epochs"],
        )
        assert ours == pytest.approx(value, rel=1e-12), epoch
