"""`brainfusion align` with several modalities, negatives, stops and several processes."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from brainfusion.alignment import load
from brainfusion.cli import main
from brainfusion.data.features import read_features, write_features
from brainfusion.genetics import open_store
from brainfusion.runtime.files import read_json
from brainfusion.runtime.logs import MetricsLog, read_metrics
from tests.cli.conftest import BRIEF, Said, Site

SMALL = ("--dim-hidden", 64, "--dim-out", 16, "--max-steps", 10, "--init", "random")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Site:
    """120 people; brain features of two makers, which are the traits with noise; two DNA models."""
    root = tmp_path_factory.mktemp("people")
    site = Site(root / "cohort", root / "work")
    size = ("--n-people", "120", "--n-parcels", "14", "--n-trs", "32")
    assert main(["simulate", *size, "--out", str(site.cohort)]) == 0
    for model in ("evo2", "caduceus"):
        source = str(site.cohort / "sources" / model)
        assert main(["import", "--dna", model, source, "--cohort", str(site.cohort)]) == 0
    latents = pl.read_parquet(site.cohort / "truth" / "latents.parquet")
    traits = latents.select(pl.selectors.starts_with("trait_")).to_numpy()
    random, subjects = np.random.default_rng(0), latents["subject"].to_list()
    for name, rows in (("one", slice(0, 100)), ("two", slice(40, 120))):
        vectors = traits[rows] + 0.3 * random.normal(size=traits[rows].shape)
        path = site.workspace / "features" / f"{name}.parquet"
        write_features(path, subjects[rows], vectors, provenance={})
    return site


@pytest.fixture
def scratch(place, tmp_path) -> Site:
    """A copy to write to."""
    for folder in ("cohort", "work"):
        shutil.copytree(place.cohort.parent / folder, tmp_path / folder)
    return Site(tmp_path / "cohort", tmp_path / "work")


def embeddings(run: Path) -> dict[str, np.ndarray]:
    return {p.stem: read_features(p).vectors for p in sorted((run / "embeddings").iterdir())}


def assert_same_run(a: Path, b: Path) -> None:
    for one, other in ((a, b), (a / "control", b / "control")):
        for name, rows in embeddings(one).items():
            np.testing.assert_array_equal(rows, embeddings(other)[name])
        first, second = (
            [{k: v for k, v in row.items() if k != "pairs_per_s"} for row in read_metrics(path)]
            for path in (one / "metrics.jsonl", other / "metrics.jsonl")
        )
        assert first == second


# -- several modalities ----------------------------------------------------------------------------


def test_people_with_one_modality_of_each_side_are_kept_in_one_space(scratch, done):
    store = scratch.cohort / "genetics" / "caduceus"
    subjects = open_store(store).subjects
    shutil.rmtree(store)
    from brainfusion.genetics import read, write_store

    whole = read("caduceus", scratch.cohort / "sources" / "caduceus")
    write_store(store, whole.select(subjects[:70]))

    words = ("--brain", "one", "two", "--dna", "evo2", "caduceus", *SMALL, *scratch.place)
    said = done("align", *words)
    assert "100 people with one features, 80 people with two features; 120 have any" in said.err
    assert "pairs: 120 people have some of one, two features and some of evo2, caduceus" in said.err
    run = scratch.workspace / "align" / "one,two-evo2,caduceus"
    summary = read_json(run / "summary.json")
    steps = {row["step"]: row["n"] for row in summary["flow"]}
    assert steps == {
        "people in the cohort": 120,
        "with one features": 100,
        "with two features": 80,
        "with brain features": 120,
        "with evo2 embeddings": 120,
        "with caduceus embeddings": 70,
        "with DNA embeddings": 120,
        "with both: pairs": 120,
        "in a table but not in the cohort": 0,
    }
    names = ["brain_one", "brain_two", "dna_evo2", "dna_caduceus"]
    assert summary["modalities"] == names
    assert len(summary["pairs"]) == 6
    assert {name: sum(n.values()) for name, n in summary["n_people"].items()} == dict(
        zip(names, (100, 80, 120, 70), strict=True)
    )

    found = {name: read_features(run / "embeddings" / f"{name}.parquet") for name in names}
    sides = {s: read_features(run / "embeddings" / f"{s}.parquet") for s in ("brain", "dna")}
    assert sides["brain"].subjects == sides["dna"].subjects
    for side, parts in (("brain", names[:2]), ("dna", names[2:])):
        for row, subject in enumerate(sides[side].subjects):
            total = np.zeros(16)
            for name in parts:
                if subject in found[name].subjects:
                    total += found[name].vectors[found[name].subjects.index(subject)]
            want = total / np.linalg.norm(total)
            np.testing.assert_allclose(sides[side].vectors[row], want, atol=1e-6)
    scores = {s: read_features(run / "scores" / f"{s}.parquet") for s in ("brain", "dna")}
    head = load(run).head
    assert head is not None
    for side, rows in scores.items():
        assert rows.subjects == sides[side].subjects
        np.testing.assert_array_equal(rows.vectors, head.vectors(side, sides[side].vectors))
    opened, mine = load(run), read_features(scratch.workspace / "features" / "two.parquet")
    again = opened.embed_brain(mine.select(found["brain_two"].subjects), encoder="two")
    np.testing.assert_allclose(again, found["brain_two"].vectors, atol=1e-6)

    # The other commands go through the sides.
    pair = ("--brain", "one,two", "--dna", "evo2", "caduceus", *scratch.place)
    said = done("retrieve", *BRIEF, *pair)
    assert "brain to DNA" in said.out
    scores = read_json(run / "retrieval.json")
    assert scores["brain_to_dna"]["n_gallery"] == summary["n_test"]


def test_models_joined_by_a_plus_are_one_modality_beside_another(scratch, done):
    source = scratch.cohort / "sources" / "generator"
    done("import", "--dna", "generator", source, "--cohort", scratch.cohort)
    out = scratch.workspace / "out"
    words = ("--brain", "one", "--dna", "generator", "caduceus+evo2", "--no-control", *SMALL)
    done("align", *words, "--out", out, *scratch.place)
    assert read_json(out / "summary.json")["modalities"] == [
        *("brain", "dna_evo2_caduceus", "dna_generator"),
    ]


def test_weights_of_pairs_are_options(scratch, done, call):
    words = ("--brain", "one", "two", "--no-control", *SMALL, *scratch.place)
    weights = ("--pair-weights", "brain_one-brain_two=0", "brain_one-dna=2")
    done("align", *words, *weights, "--out", scratch.workspace / "out")
    pairs = read_json(scratch.workspace / "out" / "summary.json")["pairs"]
    found = {(row["first"], row["second"]): row["weight"] for row in pairs}
    assert found == {("brain_one", "dna"): 2.0, ("brain_two", "dna"): 1.0}
    error = call("align", *words, "--pair-weights", "brain_on-dna=2").error
    assert "'brain_on-dna' is no pair of modalities. Did you mean 'brain_one-dna'" in error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--brain", "one", "one"), "--brain names one twice: expected each modality once"),
        (("--brain",), "--brain names no features"),
        (("--brain", "one", "two", "--method", "ridge"), "--method ridge needs every modality"),
        (("--brain", "one", "--negatives", "some"), "negatives"),
        (("--brain", "one", "--checkpoint-every", "-1"), "--checkpoint-every -1: expected 0 or"),
    ],
)
def test_modalities_that_there_are_not_are_refused(place, call, words, says):
    assert says in call("align", *words, *place.place).error


@pytest.mark.parametrize("method", ["rcca", "pls", "ridge"])
def test_a_closed_form_leaves_the_files_of_a_trained_run(scratch, done, method):
    out = scratch.workspace / "out"
    words = ("--brain", "one", "--method", method, "--no-control", "--out", out)
    said = done("align", *words, *scratch.place)
    assert "validation AUC" in said.err
    assert load(out).sides == {"brain": ("brain",), "dna": ("dna",)}
    assert embeddings(out).keys() == {"brain", "dna"}
    assert "negatives" not in said.err
    mine = read_features(scratch.workspace / "features" / "one.parquet")
    written = read_features(out / "embeddings" / "brain.parquet")
    again = load(out).embed_brain(mine.select(written.subjects))
    np.testing.assert_allclose(again, written.vectors, atol=1e-6)


# -- negatives -------------------------------------------------------------------------------------


def test_unrelated_people_are_the_negatives_where_there_are_families(scratch, done, call):
    words = ("--brain", "one", "--no-control", *SMALL, "--out", scratch.workspace / "out")
    said = done("align", *words, *scratch.place)
    table = pl.read_parquet(scratch.cohort / "subjects.parquet")
    people = table.filter(pl.col("subject").is_in(list(_subjects(scratch, "one"))))
    n_related = people.filter(pl.len().over("family") > 1).height
    assert 0 < n_related < 100
    assert (
        f"unrelated people only; of 100 people {n_related} have a relative among them" in said.err
    )
    meta = read_json(scratch.workspace / "out" / "summary.json")["meta"]
    assert (meta["negatives"], meta["n_people_with_exclusions"]) == ("unrelated", n_related)
    unrelated = read_metrics(scratch.workspace / "out" / "metrics.jsonl")[0]["log_n"]
    done("align", *words, "--negatives", "within-site", *scratch.place)
    within = read_metrics(scratch.workspace / "out" / "metrics.jsonl")[0]["log_n"]
    done("align", *words, "--negatives", "all", *scratch.place)
    everybody = read_metrics(scratch.workspace / "out" / "metrics.jsonl")[0]["log_n"]
    n_train = read_json(scratch.workspace / "out" / "summary.json")["n_train"]
    assert everybody == pytest.approx(np.log(n_train))
    assert within < unrelated < everybody

    table.drop("family", "site").write_parquet(scratch.cohort / "subjects.parquet")
    (scratch.cohort / "splits.json").unlink()
    with_control = [word for word in words if word != "--no-control"]
    said = done("align", *with_control, *scratch.place)
    assert "negatives: everybody else (no column 'family' says who is related)" in said.err
    error = call("align", *words, "--negatives", "within-site", *scratch.place).error
    assert "subjects.parquet has no column 'site'" in error


def _subjects(site: Site, name: str) -> set[str]:
    return set(read_features(site.workspace / "features" / f"{name}.parquet").subjects)


# -- stops -----------------------------------------------------------------------------------------


LONG = ("--brain", "one", "--dim-hidden", 256, "--dim-out", 64, "--max-steps", 60,
        "--init", "random", "--patience", 99, "--checkpoint-every", 10)  # fmt: skip


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(scratch, done):
    run = scratch.workspace / "align" / "one-evo2"
    parts = run.parent / ".one-evo2-parts"
    argv = [sys.executable, "-m", "brainfusion.cli", "align", *map(str, (*LONG, *scratch.place))]
    process = subprocess.Popen(argv, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not list(parts.glob("checkpoints/step-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not run.exists()
    said = done("align", *LONG, *scratch.place)
    assert "going on with the run that was stopped at step" in said.err
    assert not parts.exists()
    assert not list(run.rglob("checkpoints"))
    assert not (run / "lock").exists()
    done("align", *LONG, *scratch.place, "--out", scratch.workspace / "whole")
    assert_same_run(scratch.workspace / "whole", run)


@pytest.mark.parametrize("which", ["the run", "its control"])
def test_a_command_asked_to_stop_saves_and_says_so_by_its_code(
    scratch, call, done, monkeypatch, which
):
    words = ("--brain", "one", *SMALL, *scratch.place)
    real, seen = MetricsLog.write, []

    def write(self: MetricsLog, **row: Any) -> None:
        real(self, **row)
        seen.append(row["step"])
        if len(seen) == {"the run": 4, "its control": 14}[which]:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(MetricsLog, "write", write)
        said = call("align", *words)
    assert said.code == 75
    assert "asked to stop: saved at step 5; the same command goes on from there" in said.err
    run = scratch.workspace / "align" / "one-evo2"
    assert not run.exists()
    done("align", *words)
    done("align", *words, "--out", scratch.workspace / "whole")
    assert_same_run(scratch.workspace / "whole", run)


@pytest.fixture
def cut(scratch, call, monkeypatch) -> Callable[..., Said]:
    """Align, and fail as the embeddings are written."""
    from brainfusion.cli import align

    def run(*words: object) -> Said:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(align, "write_features", fail)
            return call("align", "--brain", "one", *SMALL, *words, *scratch.place)

    return run


def test_other_options_are_refused_until_the_stopped_run_is_forgotten(scratch, cut, call, done):
    said = cut()
    assert "No space left on device" in said.error
    assert "the same command goes on from the checkpoints in" in said.err
    words = ("--brain", "one", *SMALL, "--lr", 0.01, *scratch.place)
    error = call("align", *words).error
    assert "lr: 0.0 -> 0.01" in error
    assert "--resume never to start anew" in error
    parts = scratch.workspace / "align" / ".one-evo2-parts"
    assert list(parts.glob("checkpoints/step-*"))
    error = call("align", "--brain", "one", *SMALL, "--negatives", "all", *scratch.place).error
    assert "other negatives" in error
    error = call("align", "--brain", "one", "--method", "ridge", *scratch.place).error
    assert "holds a stopped run of --method infonce" in error
    done("align", *words, "--resume", "never")
    assert not parts.exists()


def test_a_run_that_failed_before_any_checkpoint_leaves_nothing(scratch, cut):
    assert "No space left on device" in cut("--checkpoint-every", 0).error
    assert not list((scratch.workspace / "align").iterdir())


def test_a_second_process_is_kept_out_of_an_unfinished_run(scratch, call, done):
    parts = scratch.workspace / "align" / ".one-evo2-parts"
    parts.mkdir(parents=True)
    words = ("--brain", "one", "--no-control", *SMALL, *scratch.place)
    with (parts / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is making" in call("align", *words).error
        assert "another process is making" in call("align", *words, "--resume", "never").error
    assert parts.exists()
    done("align", *words)
    assert not parts.exists()


# -- several processes -----------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_under_torchrun_have_the_loss_curve_of_one(scratch, done):
    words = ("--brain", "one", "two", "--dna", "evo2", "--max-steps", 8, "--dropout", 0.3,
             "--batch-size", 30, *map(str, scratch.place))  # fmt: skip
    done("align", *words, "--out", scratch.workspace / "alone")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    script = Path(__file__).parents[2] / "scripts" / "align.py"
    argv = [*launcher, "--standalone", str(script), *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    together = subprocess.run(
        [*argv, "--out", str(scratch.workspace / "together")], env=env, check=False, text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert together.returncode == 0, together.stderr
    for control in ("", "control"):
        one, two = (
            read_metrics(scratch.workspace / name / control / "metrics.jsonl")
            for name in ("alone", "together")
        )
        assert len(one) == len(two) == 1 + 8  # the closed form, then each step
        for a, b in zip(one, two, strict=True):
            # float32 sums in another order
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
            assert b["logit_scale"] == pytest.approx(a["logit_scale"], rel=1e-4)
    assert read_json(scratch.workspace / "together" / "summary.json")["n_processes"] == 2
