"""Pretraining in one process: it learns, resumes to the bit, and refuses what does not fit."""

import dataclasses
from pathlib import Path
from unittest import mock

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from brainfusion.data.atlas import Atlas
from brainfusion.data.cohort import Cohort
from brainfusion.data.splits import Splits
from brainfusion.encoders import create, optimiser, pretrain, pretrain_inputs
from brainfusion.encoders.brainlm import BrainLM
from brainfusion.encoders.checkpoints import load_pretrained
from brainfusion.encoders.mae import MaskedOutput
from brainfusion.encoders.objectives import BrainLMObjective, objective_for
from brainfusion.encoders.optimiser import schedule, target_momentum
from brainfusion.encoders.parallel import agree
from brainfusion.encoders.pretrain_config import (
    DataConfig,
    EfficiencyConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    WatchConfig,
)
from brainfusion.runtime import checkpoint, config
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import CheckpointError, NonFiniteError, UserError
from brainfusion.runtime.files import read_json
from brainfusion.runtime.logs import read_metrics
from tests.encoders.tiny_cohort import (
    ATLAS,
    ENCODERS,
    IMAGE,
    N_PARCELS,
    settings,
    tiny_cohort,
    without_dropout,
)

MODELS = ("brainlm", "brainjepa")
DIAGNOSED = {
    "brainlm": {
        "masked_r2",
        "interpolation_r2",
        "neighbours_r2",
        "r2_over_interpolation",
    },
    "brainjepa": {"loss_of_mean_target"},
}
SPREAD = {"target_std", "feature_std", "effective_rank"}
TIMES = {"windows_per_s", "wait_share", "peak_mib"}


def run(options: PretrainConfig, cohort: Cohort, run_dir: Path) -> Path:
    return pretrain.pretrain(options, cohort, run_dir, ranks=Ranks())


def same_tensors(a: Path, b: Path) -> None:
    one, two = (load_file(path / "model.safetensors") for path in (a, b))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]), key


def curve(run_dir: Path) -> list[dict]:
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return tiny_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module", params=MODELS)
def whole(request, cohort, tmp_path_factory) -> tuple[str, Path, Path]:
    """The model, and the run folder and last checkpoint of an uninterrupted run."""
    run_dir = tmp_path_factory.mktemp(request.param) / "run"
    return request.param, run_dir, run(settings(request.param), cohort, run_dir)


@pytest.mark.parametrize("model", MODELS)
def test_training_brings_the_loss_down(cohort, tmp_path, model):
    options = settings(model, steps=40, batch_size=8, run={"log_every": 40, "save_every": 40})
    run(options, cohort, tmp_path)
    summary = read_json(tmp_path / "summary.json")
    first, last = summary["first"], summary["last"]
    assert last["validation_loss"] < 0.7 * first["validation_loss"]
    if model == "brainlm":
        assert first["masked_r2"] < 0.05
        assert last["masked_r2"] > 0.3
    else:
        assert last["feature_std"] > 0.0
        assert last["validation_loss"] < last["loss_of_mean_target"]


def test_a_run_leaves_what_the_report_reads(whole):
    model, run_dir, last = whole
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 3, 4, 6]
    validated = {"validation_loss", *DIAGNOSED[model], *SPREAD}
    assert rows[0].keys() == {"step", *validated}
    logged = {"step", "loss", "lr", "weight_decay", "grad_norm", *TIMES}
    for row in rows[1:]:
        assert row.keys() == logged | (validated if row["step"] % 3 == 0 else set())
        lr, decay = schedule(settings(model).optim, row["step"] - 1)
        assert (row["lr"], row["weight_decay"]) == (lr, decay)
        assert np.isfinite(list(row.values())).all()
    summary = read_json(run_dir / "summary.json")
    assert summary.keys() == {
        "model", "n_steps", "n_parameters", "seconds", "world_size", "final_loss", "first", "last",
        "peak_mib",
    }  # fmt: skip
    assert (summary["model"], summary["n_steps"], summary["world_size"]) == (model, 6, 1)
    assert summary["final_loss"] == rows[-1]["loss"]
    assert summary["first"] == {name: rows[0][name] for name in validated}
    assert summary["last"] == {name: rows[-1][name] for name in validated}
    assert [path.name for path in checkpoint.steps(run_dir)] == ["step-0000004", "step-0000006"]
    assert last == checkpoint.newest(run_dir)
    values = config.read_yaml(run_dir / "config.yaml")
    assert config.from_dict(PretrainConfig, values) == settings(model)


def test_a_checkpoint_says_all_that_a_later_stage_needs(whole, cohort):
    model, _, last = whole
    state = checkpoint.load_state(last)
    splits = cohort.splits()
    assert state["model"] == model
    assert state["step"] == 6
    assert state["config"] == config.to_dict(settings(model))
    assert state["cohort_hash"] == cohort.hash
    assert state["splits_hash"] == splits.hash
    assert state["n_people"] == state["n_recordings"] == len(splits.train)
    assert state["tr_s"] == 2.0
    assert state["conditioning"]["standardiser"]["n_people"] == len(splits.train)
    assert Atlas.from_dict(state["atlas"]).parcels == ATLAS.parcels


def run_until(step: int, options: PretrainConfig, cohort: Cohort, run_dir: Path) -> None:
    """Train, but break the loop as it fetches the batch of `step`."""
    fetch = pretrain_inputs.training_windows

    def windows(*args, **kwargs):
        if kwargs["step"] == step:
            raise KeyboardInterrupt
        return fetch(*args, **kwargs)

    with (
        mock.patch.object(pretrain_inputs, "training_windows", windows),
        pytest.raises(KeyboardInterrupt),
    ):
        run(options, cohort, run_dir)


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(whole, cohort, tmp_path, capsys):
    model, run_dir, last = whole
    for step in (3, 5):  # stopped twice, each time a step after the last checkpoint
        run_until(step, settings(model), cohort, tmp_path)
    torch.rand(17)  # whatever was drawn in between must not matter
    resumed = run(settings(model), cohort, tmp_path)
    assert "resumed at step 4" in capsys.readouterr().err
    same_tensors(last, resumed)
    assert curve(tmp_path) == curve(run_dir)
    before, after = (checkpoint.load_optimizer(path) for path in (last, resumed))
    for key, moments in before["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, after["state"][key][name])
    assert before["param_groups"] == after["param_groups"]
    one, two = (read_json(folder / "summary.json") for folder in (run_dir, tmp_path))
    for key in ("first", "last", "final_loss"):
        assert one[key] == two[key]


def test_a_disk_that_fills_up_in_a_checkpoint_costs_only_the_steps_since_the_last(
    whole, cohort, tmp_path, monkeypatch
):
    model, _, last = whole
    real = torch.save

    def full(value, path):
        if "step-0000004" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(value, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(
            UserError, match=r"cannot write .*step-0000004.*No space left on device"
        ):
            run(settings(model), cohort, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000002"]
    same_tensors(last, run(settings(model), cohort, tmp_path))


def test_another_seed_trains_another_model(cohort, tmp_path):
    paths = []
    for seed in (1, 2):
        options = settings("brainlm", steps=1, run={"seed": seed})
        paths.append(run(options, cohort, tmp_path / str(seed)))
    with pytest.raises(AssertionError):
        same_tensors(*paths)


def test_a_trained_run_is_left_as_it_is(whole, cohort, capsys):
    model, run_dir, last = whole
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    assert run(settings(model), cohort, run_dir) == last
    assert "already trained to step 6; --restart trains it anew" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}


def test_a_run_stopped_after_its_last_checkpoint_gets_its_summary(whole, cohort):
    model, run_dir, last = whole
    before = read_json(run_dir / "summary.json")
    (run_dir / "summary.json").unlink()
    assert run(settings(model), cohort, run_dir) == last
    after = read_json(run_dir / "summary.json")
    for key in ("first", "last", "final_loss", "n_steps"):
        assert before[key] == after[key]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("optim", {"lr": 0.02}, "optim.lr: 0.01 -> 0.02"),
        ("optim", {"steps": 8, "clip": 2.0}, "optim.clip: 1.0 -> 2.0; optim.steps: 6 -> 8"),
        ("run", {"seed": 1}, "run.seed: 0 -> 1"),
        ("data", {"standardiser": "parcel-zscore"}, "recording-zscore -> parcel-zscore"),
        ("encoder", {"n_heads": 1}, "encoder.n_heads: 2 -> 1"),
    ],
)
def test_resuming_with_another_config_is_refused_with_a_diff(whole, cohort, part, change, message):
    model, run_dir, _ = whole
    options = settings(model)
    changed = dataclasses.replace(getattr(options, part), **change)
    with pytest.raises(CheckpointError, match="was trained with another config") as caught:
        run(dataclasses.replace(options, **{part: changed}), cohort, run_dir)
    assert message in str(caught.value)
    assert "--restart" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_efficiency_may_change_on_resume(cohort, tmp_path):
    options = settings("brainlm", steps=3)
    run_until(2, options, cohort, tmp_path)
    other = EfficiencyConfig(threads=1, precision="bfloat16", device="cpu")
    run(dataclasses.replace(options, efficiency=other), cohort, tmp_path)
    assert read_json(tmp_path / "summary.json")["n_steps"] == 3


def test_a_compiled_loss_trains_the_same_weights(cohort, tmp_path, monkeypatch):
    """With a backend that only traces: generating code takes minutes, and is torch's own matter."""
    compiled = []

    def traced(module: torch.nn.Module) -> None:
        compiled.append(type(module))
        compile_module(module, backend="eager")

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    options = settings("brainlm", encoder=without_dropout("brainlm"), steps=2)
    plain = run(options, cohort, tmp_path / "plain")
    assert not compiled
    faster = dataclasses.replace(options, efficiency=EfficiencyConfig(compile=True))
    same_tensors(plain, run(faster, cohort, tmp_path / "compiled"))
    assert compiled == [BrainLMObjective]


@pytest.mark.parametrize("encoder", [*ENCODERS.values(), IMAGE], ids=lambda c: type(c).__name__)
def test_activations_computed_again_give_the_same_weights_from_fewer_kept(
    cohort, tmp_path, encoder
):
    """With dropout where the model has it: its draws are repeated too."""
    model = "brainjepa" if encoder is ENCODERS["brainjepa"] else "brainlm"
    options = settings(model, encoder=encoder, steps=2)
    paths, kept = [], []
    for lean in (False, True):
        sizes: list[int] = []

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        efficiency = EfficiencyConfig(activation_checkpointing=lean)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            made = dataclasses.replace(options, efficiency=efficiency)
            paths.append(run(made, cohort, tmp_path / str(lean)))
        kept.append(sum(sizes))
    assert kept[1] < 0.7 * kept[0]
    one, two = (load_file(path / "model.safetensors") for path in paths)
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=1e-4, atol=1e-5)


def spoil_table(cohort: Cohort) -> None:
    path = cohort.path / "subjects.parquet"
    pl.read_parquet(path).with_columns(age=pl.lit(40.0)).write_parquet(path)


def spoil_splits(cohort: Cohort) -> None:
    Splits.make(cohort.subjects, seed=1).save(cohort.path / "splits.json")


@pytest.mark.parametrize(("spoil", "what"), [(spoil_table, "cohort"), (spoil_splits, "splits")])
def test_resuming_on_a_changed_cohort_is_refused(tmp_path, spoil, what):
    cohort = tiny_cohort(tmp_path / "cohort")
    options = settings("brainlm", steps=1)
    run(options, cohort, tmp_path / "run")
    spoil(cohort)
    message = rf"another state of the cohort \({what} [0-9a-f]{{16}}, now [0-9a-f]{{16}}\)"
    with pytest.raises(CheckpointError, match=message) as caught:
        run(options, Cohort.open(cohort.path), tmp_path / "run")
    assert "--restart" in str(caught.value)
    assert "--out" in str(caught.value)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_spoils_a_checkpoint(cohort, tmp_path):
    options = settings("brainlm", lr=1e30, warmup_share=0.0, steps=20, run={"save_every": 1})
    with pytest.raises(NonFiniteError, match=r"not finite at step \d+.*lower --lr") as caught:
        run(options, cohort, tmp_path)
    assert "\n" not in str(caught.value)
    step = int(str(caught.value).split("at step ")[1].split()[0].strip(",:"))
    newest = checkpoint.newest(tmp_path)
    assert checkpoint.load_state(newest)["step"] == step
    assert all(value.isfinite().all() for value in checkpoint.load_weights(newest).values())


def test_the_rank_the_step_and_the_recordings_of_a_bad_loss_are_named():
    good, bad = torch.tensor(1.0), torch.tensor(float("nan"))

    def rows() -> tuple[list[int], list[int]]:
        return list(range(12, 0, -1)), [3]

    assert not agree(good, good, 7, Ranks(), rows=rows)
    assert agree(good, good, 7, Ranks(), rows=rows, stop=True)
    with pytest.raises(
        NonFiniteError,
        match=r"the loss is not finite at step 7 on rank\(s\) \[0\], with recordings "
        r"\[1, 2, 3, 4, 5, 6, 7, 8\] and 4 more \(rows .*; of these, \[3\] have values that",
    ):
        agree(bad, bad, 7, Ranks(), rows=rows)
    with pytest.raises(NonFiniteError, match="the gradient is not finite at step 7, though the"):
        agree(good, good / 0.0, 7, Ranks(), rows=rows)


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused_before_anything_is_written(
    cohort, tmp_path
):
    message = "optim.batch_size=4 does not divide over 3 processes: use a multiple of 3"
    with pytest.raises(UserError, match=message):
        pretrain.pretrain(settings("brainlm"), cohort, tmp_path / "run", ranks=Ranks(world_size=3))
    assert not (tmp_path / "run").exists()


def test_short_recordings_are_counted_and_left_out(tmp_path, capsys):
    scanned = [(i, 48 if i < 5 else 64) for i in range(20)]
    cohort = tiny_cohort(tmp_path / "cohort", n_people=20, scanned=scanned)
    run(settings("brainlm", steps=1), cohort, tmp_path / "run")
    assert "5 of 20 recordings are shorter than 64 TRs" in capsys.readouterr().err
    state = checkpoint.load_state(checkpoint.newest(tmp_path / "run"))
    short = {f"{i:03d}" for i in range(5)}
    assert state["n_recordings"] == len(set(cohort.splits().train) - short)
    assert state["conditioning"]["standardiser"]["n_recordings"] == state["n_recordings"]


def test_a_cohort_of_short_recordings_alone_is_refused(tmp_path):
    scanned = [(i, 48) for i in range(20)]
    cohort = tiny_cohort(tmp_path / "cohort", n_people=20, scanned=scanned)
    with pytest.raises(UserError, match="0 training and 0 validation recordings of at least 64"):
        run(settings("brainlm"), cohort, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", MODELS)
def test_missing_parcels_do_not_spoil_training(tmp_path, model):
    cohort = tiny_cohort(tmp_path / "cohort", missing=0.2)
    assert np.isnan(cohort.recordings.read(0)).any()
    last = run(settings(model, steps=3), cohort, tmp_path / "run")
    assert all(value.isfinite().all() for value in checkpoint.load_weights(last).values())
    for row in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert np.isfinite(list(row.values())).all()


def test_the_image_family_trains_too(cohort, tmp_path):
    last = run(settings("brainlm", encoder=IMAGE, steps=2), cohort, tmp_path)
    assert checkpoint.load_state(last)["config_class"] == "BrainLMImageConfig"
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert "masked_r2" not in rows[0]  # patches span parcels there
    assert rows[-1]["loss"] > 0.0
    assert rows[-1]["grad_norm"] > 0.0


def test_brainlm_without_coordinates_is_refused(tmp_path):
    atlas = dataclasses.replace(ATLAS, xyz_mm=None)
    cohort = tiny_cohort(tmp_path / "cohort", atlas=atlas)
    with pytest.raises(UserError, match="'sixteen' has no coordinates, which BrainLM reads"):
        run(settings("brainlm"), cohort, tmp_path / "run")
    run(settings("brainjepa", steps=1), cohort, tmp_path / "run")


def test_an_encoder_of_another_atlas_is_refused(cohort, tmp_path):
    encoder = dataclasses.replace(ENCODERS["brainlm"], n_parcels=424)
    message = "has 16 parcels but the encoder 'brainlm' expects 424.*--preset tiny"
    with pytest.raises(UserError, match=message):
        run(settings("brainlm", encoder=encoder), cohort, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unwritable_run_folder_is_one_line(cohort, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*Not a directory"):
        run(settings("brainlm"), cohort, tmp_path / "file" / "run")


def test_an_unknown_standardiser_names_the_nearest(cohort, tmp_path):
    options = dataclasses.replace(
        settings("brainlm"), data=DataConfig(standardiser="recording-score")
    )
    with pytest.raises(UserError, match="Did you mean 'recording-zscore'"):
        run(options, cohort, tmp_path / "run")


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (OptimConfig, {"steps": 0}),
        (OptimConfig, {"batch_size": 0}),
        (OptimConfig, {"lr": -1.0}),
        (OptimConfig, {"lr": float("nan")}),
        (OptimConfig, {"clip": -1.0}),
        (OptimConfig, {"warmup_share": 1.5}),
        (OptimConfig, {"lr_start_share": -0.1}),
        (OptimConfig, {"epochs": -1.0}),
        (OptimConfig, {"steps": 5, "epochs": 5.0}),
        (OptimConfig, {"betas": (0.9, 1.0)}),
        (OptimConfig, {"momentum": (0.9, 1.1)}),
        (RunConfig, {"seed": -1}),
        (WatchConfig, {"log_every": 0}),
        (WatchConfig, {"validate_every": 0}),
        (WatchConfig, {"save_every": 0}),
        (WatchConfig, {"keep_last": 0}),
        (WatchConfig, {"keep_every": -1}),
        (WatchConfig, {"n_validation": 0}),
        (WatchConfig, {"n_probe": 7}),
        (WatchConfig, {"watchdog_s": -1.0}),
        (EfficiencyConfig, {"accumulation": 0}),
        (EfficiencyConfig, {"prefetch": 0}),
        (EfficiencyConfig, {"workers": 0}),
        (EfficiencyConfig, {"threads": -1}),
    ],
)
def test_settings_out_of_range_are_refused_by_name(make, values):
    with pytest.raises(UserError, match=f"^{next(iter(values))}=.*expected"):
        make(**values)


@pytest.mark.parametrize("model", MODELS)
def test_weights_decay_and_biases_norms_and_tokens_do_not(cohort, model):
    encoder = create(model, **config.to_dict(ENCODERS[model]))
    objective = objective_for(encoder, cohort.atlas)
    grouped = optimiser.groups(objective)
    groups = {group["decays"]: {id(p) for p in group["params"]} for group in grouped}
    names = {True: set(), False: set()}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            (decays,) = [key for key, ids in groups.items() if id(parameter) in ids]
            names[decays].add(name)
    assert len(names[True]) + len(names[False]) == len(groups[True]) + len(groups[False])
    assert names[True]
    assert not [name for name in names[True] if "norm" in name or "bias" in name or "token" in name]
    assert not [
        name for name in names[False]
        if not any(word in name for word in ("norm", "bias", "token"))
    ]  # fmt: skip


def test_the_optimiser_decays_one_group_alone(whole):
    _, _, last = whole
    groups = checkpoint.load_optimizer(last)["param_groups"]
    assert {group["decays"]: group["weight_decay"] for group in groups} == {True: 0.05, False: 0.0}


def test_the_target_encoder_follows_the_encoder_by_its_momentum(cohort, tmp_path):
    run(settings("brainjepa", steps=1, momentum=(0.75, 0.75)), cohort, tmp_path)
    before = load_pretrained(tmp_path, untrained=True).module.state_dict()
    after = load_pretrained(tmp_path).module.state_dict()
    moved = 0
    for key in [key for key in after if key.startswith("target_encoder.")]:
        online = after[key.removeprefix("target_")]
        torch.testing.assert_close(after[key], 0.75 * before[key] + 0.25 * online)
        moved += not torch.equal(after[key], before[key])
    assert moved > 5


def test_masked_r2_of_known_predictions(monkeypatch):
    encoder = create("brainlm", **config.to_dict(ENCODERS["brainlm"]))
    assert isinstance(encoder, BrainLM)
    objective = BrainLMObjective(encoder, ATLAS)
    x = torch.randn(3, N_PARCELS, 64, generator=torch.Generator().manual_seed(0)) + 5.0
    draws = objective.draw(3, seed=0, step=0)
    truth = x.unflatten(-1, (-1, 16))
    hidden = encoder(x, objective.xyz, noise=draws[0]).mask
    mean = truth.flatten(1, 2)[hidden.bool()].mean()
    for logits, expected in (
        (truth, 1.0),
        (torch.full_like(truth, float(mean)), 0.0),
        (2 * mean - truth, -3.0),
    ):
        out = MaskedOutput(torch.tensor(0.0), logits, x, hidden, hidden)
        monkeypatch.setattr(encoder, "forward", lambda *_, out=out, **__: out)
        assert objective.diagnose(x, draws)["masked_r2"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_draws_are_pure_functions_of_seed_and_step(model):
    encoder = create(model, **config.to_dict(ENCODERS[model]))
    objective = objective_for(encoder, ATLAS)

    def draws(seed: int, step: int) -> list[torch.Tensor]:
        return objective.draw(4, seed=seed, step=step)

    before = torch.random.get_rng_state()
    one = draws(1, 2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(map(torch.equal, one, draws(1, 2)))
    for other in (draws(2, 1), draws(1, 3), draws(0, 2)):
        assert not all(map(torch.equal, one, other))


def test_a_mask_ratio_of_zero_has_nothing_to_learn(cohort, tmp_path):
    encoder = dataclasses.replace(ENCODERS["brainlm"], mask_ratio=0.0)
    with pytest.raises(UserError, match="mask_ratio=0 hides nothing"):
        run(settings("brainlm", encoder=encoder), cohort, tmp_path)


def test_the_target_encoders_momentum_is_a_ramp_over_the_optimiser_steps():
    optim = OptimConfig(steps=4, momentum=(0.5, 1.0))
    assert [target_momentum(optim, step) for step in (0, 1, 3)] == [0.625, 0.75, 1.0]


def test_the_references_ramp_ends_where_the_reference_ends():
    """One entry of a ramp of 300 epochs x 1000 batches is taken at each of 37,500 steps."""
    optim = OptimConfig(steps=37_500, momentum=(0.996, 1.0), momentum_ramp="reference")
    theirs = np.linspace(0.996, 1.0, 300 * 1000 + 1)
    for step in (0, 1, 17, 20_000, 37_499):
        assert target_momentum(optim, step) == pytest.approx(theirs[step], rel=1e-12)
    assert round(target_momentum(optim, 37_499), 4) == 0.9965


def test_a_single_validation_recording_has_no_spread_and_none_is_reported(cohort, tmp_path):
    options = settings("brainjepa", run={"n_validation": 1})
    run(options, cohort, tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert "loss_of_mean_target" in rows[0]
    assert all("feature_std" not in row and "effective_rank" not in row for row in rows)
