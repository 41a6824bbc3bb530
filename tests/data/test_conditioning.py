import dataclasses
import json
import math

import numpy as np
import pytest

from brainfusion.data.conditioning import PUBLISHED, InputConditioning
from brainfusion.data.input_statistics import MEASURES, InputStatistics
from brainfusion.data.recordings import Recordings, RecordingWriter
from brainfusion.data.resample import Resampling, resample
from brainfusion.data.standardise import KINDS, Standardiser
from brainfusion.runtime.errors import UserError

N_PARCELS = 6


@pytest.fixture(scope="module")
def arrays():
    """Ten recordings of unequal length whose parcels share a signal; one lacks parcel 2."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(N_PARCELS, 3))
    bold = []
    for i in range(10):
        slow = np.cumsum(rng.normal(size=(3, 80 + i)), axis=1) / 4
        noise = rng.normal(size=(N_PARCELS, 80 + i))
        bold.append((50 + 3 * mixing @ slow + 2 * noise).astype(np.float32))
    bold[4][2] = np.nan
    return bold


@pytest.fixture(scope="module")
def recordings(arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    with RecordingWriter(folder, n_parcels=N_PARCELS) as writer:
        for i, bold in enumerate(arrays):
            # The TR of the last one is not known.
            tr_s = None if i == 9 else 2.0
            writer.add(bold, recording=f"r{i}", subject=f"s{i}", tr_s=tr_s)
    return Recordings.open(folder)


def conditioning(
    recordings: Recordings,
    *,
    kind: str = "recording-zscore",
    tr_s: float | None = 0.735,
    resampling: Resampling = "linear",
) -> InputConditioning:
    standardiser = Standardiser.fit(kind, recordings, range(9), cohort="X", divide_by=2.0)
    return InputConditioning(
        standardiser=standardiser, tr_s=tr_s, resampling=resampling, statistics=None
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("resampling", ["linear", "nearest"])
def test_the_whole_recording_is_standardised_then_resampled(recordings, arrays, kind, resampling):
    made = conditioning(recordings, kind=kind, resampling=resampling)
    got = made.prepare(arrays[4], tr_s=2.0)
    scaled = made.standardiser.transform(arrays[4])
    expected = resample(scaled, tr_s=2.0, to_tr_s=0.735, method=resampling)
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == np.float32
    assert got.shape == (N_PARCELS, made.length(84, tr_s=2.0))
    assert (got[2] == 0).all()  # a missing parcel
    assert np.isfinite(got).all()


def test_an_encoder_without_a_tr_leaves_recordings_at_theirs(recordings, arrays):
    made = conditioning(recordings, tr_s=None)
    for tr_s in (0.72, None, math.nan):
        got = made.prepare(arrays[0], tr_s=tr_s)
        np.testing.assert_array_equal(got, made.standardiser.transform(arrays[0]))
        assert made.length(80, tr_s=tr_s) == 80


def test_a_tr_that_is_not_known_is_one_line(recordings, arrays):
    made = conditioning(recordings)
    for tr_s in (None, math.nan):
        with pytest.raises(UserError, match=r"^a TR that is not known: .* 0\.735 s.*--tr-s") as e:
            made.prepare(arrays[0], tr_s=tr_s)
        assert "\n" not in str(e.value)
        with pytest.raises(UserError, match="a TR that is not known"):
            made.length(80, tr_s=tr_s)
    with pytest.raises(UserError, match="a TR that is not known"):
        made.measure(recordings, [0, 9])


@pytest.mark.parametrize("tr_s", [None, 0.735])
def test_a_conditioning_survives_json(recordings, arrays, tr_s):
    made = conditioning(recordings, kind="brainlm-robust", tr_s=tr_s)
    made = dataclasses.replace(made, statistics=made.measure(recordings, range(9)))
    values = made.to_dict()
    back = InputConditioning.from_dict(json.loads(json.dumps(values, allow_nan=False)))
    np.testing.assert_array_equal(
        back.prepare(arrays[1], tr_s=2.0), made.prepare(arrays[1], tr_s=2.0)
    )
    assert (back.tr_s, back.resampling) == (tr_s, "linear")
    assert back.to_dict() == values  # rounding a second time changes nothing
    assert back.statistics is not None
    assert made.statistics is not None
    for name in MEASURES:
        assert back.statistics.mean[name] == pytest.approx(made.statistics.mean[name], rel=1e-4)
    np.testing.assert_allclose(
        back.statistics.connectivity, made.statistics.connectivity, atol=0.5 / 127 + 1e-6
    )


def test_a_conditioning_that_was_edited_is_one_line(recordings):
    made = conditioning(recordings)
    made = dataclasses.replace(made, statistics=made.measure(recordings, range(9)))
    values = made.to_dict()
    statistics = values["statistics"]
    changes = [
        ({"extra": 1}, "expected the keys standardiser, tr_s, resampling, statistics"),
        ({"tr_s": -2.0}, r"tr_s=-2.0 with resampling 'linear': expected seconds above zero"),
        ({"resampling": "cubic"}, "one of linear, nearest"),
        ({"standardiser": {}}, "standardiser: expected the keys"),
        ({"statistics": {"mean": {}}}, "statistics of the inputs are not whole"),
        ({"statistics": {**statistics, "connectivity": "AAAA"}}, "statistics of 3 parcels beside"),
        ({"statistics": {**statistics, "connectivity": "AAA="}}, "2 pairs are of no number"),
        ({"statistics": {**statistics, "connectivity": "?"}}, "not whole"),
        ({"statistics": {**statistics, "mean": {"mean": 0.0}}}, "not whole"),
    ]
    for change, message in changes:
        with pytest.raises(UserError, match=message) as caught:
            InputConditioning.from_dict({**values, **change})
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="expected the keys"):
        InputConditioning.from_dict(None)


def brute_force(bold):
    """The measures of one recording in float64, parcel by parcel, pair by pair."""
    rows = [row.astype(np.float64) for row in bold if np.ptp(row) > 0]
    means, sds = [row.mean() for row in rows], [row.std() for row in rows]
    values = np.concatenate(rows) if len({len(row) for row in rows}) == 1 else None
    assert values is not None
    within = np.mean(np.square(sds))

    def lagged(lag):
        found = []
        for row in rows:
            x = row - row.mean()
            found.append(sum(x[t] * x[t + lag] for t in range(len(x) - lag)) / sum(x * x))
        return np.mean(found)

    pairs = [np.corrcoef(a, b)[0, 1] for i, a in enumerate(rows) for b in rows[i + 1 :]]
    low, middle, high = np.percentile(sds, [25, 50, 75])
    return {
        "mean": values.mean() / values.std(),
        "log_sd": math.log(math.sqrt(within)),
        "level_share": np.var(means) / values.var(),
        "sd_variation": (high - low) / middle,
        "lag1": lagged(1),
        "lag4": lagged(4),
        "fc_mean": np.mean(pairs),
        "flat": 1 - len(rows) / len(bold),
    }


def test_statistics_match_brute_force(recordings, arrays):
    made = conditioning(recordings, kind="none", tr_s=None)
    got = made.measure(recordings, range(9))
    table = [brute_force(made.prepare(bold, tr_s=2.0)) for bold in arrays[:9]]
    assert got.mean.keys() == got.spread.keys() == MEASURES.keys() == table[0].keys()
    for name in MEASURES:
        values = [row[name] for row in table]
        assert got.mean[name] == pytest.approx(np.mean(values), rel=1e-5, abs=1e-6), name
        assert got.spread[name] == pytest.approx(np.std(values, ddof=1), rel=1e-3, abs=1e-6), name
    assert (got.n_recordings, got.tr_s) == (9, 2.0)
    assert got.mean["flat"] == pytest.approx(1 / 6 / 9)
    r = np.nanmean([np.corrcoef(bold) for bold in arrays[:9]], axis=0)
    np.testing.assert_allclose(got.connectivity, r, atol=1e-5)


def test_statistics_are_of_what_the_encoder_sees(recordings, arrays):
    made = conditioning(recordings, tr_s=4.0)
    got = made.measure(recordings, [0, 1])
    expected = [brute_force(made.prepare(bold, tr_s=2.0)) for bold in arrays[:2]]
    assert got.tr_s == 4.0
    for name in ("log_sd", "lag1"):
        assert got.mean[name] == pytest.approx(np.mean([row[name] for row in expected]), rel=1e-4)


def test_recordings_are_thinned_evenly_and_put_into_the_checkpoints_order(recordings):
    made = conditioning(recordings, tr_s=None)
    thinned = made.measure(recordings, range(9), n_at_most=3)
    assert thinned.to_dict() == made.measure(recordings, [0, 4, 8]).to_dict()
    order = np.array([3, 1, 0, 2, 5, 4])
    moved = made.measure(recordings, range(9), order=order)
    plain = made.measure(recordings, range(9))
    np.testing.assert_allclose(
        moved.connectivity, plain.connectivity[np.ix_(order, order)], atol=1e-6
    )
    lacking = made.measure(recordings, [0, 1], order=np.array([0, 1, 2, 3, 4, -1]))
    assert lacking.mean["flat"] == pytest.approx(1 / 6)
    assert np.isnan(lacking.connectivity[5]).all()
    with pytest.raises(UserError, match="there is no recording to measure"):
        made.measure(recordings, [])


def test_recordings_without_signal_have_no_measures_but_their_share():
    got = InputStatistics.of([np.zeros((4, 30), np.float32)] * 3, n_recordings=3, tr_s=2.0)
    assert got.mean["flat"] == 1.0
    assert all(math.isnan(got.mean[name]) for name in MEASURES if name != "flat")
    back = InputStatistics.from_dict(json.loads(json.dumps(got.to_dict(), allow_nan=False)))
    assert math.isnan(back.mean["lag1"])
    assert math.isnan(back.likeness(got))


def test_the_expected_likeness_of_two_groups_is_the_one_that_samples_have():
    """Recordings whose connectivity is a common one plus noise of a known size."""
    rng = np.random.default_rng(3)
    p, t = 24, 60
    mixing = rng.normal(size=(p, 4))

    def group(n):
        bold = [mixing @ rng.normal(size=(4, t)) + 3 * rng.normal(size=(p, t)) for _ in range(n)]
        return InputStatistics.of(bold, n_recordings=n, tr_s=None)

    large = group(40)
    for n in (2, 8, 40):
        seen = np.mean([large.likeness(group(n)) for _ in range(6)])
        assert seen == pytest.approx(large.expected_likeness(n), abs=0.05)
    assert large.expected_likeness(2) < 0.9 < large.expected_likeness(40)


def test_published_conditionings_are_those_of_the_facts():
    rows = {
        name: (row.tr_s, row.resampling, row.standardiser, row.divide_by)
        for name, row in PUBLISHED.items()
    }
    assert rows == {
        "brainlm": (0.735, "linear", "brainlm-robust", 1.0),
        "brainlm-image": (0.735, "linear", "brainlm-robust", 5.6430855),
        "brainjepa": (2.0, "nearest", "recording-zscore", 1.0),
    }
