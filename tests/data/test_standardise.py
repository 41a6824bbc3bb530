import json

import numpy as np
import pytest

from brainfusion.data import standardise
from brainfusion.data.recordings import Recordings, RecordingWriter
from brainfusion.data.standardise import DIVISORS, FITTED, KINDS, Standardiser
from brainfusion.runtime.errors import UserError

N_PARCELS = 5


@pytest.fixture(scope="module")
def arrays():
    """Twelve recordings of unequal length with offsets and scales; one lacks parcel 2."""
    rng = np.random.default_rng(0)
    scale = rng.uniform(1, 30, size=(N_PARCELS, 1))
    offsets = rng.normal(size=(12, N_PARCELS, 1)) * 200 + 1000
    noises = [rng.standard_t(5, size=(N_PARCELS, 230 + 10 * i)) for i in range(12)]
    bold = [
        (x * scale + offset).astype(np.float32) for x, offset in zip(noises, offsets, strict=True)
    ]
    bold[3][2] = np.nan
    return bold


@pytest.fixture(scope="module")
def recordings(arrays, tmp_path_factory):
    return store(tmp_path_factory.mktemp("recordings"), arrays)


def store(folder, arrays):
    with RecordingWriter(folder, n_parcels=len(arrays[0])) as writer:
        for i, bold in enumerate(arrays):
            writer.add(bold, recording=f"r{i}", subject=f"s{i // 2}", tr_s=2.0)
    return Recordings.open(folder)


def fit(kind, recordings, rows=range(12), **options):
    return Standardiser.fit(kind, recordings, list(rows), cohort="X", **options)


def centred(bold):
    return bold - bold.mean(axis=1, keepdims=True, dtype=np.float64)


def test_recording_zscore_is_one_unbiased_pair_over_present_parcels(recordings, arrays):
    bold = arrays[3]
    present = bold[[0, 1, 3, 4]].astype(np.float64)
    expected = (present - present.mean()) / present.std(ddof=1)
    got = fit("recording-zscore", recordings).transform(bold)
    np.testing.assert_allclose(got[[0, 1, 3, 4]], expected, atol=1e-5)
    assert (got[2] == 0).all()


def test_parcel_zscore_is_a_pair_a_parcel(recordings, arrays):
    got = fit("parcel-zscore", recordings).transform(arrays[0])
    np.testing.assert_allclose(got.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(got.std(axis=1, ddof=1), 1, atol=1e-5)


def test_parcel_centred_takes_the_time_mean_away_and_nothing_else(recordings, arrays):
    got = fit("parcel-centred", recordings).transform(arrays[0])
    np.testing.assert_allclose(got, centred(arrays[0]), atol=1e-3)  # float32 of values near 1000


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_divided_by_a_constant(recordings, arrays, kind):
    plain = fit(kind, recordings)
    assert plain.divide_by == 1.0
    divided = fit(kind, recordings, divide_by=DIVISORS["brainlm-image"])
    expected = plain.transform(arrays[3]) / 5.6430855
    np.testing.assert_allclose(divided.transform(arrays[3]), expected, rtol=1e-6)
    back = Standardiser.from_dict(json.loads(json.dumps(divided.to_dict())))
    assert back.divide_by == 5.6430855
    np.testing.assert_array_equal(back.transform(arrays[3]), divided.transform(arrays[3]))


def test_the_published_constants_are_those_of_the_facts():
    assert list(DIVISORS.values()) == [5.6430855, 41.44047, 111.13143061224855]


def brainlm_oracle(arrays):
    """Median and IQR of the first 200 TRs of all recordings, each minus its whole time mean."""
    frames = np.concatenate([centred(bold)[:, :200] for bold in arrays], axis=1)
    low, median, high = np.nanpercentile(frames, [25, 50, 75], axis=1)
    return median[:, None], (high - low)[:, None]


def test_brainlm_robust_is_the_formula_of_the_paper(recordings, arrays):
    median, iqr = brainlm_oracle(arrays)
    got = fit("brainlm-robust", recordings).transform(arrays[1])
    np.testing.assert_allclose(got, (centred(arrays[1]) - median) / iqr, atol=1e-4)


def test_brainlm_code_divides_only_the_median(recordings, arrays):
    median, iqr = brainlm_oracle(arrays)
    got = fit("brainlm-code", recordings).transform(arrays[1])
    np.testing.assert_allclose(got, centred(arrays[1]) - median / iqr, rtol=1e-5, atol=1e-3)
    assert np.abs(median / iqr).max() > 0.005  # so that a dropped term would be seen


def test_zeros_are_left_out_of_brainlms_quartiles_but_not_of_its_median(tmp_path):
    row = np.repeat([-3.0, 0.0, 2.0], [40, 100, 60])  # sums to exactly 0, so zeros stay zeros
    fitted = fit("brainlm-robust", store(tmp_path, [np.stack([row, row])]), rows=[0])
    assert fitted.median is not None
    assert fitted.iqr is not None
    assert fitted.median[0] == 0  # without zeros it would be 2
    assert fitted.iqr[0] == 2 - -3  # with zeros it would be 2


def test_brainjepa_robust_scales_by_the_spread_of_time_means(recordings, arrays):
    means = np.stack([bold.mean(axis=1, dtype=np.float64) for bold in arrays])
    low, median, high = np.nanpercentile(means, [25, 50, 75], axis=0)
    got = fit("brainjepa-robust", recordings).transform(arrays[5])
    expected = (arrays[5] - median[:, None]) / (high - low)[:, None]
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_brainjepa_robust_refuses_data_whose_means_were_removed(arrays, tmp_path):
    recordings = store(tmp_path, [centred(bold) for bold in arrays])
    with pytest.raises(UserError, match="5 of 5 parcels have none over 12 of them: expected"):
        fit("brainjepa-robust", recordings)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_and_constant_parcels_become_zero_and_shape_is_kept(recordings, arrays, kind):
    batch = np.stack([bold[:, :200] for bold in arrays[:3]])
    batch[1, 4] = np.nan
    fitted = fit(kind, recordings)
    got = fitted.transform(batch)
    assert got.shape == batch.shape
    assert got.dtype == np.float32
    assert np.isfinite(got).all()
    assert (got[1, 4] == 0).all()
    assert (got[1, :4] != 0).any()
    for i in range(3):
        np.testing.assert_allclose(got[i], fitted.transform(batch[i]), atol=1e-6)


def test_a_constant_recording_becomes_zero_rather_than_noise(recordings):
    flat = np.full((N_PARCELS, 100), 12345.678, dtype=np.float32)
    for kind in ("recording-zscore", "parcel-zscore"):
        assert (fit(kind, recordings).transform(flat) == 0).all()


@pytest.mark.parametrize("kind", FITTED)
def test_a_parcel_without_spread_in_training_becomes_zero(arrays, tmp_path, kind):
    changed = [bold.copy() for bold in arrays]
    for bold in changed:
        bold[1] = 7.0
        bold[4] = np.nan
    fitted = fit(kind, store(tmp_path, changed))
    got = fitted.transform(arrays[0])
    assert (got[[1, 4]] == 0).all()
    assert (got[[0, 2, 3]] != 0).any(axis=1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_standardiser_survives_json_exactly(recordings, arrays, kind):
    fitted = fit(kind, recordings)
    back = Standardiser.from_dict(json.loads(json.dumps(fitted.to_dict(), allow_nan=False)))
    np.testing.assert_array_equal(back.transform(arrays[0]), fitted.transform(arrays[0]))
    assert back.fitted_on == fitted.fitted_on == "6 people of cohort X"
    assert (back.n_people, back.n_recordings) == (6, 12)


def test_only_the_given_rows_are_fitted(recordings, arrays):
    few = fit("brainlm-robust", recordings, rows=[0, 1, 2])
    median, iqr = brainlm_oracle(arrays[:3])
    assert few.fitted_on == "2 people of cohort X"
    np.testing.assert_allclose(few.iqr, iqr[:, 0], rtol=1e-5)
    np.testing.assert_allclose(few.median, median[:, 0], atol=1e-4)


def test_a_capped_sample_of_frames_gives_nearly_the_same_scale(recordings, monkeypatch):
    whole = fit("brainlm-robust", recordings)
    monkeypatch.setattr(standardise, "_MAX_SAMPLE", 12 * 80 * N_PARCELS)
    thinned = fit("brainlm-robust", recordings)
    # 960 of 2,400 frames a parcel: an IQR's standard error is about 1.6 / sqrt(960) of itself
    np.testing.assert_allclose(thinned.iqr, whole.iqr, rtol=0.15)
    assert (thinned.iqr != whole.iqr).any()
    monkeypatch.setattr(standardise, "_MAX_SAMPLE", 4 * N_PARCELS)
    assert np.isfinite(fit("brainlm-robust", recordings).iqr).all()


def test_another_number_of_parcels_is_refused(recordings):
    fitted = fit("brainlm-robust", recordings)
    with pytest.raises(UserError) as error:
        fitted.transform(np.zeros((2, 7, 20), dtype=np.float32))
    assert str(error.value) == (
        "this data has 7 parcels but the standardiser was fitted on 5 (6 people of cohort X): use "
        "data of the same atlas, or refit it on this cohort."
    )


def test_bad_requests_get_one_line(recordings):
    with pytest.raises(UserError, match=r"unknown standardiser 'brainlm-robst'. Did you mean"):
        fit("brainlm-robst", recordings)
    for constant in (0.0, -1.0, float("nan"), None):
        with pytest.raises(UserError, match="expected a number above zero"):
            fit("none", recordings, divide_by=constant)
    with pytest.raises(UserError, match="was given no recording to fit on"):
        fit("none", recordings, rows=[])
    values = fit("brainlm-robust", recordings).to_dict()
    with pytest.raises(UserError, match="expected the keys"):
        Standardiser.from_dict({**values, "extra": 1})
    with pytest.raises(UserError, match="'iqr' must be 5 numbers"):
        Standardiser.from_dict({**values, "iqr": [1.0]})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [slice(7, 107), np.array([0, 3, 3, 50])], ids=["range", "list"])
def test_a_part_is_that_of_the_whole_to_the_bit(recordings, arrays, kind, part):
    standardiser = fit(kind, recordings, divide_by=2.5)
    for bold in (arrays[0], arrays[3]):  # the second lacks a parcel
        whole = standardiser.transform(bold)[..., part]
        held = standardiser.transform(bold, part=part)
        np.testing.assert_array_equal(held, whole)
        assert held.dtype == np.float32
        alone = standardiser.transform(bold[:, part])
        if kind in ("recording-zscore", "parcel-zscore", "parcel-centred"):
            assert not np.array_equal(held, alone)  # a window's own mean is another one
