"""What happens to a run at night: killed in a write, asked to leave, watched by what may change."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
from safetensors.torch import load_file

from brainfusion.cli import main
from brainfusion.data.cohort import Cohort
from brainfusion.encoders import parallel
from brainfusion.encoders.pretrain import pretrain
from brainfusion.encoders.pretrain_config import WatchConfig
from brainfusion.runtime import checkpoint
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import read_metrics
from brainfusion.runtime.signals import STOPPED, Stopped
from tests.encoders.tiny_cohort import settings, tiny_cohort

MODELS = ("brainlm", "brainjepa")
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from brainfusion.data.cohort import Cohort
from brainfusion.encoders.pretrain import pretrain
from brainfusion.runtime.distributed import Ranks
from tests.encoders.tiny_cohort import settings

torch.set_num_threads(1)
real = torch.save

def half(value, path):
    real(value, path)
    if "step-0000004" in str(path):  # cut the file in two, and die
        os.truncate(path, Path(path).stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = half
cohort, run_dir, model = sys.argv[1:]
pretrain(settings(model), Cohort.open(Path(cohort)), Path(run_dir), ranks=Ranks())
"""


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Cohort:
    found = tiny_cohort(tmp_path_factory.mktemp("night") / "cohort")
    found.splits()
    return found


@pytest.fixture(scope="module", params=MODELS)
def whole(request, cohort, tmp_path_factory) -> tuple[str, Path]:
    """A model, and the folder of its uninterrupted run."""
    run_dir = tmp_path_factory.mktemp(request.param) / "run"
    pretrain(settings(request.param), cohort, run_dir, ranks=Ranks())
    return request.param, run_dir


def same(one: Path, two: Path) -> None:
    """To the bit: weights, and every logged figure that is no time."""
    a, b = (load_file(checkpoint.newest(path) / "model.safetensors") for path in (one, two))
    assert a.keys() == b.keys()
    assert all((a[key] == b[key]).all() for key in a)
    times = {"windows_per_s", "wait_share", "peak_mib"}
    one_rows, two_rows = (
        [{k: v for k, v in row.items() if k not in times} for row in rows]
        for rows in (read_metrics(path / "metrics.jsonl") for path in (one, two))
    )
    assert one_rows == two_rows


def stopped_by(number: signal.Signals, options, cohort: Cohort, run_dir: Path) -> None:
    """The signal comes in the third step."""
    accumulate, calls = parallel.accumulate, []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return accumulate(*args, **kwargs)

    with (
        mock.patch.object(parallel, "accumulate", counted),
        pytest.raises(Stopped, match="at step 3"),
    ):
        pretrain(options, cohort, run_dir, ranks=Ranks())


def test_kill_9_in_the_middle_of_a_checkpoint_costs_nothing_but_time(whole, cohort, tmp_path):
    model, reference = whole
    run_dir = tmp_path / "run"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(cohort.path), str(run_dir), model],
        cwd=Path(__file__).parents[2],
        check=False,
        capture_output=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert left[-1] == "step-0000002"
    assert len(left) == 2  # and what it was writing
    pretrain(settings(model), cohort, run_dir, ranks=Ranks())
    same(reference, run_dir)
    assert not [path for path in (run_dir / "checkpoints").iterdir() if path.name[0] == "."]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_asked_to_stop_saves_first_and_goes_on_to_the_bit(
    whole, cohort, tmp_path, capsys, number
):
    model, reference = whole
    stopped_by(number, settings(model), cohort, tmp_path)
    assert checkpoint.newest(tmp_path).name == "step-0000003"
    said = "asked to stop: saved step 3; the same command goes on from there."
    assert said in capsys.readouterr().err
    assert said in (tmp_path / "run.log").read_text()
    pretrain(settings(model), cohort, tmp_path, ranks=Ranks())
    same(reference, tmp_path)


def test_the_command_leaves_with_a_code_that_says_start_me_again(cohort, tmp_path, capsys):
    words = [
        "pretrain", "--model", "brainlm", "--cohort", cohort.path, "--workspace", tmp_path,
        "--n-trs", 64, "--patch-trs", 16, "--width", 16, "--steps", 4, "--batch-size", 4,
    ]  # fmt: skip
    words = [str(word) for word in words]
    accumulate = parallel.accumulate

    def asked(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return accumulate(*args, **kwargs)

    assert main([*words, "--resume", "must"]) == 2
    assert "--resume must: " in capsys.readouterr().err
    with mock.patch.object(parallel, "accumulate", asked):
        assert main(words) == STOPPED == 75
    assert main([*words, "--resume", "never"]) == 2
    assert "--resume never: " in capsys.readouterr().err
    assert main([*words, "--resume", "must"]) == 0
    assert "resumed at step 1" in capsys.readouterr().err


def test_the_published_recipe_sizes_itself_by_the_cohort(cohort, tmp_path, capsys):
    words = [
        "pretrain", "--model", "brainlm", "--recipe", "published", "--cohort", cohort.path,
        "--workspace", tmp_path, "--n-trs", 64, "--patch-trs", 16, "--width", 16,
        "--batch-size", 4, "--accumulation", 2, "--epochs", 0.5,
    ]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    assert "on 17 recordings of 'tiny', 2 steps of 4 windows" in capsys.readouterr().err
    assert main([*map(str, words), "--steps", "3"]) == 2
    assert "give --epochs 0 with --steps" in capsys.readouterr().err


def test_what_changes_no_result_may_change_on_resume(whole, cohort, tmp_path):
    model, reference = whole
    stopped_by(signal.SIGTERM, settings(model), cohort, tmp_path)
    other = WatchConfig(
        log_every=1, validate_every=2, save_every=1, keep_last=1, keep_every=4, n_validation=2
    )
    changed = dataclasses.replace(settings(model, efficiency={"workers": 2}), watch=other)
    pretrain(changed, cohort, tmp_path, ranks=Ranks())
    kept = [path.name for path in checkpoint.steps(tmp_path)]
    assert kept == ["step-0000004", "step-0000006"]
    a, b = (load_file(checkpoint.newest(p) / "model.safetensors") for p in (reference, tmp_path))
    assert all((a[key] == b[key]).all() for key in a)


def test_tensorboard_that_is_not_there_is_asked_for_before_anything_is_trained(cohort, tmp_path):
    options = settings("brainlm", run={"tensorboard": True})
    with (
        mock.patch.dict(sys.modules, {"torch.utils.tensorboard": None}),
        pytest.raises(UserError, match="not installed: pip install tensorboard, or leave the"),
    ):
        pretrain(options, cohort, tmp_path / "run", ranks=Ranks())
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_rows_of_the_log(cohort, tmp_path):
    written, closed = [], []

    class Writer(SimpleNamespace):
        def add_scalar(self, name, value, step):
            written.append((step, name, value))

        def close(self):
            closed.append(self.log_dir)

    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"torch.utils.tensorboard": fake}):
        pretrain(settings("brainlm", run={"tensorboard": True}), cohort, tmp_path, ranks=Ranks())
    rows = read_metrics(tmp_path / "metrics.jsonl")[1:]
    names = [(row["step"], name) for row in rows for name in row if name != "step"]
    assert [(step, name) for step, name, _ in written] == names
    assert [value for _, name, value in written if name == "loss"] == [r["loss"] for r in rows]
    assert closed == [str(tmp_path / "board")]
