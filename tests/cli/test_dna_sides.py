"""Several DNA models at once, and genes that are pooled."""

import json
import shutil

import numpy as np
import polars as pl
import pytest

from brainfusion.alignment import load
from brainfusion.cli.pairs import dna_models
from brainfusion.data.cohort import Cohort
from brainfusion.data.features import read_features
from brainfusion.genetics import open_store, read, write_store
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import read_json
from tests.cli.conftest import BRIEF


@pytest.fixture(scope="module")
def two(site, tmp_path_factory):
    """A copy of the site, in which 9 people lack caduceus and one has no gene of it."""
    root = tmp_path_factory.mktemp("two")
    shutil.copytree(site.cohort, root / "cohort")
    shutil.copytree(site.workspace, root / "work")
    features = read("caduceus", root / "cohort" / "sources" / "caduceus")
    mask = features.mask.copy()
    mask[-1] = False
    empty = type(features)(
        subjects=features.subjects,
        genes=features.genes,
        vectors=np.where(mask[:, :, None], np.asarray(features.vectors), 0.0),
        mask=mask,
        provenance=features.provenance,
    )
    store = root / "cohort" / "genetics" / "caduceus"
    shutil.rmtree(store, ignore_errors=True)
    write_store(store, empty.select(features.subjects[9:]))
    return type(site)(root / "cohort", root / "work")


def test_two_dna_models_make_one_modality_through_every_command(two, done):
    # The order in which they are typed does not matter.
    pair = ("--brain", "brainlm", "--dna", "caduceus+evo2", *two.place)
    said = done("align", "--max-steps", 5, "--dna-pool", "attention", *pair)
    assert "120 people with evo2 embeddings, 110 people with caduceus embeddings; 110 have" in (
        said.err
    )
    assert "pairs: 110 people have brainlm features and evo2+caduceus embeddings" in said.err
    assert "genes looked at most, of 48 (even would be 2% each)" in said.err
    run = two.workspace / "align" / "brainlm-evo2+caduceus"
    summary = read_json(run / "summary.json")
    assert summary["dna_genes"]["models"] == ["evo2", "caduceus"]
    steps = {row["step"]: row["n"] for row in summary["flow"]}
    assert steps["with evo2 embeddings"] == 120
    assert steps["with caduceus embeddings"] == steps["with both: pairs"] == 110

    again = ("--brain", "brainlm", "--dna", "evo2+caduceus", *two.place)
    done("retrieve", *BRIEF, *again)
    done("probe", "--targets", "age", *BRIEF, *again)
    done("report", *again)
    results = read_json(two.workspace / "results.json")
    assert results["alignment"]["dna"] == "evo2+caduceus"
    assert results["retrieval"]["brain_to_dna"]["n_gallery"] == summary["n_test"]
    assert {"evo2+caduceus vectors"} <= {row["features"] for row in results["probes"]}
    made = read_features(run / "embeddings" / "dna.parquet").provenance["dna"]
    assert {model: facts["model"] for model, facts in made.items()} == {
        "evo2": "evo2",
        "caduceus": "caduceus",
    }


def test_people_without_any_gene_are_left_out_and_counted(two, done):
    out = two.workspace / "caduceus"
    words = ("--dna", "caduceus", "--max-steps", 2, "--no-control", "--out", out)
    said = done("align", *words, *two.place)
    assert "without a vector of any gene, and left out: 1 of 111." in said.err
    assert len(read_features(out / "embeddings" / "dna.parquet").subjects) == 110


def test_a_run_with_pooled_genes_says_which_it_looked_at(two, done):
    out = two.workspace / "attention"
    done(
        *("align", "--dna-pool", "attention", "--max-steps", 5, "--out", out, "--no-control"),
        *two.place,
    )
    table = pl.read_parquet(out / "genes.parquet")
    assert table.columns == ["model", "gene", "weight", "attention", "attention_sd", "n_people"]
    store = open_store(two.cohort / "genetics" / "evo2")
    assert sorted(table["gene"]) == sorted(store.genes)
    assert table["weight"].is_sorted(descending=True)
    assert table["weight"].sum() == pytest.approx(1.0, abs=1e-5)
    assert table["attention"].sum() == pytest.approx(1.0, abs=1e-5)
    assert set(table["n_people"]) == {read_json(out / "summary.json")["n_test"]}
    looked = read_json(out / "summary.json")["genes_looked_at"]
    assert [row["gene"] for row in looked] == table["gene"][:5].to_list()

    # The written embeddings, and one gene left out, from the checkpoint alone.
    written = read_features(out / "embeddings" / "dna.parquet")
    opened, dna = load(out), store.select(written.subjects)
    np.testing.assert_allclose(opened.embed_dna(dna), written.vectors, atol=1e-6)
    shown = np.array([gene != looked[0]["gene"] for gene in store.genes])
    moved = np.linalg.norm(opened.embed_dna(dna, mask=shown) - written.vectors, axis=1)
    assert moved.min() > 1e-4


def test_genes_side_by_side_weigh_none(site):
    folder = site.workspace / "align" / "brainjepa-evo2"
    assert not (folder / "genes.parquet").exists()
    dna = open_store(site.cohort / "genetics" / "evo2")
    with pytest.raises(UserError, match="weighs none: align with dna_pool 'attention'"):
        load(folder).gene_weights(dna)


def test_no_subject_id_is_in_the_table_of_genes(two, done):
    done("align", "--dna-pool", "mean", "--max-steps", 2, "--no-control", "--out",
         two.workspace / "mean", *two.place)  # fmt: skip
    ids = set(Cohort.open(two.cohort).subjects["subject"])
    table = pl.read_parquet(two.workspace / "mean" / "genes.parquet")
    assert not ids & {str(value) for row in table.rows() for value in row}
    assert not [i for i in ids if i in json.dumps(read_json(two.workspace / "mean/summary.json"))]


@pytest.mark.parametrize("command", ["align", "retrieve", "probe", "report"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("evo2", "evo2"), "--dna names evo2 twice: expected each model once"),
        (("evo2", "evo3"), "unknown DNA model 'evo3'. Did you mean 'evo2'?"),
        ((), "--dna names no model: expected one or several, such as evo2 caduceus"),
        (("evo2+evo2",), "--dna names evo2 twice: expected each model once"),
        (("evo2", "caduceus+evo2"), "--dna names evo2 twice: expected each model once"),
        (("evo2+",), "unknown DNA model ''"),
    ],
)
def test_a_dna_side_that_there_is_not_is_refused(two, call, command, words, message):
    assert message in call(command, "--dna", *words, *two.place).error


def test_a_pool_that_there_is_not_names_those_that_there_are(two, call):
    error = call("align", "--dna-pool", "median", *two.place).error
    assert "concat" in error
    assert "attention" in error


def test_an_alignment_of_two_models_that_is_not_there_names_its_command(two, call):
    error = call("retrieve", "--brain", "brainjepa", "--dna", "caduceus+evo2", *two.place).error
    assert "brainjepa-evo2+caduceus does not exist" in error
    assert "brainfusion align --brain brainjepa --dna evo2+caduceus" in error


def test_modalities_stand_in_one_order_however_they_are_typed():
    assert dna_models(["caduceus", "evo2"]) == dna_models(["evo2", "caduceus"])
    assert dna_models(["caduceus", "evo2"]) == dna_models(["evo2,caduceus"]) != ("evo2+caduceus",)
    assert dna_models(["caduceus+evo2"]) == dna_models(["evo2+caduceus"]) == ("evo2+caduceus",)
    assert dna_models(["generator", "caduceus+evo2"]) == ("evo2+caduceus", "generator")


def test_both_haplotypes_are_combined_as_asked_and_scored_the_same_way(
    site, tmp_path, done, monkeypatch
):
    from brainfusion.cli import pairs as pairs_module

    shutil.copytree(site.cohort, tmp_path / "cohort")
    shutil.copytree(site.workspace, tmp_path / "work")
    merged = read("evo2", tmp_path / "cohort" / "sources" / "evo2")
    one = np.asarray(merged.vectors)
    other = one + 0.1 * np.abs(one).mean() * np.sign(np.roll(one, 1, axis=0))
    both = type(merged)(
        subjects=merged.subjects,
        genes=merged.genes,
        vectors=np.stack([one, other], axis=2).astype(np.float32),
        mask=merged.mask,
        provenance=merged.provenance,
    )
    store = tmp_path / "cohort" / "genetics" / "evo2"
    shutil.rmtree(store, ignore_errors=True)
    write_store(store, both, storage="dictionary")
    place = ("--cohort", tmp_path / "cohort", "--workspace", tmp_path / "work")
    words = ("--brain", "brainlm", "--dna", "evo2", *place)
    done("align", "--max-steps", 2, "--no-control", "--haplotypes", "mean-absdiff", *words)
    asked = []
    real = pairs_module.load_pairs

    def spied(*places, haplotypes, **names):
        asked.append(haplotypes)
        return real(*places, haplotypes=haplotypes, **names)

    monkeypatch.setattr("brainfusion.cli.scoring.load_pairs", spied)
    done("retrieve", *BRIEF, *words)
    assert asked == ["mean-absdiff"]
    widths = {
        how: open_store(store, haplotypes=how).column(0, np.arange(2)).shape[-1]
        for how in ("mean", "sum", "mean-absdiff")
    }
    assert widths == {"mean": one.shape[2], "sum": one.shape[2], "mean-absdiff": 2 * one.shape[2]}


def test_merged_haplotypes_cannot_be_summed(site, call):
    words = ("--brain", "brainlm", "--dna", "evo2", "--haplotypes", "sum", *site.place)
    assert "use 'mean', or import files that hold both" in call("align", *words).error
