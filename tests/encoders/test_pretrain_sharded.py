"""Two real gloo processes: shards, accumulation, signals, and processes that disagree."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from brainfusion.data.cohort import Cohort
from brainfusion.encoders import parallel, pretrain, pretrain_inputs
from brainfusion.runtime import checkpoint
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import CheckpointError, UserError
from brainfusion.runtime.logs import read_metrics
from brainfusion.runtime.signals import Stopped
from tests.encoders.test_pretrain_distributed import float64
from tests.encoders.tiny_cohort import IMAGE, settings, tiny_cohort, without_dropout
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

MODELS = ("brainlm", "brainjepa")
FAMILIES = (*MODELS, "image")


def options(model: str, **efficiency: Any):
    if model == "image":
        return settings("brainlm", encoder=IMAGE, efficiency=efficiency)
    return settings(model, encoder=without_dropout(model), efficiency=efficiency)


def train(model: str, cohort: Path, run_dir: Path, ranks: Ranks, **efficiency: Any) -> None:
    pretrain.pretrain(options(model, **efficiency), Cohort.open(cohort), run_dir, ranks=ranks)


def broken_off(step: int, call: Any) -> None:
    """Run `call`, but break its loop as it takes the batch of `step`."""
    fetch = pretrain_inputs.training_windows

    def windows(*args: Any, **kwargs: Any):
        if kwargs["step"] == step:
            raise KeyboardInterrupt
        return fetch(*args, **kwargs)

    with (
        mock.patch.object(pretrain_inputs, "training_windows", windows),
        pytest.raises(KeyboardInterrupt),
    ):
        call()


def signalled(cohort: Path, folder: Path, ranks: Ranks) -> str:
    """The second rank alone gets a signal in its third step."""
    accumulate = parallel.accumulate

    def counted(*args: Any, **kwargs: Any):
        counted.n += 1
        if ranks.rank == 1 and counted.n == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return accumulate(*args, **kwargs)

    counted.n = 0
    with (
        mock.patch.object(parallel, "accumulate", counted),
        pytest.raises(Stopped) as caught,
    ):
        train("brainlm", cohort, folder / "signalled", ranks)
    return str(caught.value)


def disagreeing(cohort: Path, folder: Path, ranks: Ranks) -> str:
    """The second rank has fewer recordings."""
    mine = cohort if ranks.rank == 0 else folder / "fewer"
    with pytest.raises(UserError) as caught:
        train("brainlm", mine, folder / "disagreeing", ranks)
    return str(caught.value)


def local_share(model: str, cohort: Path, folder: Path, ranks: Ranks) -> float:
    """Train shards, stopped after a checkpoint and gone on; this rank's share of the weights."""
    run_dir, seen = folder / f"{model}-fsdp", []
    save = parallel.save

    def spied(*args: Any, **kwargs: Any) -> None:
        parameters = list(kwargs["objective"].parameters())
        assert all(isinstance(p, DTensor) for p in parameters)
        local = sum(p.to_local().numel() for p in parameters)  # type: ignore[attr-defined]
        seen.append(local / sum(p.numel() for p in parameters))
        save(*args, **kwargs)

    def go() -> None:
        train(model, cohort, run_dir, ranks, sharding="fsdp")

    with mock.patch.object(parallel, "save", spied):
        broken_off(5, go)
        go()
    return seen[-1]


def everything(rank: int, world_size: int, cohort: Path, folder: Path) -> dict[str, Any]:
    ranks, found = Ranks(rank=rank, world_size=world_size), {}
    for model in FAMILIES:
        with float64():
            train(model, cohort, folder / f"{model}-parts", ranks, accumulation=2)
    for model in MODELS:
        train(model, cohort, folder / f"{model}-whole", ranks)
        found[model] = local_share(model, cohort, folder, ranks)
        again = {"sharding": "fsdp", "activation_checkpointing": True}
        train(model, cohort, folder / f"{model}-again", ranks, **again)
    found["signalled"] = signalled(cohort, folder, ranks)
    found["disagreeing"] = disagreeing(cohort, folder, ranks)
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the runs, and what each of the two ranks returned."""
    folder = tmp_path_factory.mktemp("ranks")
    cohort = tiny_cohort(folder / "cohort")
    tiny_cohort(folder / "fewer", n_people=20).splits()
    cohort.splits()
    with float64():
        for model in FAMILIES:
            for n_parts in (1, 4):
                run_dir = folder / f"{model}-{n_parts}"
                train(model, cohort.path, run_dir, Ranks(), accumulation=n_parts)
    return folder, run_ranks(everything, cohort.path, folder)


def largest_difference(one: Path, two: Path) -> float:
    a, b = (load_file(checkpoint.newest(path) / "model.safetensors") for path in (one, two))
    assert a.keys() == b.keys()
    for weights in (a, b):
        for key in weights:
            if key.endswith("qkv.bias"):
                # Softmax takes no notice of what is added to all keys: the gradient of their
                # biases is rounding, which Adam makes steps of.
                weights[key].chunk(3)[1].zero_()
    return max((a[key] - b[key]).abs().max().item() for key in a)


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("other", ["4", "parts"])
def test_accumulated_gradients_equal_those_of_one_big_batch(done, model, other):
    """Four parts in one process, and two parts on each of two, against a batch of four."""
    folder, _ = done
    # float64 sums in another order, through six steps of Adam
    assert largest_difference(folder / f"{model}-1", folder / f"{model}-{other}") < 1e-10
    one, two = (read_metrics(folder / f"{model}-{n}" / "metrics.jsonl") for n in ("1", other))
    for a, b in zip(one, two, strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-9)


def check_same_curves(one: Path, two: Path) -> None:
    """Losses, gradient norms and final weights of two runs, and that the loss moved at all."""
    # float32: sums in another order, through six steps of Adam
    assert largest_difference(one, two) < 1e-5
    rows = [read_metrics(path / "metrics.jsonl") for path in (one, two)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for a, b in zip(*rows, strict=True):
        for name in a.keys() & {"loss", "validation_loss", "grad_norm", "effective_rank"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5), name
    first, *_, last = rows[0]
    assert last["validation_loss"] < 0.95 * first["validation_loss"]


@pytest.mark.parametrize("model", MODELS)
def test_shards_train_what_replicas_train_also_after_a_resume(done, model):
    folder, results = done
    check_same_curves(folder / f"{model}-whole", folder / f"{model}-fsdp")
    shares = [result[model] for result in results]
    assert sum(shares) == pytest.approx(1.0)
    assert max(shares) < 0.7
    last = checkpoint.newest(folder / f"{model}-fsdp")
    assert (last / "optimizer" / ".metadata").exists()
    assert not (last / "optimizer.pt").exists()


@pytest.mark.parametrize("model", MODELS)
def test_shards_with_activation_checkpointing_train_what_replicas_train(done, model):
    check_same_curves(done[0] / f"{model}-whole", done[0] / f"{model}-again")


def compiled(rank: int, world_size: int, model: str, cohort: Path, folder: Path) -> None:
    """Replicas as they are; replicas, shards, and shards that compute again, all compiled."""
    ranks, compile_module = Ranks(rank=rank, world_size=world_size), torch.nn.Module.compile

    def traced(self: torch.nn.Module) -> None:
        # Traced and differentiated as ever, but no code is built: that takes minutes.
        compile_module(self, backend="aot_eager")

    train(model, cohort, folder / "plain", ranks)
    with mock.patch.object(torch.nn.Module, "compile", traced):
        train(model, cohort, folder / "replicas", ranks, compile=True)
        sharded = {"compile": True, "sharding": "fsdp"}
        train(model, cohort, folder / "shards", ranks, **sharded)
        again = {**sharded, "activation_checkpointing": True}
        train(model, cohort, folder / "again", ranks, **again)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_compiled_replicas_and_shards_train_what_replicas_train(tmp_path, model):
    cohort = tiny_cohort(tmp_path / "cohort")
    cohort.splits()
    run_ranks(compiled, model, cohort.path, tmp_path)
    for name in ("replicas", "shards", "again"):
        check_same_curves(tmp_path / "plain", tmp_path / name)


def test_shards_and_replicas_do_not_go_on_from_one_another(done):
    folder, _ = done
    objective: Any = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(objective.parameters())
    for name, sharding, before in (("whole", "fsdp", "none"), ("fsdp", "none", "fsdp")):
        wanted = options("brainlm", sharding=sharding)
        with pytest.raises(CheckpointError, match=f"was saved with --sharding {before} and cann"):
            parallel.load_optimizer(
                folder / f"brainlm-{name}",
                objective=objective,
                optimizer=optimizer,
                settings=wanted,
            )


def test_shards_need_processes(done):
    cohort = Cohort.open(done[0] / "cohort")
    with pytest.raises(UserError, match="there is one: start them with torchrun"):
        pretrain.pretrain(
            options("brainlm", sharding="fsdp"), cohort, done[0] / "never", ranks=Ranks()
        )


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint_first(done):
    folder, results = done
    said = {result["signalled"] for result in results}
    assert said == {"at step 3"}
    assert checkpoint.newest(folder / "signalled").name == "step-0000003"


def test_another_number_of_processes_goes_on_and_it_is_said(done, capsys):
    folder, _ = done
    train("brainlm", folder / "cohort", folder / "signalled", Ranks())
    said = capsys.readouterr().err
    assert "was trained on 2 process(es) and goes on with 1: batches and masks stay" in said
    assert "resumed at step 3" in said
    assert largest_difference(folder / "brainlm-whole", folder / "signalled") < 1e-5


def test_processes_that_see_different_cohorts_are_told_apart_by_rank_before_training(done):
    folder, results = done
    for result in results:
        assert result["disagreeing"].startswith("rank 1 has a cohort of the hash ")
        assert "where rank 0 has" in result["disagreeing"]
    assert not (folder / "disagreeing").exists()


@pytest.mark.parametrize(
    ("n_parts", "message"), [(3, "accumulation=3 does not divide the 4 windows"), (4, None)]
)
def test_parts_that_are_not_equal_are_refused(n_parts, message):
    wanted = dataclasses.replace(options("brainlm", accumulation=n_parts))
    if message is None:
        parallel.check_shares(wanted, Ranks())
        return
    with pytest.raises(UserError, match=message):
        parallel.check_shares(wanted, Ranks())
