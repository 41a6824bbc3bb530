import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainfusion.data.resample import resample, resampled_length, sample_frames
from brainfusion.runtime.errors import UserError

GOLDENS = Path(__file__).parents[1] / "goldens"


def test_linear_resampling_lies_on_the_straight_line_between_frames():
    bold = np.array([[0.0, 2.0, 4.0, 10.0], [1.0, 1.0, 5.0, -3.0]])
    got = resample(bold, tr_s=2.0, to_tr_s=1.5)  # at 0, 1.5, 3, 4.5 and 6 s
    expected = [[0.0, 1.5, 3.0, 5.5, 10.0], [1.0, 1.0, 3.0, 3.0, -3.0]]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert got.dtype == np.float32


def test_nearest_resampling_takes_whole_frames_and_of_two_the_later():
    bold = np.arange(6.0)[None]
    np.testing.assert_array_equal(
        resample(bold, tr_s=1.0, to_tr_s=1.5, method="nearest"), [[0, 2, 3, 5]]
    )
    np.testing.assert_array_equal(
        resample(bold, tr_s=2.0, to_tr_s=1.25, method="nearest")[0], [0, 1, 1, 2, 3, 3, 4, 4, 5]
    )


@pytest.mark.parametrize("method", ["linear", "nearest"])
@pytest.mark.parametrize(("tr_s", "to_tr_s"), [(0.72, 0.735), (2.0, 0.735), (0.735, 2.0)])
def test_resampling_matches_numpys_interpolation(method, tr_s, to_tr_s):
    bold = np.random.default_rng(0).normal(size=(3, 150))
    got = resample(bold, tr_s=tr_s, to_tr_s=to_tr_s, method=method)
    times, at = np.arange(150) * tr_s, np.arange(got.shape[1]) * to_tr_s
    assert times[-1] - to_tr_s < at[-1] <= times[-1] + 1e-9
    for row, values in zip(got, bold, strict=True):
        if method == "linear":
            expected = np.interp(at, times, values)
        else:
            later = 1e-6 * np.arange(150)[:, None]  # of two equally near frames
            expected = values[(np.abs(times[:, None] - at) - later).argmin(axis=0)]
        np.testing.assert_allclose(row, expected, atol=1e-5)


@pytest.mark.parametrize(("tr_s", "to_tr_s"), [(0.72, 0.735), (2.0, 0.735), (0.735, 2.0)])
def test_a_slow_sine_stays_that_sine(tr_s, to_tr_s):
    hz = 0.03
    wave = np.sin(2 * math.pi * hz * np.arange(300) * tr_s)[None]
    got = resample(wave, tr_s=tr_s, to_tr_s=to_tr_s)
    expected = np.sin(2 * math.pi * hz * np.arange(got.shape[1]) * to_tr_s)
    # A chord leaves the sine by at most (2 pi f TR)^2 / 8 of its amplitude.
    bound = (2 * math.pi * hz * tr_s) ** 2 / 8
    assert np.abs(got[0] - expected).max() <= bound + 1e-5
    assert got.shape[1] == int(299 * tr_s / to_tr_s) + 1


def test_what_lies_above_the_new_nyquist_frequency_is_folded_not_filtered():
    """The documented lack of an anti-alias filter: 0.45 Hz at a TR of 2 s looks like 0.05 Hz."""
    wave = np.cos(2 * math.pi * 0.45 * np.arange(400) * 0.5)[None]
    got = resample(wave, tr_s=0.5, to_tr_s=2.0)[0]
    np.testing.assert_allclose(got, np.cos(2 * math.pi * 0.05 * np.arange(100) * 2.0), atol=1e-5)


def test_the_same_tr_changes_nothing():
    bold = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)
    for to_tr_s in (0.72, float(np.float32(0.72)), 0.72 * (1 + 1e-7)):
        np.testing.assert_array_equal(resample(bold, tr_s=0.72, to_tr_s=to_tr_s), bold)
    assert not np.array_equal(resample(bold, tr_s=0.72, to_tr_s=0.7201)[:, :50], bold)


@pytest.mark.parametrize("method", ["linear", "nearest"])
def test_missing_parcels_stay_missing_alone(method):
    bold = np.random.default_rng(0).normal(size=(2, 3, 40)).astype(np.float32)
    whole = resample(bold, tr_s=1.0, to_tr_s=0.7, method=method)
    bold[1, 2] = np.nan
    got = resample(bold, tr_s=1.0, to_tr_s=0.7, method=method)
    assert np.isnan(got[1, 2]).all()
    assert np.isnan(got).sum() == got.shape[-1]
    np.testing.assert_array_equal(got[0], whole[0])


@given(
    n_trs=st.integers(1, 400),
    tr_s=st.floats(0.1, 5.0),
    to_tr_s=st.floats(0.1, 5.0),
    method=st.sampled_from(["linear", "nearest"]),
)
def test_no_frame_lies_after_the_last_and_none_is_left_out(n_trs, tr_s, to_tr_s, method):
    n = resampled_length(n_trs, tr_s=tr_s, to_tr_s=to_tr_s)
    last = (n_trs - 1) * tr_s
    assert (n - 1) * to_tr_s <= last * (1 + 1e-6) + 1e-5 * tr_s
    assert n * to_tr_s > last * (1 - 1e-6)
    bold = np.arange(n_trs, dtype=np.float32)[None]
    got = resample(bold, tr_s=tr_s, to_tr_s=to_tr_s, method=method)
    assert got.shape == (1, n)
    assert got.min() >= 0
    assert got.max() <= n_trs - 1
    assert (np.diff(got[0]) >= 0).all()


def test_resampling_down_and_up_by_a_whole_factor_keeps_the_shared_frames():
    bold = np.random.default_rng(0).normal(size=(2, 61)).astype(np.float32)
    down = resample(bold, tr_s=0.7, to_tr_s=2.1)
    np.testing.assert_allclose(down, bold[:, ::3], atol=1e-5)
    up = resample(down, tr_s=2.1, to_tr_s=0.7)
    np.testing.assert_allclose(up[:, ::3], down, atol=1e-5)


def test_bad_requests_get_one_line():
    bold = np.zeros((2, 10))
    for tr_s, to_tr_s in ((0.0, 1.0), (1.0, math.nan)):
        with pytest.raises(UserError, match="expected the seconds between frames, above zero"):
            resample(bold, tr_s=tr_s, to_tr_s=to_tr_s)
    with pytest.raises(UserError, match="resampling 'cubic': expected one of linear, nearest"):
        resample(bold, tr_s=1.0, to_tr_s=2.0, method="cubic")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot take 160 frames over a span of 100"):
        sample_frames(490, n_frames=160, span=100, start=0.0)


def test_sampled_frames_are_those_of_the_reference():
    golden = json.loads((GOLDENS / "jepa_schedules.json").read_text())["frame_sampling"]
    assert len(golden["by_start"]) >= 3
    for start, frames in golden["by_start"].items():
        got = sample_frames(490, n_frames=160, span=480, start=float(start))
        assert got.tolist() == frames, start
    start, end = golden["start_end_seed_0"]
    got = sample_frames(490, n_frames=160, span=480, start=start)
    assert (got[0], got[-1]) == (int(start), int(end))


def test_sampled_frames_past_the_end_repeat_the_last():
    got = sample_frames(10, n_frames=8, span=16, start=0.0)
    assert got.tolist() == [0, 2, 4, 6, 8, 9, 9, 9]
    assert sample_frames(5, n_frames=5, span=5, start=0.0).tolist() == [0, 1, 2, 3, 4]
