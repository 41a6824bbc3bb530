import dataclasses
import json

import numpy as np
import polars as pl
import pytest

from brainfusion.cli import run
from brainfusion.data.features import write_features
from brainfusion.data.importers import import_cohort
from brainfusion.data.simulate import PRESETS, simulate
from tests.real_data import connattractor_config


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    path = tmp_path_factory.mktemp("audit") / "cohort"
    config = dataclasses.replace(PRESETS["demo"], n_people=240, n_parcels=30, n_trs=120, n_genes=8)
    simulate(path, config)
    return path


def test_a_published_package_has_one_run_off_by_one_person(tmp_path, capsys):
    # Files sub-i_ts.txt (run 01) hold the recording of subject i - 1 of runs 03 and 07.
    config = dataclasses.replace(
        connattractor_config(tmp_path / "cohort"),
        glob="*_ts*.t*",
        pattern=r"(?P<subject>sub-\d+)_ts(?:_run_(?P<session>\d+))?\.t",
    )
    import_cohort(config)
    out = tmp_path / "audit.json"
    assert run("audit", ["--cohort", str(config.out), "--out", str(out)]) == 1
    text = capsys.readouterr().out
    assert "session 1 is the odd one" in text
    assert "sub-" not in text
    checks = {check["what"]: check for check in json.loads(out.read_text())["checks"]}
    runs_03_07 = checks["session 03 and session 07"]
    assert (runs_03_07["verdict"], runs_03_07["best"]) == ("aligned", 0)
    for what in ("session 03 and session 1", "session 07 and session 1"):
        check = checks[what]
        assert (check["verdict"], check["best"]) == ("shifted", 1)
        own, next_ = (check["shifts"].index(shift) for shift in (0, 1))
        assert check["recall_at_1"][own] == 0.0
        assert check["recall_at_1"][next_] > 0.6
        assert check["agreement"][next_] > check["agreement"][own] + 0.12


def test_a_cohort_whose_tables_belong_to_its_people_passes(cohort, capsys):
    assert run("audit", ["--cohort", str(cohort), "--dna", "evo2"]) == 0
    text = capsys.readouterr().out
    assert "aligned connectomes and motion" in text
    assert "aligned evo2 and ancestry_1" in text
    assert "no table is shifted" in text


def test_a_feature_file_that_slipped_by_one_person_is_found(cohort, tmp_path, capsys):
    people = pl.read_parquet(cohort / "subjects.parquet").sort("subject")
    rng = np.random.default_rng(0)
    values = people["motion"].to_numpy()
    vectors = rng.standard_normal((len(values), 12)) * 0.3
    vectors[:, :6] += ((values - values.mean()) / values.std())[:, None]
    for shift, code in ((0, 0), (1, 1)):
        path = tmp_path / f"shift-{shift}.parquet"
        write_features(
            path, people["subject"].to_list(), np.roll(vectors, shift, axis=0), provenance={}
        )
        assert run("audit", ["--cohort", str(cohort), "--features", str(path)]) == code
    assert "SHIFTED shift-1 and motion" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--columns", "agee"], "no column 'agee'"),
        (["--max-shift", "0"], "--max-shift 0"),
        (["--max-people", "3"], "--max-people 3"),
        (["--dna", "evo3"], "evo3"),
        (["--features", "nowhere.parquet"], "nowhere.parquet"),
    ],
)
def test_bad_input_is_one_line(cohort, flags, words, capsys):
    assert run("audit", ["--cohort", str(cohort), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error
