"""`brainfusion extract`, as a user types it; the models' packages are stood in for by toys."""

import json
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from brainfusion.genetics import open_store
from brainfusion.genetics.vectors import StoredVectors
from tests.genetics.extraction import toys
from tests.genetics.extraction.people import reference, write_cohort, write_fasta, write_vcf

pytest.importorskip("pysam", reason="pysam, which reads VCF, is not installed")


@pytest.fixture
def cohort(tmp_path, monkeypatch) -> Path:
    """A reference, six people's variants, regions, and a package evo2 with random weights."""
    monkeypatch.setitem(sys.modules, "evo2", toys.evo2_package())
    (tmp_path / "weights.pt").write_bytes(b"random")
    return write_cohort(tmp_path)


def words(cohort: Path, **changes) -> list[object]:
    """A command that works, with some of its flags changed (None: left out)."""
    flags = {
        "model": "evo2", "checkpoint": "simulated", "weights": cohort / "weights.pt",
        "layer": "blocks.1", "reference": cohort / "ref.fa", "variants": cohort / "people.vcf.gz",
        "regions": cohort / "genes.tsv", "coordinates": "1-based", "window_bp": 400,
        "build": "GRCh37", "out": cohort / "out",
    }  # fmt: skip
    given = [
        [f"--{key.replace('_', '-')}", value]
        for key, value in {**flags, **changes}.items()
        if value is not None
    ]
    return ["extract", *(word for pair in given for word in pair)]


def test_from_a_reference_and_variants_to_a_cohorts_store(done, cohort):
    said = done(*words(cohort, flank_bp=100), "--native")
    store = open_store(cohort / "out" / "store")
    assert store.genes == ("ABC", "DEF")
    assert store.vectors.shape == (6, 2, 64)
    assert store.n_haplotypes == 2
    assert store.provenance.reference == "GRCh37"
    assert store.provenance.extra["indels"] == "none"
    assert store.provenance.extra["flank_bp"] == 100
    lengths = pl.read_parquet(cohort / "out" / "genes.parquet")["length_bp"].to_list()
    assert lengths == [800, 807]
    assert "6 people x 2 genes, 2 haplotypes each; windows of at most 400 bp" in said.err
    assert f"next: brainfusion import --dna evo2 {cohort / 'out' / 'store'}" in said.err
    assert "1000" not in said.err.replace(str(cohort), "")  # the ids begin so
    assert said.out == ""


def test_the_store_and_its_native_form_import_as_the_same_vectors(done, cohort, tmp_path):
    (tmp_path / "bold").mkdir()
    rng = np.random.default_rng(0)
    for person in range(6):
        np.save(tmp_path / "bold" / f"{1000 + person:07d}.npy", rng.normal(size=(8, 60)))
    names = [f"p{k}" for k in range(8)]
    atlas = {"name": "a", "parcels": names, "xyz_mm": None, "gradient": None, "networks": None}
    (tmp_path / "atlas.json").write_text(json.dumps(atlas))
    flags = ("--tr-s", 2, "--atlas", tmp_path / "atlas.json")
    done("import", tmp_path / "bold", "--out", tmp_path / "c", *flags)
    done(*words(cohort), "--native")
    found = []
    for source in ("store", "native"):
        done("import", "--dna", "evo2", cohort / "out" / source, "--cohort", tmp_path / "c")
        found.append(open_store(tmp_path / "c" / "genetics" / "evo2"))
    assert found[0].subjects == found[1].subjects
    assert [features.n_haplotypes for features in found] == [2, 2]
    assert np.array_equal(np.asarray(found[0].vectors), np.asarray(found[1].vectors))


def test_each_model_is_called_verbatim(done, cohort, monkeypatch):
    (cohort / "folder").mkdir()
    for model in ("generator", "caduceus"):
        package = toys.transformers_package(model, rcps=True, fused_add_norm=False)
        monkeypatch.setitem(sys.modules, "transformers", package)
        flags = {"model": model, "weights": cohort / "folder", "layer": None, "window_bp": 396}
        done(*words(cohort, out=cohort / model, **flags))
        store = open_store(cohort / model / "store")
        expected = {"generator": "averaged", "caduceus": "ps_folded"}[model]
        assert store.provenance.strands == expected
        assert store.vectors.shape == (6, 2, 64)


def test_a_flipped_strand_in_the_regions_changes_no_vector(done, cohort):
    done(*words(cohort))
    text = (cohort / "genes.tsv").read_text()
    flipped = text.replace("\t+\n", "\t?\n").replace("\t-\n", "\t+\n").replace("\t?\n", "\t-\n")
    (cohort / "flipped.tsv").write_text(flipped)
    done(*words(cohort, regions=cohort / "flipped.tsv", out=cohort / "other"))
    one, two = (open_store(cohort / out / "store").vectors for out in ("out", "other"))
    assert np.array_equal(np.asarray(one), np.asarray(two))
    for out, regions in (("a", "genes.tsv"), ("b", "flipped.tsv")):
        given = words(cohort, regions=cohort / regions, out=cohort / out, strands="forward")
        done(*given)
    one, two = (np.asarray(open_store(cohort / out / "store").vectors) for out in ("a", "b"))
    assert np.abs(one - two).max() > 1e-3  # one strand alone depends on the annotation


def test_people_may_be_chosen_and_named_in_another_order(done, cohort):
    done(*words(cohort))
    (cohort / "who.txt").write_text("0001004\n0001001\n")
    done(*words(cohort, subjects=cohort / "who.txt", out=cohort / "two"))
    all_six = open_store(cohort / "out" / "store")
    two = open_store(cohort / "two" / "store")
    assert two.subjects == ("0001004", "0001001")
    assert isinstance(two.vectors, StoredVectors)
    np.testing.assert_array_equal(two.rows([0, 1]), all_six.rows([4, 1]))


def test_fasta_files_of_people_do_as_well(done, cohort):
    (cohort / "people").mkdir()
    for person in range(4):
        bases = reference(person, 300)
        write_fasta(cohort / "people" / f"{person}.fa", **{"ABC|1": bases, "ABC|2": bases[::-1]})
    given = words(
        cohort, sequences=cohort / "people", reference=None, variants=None, regions=None,
        coordinates=None,
    )  # fmt: skip
    done(*given)
    assert open_store(cohort / "out" / "store").vectors.shape == (4, 1, 64)


def other_reference(cohort: Path) -> Path:
    return write_fasta(cohort / "other.fa", **{"7": reference(9)})


def unphased(cohort: Path) -> Path:
    bases = reference(0)
    rows = [("7", 400, bases[399], "ACGT"["CGTA".index(bases[399])], "PASS", "GT", "0/1", "1/0")]
    return write_vcf(cohort / "raw.vcf.gz", rows, ["a", "b"], contigs={"7": len(bases)})


def short_genes(cohort: Path) -> Path:
    (cohort / "short.bed").write_text("7\t10\t14\tTINY\t0\t+\n")
    return cohort / "short.bed"


def beyond(cohort: Path) -> Path:
    (cohort / "beyond.bed").write_text("7\t2990\t3010\tFAR\t0\t+\n")
    return cohort / "beyond.bed"


def listed(cohort: Path) -> Path:
    (cohort / "who.txt").write_text("0001001\nsecret-9\n")
    return cohort / "who.txt"


def without_genes(cohort: Path) -> Path:
    (cohort / "x.tsv").write_text("what\tchrom\tstart\tend\tstrand\nA\t7\t1\t9\t+\n")
    return cohort / "x.tsv"


def read_only(cohort: Path) -> Path:
    (cohort / "file").write_text("in the way")
    return cohort / "file" / "out"


BAD = {
    "a missing package": (lambda c: {"model": "caduceus", "weights": None, "checkpoint": None,
                                     "layer": None, "window_bp": None}, "pip install transformers"),
    "missing weights": (lambda c: {"weights": c / "absent.pt"}, "does not exist: expected the che"),
    "no phase": (lambda c: {"variants": unphased(c)}, "2 of 2 heterozygous genotypes have"),
    "another build": (lambda c: {"reference": other_reference(c)}, "REF alleles are not what the"),
    "a region outside": (lambda c: {"regions": beyond(c), "coordinates": None},
                         "outside the chromosome, which has 3000 bases"),
    "no gene column": (lambda c: {"regions": without_genes(c)}, "no column 'gene'"),
    "people who do not meet": (lambda c: {"subjects": listed(c)}, "1 of the 2 people who are"),
    "another's layer": (lambda c: {"checkpoint": "evo2_1b_base", "layer": "blocks.28"},
                        "does not exist in 'evo2_1b_base': it has 25 layers"),
    "a layer the weights lack": (lambda c: {"layer": "blocks.5"}, "'blocks.5' is no module"),
    "a window beyond the context": (lambda c: {"checkpoint": "evo2_1b_base", "layer": "blocks.2",
                                               "window_bp": 9000}, "more than the 8192 bp"),
    "a window that 6-mers cannot fill": (lambda c: {"model": "generator", "layer": None},
                                         "expected a multiple of 6, the bases of a token; 396"),
    "a gene without a token": (lambda c: {"regions": short_genes(c), "coordinates": None,
                                          "trim_left": 15}, "4 bp has 4 whole tokens of 1 bp"),
    "an --out that cannot be": (lambda c: {"out": read_only(c)}, "cannot write to"),
    "coordinates that are not said": (lambda c: {"coordinates": None}, "say how it counts"),
    "a reference alone": (lambda c: {"variants": None}, "--variants missing"),
    "both kinds of input": (lambda c: {"sequences": c}, "a reference alone is the same"),
    "no index": (lambda c: {"variants": c / "genes.tsv"}, "cannot be opened as VCF or BCF"),
    "no such checkpoint": (lambda c: {"checkpoint": "evo2_7bb"}, "Did you mean 'evo2_7b'"),
    "an option without effect": (lambda c: {"device": "cpu"}, "have no effect on Evo 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_one_line_that_says_what_to_do(call, cohort, monkeypatch, name):
    if name == "a missing package":
        monkeypatch.setattr(
            "brainfusion.genetics.extraction.packages.find_spec", lambda _name: None
        )
    changes, expected = BAD[name]
    said = call(*words(cohort, **changes(cohort)))
    assert expected in said.error
    assert "secret" not in said.err
    assert not (cohort / "out" / "store").exists()
