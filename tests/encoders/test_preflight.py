"""The pre-flight check speaks up for each way in which a cohort can differ, and only then."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from brainfusion.data.atlas import Atlas
from brainfusion.data.cohort import Cohort, write_cohort_tables
from brainfusion.data.conditioning import InputConditioning
from brainfusion.data.importers import import_cohort
from brainfusion.data.recordings import RecordingWriter
from brainfusion.data.standardise import Standardiser
from brainfusion.encoders import create
from brainfusion.encoders.checkpoints import Pretrained
from brainfusion.encoders.preflight import preflight
from brainfusion.runtime import config
from tests.encoders.tiny_cohort import ENCODERS
from tests.real_data import connattractor_config

N_PARCELS, N_TRS, TR_S = 32, 240, 0.8
KINDS = ("recording-zscore", "parcel-zscore", "brainlm-robust", "none")
Change = Callable[[np.ndarray], np.ndarray]


def smooth(rng: np.random.Generator, n: int, seconds: float = 3.0) -> np.ndarray:
    """[n, N_TRS]: noise of a given time scale, unit variance."""
    lags = np.arange(-24, 25) * TR_S / seconds
    kernel = np.exp(-0.5 * lags**2)
    noise = rng.normal(size=(n, N_TRS + 48))
    rows = [np.convolve(row, kernel / np.linalg.norm(kernel), mode="valid") for row in noise]
    return np.stack(rows)


@functools.cache
def person(seed: int) -> np.ndarray:
    """Raw BOLD [p, t]: networks, a global signal, noise, a level and a scale of each parcel."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng([1, seed])
    networks = fixed.normal(size=(N_PARCELS, 5))
    level = fixed.uniform(800, 1200, size=(N_PARCELS, 1))
    scale = fixed.uniform(4, 9, size=(N_PARCELS, 1))
    own = networks + 0.3 * rng.normal(size=networks.shape)
    bold = own @ smooth(rng, 5) + rng.uniform(0.6, 1.2) * smooth(rng, 1)
    bold = bold + rng.uniform(0.8, 1.2) * rng.normal(size=bold.shape)
    return (level + rng.uniform(0.8, 1.25) * scale * bold).astype(np.float32)


def cohort_of(path: Path, seeds: range, change: Change | None = None, tr_s=TR_S) -> Cohort:
    ids = [f"{seed:03d}" for seed in seeds]
    atlas = Atlas(name="some", parcels=tuple(f"p{i}" for i in range(N_PARCELS)))
    table = pl.DataFrame({"subject": ids})
    write_cohort_tables(path, name="some", origin="imported", subjects=table, atlas=atlas)
    with RecordingWriter(path / "recordings", n_parcels=N_PARCELS) as writer:
        for seed, subject in zip(seeds, ids, strict=True):
            bold = person(seed) if change is None else change(person(seed))
            writer.add(bold, recording=f"r{subject}", subject=subject, tr_s=tr_s)
    return Cohort.open(path)


def encoder_for(cohort: Cohort, kind: str, *, tr_s: float | None = TR_S) -> Pretrained:
    """A checkpoint as it comes back from disk, of an encoder trained on the whole cohort."""
    rows = range(len(cohort.recordings))
    standardiser = Standardiser.fit(kind, cohort.recordings, rows, cohort="some")
    made = InputConditioning(
        standardiser=standardiser, tr_s=tr_s, resampling="linear", statistics=None
    )
    made = dataclasses.replace(made, statistics=made.measure(cohort.recordings, rows))
    return Pretrained(
        model="brainlm",
        module=create("brainlm", **config.to_dict(ENCODERS["brainlm"])),
        conditioning=InputConditioning.from_dict(made.to_dict()),
        atlas=cohort.atlas,
        state={},
        path=cohort.path,
        hash="",
    )


def warnings_for(pretrained: Pretrained, cohort: Cohort) -> list[str]:
    found = preflight(
        pretrained, cohort, np.arange(len(cohort.recordings)), np.arange(cohort.atlas.n_parcels)
    )
    assert not [text for text in found if "\n" in text or text[-1] not in ".?"]
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Pretrained]:
    cohort = cohort_of(tmp_path_factory.mktemp("training"), range(24))
    return {kind: encoder_for(cohort, kind) for kind in KINDS}


def centred(bold: np.ndarray) -> np.ndarray:
    return bold - bold.mean(axis=1, keepdims=True)


def zscored(bold: np.ndarray) -> np.ndarray:
    return centred(bold) / bold.std(axis=1, keepdims=True)


def without_global_signal(bold: np.ndarray) -> np.ndarray:
    x = centred(bold)
    signal = zscored(x).mean(axis=0)
    return bold - np.outer(x @ signal / (signal @ signal), signal)


def low_passed(bold: np.ndarray) -> np.ndarray:
    spectrum = np.fft.rfft(bold, axis=1)
    spectrum[:, np.fft.rfftfreq(bold.shape[1], TR_S) > 0.1] = 0
    return np.fft.irfft(spectrum, n=bold.shape[1], axis=1)


def with_missing(bold: np.ndarray) -> np.ndarray:
    bold = bold.copy()
    bold[:5] = np.nan
    return bold


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_people", [1, 4, 24])
def test_other_people_of_the_same_kind_raise_no_warning(trained, tmp_path, kind, n_people):
    for first in (100, 200, 300):
        cohort = cohort_of(tmp_path / str(first), range(first, first + n_people))
        assert warnings_for(trained[kind], cohort) == []


SHIFTED = r"correlates -?0\.\d\d with .* but 0\.9\d if each row is the parcel 1 before its name"
DIFFERENT: list[tuple[str, Change, tuple[str, ...], str]] = [
    ("shifted", lambda x: np.roll(x, 1, axis=0), KINDS, SHIFTED),
    (
        "permuted",
        lambda x: x[np.random.default_rng(0).permutation(N_PARCELS)],
        KINDS,
        r"connectivity correlates -?0\.[0-3]\d with that of training, where 0\.9\d is usual",
    ),
    (
        "another unit",
        lambda x: x / 100,
        ("brainlm-robust", "none"),
        r"the standard deviation over time is 0\.\d+ in this cohort but .* another unit",
    ),
    (
        "standardised before",
        zscored,
        ("recording-zscore", "none"),
        r"the share of the variance .* is 0 in this cohort but 0\.9\d* .* time means removed",
    ),
    (
        "standardised before, scaled again",
        zscored,
        ("brainlm-robust",),
        r"the standard deviation over time is 0\.\d+ in this cohort but .* data scaled before",
    ),
    (
        "twice the TR that is stated",
        lambda x: x[:, ::2],
        KINDS,
        r"the correlation of a frame with the (next|fourth after it) is -?0\.\d+ .* another TR",
    ),
    (
        "low-pass filtered",
        low_passed,
        KINDS,
        r"the correlation of a frame with the next is 0\.9\d* in this cohort but 0\.[5-8]",
    ),
    (
        "global signal removed",
        without_global_signal,
        KINDS,
        r"the mean correlation between parcels is -?0\.0\d+ in this cohort but 0\.[12]\d* in",
    ),
    (
        "parcels missing",
        with_missing,
        KINDS,
        r"the share of parcels without signal is 0\.156 in this cohort but 0 in training",
    ),
]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        pytest.param(change, kind, message, id=f"{name}-{kind}")
        for name, change, kinds, message in DIFFERENT
        for kind in kinds
    ],
)
def test_a_difference_is_named_with_both_numbers(trained, tmp_path, change, kind, message):
    found = warnings_for(trained[kind], cohort_of(tmp_path, range(100, 116), change))
    assert [text for text in found if re.search(message, text)], found


@pytest.mark.parametrize("kind", KINDS)
def test_global_signal_left_in_is_caught_too(tmp_path, kind):
    pretrained = encoder_for(
        cohort_of(tmp_path / "training", range(24), without_global_signal), kind
    )
    clean = cohort_of(tmp_path / "clean", range(100, 116), without_global_signal)
    assert warnings_for(pretrained, clean) == []
    [text] = warnings_for(pretrained, cohort_of(tmp_path / "other", range(100, 116)))
    assert "the mean correlation between parcels is 0.1" in text
    assert "the global signal removed in one and left in the other?" in text


def test_a_unit_that_the_standardiser_takes_away_is_no_difference(trained, tmp_path):
    cohort = cohort_of(tmp_path, range(100, 116), lambda x: x * 1000)
    assert warnings_for(trained["recording-zscore"], cohort) == []


def test_parcels_that_were_put_into_order_by_name_are_fine(trained, tmp_path):
    rows = np.random.default_rng(0).permutation(N_PARCELS)
    cohort = cohort_of(tmp_path, range(100, 116), lambda x: x[rows])
    found = preflight(trained["recording-zscore"], cohort, np.arange(16), np.argsort(rows))
    assert found == []


def test_a_parcel_that_the_cohort_lacks_counts_as_without_signal(trained, tmp_path):
    order = np.where(np.arange(N_PARCELS) < 28, np.arange(N_PARCELS), -1)
    cohort = cohort_of(tmp_path, range(100, 116))
    [text] = preflight(trained["recording-zscore"], cohort, np.arange(16), order)
    assert "the share of parcels without signal is 0.125 in this cohort but 0 in training" in text


def test_a_cohort_at_another_tr_is_resampled_and_stays_silent(trained, tmp_path):
    """The same people scanned twice as fast, and the encoder's conditioning halves it again."""
    double = np.repeat  # each frame twice: nothing is lost on the way back
    cohort = cohort_of(tmp_path, range(100, 116), lambda x: double(x, 2, axis=1), tr_s=TR_S / 2)
    assert warnings_for(trained["recording-zscore"], cohort) == []


@pytest.mark.parametrize(("tr_s", "text"), [(1.6, "has a TR of 1.6 s"), (None, "not known")])
def test_an_encoder_that_does_not_resample_warns_of_another_tr(tmp_path, tr_s, text):
    pretrained = encoder_for(cohort_of(tmp_path / "training", range(16)), "none", tr_s=None)
    found = warnings_for(pretrained, cohort_of(tmp_path / "other", range(100, 116), tr_s=tr_s))
    assert len(found) == 1
    assert text in found[0]
    assert "trained at 0.8 s" in found[0]


def test_what_cannot_be_compared_is_said(trained, tmp_path):
    few = encoder_for(cohort_of(tmp_path / "few", range(3)), "none")
    [text] = warnings_for(few, cohort_of(tmp_path / "other", range(100, 104)))
    assert "trained on 3 recordings, under the 8" in text
    bare = dataclasses.replace(
        few, conditioning=dataclasses.replace(few.conditioning, statistics=None)
    )
    [text] = warnings_for(bare, cohort_of(tmp_path / "another", range(100, 104)))
    assert "holds no statistics of its training recordings" in text


def test_training_without_any_connectivity_is_not_compared_by_it(tmp_path):
    def noise(x: np.ndarray) -> np.ndarray:
        return np.random.default_rng(int(x[0, 0] * 1e3)).normal(size=x.shape)

    pretrained = encoder_for(cohort_of(tmp_path / "training", range(16), noise), "none")
    statistics = pretrained.conditioning.statistics
    assert statistics is not None
    expected = statistics.expected_likeness(16)
    assert math.isnan(expected) or expected < 0.3
    assert warnings_for(pretrained, cohort_of(tmp_path / "other", range(100, 116), noise)) == []


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Cohort:
    settings = connattractor_config(tmp_path_factory.mktemp("real") / "cohort")
    import_cohort(settings)
    return Cohort.open(settings.out)


@pytest.mark.parametrize("kind", ["recording-zscore", "brainlm-robust"])
def test_real_recordings_of_other_people_pass_and_shifted_ones_do_not(people, kind):
    half = np.arange(len(people.recordings)) < 32
    train, other = np.flatnonzero(half), np.flatnonzero(~half)
    standardiser = Standardiser.fit(kind, people.recordings, train, cohort="X")
    made = InputConditioning(
        standardiser=standardiser, tr_s=2.0, resampling="linear", statistics=None
    )
    made = dataclasses.replace(made, statistics=made.measure(people.recordings, train))
    pretrained = dataclasses.replace(encoder_of(people), conditioning=made)
    order = np.arange(people.atlas.n_parcels)
    assert preflight(pretrained, people, other, order) == []
    found = preflight(pretrained, people, other, np.roll(order, 1))
    assert [text for text in found if "the parcel 1 before its name" in text], found


def encoder_of(cohort: Cohort) -> Pretrained:
    """A checkpoint without conditioning."""
    return Pretrained(
        model="brainlm",
        module=create("brainlm", **config.to_dict(ENCODERS["brainlm"])),
        conditioning=None,  # type: ignore[arg-type]
        atlas=cohort.atlas,
        state={},
        path=cohort.path,
        hash="",
    )
