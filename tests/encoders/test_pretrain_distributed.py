"""Two real gloo processes train what one process trains, and stop together."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors.torch import load_file

from brainfusion.data.cohort import Cohort
from brainfusion.data.standardise import Standardiser
from brainfusion.encoders import pretrain, pretrain_inputs
from brainfusion.encoders.pretrain_config import DataConfig
from brainfusion.runtime import checkpoint
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import NonFiniteError, UserError
from brainfusion.runtime.files import read_json
from brainfusion.runtime.logs import read_metrics
from tests.encoders.tiny_cohort import settings, tiny_cohort, without_dropout
from tests.ranks import run_ranks

MODELS = ("brainlm", "brainjepa")


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Train in float64. In float32 Adam turns rounding of gradients that are zero, those of key
    biases, into steps as large as any other, and weights could be compared only to the size of
    the learning rate."""
    objective_for, transform = pretrain.objective_for, Standardiser.transform

    def double(*args: Any, **kwargs: Any) -> Any:
        return objective_for(*args, **kwargs).double()

    def scaled(self: Standardiser, bold: np.ndarray, **kwargs: Any) -> np.ndarray:
        return transform(self, bold, **kwargs).astype(np.float64)

    with (
        mock.patch.object(pretrain, "objective_for", double),
        mock.patch.object(Standardiser, "transform", scaled),
    ):
        yield


def train(model: str, cohort: Path, folder: Path, rank: int, world_size: int) -> None:
    """Six steps on global batches of 4, each rank with its share. Dropout is off: its draws are a
    rank's own."""
    ranks = Ranks(rank=rank, world_size=world_size)
    options = settings(model, encoder=without_dropout(model))
    with float64():
        pretrain.pretrain(
            options, Cohort.open(cohort), folder / f"{model}-{world_size}", ranks=ranks
        )


def stop(cohort: Path, folder: Path, rank: int) -> str:
    """Train with data that is not finite on the second rank, at step 2."""
    fetch = pretrain_inputs.training_windows

    def windows(*args: Any, **kwargs: Any) -> np.ndarray:
        bold = fetch(*args, **kwargs)
        return bold * np.float32(np.inf) if rank == 1 and kwargs["step"] == 2 else bold

    options = dataclasses.replace(settings("brainlm"), data=DataConfig(standardiser="none"))
    ranks = Ranks(rank=rank, world_size=2)
    with (
        mock.patch.object(pretrain_inputs, "training_windows", windows),
        pytest.raises(NonFiniteError) as caught,
    ):
        pretrain.pretrain(options, Cohort.open(cohort), folder / "stopped", ranks=ranks)
    return str(caught.value)


def too_few(cohort: Path, folder: Path, rank: int) -> str:
    """Validate on one recording with two processes."""
    options = settings("brainlm", run={"n_validation": 1})
    ranks = Ranks(rank=rank, world_size=2)
    with pytest.raises(UserError) as caught:
        pretrain.pretrain(options, Cohort.open(cohort), folder / "few", ranks=ranks)
    return str(caught.value)


def everything(rank: int, world_size: int, cohort: Path, folder: Path) -> dict[str, str]:
    for model in MODELS:
        train(model, cohort, folder, rank, world_size)
    return {"stopped": stop(cohort, folder, rank), "few": too_few(cohort, folder, rank)}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """The folder of the runs, and what each of the two ranks returned."""
    folder = tmp_path_factory.mktemp("ranks")
    cohort = tiny_cohort(folder / "cohort")
    cohort.splits()
    for model in MODELS:
        train(model, cohort.path, folder, 0, 1)
    return folder, run_ranks(everything, cohort.path, folder)


@pytest.mark.parametrize("model", MODELS)
def test_two_processes_train_the_weights_that_one_trains(done, model):
    folder, _ = done
    one, two = (
        load_file(checkpoint.newest(folder / f"{model}-{n}") / "model.safetensors") for n in (1, 2)
    )
    start = load_file(checkpoint.steps(folder / f"{model}-1")[0] / "model.safetensors")
    assert one.keys() == two.keys()
    largest = 0.0
    for key, value in one.items():
        difference = (value - two[key]).abs().max().item()
        # float64 sums in another order, through six steps of Adam (its eps is 1e-8)
        assert difference <= 1e-10 * max(1.0, value.abs().max().item()), key
        largest = max(largest, (value - start[key]).abs().max().item())
    assert largest > 1e-4  # two steps lie between those checkpoints


@pytest.mark.parametrize("model", MODELS)
def test_two_processes_log_the_losses_that_one_logs(done, model):
    folder, _ = done
    one, two = (read_metrics(folder / f"{model}-{n}" / "metrics.jsonl") for n in (1, 2))
    assert len(one) == len(two) == 5
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in {"step", "loss", "lr", "weight_decay", "grad_norm"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-9), name
        if "validation_loss" in a:  # means over ranks are taken in float32
            assert a["validation_loss"] == pytest.approx(b["validation_loss"], rel=1e-6)
        if "feature_std" in a:
            for name in ("feature_std", "effective_rank"):
                assert a[name] == pytest.approx(b[name], rel=1e-6)
    assert read_json(folder / f"{model}-2" / "summary.json")["world_size"] == 2


def test_all_ranks_stop_together_and_name_the_one_to_blame(done):
    folder, results = done
    for result in results:
        assert "not finite at step 2 on rank(s) [1], with recordings [" in result["stopped"]
        assert "have values that are not finite" in result["stopped"]
        assert result["stopped"] == results[0]["stopped"]
    assert [path.name for path in checkpoint.steps(folder / "stopped")] == ["step-0000002"]
    for value in checkpoint.load_weights(checkpoint.newest(folder / "stopped")).values():
        assert value.isfinite().all()


def test_fewer_validation_recordings_than_processes_are_refused_by_all(done):
    for result in done[1]:
        assert "do not go round 2 processes" in result["few"]
