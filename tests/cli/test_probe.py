"""What `brainfusion probe` adds when it is asked to."""

import shutil

import polars as pl

from brainfusion.runtime.files import read_json
from tests.cli.conftest import BRIEF


def test_every_kind_of_row_is_made_and_said(site, done, tmp_path):
    work = shutil.copytree(site.workspace, tmp_path / "work")
    cohort = shutil.copytree(site.cohort, tmp_path / "copy")
    table = pl.read_parquet(cohort / "subjects.parquet")
    table.with_columns(pl.Series("colour", ["red", "green", "blue"] * 40)).write_parquet(
        cohort / "subjects.parquet"
    )
    words = ("--targets", "age", "mdd", "colour", "--n-folds", 3, "--knn", "--pca", 5)
    more = ("--learning-curve", 0.5, "--cca", 2, "--cca-permutations", 19)
    said = done("probe", *words, *more, *BRIEF, "--cohort", cohort, "--workspace", work)
    rows = {(row["target"], row["features"]): row for row in read_json(work / "probes.json")}
    assert rows["age", "connectome"]["kind"] == "continuous"
    assert rows["mdd", "connectome"]["kind"] == "binary"
    assert rows["colour", "connectome"]["n_classes"] == 3
    wanted = ["connectome, 5 PCs", "evo2 vectors, kNN", "brainjepa features + evo2 vectors"]
    for target in ("age", "mdd", "colour"):
        assert all((target, name) in rows for name in wanted)
        curve = rows[target, "connectome"]["learning_curve"]
        assert all(point.keys() >= {"n_train", "value", "ci_low"} for point in curve)
        # Few people: a training set may lack a class, which is said.
        assert len(curve) == 2 or f"{target}" in said.err.split("no point at 50% for")[1]
        assert 0 < rows[target, "connectome"]["q_value"] <= 1
    assert len(rows["age", "connectome"]["learning_curve"]) == 2
    assert sum(one["n"] for one in rows["mdd", "connectome"]["reliability"]) == 36
    long = pl.read_parquet(work / "probes.parquet")
    assert long.height == sum(len(row["metrics"]) for row in rows.values())
    found = read_json(work / "cca.json")
    assert [row["component"] for row in found["components"]] == [1, 2]
    assert found["n"] < 120
    assert "component" in said.out
    assert "adjusted for the number of targets" in said.out


def test_fusion_can_be_left_out(site, done, tmp_path):
    work = shutil.copytree(site.workspace, tmp_path / "work")
    place = ("--cohort", site.cohort, "--workspace", work)
    done("probe", "--targets", "age", "--no-fusion", *BRIEF, *place)
    assert not [row for row in read_json(work / "probes.json") if " + " in row["features"]]
