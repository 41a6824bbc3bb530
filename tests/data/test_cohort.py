import json
import shutil

import numpy as np
import polars as pl
import pytest

from brainfusion.data.cohort import Cohort, write_cohort_tables
from brainfusion.data.recordings import RecordingWriter
from brainfusion.runtime.errors import UserError
from tests.data.cohorts import noise, small_atlas, write_cohort


def people(**columns):
    return pl.DataFrame({"subject": [f"00{i}" for i in range(6)], **columns})


def test_a_cohort_is_opened_and_described(tmp_path):
    table = people(
        family=["a", "a", None, None, "b", ""],
        site=["x", "x", "y", "y", None, "x"],
        sex=["F", "M", "F", None, "M", "M"],
        age=[20.0, 30.0, 40.0, None, 50.0, 60.0],
    )
    path = write_cohort(tmp_path / "c", subjects=table, scanned=["000", "001", "002"])
    cohort = Cohort.open(path)
    facts = cohort.describe()
    assert facts["n_people"] == 6
    assert facts["n_people_without_recordings"] == 3
    assert facts["n_recordings"] == 3
    assert (facts["n_parcels"], facts["n_trs"], facts["tr_s"]) == (4, [20, 20], [2.0])
    assert facts["families"] == {"n_families": 5, "n_with_relatives": 2, "largest": 2}
    assert facts["sites"] == {"unknown": 1, "x": 3, "y": 2}
    assert facts["sex"] == {"F": 2, "M": 3, "unknown": 1}
    assert facts["age"]["mean"] == 40.0
    assert facts["age"]["sd"] == pytest.approx(np.std([20, 30, 40, 50, 60], ddof=1))
    assert facts["motion"] is None
    text = json.dumps(facts, allow_nan=False)
    assert not any(subject in text for subject in ("000", "001", "002"))
    assert cohort.truth() is None


def test_opening_reads_no_recording(tmp_path, monkeypatch):
    path = write_cohort(tmp_path / "c")
    monkeypatch.setattr(np, "load", None)
    assert len(Cohort.open(path).recordings) == 6


def test_splits_are_made_once_and_checked_afterwards(tmp_path):
    path = write_cohort(tmp_path / "c")
    first = Cohort.open(path).splits()
    made = (path / "splits.json").read_bytes()
    assert Cohort.open(path).splits() == first
    assert (path / "splits.json").read_bytes() == made
    people().slice(1).write_parquet(path / "subjects.parquet")
    with pytest.raises(UserError, match=r"splits.json and subjects.parquet disagree: 1 people"):
        Cohort(
            path,
            facts={"name": "c", "origin": "imported", "notes": ""},
            subjects=people().slice(1),
            atlas=small_atlas(),
            recordings=Cohort.open(write_cohort(tmp_path / "other")).recordings,
        ).splits()


def test_the_hash_follows_the_content_and_not_the_place(tmp_path):
    first = Cohort.open(write_cohort(tmp_path / "a"))
    second = Cohort.open(write_cohort(tmp_path / "b"))
    longer = Cohort.open(write_cohort(tmp_path / "c", n_trs=21))
    older = Cohort.open(write_cohort(tmp_path / "d", subjects=people(age=[1.0] * 6)))
    assert first.hash == second.hash
    assert len({first.hash, longer.hash, older.hash}) == 3


def test_validate_warns_of_constant_parcels_and_of_low_coverage(tmp_path):
    path = write_cohort(tmp_path / "c")
    assert Cohort.open(path).validate() == []
    rng = np.random.default_rng(0)
    flat, poor = noise(rng), noise(rng)
    flat[1:] = 3.0
    poor[:2] = np.nan
    shutil.rmtree(path / "recordings")
    with RecordingWriter(path / "recordings", n_parcels=4) as writer:
        writer.add(flat, recording="flat", subject="000", tr_s=None)
        writer.add(poor, recording="poor", subject="001", tr_s=2.0)
    warnings = " ".join(Cohort.open(path).validate())
    assert "1 recordings have 3 constant parcels" in warnings
    assert "1 recordings are constant in most parcels" in warnings
    assert "4 of 6 people have no recording" in warnings
    assert "1 recordings have no TR" in warnings
    assert "1 recordings cover under 80% of parcels (lowest 50%)" in warnings


def test_validate_finds_what_was_changed_behind_the_index(tmp_path):
    path = write_cohort(tmp_path / "c")
    shard = path / "recordings" / "shard-00000.npy"
    bold = np.load(shard)
    bold[2, 1, 5] = np.nan
    np.save(shard, bold)
    with pytest.raises(UserError, match="recording '002_rest' has 1 single NaN values"):
        Cohort.open(path).validate()
    bold[2, 1] = np.nan
    np.save(shard, bold)
    with pytest.raises(UserError, match=r"75.0% of its parcels but index.parquet says 100.0%"):
        Cohort.open(path).validate()


def test_a_cohort_that_is_not_there_gets_one_line(tmp_path):
    with pytest.raises(UserError) as error:
        Cohort.open(tmp_path / "nowhere")
    assert str(error.value) == (
        f"{tmp_path / 'nowhere'} does not exist: --cohort expects a cohort folder; make one with "
        "'brainfusion import' or 'brainfusion simulate'."
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a cohort folder"):
        Cohort.open(tmp_path / "empty")


@pytest.mark.parametrize("missing", ["subjects.parquet", "atlas.json", "recordings/index.parquet"])
def test_a_missing_part_is_named(tmp_path, missing):
    path = write_cohort(tmp_path / "c")
    (path / missing).unlink()
    with pytest.raises(UserError, match=f"{missing} does not exist: "):
        Cohort.open(path)


def test_recordings_of_unknown_people_are_refused(tmp_path):
    path = write_cohort(tmp_path / "c", scanned=["000", "x1", "x2"])
    with pytest.raises(UserError, match="2 recordings belong to 2 people who are not in"):
        Cohort.open(path)


def test_an_atlas_of_another_size_is_refused(tmp_path):
    path = write_cohort(tmp_path / "c", atlas=small_atlas(5))
    with pytest.raises(UserError, match=r"recordings have 4 parcels but atlas.json has 5"):
        Cohort.open(path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pl.DataFrame({"eid": ["1"]}), "has no column 'subject'"),
        (pl.DataFrame({"subject": [1, 2]}), "column 'subject' is Int64, expected text"),
        (pl.DataFrame({"subject": ["a", "b", "a"]}), r"1 subject ids repeat \(for example a\)"),
        (pl.DataFrame({"subject": ["a", None, ""]}), "2 rows have no subject id"),
        (pl.DataFrame({"subject": []}, schema={"subject": pl.String}), "lists nobody"),
        (people(sex=["1", "2", "1", "2", "F", "M"]), "column 'sex' holds '1', '2', expected 'F'"),
        (people(age=["old"] * 6), "column 'age' is String, expected numbers"),
        (people(family=[1] * 6), "column 'family' is Int64, expected text"),
    ],
)
def test_a_bad_table_of_people_gets_one_line(tmp_path, table, message):
    path = write_cohort(tmp_path / "c")
    table.write_parquet(path / "subjects.parquet")
    with pytest.raises(UserError, match=message) as error:
        Cohort.open(path)
    assert "\n" not in str(error.value)


def test_tables_that_could_not_be_opened_are_not_written(tmp_path):
    with pytest.raises(UserError, match="1 subject ids repeat"):
        write_cohort_tables(
            tmp_path / "c",
            name="c",
            origin="imported",
            subjects=pl.DataFrame({"subject": ["a", "a"]}),
            atlas=small_atlas(),
        )
    assert not (tmp_path / "c").exists()
