"""`brainfusion attribute` on every kind of run: the same vectors as the run's, what is hidden, how
it is trained again, and what is refused in one line.
"""

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from brainfusion.alignment import load
from brainfusion.alignment.genes.vectors import Gene, GeneVectors
from brainfusion.cli import main
from brainfusion.cli.attribution.attributed import Attributed, read_attributed
from brainfusion.cli.attribution.hidden import BrainUnits, genes
from brainfusion.cli.attribution.retrained import retrained
from brainfusion.cli.published import PublishedOptions
from brainfusion.cli.runs import AlignmentRun
from brainfusion.cli.workspace import Place, Workspace
from brainfusion.data.features import read_features, write_features
from brainfusion.genetics import read, write_store
from brainfusion.runtime.checkpoint import load_weights, save_weights
from brainfusion.runtime.files import read_json
from tests.cli.conftest import Said, Site

TINY = (
    *("--dim-hidden", 32, "--dim-out", 8, "--max-steps", 4, "--init", "random", "--no-control"),
    *("--threads", 1),
)
QUICK = ("--bootstrap", 9, "--threads", 1)
COMMON = {"unit", "drop", "ci_low", "ci_high", "p_value", "q_value"}


@pytest.fixture(scope="module")
def place(site, tmp_path_factory) -> Site:
    """Two encoders, a file of somebody's own, two DNA models; people lack some of each."""
    root = tmp_path_factory.mktemp("attributed")
    shutil.copytree(site.cohort, root / "cohort")
    for part in ("pretrain", "features", "align"):
        shutil.copytree(site.workspace / part, root / "work" / part)
    place = Site(root / "cohort", root / "work")
    subjects = pl.read_parquet(place.cohort / "subjects.parquet")["subject"].to_list()
    for model, kept in (("evo2", subjects[:110]), ("caduceus", subjects[20:])):
        store = place.cohort / "genetics" / model
        whole = read(model, place.cohort / "sources" / model).select(kept)
        shutil.rmtree(store, ignore_errors=True)
        write_store(store, whole.select(kept, genes=whole.genes[:6]))
    brainlm = place.workspace / "features" / "brainlm.parquet"
    found = read_features(brainlm)
    kept = found.subjects[10:]
    write_features(brainlm, kept, found.select(kept), provenance=found.provenance)
    own = np.random.default_rng(0).standard_normal((100, 5))
    path = place.workspace / "features" / "own.parquet"
    write_features(path, subjects[:100], own, provenance={})
    for out, words in (
        ("two", ("--brain", "brainjepa", "brainlm", "--dna", "evo2", "caduceus")),
        ("mixed", ("--brain", "brainjepa", "own", "--dna", "evo2+caduceus")),
        ("pooled", ("--dna-pool", "attention", "--residualise", "age", "sex")),
        ("rcca", ("--method", "rcca")),
        ("own", ("--brain", "own", "--method", "rcca")),
    ):
        run(place, "align", *words, *TINY, "--out", folder(place, out))
    tune = ("--micro-batch", 60, "--threads", 1, "--no-control")
    run(place, "align", *TINY)
    run(place, "finetune", "--how", "last-1", "--lr", 0.02, "--max-steps", 2, *tune)
    return place


def run(place: Site, *words: object) -> None:
    assert main([str(word) for word in (*words, *place.place)]) == 0


def folder(place: Site, name: str) -> Path:
    if name == "tuned":
        return place.workspace / "align" / "brainjepa-last-1-evo2"
    return place.workspace / "align" / name


def asked(place: Site, name: str) -> Attributed:
    workspace = Workspace.of(Place(cohort=place.cohort, workspace=place.workspace))
    run = AlignmentRun.read(folder(place, name))
    return read_attributed(workspace, workspace.open_cohort(), run, people=1000, seed=0)


def units(asked: Attributed) -> BrainUnits:
    import torch

    return BrainUnits(asked=asked, device=torch.device("cpu"), published=PublishedOptions())


def results(place: Site, name: str) -> dict:
    return read_json(folder(place, name) / "attribution.json")


# -- every kind of run -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two", "mixed", "pooled", "rcca", "tuned"])
def test_with_nothing_hidden_the_vectors_are_those_that_the_run_has_written(place, name):
    made = asked(place, name)
    subjects = [made.people.subjects[row] for row in made.rows]
    for side in ("brain", "dna"):
        # The head's vectors, as retrieval scores them.
        want = read_features(folder(place, name) / "scores" / f"{side}.parquet").select(subjects)
        np.testing.assert_allclose(made.vectors(side), want, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["two", "mixed", "pooled", "rcca", "tuned"])
def test_hiding_a_gene_is_masking_it_in_its_modality_for_who_has_it(place, name):
    made, alignment = asked(place, name), load(folder(place, name))
    found = {unit: dna for unit, _, dna in genes(made)}
    several = len({gene.model for gene in made.genes}) > 1
    assert len(found) == len(made.genes) >= 5
    for modality, vectors in made.people.dna.items():
        gene = made.conditioner(modality).used[2]
        rows = made.owners(modality)
        covariates = None if made.covariates is None else made.covariates[rows]
        mask = np.array([other != gene for other in made.conditioner(modality).genes])
        hidden = alignment.embed(modality, vectors.take(rows), covariates, mask=mask)
        total = np.zeros((len(made.rows), hidden.shape[1]))
        for other, embedded in made.embedded.items():
            if other in made.people.dna:
                own = made.people.present[other][made.rows]
                total[own] += hidden if other == modality else embedded
        total /= np.linalg.norm(total, axis=1, keepdims=True)
        want = alignment.head.vectors("dna", total.astype(np.float32)) if alignment.head else total
        unit = f"{gene.model} {gene.name}" if several else gene.name
        np.testing.assert_allclose(found[unit], want, atol=1e-3, rtol=1e-3)
        # Who lacks the modality loses nothing.
        lacking = ~made.has(modality)
        np.testing.assert_array_equal(found[unit][lacking], made.vectors("dna")[lacking])


def test_parcels_are_hidden_from_all_encoders_at_once_and_from_nobody_else(place, capsys):
    two, mixed = units(asked(place, "two")), units(asked(place, "mixed"))
    whole = two.asked.vectors("brain")
    unit, brain, _ = next(two.networks())
    assert two.hidden_from == ["brainjepa", "brainlm"]
    only_first = units(two.asked)
    only_first.__dict__["encoders"] = {"brain_brainjepa": two.encoders["brain_brainjepa"]}
    of_first = next(only_first.networks())[1]
    with_second = two.asked.has("brain_brainlm")
    assert with_second.any()
    assert not with_second.all()
    assert np.abs(brain - whole).max(axis=1).min() > 1e-6  # everybody has one of the two
    assert np.abs(brain - of_first)[with_second].max(axis=1).min() > 1e-6
    np.testing.assert_allclose(brain[~with_second], of_first[~with_second], atol=1e-6)
    capsys.readouterr()
    assert next(mixed.networks())[0] == unit
    assert mixed.hidden_from == ["brainjepa"]
    assert "brain features own were not made by an encoder that is here: they stay" in (
        capsys.readouterr().err
    )
    both = (("two", two), ("mixed", mixed))
    assert {name: sum(1 for _ in made.networks()) for name, made in both} == {"two": 7, "mixed": 7}


def test_a_fine_tuned_run_is_asked_through_the_encoder_in_its_folder(place, call):
    made = units(asked(place, "tuned"))
    [encoder] = made.encoders.values()
    assert encoder.path == folder(place, "tuned") / "encoder"
    # Hiding nothing gives what the run has written of its test people.
    _, brain, _ = next(made._hidden({"nothing": {"brain": np.array([], dtype=int)}}))
    np.testing.assert_allclose(brain, made.asked.vectors("brain"), atol=1e-4, rtol=1e-3)
    said = call("attribute", "--run", folder(place, "tuned"), *QUICK, *place.place)
    assert said.code == 0
    assert results(place, "tuned")["networks"]["hidden_from"] == ["brainjepa-last-1"]
    # An alignment of the tuned features finds the encoder of the run that made them, too.
    out = place.workspace / "align" / "again"
    run(place, "align", "--brain", "brainjepa-last-1", *TINY, "--out", out)
    assert units(asked(place, "again")).encoders["brain"].hash == encoder.hash


def test_a_run_of_several_modalities_is_attributed_as_a_user_would_type_it(place, done):
    path = folder(place, "two")
    said = done("attribute", "--run", path, "--target", "age", "mdd", *QUICK, *place.place)
    assert f"next: brainfusion report --run {path}" in said.err
    made = read_json(path / "attribution.json")
    assert {row["unit"].split()[0] for row in made["genes"]["rows"]} == {"evo2", "caduceus"}
    assert len(made["genes"]["rows"]) == 12
    assert made["networks"]["hidden_from"] == ["brainjepa", "brainlm"]
    for kind in ("genes", "networks"):
        assert all(row.keys() == COMMON | {"auc"} for row in made[kind]["rows"])
    assert made["targets"].keys() == {"age", "mdd"}
    for name, facts in made["targets"].items():
        assert len(facts["rows"]) == 12
        assert all(row.keys() == COMMON | {"r2"} for row in facts["rows"])
        assert name not in facts["confounds"]
        assert facts["n_people"] + facts["n_missing"] == 120
        drops = [row["drop"] for row in facts["rows"]]
        assert drops == sorted(drops, reverse=True)
        for row in facts["rows"]:
            assert row["r2"] == pytest.approx(facts["r2"] - row["drop"])
    table = pl.read_parquet(path / "attribution.parquet")
    kinds = {"genes", "networks", "genes: age", "genes: mdd"}
    assert set(table["kind"]) == kinds
    assert "R2 lost" in said.out
    assert "genes: mdd" in said.out
    subjects = pl.read_parquet(place.cohort / "subjects.parquet")["subject"].to_list()
    text = (path / "attribution.json").read_text() + said.out + said.err
    assert not [subject for subject in subjects if subject in text]


# -- trained again ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two", pytest.param("mixed", marks=pytest.mark.slow), "rcca"])
def test_training_again_is_aligning_a_cohort_that_never_had_the_gene(place, tmp_path, name):
    """The same method, modalities, haplotypes and rule of negatives, from the user's own files."""
    made = asked(place, name)
    rule = made.alignment.info["meta"]["negatives"]
    assert rule == ("all" if name == "rcca" else "unrelated")
    _, brain, dna = next(retrained(made))
    gene = made.genes[0]
    less = Site(tmp_path / "cohort", tmp_path / "work")
    shutil.copytree(place.cohort, less.cohort)
    shutil.copytree(place.workspace / "features", less.workspace / "features")
    store = less.cohort / "genetics" / gene.model
    whole = read(gene.model, store)
    left = [other for other in whole.genes if other != gene.name]
    copied = whole.select(whole.subjects, genes=left)
    shutil.move(store, tmp_path / "store")
    copied = read(gene.model, tmp_path / "store").select(whole.subjects, genes=left)
    write_store(store, copied)
    words = {
        "two": ("--brain", "brainjepa", "brainlm", "--dna", "evo2", "caduceus"),
        "mixed": ("--brain", "brainjepa", "own", "--dna", "evo2+caduceus"),
        "rcca": ("--method", "rcca"),
    }[name]
    run(less, "align", *words, *TINY, "--out", tmp_path / "out")
    subjects = [made.people.subjects[row] for row in made.rows]
    for side, vectors in (("brain", brain), ("dna", dna)):
        want = read_features(tmp_path / "out" / "scores" / f"{side}.parquet").select(subjects)
        np.testing.assert_allclose(vectors, want, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_retraining_is_said_and_written(place, done):
    words = ("--run", folder(place, "rcca"), "--what", "genes", "--retrain", *QUICK, *place.place)
    said = done("attribute", *words)
    assert results(place, "rcca")["retrained"] is True
    assert len(results(place, "rcca")["genes"]["rows"]) == 6
    assert "aligned" not in said.err  # six trainings do not repeat what one has said


# -- refused ---------------------------------------------------------------------------------------


def refused(place: Site, call, name: str, *words: object) -> str:
    said: Said = call("attribute", "--run", folder(place, name), *words, *QUICK, *place.place)
    return said.error


def test_what_cannot_be_done_is_refused_in_one_line(place, call, tmp_path):
    said = refused(place, call, "tuned", "--retrain")
    assert "is a fine-tuned run, and its encoder has learnt from all genes" in said
    said = refused(place, call, "own", "--what", "parcels")
    assert "'own' were not made by an encoder that is here" in said
    assert "--what genes" in said
    assert "--retrain is of genes" in refused(place, call, "two", "--retrain", "--what", "networks")
    assert "holds no finished alignment" in refused(place, call, "nothing")
    assert "Did you mean 'mdd'?" in refused(place, call, "two", "--target", "mddd")
    assert "'site' has 3 labels: expected numbers" in refused(
        place, call, "two", "--target", "site"
    )
    assert "--n-folds 2: expected 3 or more" in refused(place, call, "two", "--n-folds", "2")
    said = refused(place, call, "two", "--checkpoint", tmp_path / "none.bin")
    assert "none.bin does not exist" in said
    said = refused(place, call, "two", "--brain", "own")
    assert "leave --brain out" in said


def test_features_of_weights_that_are_gone_name_the_option_that_finds_them(place, call, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(place.workspace, work)
    [step] = (work / "pretrain" / "brainlm" / "checkpoints").iterdir()
    kept = shutil.copytree(step, tmp_path / "kept")
    weights = load_weights(step)
    name = next(iter(weights))
    save_weights(step / "model.safetensors", {**weights, name: weights[name] + 1})
    there = ("--cohort", place.cohort, "--workspace", work, *QUICK)
    words = ("--run", work / "align" / "two", "--what", "networks", *there)
    said = call("attribute", *words).error
    assert "features 'brainlm' were made by another checkpoint of brainlm than those in" in said
    assert "--checkpoint" in said
    assert call("attribute", *words, "--checkpoint", kept).code == 0


def test_a_run_of_another_split_is_refused(place, call, tmp_path):
    out = tmp_path / "moved"
    shutil.copytree(folder(place, "rcca"), out)
    state = out / "model" / "state.json"
    made = read_json(state)["meta"]["provenance"]["splits_hash"]
    state.write_text(state.read_text().replace(made, "0" * len(made)))
    said = call("attribute", "--run", out, *QUICK, *place.place).error
    assert "was trained on another split of these people" in said


def test_who_has_one_gene_only_keeps_it_and_is_counted(place, capsys):
    from dataclasses import replace

    from brainfusion.alignment import GeneArray

    made = asked(place, "two")
    vectors = made.people.dna["dna_evo2"]
    [source] = vectors.sources.values()
    every = np.arange(len(source.mask))
    columns = [source.column(i, every) for i in range(len(source.genes))]
    mask = source.mask.copy()
    lonely = made.owners("dna_evo2")[0]
    mask[vectors.rows[lonely], 1:] = False
    bare = GeneArray(genes=source.genes, vectors=np.stack(columns, axis=1), mask=mask)
    dna = {**made.people.dna, "dna_evo2": GeneVectors(sources={"evo2": bare}, rows=vectors.rows)}
    made = replace(made, people=replace(made.people, dna=dna))
    capsys.readouterr()
    found = {unit: rows for unit, _, rows in genes(made)}
    assert "1 of" in capsys.readouterr().err
    row = int(np.flatnonzero(made.rows == lonely)[0])
    whole = made.vectors("dna")
    for gene in made.conditioner("dna_evo2").used:
        np.testing.assert_array_equal(found[made.unit(Gene("evo2", gene.name))][row], whole[row])
