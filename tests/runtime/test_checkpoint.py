"""Checkpoints: whole or absent, also on a full disk and after kill -9."""

import json
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from brainfusion.runtime import checkpoint
from brainfusion.runtime.errors import CheckpointError, UserError


def save(run_dir: Path, step: int, *, n: int = 4, keep_last: int = 2) -> Path:
    return checkpoint.save(
        run_dir,
        step,
        weights={"w": torch.full((n,), float(step))},
        optimizer={"state": {0: {"exp_avg": torch.full((n,), -float(step))}}},
        state={"model": "brainlm"},
        keep_last=keep_last,
    )


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def check_usable(path: Path, step: int, n: int = 4) -> None:
    state = checkpoint.load_state(path)
    assert (state["step"], state["model"], state["format"]) == (step, "brainlm", checkpoint.FORMAT)
    assert checkpoint.load_weights(path)["w"].tolist() == [step] * n
    saved = checkpoint.load_optimizer(path)["state"][0]["exp_avg"]
    assert saved.tolist() == [-step] * n


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Let every write past `n_bytes` fail in the kernel, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_holds_what_was_saved_and_the_newest_is_found(tmp_path):
    for step in (1, 2, 3):
        path = save(tmp_path, step)
        assert checkpoint.newest(tmp_path) == path == checkpoint.newest(path)
        check_usable(path, step)
    assert names(tmp_path) == ["step-0000002", "step-0000003"]
    save(tmp_path, 4, keep_last=1)
    assert names(tmp_path) == ["step-0000004"]


def test_checkpoints_are_in_order_of_their_steps_past_ten_million(tmp_path):
    for step in (9_999_999, 10_000_000):
        path = save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-0000001.copied").mkdir()
    (tmp_path / "checkpoints" / "step-final").mkdir()
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step-9999999", "step-10000000"]
    assert checkpoint.newest(tmp_path) == path


def test_others_may_read_a_checkpoint(tmp_path):
    for file in save(tmp_path, 1).iterdir():
        assert stat.S_IMODE(file.stat().st_mode) & 0o044, file


def test_a_folder_without_checkpoints_is_one_line(tmp_path):
    assert checkpoint.steps(tmp_path / "nowhere") == []
    with pytest.raises(CheckpointError, match=r"holds no checkpoint.*brainfusion pretrain"):
        checkpoint.newest(tmp_path)
    with pytest.raises(CheckpointError, match=r"no state\.json"):
        checkpoint.load_state(tmp_path)


@pytest.mark.parametrize(
    ("file", "load"),
    [
        ("model.safetensors", checkpoint.load_weights),
        ("optimizer.pt", checkpoint.load_optimizer),
        ("state.json", checkpoint.load_state),
    ],
)
def test_a_truncated_or_absent_file_is_one_line_with_its_name(tmp_path, file, load):
    path = save(tmp_path, 1, n=1000)
    whole = (path / file).read_bytes()
    for n_bytes in (0, 10, len(whole) // 2, len(whole) - 5):
        (path / file).write_bytes(whole[:n_bytes])
        with pytest.raises(CheckpointError, match=file) as caught:
            load(path)
        assert "\n" not in str(caught.value)
    (path / file).write_bytes(b"hello, this is something else")
    with pytest.raises(CheckpointError, match=file):
        load(path)
    (path / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        load(path)


@pytest.mark.parametrize("state", [{"format": 99, "step": 1}, {"step": 1}, [1, 2]])
def test_another_format_is_refused(tmp_path, state):
    path = save(tmp_path, 1)
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"has format (99|None), this version reads 1"):
        checkpoint.load_state(path)


def test_an_optimizer_file_runs_no_code_when_it_is_loaded(tmp_path):
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    path = save(tmp_path, 1)
    torch.save({"state": Evil()}, path / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        checkpoint.load_optimizer(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "n_weights", "n_moments"), [("model", 9000, 4), ("optimizer", 4, 9000)]
)
def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(
    tmp_path, file, n_weights, n_moments
):
    path = save(tmp_path, 1)
    with largest_file(4096), pytest.raises(UserError, match=f"cannot write .*{file}") as caught:
        checkpoint.save(
            tmp_path,
            2,
            weights={"w": torch.zeros(n_weights)},
            optimizer={"m": torch.zeros(n_moments)},
            state={},
            keep_last=1,
        )
    assert "\n" not in str(caught.value)
    assert "free space" in str(caught.value)
    assert names(tmp_path) == ["step-0000001"]
    check_usable(path, 1)


def test_a_full_disk_at_the_last_file_is_one_line_too(tmp_path):
    path = save(tmp_path, 1)
    with largest_file(4096), pytest.raises(UserError, match=r"step-0000002.*File too large"):
        checkpoint.save(
            tmp_path, 2, weights={"w": torch.zeros(1)}, optimizer={}, state={"long": "x" * 9000}
        )
    assert names(tmp_path) == [path.name]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from brainfusion.runtime import checkpoint

real = torch.save
def half(value, path):
    real(value, path)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)

run_dir = Path(sys.argv[1])
for step in (1, 2):
    torch.save = half if step == 2 else real
    checkpoint.save(
        run_dir, step, weights={"w": torch.full((4,), float(step))},
        optimizer={"state": {0: {"exp_avg": torch.full((4,), -float(step))}}},
        state={"model": "brainlm"}, keep_last=1,
    )
"""


def test_kill_9_in_the_middle_of_a_write_leaves_the_checkpoint_before_usable(tmp_path):
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert run.returncode == -signal.SIGKILL
    left = names(tmp_path)
    assert len(left) == 2  # the half-written one is there, under a name that nothing finds
    assert left[0].startswith(".step-0000002-")
    assert checkpoint.newest(tmp_path).name == "step-0000001"
    check_usable(checkpoint.newest(tmp_path), 1)
    # The next run writes that step, and clears the remains away.
    check_usable(save(tmp_path, 2, keep_last=2), 2)
    assert names(tmp_path) == ["step-0000001", "step-0000002"]


def test_the_last_few_and_every_nth_are_kept(tmp_path):
    for step in range(2, 18, 2):
        checkpoint.save(
            tmp_path, step, weights={"w": torch.zeros(1)}, optimizer={}, state={},
            keep_last=2, keep_every=6,
        )  # fmt: skip
    assert names(tmp_path) == [f"step-{step:07d}" for step in (6, 12, 14, 16)]
