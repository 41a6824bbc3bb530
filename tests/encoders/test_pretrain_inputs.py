"""What pretraining reads: conditioned recordings, cut into windows after that."""

import dataclasses
import functools
import shutil
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from brainfusion.data.cohort import Cohort
from brainfusion.data.input_statistics import MEASURES
from brainfusion.data.resample import resample
from brainfusion.data.standardise import KINDS, Standardiser
from brainfusion.data.windows import training_windows
from brainfusion.encoders.checkpoints import load_pretrained
from brainfusion.encoders.pretrain import pretrain
from brainfusion.encoders.pretrain_config import DataConfig
from brainfusion.encoders.pretrain_inputs import PretrainInputs
from brainfusion.runtime import checkpoint
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import CheckpointError, UserError
from tests.encoders.tiny_cohort import N_PARCELS, N_TRS, settings, tiny_cohort

LONG = [(i, 200 + i) for i in range(20)]


def options(model: str = "brainlm", *, data: dict[str, Any] | None = None, **more: Any):
    return dataclasses.replace(settings(model, **more), data=DataConfig(**(data or {})))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Cohort:
    return tiny_cohort(tmp_path_factory.mktemp("cohort"), n_people=20, scanned=LONG)


def batches(inputs: PretrainInputs, *, n: int = 40, world_size: int = 1) -> list[np.ndarray]:
    return [
        inputs.batch(n, seed=0, step=3, ranks=Ranks(rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]


def holds(whole: np.ndarray, window: np.ndarray) -> bool:
    """Whether `window` is a run of frames of `whole`."""
    n = whole.shape[1] - window.shape[1] + 1
    return any(np.array_equal(whole[:, i : i + window.shape[1]], window) for i in range(n))


@pytest.mark.parametrize("resampling", ["linear", "nearest"])
def test_windows_are_cut_from_recordings_that_were_standardised_and_resampled(cohort, resampling):
    inputs = PretrainInputs.fit(
        options(data={"tr_s": 1.5, "resampling": resampling, "divide_by": 3.0}), cohort
    )
    assert inputs.conditioning.tr_s == 1.5
    whole = {}
    for row in inputs.train_rows:
        scaled = inputs.conditioning.standardiser.transform(cohort.recordings.read(row))
        whole[row] = resample(scaled, tr_s=2.0, to_tr_s=1.5, method=resampling)
        assert scaled.std() == pytest.approx(1 / 3, rel=1e-3)
    [batch] = batches(inputs)
    assert batch.shape == (40, N_PARCELS, N_TRS)
    for window in batch:
        assert any(holds(bold, window) for bold in whole.values())
    row = inputs.validation_rows[0]
    scaled = inputs.conditioning.standardiser.transform(cohort.recordings.read(row))
    expected = resample(scaled, tr_s=2.0, to_tr_s=1.5, method=resampling)[:, :N_TRS]
    np.testing.assert_array_equal(inputs.first_window(row), expected)


@pytest.mark.parametrize("frames", ["consecutive", "brainjepa"])
@pytest.mark.parametrize("kind", KINDS)
def test_windows_at_their_own_tr_are_to_the_bit_those_of_whole_recordings(tmp_path, kind, frames):
    """Also with parcels missing, at a second visit, and where resampling has nothing to do."""
    cohort = tiny_cohort(tmp_path, n_people=20, scanned=LONG, missing=0.2)
    data: dict[str, Any] = {"standardiser": kind, "frames": frames, "divide_by": 3.0}
    inputs = PretrainInputs.fit(options(data=data), cohort)
    cut = functools.partial(
        training_windows, cohort.recordings, inputs.train_rows, window_trs=N_TRS, batch_size=40,
        seed=0, frames=frames,
    )  # fmt: skip
    for step in (3, 3, 4):
        expected = cut(
            step=step, transform=lambda bold, _: inputs.conditioning.standardiser.transform(bold)
        )
        got = inputs.batch(40, seed=0, step=step, ranks=Ranks())
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, expected)
    if frames == "consecutive":
        same = PretrainInputs.fit(options(data=data | {"tr_s": 2.0}), cohort)
        np.testing.assert_array_equal(same.batch(40, seed=0, step=4, ranks=Ranks()), got)


def test_a_recording_is_measured_once(cohort, monkeypatch):
    inputs, measured = PretrainInputs.fit(options(), cohort), []
    scale_of = Standardiser.scale_of

    def counted(self: Standardiser, bold: np.ndarray) -> Any:
        measured.append(bold.shape)
        return scale_of(self, bold)

    monkeypatch.setattr(Standardiser, "scale_of", counted)
    for step in range(5):  # 200 windows of 14 recordings
        inputs.batch(40, seed=0, step=step, ranks=Ranks())
    inputs.first_window(inputs.train_rows[0])
    assert len(measured) == len(inputs.train_rows)


@pytest.mark.parametrize("data", [{"tr_s": 0.9}, {"frames": "brainjepa"}])
def test_batches_are_pure_and_ranks_share_them(cohort, data):
    inputs = PretrainInputs.fit(options(data=data), cohort)
    [whole], [again] = batches(inputs), batches(PretrainInputs.fit(options(data=data), cohort))
    np.testing.assert_array_equal(whole, again)
    for rank, part in enumerate(batches(inputs, world_size=2)):
        np.testing.assert_array_equal(part, whole[rank::2])


def test_brainjepas_frames_are_every_third_or_so_and_the_checkpoint_says_their_tr(cohort):
    inputs = PretrainInputs.fit(options(data={"frames": "brainjepa"}), cohort)
    assert inputs.conditioning.tr_s == pytest.approx(2.0 * 191 / 63)
    assert inputs.conditioning.resampling == "nearest"
    window = inputs.first_window(inputs.validation_rows[0])
    scaled = inputs.conditioning.standardiser.transform(
        cohort.recordings.read(inputs.validation_rows[0])
    )
    np.testing.assert_array_equal(
        window, scaled[:, (np.arange(64) * (191 / 63) + 1e-9).astype(int)]
    )
    # What embedding feeds the encoder has the same stride; it rounds where this rule cuts.
    embedded = inputs.conditioning.prepare(
        cohort.recordings.read(inputs.validation_rows[0]), tr_s=2.0
    )
    same = (embedded[:, :64] == window).all(axis=0)
    assert 0.4 < same.mean() < 0.7
    statistics = inputs.conditioning.statistics
    assert statistics is not None
    assert statistics.tr_s == inputs.conditioning.tr_s


def test_the_checkpoint_keeps_the_cohorts_own_tr(cohort):
    conditioning = PretrainInputs.fit(options(), cohort).conditioning
    assert (conditioning.tr_s, conditioning.resampling) == (2.0, "linear")
    assert conditioning.statistics is not None
    assert conditioning.statistics.n_recordings == 14


def spoil_trs(cohort: Cohort, values: list[float | None]) -> Cohort:
    path = cohort.path / "recordings" / "index.parquet"
    index = pl.read_parquet(path)
    found = (values * len(index))[: len(index)]
    index.with_columns(tr_s=pl.Series(found, dtype=pl.Float64)).write_parquet(path)
    return Cohort.open(cohort.path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([2.0, 0.8], "recordings have TRs from 0.8 to 2 s: each keeps its own; --tr-s resamples"),
        ([None], "recordings have no TR: each keeps its own"),
        ([2.0, None], "recordings have a TR that is not known in 10 of 20 cases: each keeps"),
    ],
)
def test_recordings_without_a_common_tr_keep_theirs_and_it_is_said(tmp_path, capsys, values, said):
    cohort = spoil_trs(tiny_cohort(tmp_path, n_people=20, scanned=LONG), values)
    inputs = PretrainInputs.fit(options(), cohort)
    assert said in capsys.readouterr().err
    assert inputs.conditioning.tr_s is None
    [batch] = batches(inputs)
    assert np.isfinite(batch).all()


def test_recordings_of_several_trs_are_resampled_to_one(tmp_path, capsys):
    cohort = spoil_trs(tiny_cohort(tmp_path, n_people=20, scanned=LONG), [2.0, 0.8])
    inputs = PretrainInputs.fit(options(data={"tr_s": 1.0}), cohort)
    said = "recordings are resampled from 0.8 to 2 s to 1 s (linear, no anti-alias filter)"
    assert said in capsys.readouterr().err
    for row in inputs.validation_rows:
        tr_s = 2.0 if row % 2 == 0 else 0.8
        bold = cohort.recordings.read(row)
        expected = inputs.conditioning.prepare(bold, tr_s=tr_s)
        np.testing.assert_array_equal(inputs.first_window(row), expected[:, :N_TRS])
        assert expected.shape[1] == int((bold.shape[1] - 1) * tr_s + 1e-6) + 1


@pytest.mark.parametrize(
    ("values", "data", "message"),
    [
        (
            [2.0, None, None, None],
            {"tr_s": 1.0},
            "15 of 20 recordings of the cohort 'tiny' have a TR that is not known, which tr_s=1 "
            "needs: import them again with --tr-s",
        ),
        ([None], {"frames": "brainjepa"}, "which frames='brainjepa' needs: import them again"),
        ([2.0, 0.8], {"frames": "brainjepa"}, "have TRs from 0.8 to 2 s, but frames='brainjepa'"),
        ([2.0], {"tr_s": 8.0}, "0 training and 0 validation recordings of at least 64 TRs at 8 s"),
        ([2.0], {"standardiser": "recording-score"}, "Did you mean 'recording-zscore'"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(tmp_path, values, data, message):
    cohort = spoil_trs(tiny_cohort(tmp_path / "c", n_people=20, scanned=LONG), values)
    with pytest.raises(UserError) as caught:
        pretrain(options(data=data), cohort, tmp_path / "run", ranks=Ranks())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_recordings_too_short_for_the_span_of_a_window_are_counted(tmp_path, capsys):
    scanned = [(i, 150 if i < 5 else 200) for i in range(20)]
    cohort = tiny_cohort(tmp_path, n_people=20, scanned=scanned)
    PretrainInputs.fit(options(data={"frames": "brainjepa"}), cohort)
    assert "5 of 20 recordings are shorter than 192 TRs and are left" in capsys.readouterr().err
    PretrainInputs.fit(options(data={"tr_s": 5.0}), cohort)
    assert "5 of 20 recordings are shorter than 64 TRs at 5 s and" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tr_s": 0.0}, "tr_s=0.0: expected the seconds between frames"),
        ({"tr_s": 735.0}, "a TR in milliseconds is divided by 1000"),
        ({"tr_s": 1.0, "frames": "brainjepa"}, "tr_s=1 with frames='brainjepa'.*leave one of"),
        ({"divide_by": 0.0}, "divide_by=0.0: expected a number above zero"),
    ],
)
def test_settings_that_cannot_be_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**values)


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ("brainlm", {"tr_s": 1.3, "divide_by": 2.0}),
        ("brainjepa", {"frames": "brainjepa", "standardiser": "parcel-zscore"}),
    ],
)
def test_a_resumed_run_on_resampled_recordings_is_bit_identical(cohort, tmp_path, model, data):
    wanted = options(model, data=data, steps=4)
    whole = pretrain(wanted, cohort, tmp_path / "whole", ranks=Ranks())
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(checkpoint.newest(tmp_path / "run"))  # back to step 2
    (tmp_path / "run" / "summary.json").unlink()
    resumed = pretrain(wanted, cohort, tmp_path / "run", ranks=Ranks())
    assert resumed.name == whole.name == "step-0000004"
    one, two = (load_file(path / "model.safetensors") for path in (whole, resumed))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]), key
    assert (
        checkpoint.load_state(whole)["conditioning"]
        == (checkpoint.load_state(resumed)["conditioning"])
    )
    other = dataclasses.replace(wanted, data=DataConfig(**{**data, "divide_by": 7.0}))
    with pytest.raises(CheckpointError, match=r"data.divide_by: [\d.]+ -> 7.0"):
        pretrain(other, cohort, tmp_path / "run", ranks=Ranks())


def test_the_conditioning_travels_with_the_checkpoint(cohort, tmp_path):
    wanted = options(data={"tr_s": 1.5, "standardiser": "brainlm-robust"}, steps=1)
    pretrain(wanted, cohort, tmp_path, ranks=Ranks())
    fitted = PretrainInputs.fit(wanted, cohort).conditioning
    loaded = load_pretrained(tmp_path).conditioning
    assert loaded.to_dict() == fitted.to_dict()
    bold = cohort.recordings.read(0)
    np.testing.assert_array_equal(loaded.prepare(bold, tr_s=2.0), fitted.prepare(bold, tr_s=2.0))
    assert loaded.statistics is not None
    assert loaded.statistics.mean.keys() == MEASURES.keys()
    state = checkpoint.load_state(checkpoint.newest(tmp_path))
    assert not set(cohort.subjects["subject"]) & set(str(state["conditioning"]).split("'"))
