"""A run that was stopped goes on as if it had not been."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brainfusion.alignment import AlignConfig, train
from brainfusion.alignment.losses.pair_ids import PairIds
from brainfusion.runtime import checkpoint
from brainfusion.runtime.errors import CheckpointError, NonFiniteError
from brainfusion.runtime.logs import MetricsLog
from brainfusion.runtime.signals import Stopped
from tests.alignment.genes.gene_cohort import gene_cohort
from tests.alignment.power_cut import PowerCutError
from tests.alignment.test_train import TINY, cohort
from tests.alignment.test_train_modalities import views

CONFIG = replace(TINY, dropout=0.3, max_steps=11, eval_every=2, batch_size=64)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run, without how fast it was."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "pairs_per_s"} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    files = sorted(path.relative_to(a) for path in (a / "model").iterdir())
    assert len(files) >= 3
    for file in (*files, "summary.json"):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file


def inputs(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Features, labels and config of a kind of run."""
    if kind == "genes":
        made = gene_cohort(n=150, models=("evo2",), missing=0.1)
        config = replace(CONFIG, dna_pool="attention", gene_components=5, gene_width=16)
        return made.features, {"labels": made.labels, "config": config}
    if kind == "several":
        features, present, labels = views(240)
        ids = PairIds(excluded=torch.arange(240)[:, None] // 3)
        known = {"labels": labels, "config": CONFIG, "present": present, "ids": ids}
        return features, known
    features, labels = cohort(n=200)
    closed = {"init": "rcca", "score": "density-ratio"}
    members = {**closed, "average_decay": 0.8, "choose_dropout": (0.3, 0.0), "n_seeds": 2}
    change = {"whole": {"batch_size": 0}, "batches": {}, "closed form": closed, "members": members}
    return features, {"labels": labels, "config": replace(CONFIG, **change[kind])}


@pytest.mark.parametrize("kind", ["whole", "batches", "closed form", "genes", "several"])
def test_a_resumed_run_is_bitwise_identical_to_an_uninterrupted_one(tmp_path, cut, kind):
    features, known = inputs(kind)
    train(features, **known, run_dir=tmp_path / "whole")
    torch.manual_seed(77)  # what others drew before does not matter
    again = {**known, "run_dir": tmp_path / "cut", "checkpoint_every": 3, "resume": True}
    for step in (5, 7):
        cut(step)
        with pytest.raises(PowerCutError):
            train(features, **again)
    assert [path.name for path in checkpoint.steps(tmp_path / "cut")] == [
        "step-0000003",
        "step-0000006",
    ]
    train(features, **again)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    # And once more, from its end: the checkpoints are left to the caller.
    train(features, **again)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_run_that_stopped_early_does_not_go_on(tmp_path):
    features, labels = cohort(n=200)
    config = replace(TINY, lr=0.05, max_steps=60, patience=2)
    known = {"labels": labels, "config": config, "run_dir": tmp_path}
    first = train(features, **known, checkpoint_every=1)
    assert first.summary["n_steps"] < 60
    second = train(features, **known, checkpoint_every=1, resume=True)
    assert second.summary == first.summary


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_writes_a_checkpoint_before_it_stops_the_run(tmp_path, cut, number):
    features, known = inputs("batches")
    train(features, **known, run_dir=tmp_path / "whole")
    again = {**known, "run_dir": tmp_path / "cut", "checkpoint_every": 100, "resume": True}
    before = signal.getsignal(number)
    cut(4, number)
    with pytest.raises(Stopped, match="at step 5"):
        train(features, **again)
    assert signal.getsignal(number) is before
    assert [path.name for path in checkpoint.steps(tmp_path / "cut")] == ["step-0000005"]
    train(features, **again)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("every", [0, 5])
def test_signals_act_as_ever_where_there_are_no_checkpoints(tmp_path, monkeypatch, every):
    real, handlers = MetricsLog.write, []

    def write(self: MetricsLog, **row: Any) -> None:
        handlers.append(signal.getsignal(signal.SIGTERM))
        real(self, **row)

    monkeypatch.setattr(MetricsLog, "write", write)
    features, known = inputs("batches")
    before = signal.getsignal(signal.SIGTERM)
    train(features, **known, run_dir=tmp_path, checkpoint_every=every)
    assert (handlers[0] is before) == (every == 0)


KILLED = """
import os, signal
from pathlib import Path
from brainfusion.alignment import train
from brainfusion.runtime import checkpoint
from tests.alignment.test_train_resume import inputs

real = checkpoint._save_optimizer
def save(path, optimizer):
    real(path, optimizer)
    if path.parent.name.startswith(".step-0000017-"):
        os.kill(os.getpid(), signal.SIGKILL)  # the weights are there, state.json is not
checkpoint._save_optimizer = save
features, known = inputs("members")
train(features, **known, run_dir=Path({folder!r}), checkpoint_every=3, resume=True)
"""


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(tmp_path):
    features, known = inputs("members")
    train(features, **known, run_dir=tmp_path / "whole")
    words = [sys.executable, "-c", KILLED.format(folder=str(tmp_path / "cut"))]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run(words, env=env, check=False).returncode == -signal.SIGKILL
    left = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert left[0].startswith(".step-0000017-")
    assert left[1:] == ["step-0000011", "step-0000014"]
    assert (metrics(tmp_path / "cut")[-1]["member"], metrics(tmp_path / "cut")[-1]["step"]) == (
        1,
        6,
    )
    train(features, **known, run_dir=tmp_path / "cut", checkpoint_every=3, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def stopped(folder: Path, cut: Callable[..., None]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run that was cut in two, and what goes on with it."""
    features, known = inputs("several")
    known |= {"run_dir": folder, "checkpoint_every": 3}
    cut(5)
    with pytest.raises(PowerCutError):
        train(features, **known)
    return features, {**known, "resume": True}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lr": 2e-3, "seed": 4}, ["lr: 0.0 -> 0.002", "seed: 0 -> 4"]),
        ({"pair_weights": ("brain_jepa-dna=2",)}, ["pair_weights: [] -> ['brain_jepa-dna=2']"]),
        ({"max_steps": 12}, ["max_steps: 11 -> 12"]),
    ],
)
def test_another_config_is_refused_and_what_differs_is_named(tmp_path, cut, change, says):
    features, known = stopped(tmp_path, cut)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError) as error:
        train(features, **{**known, "config": replace(CONFIG, **change)})
    assert all(part in str(error.value) for part in says)
    assert "\n" not in str(error.value)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    train(features, **{**known, "config": replace(CONFIG, **change), "resume": False})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f, k: f["dna"].__setitem__((0, 0), 9.0), "other features of dna"),
        (lambda f, k: k["labels"].__setitem__(0, "test"), "other labels"),
        (lambda f, k: k["present"]["dna"].__setitem__(0, False), "other people who have it of dna"),
        (lambda f, k: k["ids"].excluded.__setitem__((0, 0), 7), "other negatives of excluded"),
        (lambda f, k: k.update(ids=None), "other negatives"),
    ],
)
def test_other_data_is_refused(tmp_path, cut, spoil, says):
    features, known = stopped(tmp_path, cut)
    known["present"]["dna"][0] = True
    spoil(features, known)
    with pytest.raises(CheckpointError, match=says):
        train(features, **known)


def test_genes_of_other_people_are_seen_to_be_others(tmp_path, cut):
    features, known = inputs("genes")
    known |= {"run_dir": tmp_path, "checkpoint_every": 3}
    cut(5)
    with pytest.raises(PowerCutError):
        train(features, **known)
    moved = {**features, "dna": features["dna"].take(np.roll(np.arange(150), 1))}
    with pytest.raises(CheckpointError, match="other features of dna"):
        train(moved, **known, resume=True)


def test_a_run_without_resume_forgets_the_one_before(tmp_path, cut):
    features, known = stopped(tmp_path / "cut", cut)
    train(features, **{**known, "resume": False})
    train(features, **{**known, "run_dir": tmp_path / "whole", "resume": False})
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    features, labels = cohort(n=200)
    config = AlignConfig(dim_hidden=8, dim_out=4, n_components=0, lr=1e30, warmup_steps=0)
    with pytest.raises(NonFiniteError, match="at step 2: expected a finite number"):
        train(features, labels, config=config, run_dir=tmp_path)
