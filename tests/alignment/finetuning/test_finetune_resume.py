"""A fine-tuning that was stopped goes on as if it had not been."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brainfusion.alignment import load
from brainfusion.alignment.finetuning.finetune import finetune
from brainfusion.alignment.losses.pair_ids import PairIds
from brainfusion.runtime import checkpoint
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import CheckpointError
from brainfusion.runtime.logs import MetricsLog
from brainfusion.runtime.signals import Stopped
from tests.alignment.finetuning.test_finetune import ALIGN, QUICK, TinyTower, cohort
from tests.alignment.power_cut import PowerCutError
from tests.ranks import run_ranks

N = 60
CONFIG = replace(
    QUICK, lr=3e-3, max_steps=9, eval_every=2, warmup_steps=2, micro_batch=10, batch_size=24
)
SPEED = {"seconds", "peak_mib"}
"""What two runs of the same may differ in."""


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """An alignment with dropout of the frozen features."""
    from brainfusion.alignment import train

    tokens, dna, labels = cohort(N)
    sides = {"brain": TinyTower(tokens).frozen(), "dna": dna}
    config = replace(ALIGN, max_steps=5, dropout=0.3)
    folder = tmp_path_factory.mktemp("start")
    train(sides, labels, config=config, run_dir=folder)
    return folder


def tune(start: Path, folder: Path, how: str = "all", **known: Any) -> TinyTower:
    """Fine-tune; returns the tower with what was tuned."""
    tokens, dna, labels = cohort(N)
    tower = known.pop("tower", None) or TinyTower(tokens)
    config = known.pop("config", replace(CONFIG, how=how))
    dna = known.pop("dna", dna)
    finetune(load(start), tower, dna, labels, config=config, run_dir=folder, **known)
    return tower


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in SPEED} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    """Metrics, model and summary, to the bit, but for how fast it went."""
    assert metrics(a) == metrics(b)
    files = sorted(path.name for path in (a / "model").iterdir())
    for name in (x for x in files if x != "state.json"):
        assert (a / "model" / name).read_bytes() == (b / "model" / name).read_bytes(), name
    first, second = (json.loads((x / "summary.json").read_text()) for x in (a, b))
    for summary in (first, second):
        for name in SPEED:
            summary["finetune"].pop(name)
    assert first == second


def assert_same_weights(a: TinyTower, b: TinyTower) -> None:
    found = b.module.state_dict()
    for name, value in a.module.state_dict().items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("how", ["all", "lora", "last-1", "none"])
def test_a_resumed_run_is_bitwise_identical_to_an_uninterrupted_one(start, tmp_path, cut, how):
    whole = tune(start, tmp_path / "whole", how)
    torch.manual_seed(77)  # what others drew before does not matter
    keeping = {"checkpoint_every": 3, "resume": True}
    for step in (4, 8):
        cut(step)
        with pytest.raises(PowerCutError):
            tune(start, tmp_path / "cut", how, **keeping)
    left = [path.name for path in checkpoint.steps(tmp_path / "cut")]
    assert left == ["step-0000003", "step-0000006"]
    assert_same_weights(whole, tune(start, tmp_path / "cut", how, **keeping))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    # And once more, from its end: the checkpoints are left to the caller.
    assert_same_weights(whole, tune(start, tmp_path / "cut", how, **keeping))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_run_that_stopped_early_does_not_go_on(start, tmp_path):
    config = replace(CONFIG, lr=5.0, eval_every=1, patience=2)
    known = {"config": config, "checkpoint_every": 4}
    tune(start, tmp_path, **known)
    first = json.loads((tmp_path / "summary.json").read_text())
    assert first["n_steps"] < config.max_steps
    tune(start, tmp_path, **known, resume=True)
    assert json.loads((tmp_path / "summary.json").read_text())["n_steps"] == first["n_steps"]


def test_a_signal_writes_a_checkpoint_before_it_stops_the_run(start, tmp_path, cut):
    whole = tune(start, tmp_path / "whole")
    before = signal.getsignal(signal.SIGTERM)
    cut(4, signal.SIGTERM)
    with pytest.raises(Stopped, match="at step 4"):
        tune(start, tmp_path / "cut", checkpoint_every=100, resume=True)
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in checkpoint.steps(tmp_path / "cut")] == ["step-0000004"]
    assert_same_weights(whole, tune(start, tmp_path / "cut", checkpoint_every=100, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


KILLED = """
import os, signal
from pathlib import Path
from brainfusion.runtime import checkpoint
from tests.alignment.finetuning.test_finetune_resume import tune

real = checkpoint._save_optimizer
def save(path, optimizer):
    real(path, optimizer)
    if path.parent.name.startswith(".step-0000006-"):
        os.kill(os.getpid(), signal.SIGKILL)  # the weights are there, state.json is not
checkpoint._save_optimizer = save
tune(Path({start!r}), Path({folder!r}), "lora", checkpoint_every=3, resume=True)
"""


@pytest.mark.slow
def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(start, tmp_path):
    whole = tune(start, tmp_path / "whole", "lora")
    code = KILLED.format(start=str(start), folder=str(tmp_path / "cut"))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, check=False)
    assert done.returncode == -signal.SIGKILL
    left = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert left[0].startswith(".step-0000006-")
    assert left[1:] == ["step-0000003"]
    again = tune(start, tmp_path / "cut", "lora", checkpoint_every=3, resume=True)
    assert_same_weights(whole, again)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"config": replace(CONFIG, how="all", lr=2e-3)}, "lr: 0.003 -> 0.002"),
        ({"config": replace(CONFIG, how="last-1")}, "how: all -> last-1"),
        ({"made_of": {"cohort": "another"}}, "other cohort"),
        ({"dna": "moved"}, "other features of dna"),
        ({"tower": "another"}, "other encoder"),
        ({"ids": PairIds(excluded=torch.arange(N)[:, None] // 2)}, "other negatives"),
    ],
)
def test_another_run_is_refused_and_what_differs_is_named(start, tmp_path, cut, change, says):
    known: dict[str, Any] = {"checkpoint_every": 3, "made_of": {"cohort": "one"}}
    cut(4)
    with pytest.raises(PowerCutError):
        tune(start, tmp_path, **known)
    tokens, dna, _ = cohort(N)
    if "dna" in change:
        change = {"dna": dna + 1e-9}
    if "tower" in change:
        change = {"tower": TinyTower(tokens, scale=0.21)}
    with pytest.raises(CheckpointError) as error:
        tune(start, tmp_path, **{**known, "resume": True, **change})
    assert says in str(error.value)
    assert "--resume never" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_without_resume_forgets_the_one_before(start, tmp_path, cut):
    cut(4)
    with pytest.raises(PowerCutError):
        tune(start, tmp_path / "cut", checkpoint_every=3)
    tune(start, tmp_path / "cut")
    assert not checkpoint.steps(tmp_path / "cut")
    tune(start, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def stopped_and_resumed(rank: int, world_size: int, start: str, folder: str) -> dict[str, Any]:
    """A whole run, one that rank 1 is asked to stop at step 4, and what goes on with it."""
    ranks, out = Ranks(rank=rank, local_rank=rank, world_size=world_size), {}
    whole = tune(Path(start), Path(folder) / "whole", "lora", ranks=ranks)
    keeping = {"checkpoint_every": 3, "resume": True, "ranks": ranks}
    real, n = MetricsLog.write, [0]

    def write(self: MetricsLog, **row: Any) -> None:
        real(self, **row)
        if row["step"] == 4 and rank == 1 and not n[0]:
            n[0] = 1
            os.kill(os.getpid(), signal.SIGUSR1)

    MetricsLog.write = write  # type: ignore[method-assign]
    try:
        tune(Path(start), Path(folder) / "cut", "lora", **keeping)
    except Stopped as stop:
        out["stopped"] = str(stop)
    MetricsLog.write = real  # type: ignore[method-assign]
    again = tune(Path(start), Path(folder) / "cut", "lora", **keeping)
    for name, towers in (("whole", whole), ("again", again)):
        out[name] = {key: x.clone() for key, x in towers.module.state_dict().items()}
    return out


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_to_the_bit(start, tmp_path):
    found = run_ranks(stopped_and_resumed, str(start), str(tmp_path))
    for rank in found:
        assert rank["stopped"] == "at step 4"
        for key, value in found[0]["whole"].items():
            np.testing.assert_array_equal(rank["again"][key], value, err_msg=key)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
