import hashlib
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from brainfusion.genetics import grid, open_store, source
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import write_json
from tests.data.cohorts import write_cohort

N, GENES, WIDTH = 30, ("AVP", "OXT", "PDYN"), 1920
SUBJECTS = [f"00{i:02d}" for i in range(N)]
SECRET = "\n".join(SUBJECTS)
PROVENANCE = {
    "model": "evo2",
    "checkpoint": "evo2_1b_base",
    "layer": "blocks.20",
    "pooling": "mean",
    "strands": "averaged",
    "sequence": "personal",
    "reference": "GRCh38",
    "haplotypes": 2,
}


def haplotypes(n=N, seed=0):
    """float32 [n, g, 2, WIDTH], of six distinct haplotypes a gene."""
    rng = np.random.default_rng(seed)
    common = 1 + rng.random((len(GENES), 1, WIDTH))
    distinct = common * (1 + 3e-4 * rng.normal(size=(len(GENES), 6, WIDTH)))
    chosen = rng.integers(6, size=(n, len(GENES), 2))
    return distinct[np.arange(len(GENES))[:, None], chosen].astype(np.float32)


@pytest.fixture
def cohort(tmp_path) -> Path:
    """Forty people, of whom the first twenty-five have recordings."""
    people = [*SUBJECTS, *(f"other{i}" for i in range(10))]
    return write_cohort(
        tmp_path / "cohort",
        subjects=pl.DataFrame({"subject": people}),
        scanned=[*SUBJECTS[:25], "other3"],
    )


@pytest.fixture
def by_gene(tmp_path) -> Path:
    """One .pt a gene, both haplotypes, as evo2's users save a layer."""
    folder = tmp_path / "by-gene"
    folder.mkdir()
    for gene, name in enumerate(GENES):
        vectors = torch.from_numpy(np.ascontiguousarray(haplotypes()[:, gene]))
        torch.save({"blocks.20": vectors}, folder / f"{name}.pt")
    (folder / "subjects.txt").write_text(SECRET)
    write_json(folder / "provenance.json", PROVENANCE)
    return folder


@pytest.fixture
def by_person(tmp_path) -> Path:
    """One .npy a person, of all genes."""
    folder = tmp_path / "by-person"
    folder.mkdir()
    for subject, vectors in zip(SUBJECTS, haplotypes(), strict=True):
        np.save(folder / f"{subject}.npy", vectors)
    (folder / "genes.txt").write_text("\n".join(GENES))
    write_json(folder / "provenance.json", {**PROVENANCE, "files": "{subject}"})
    return folder


def kept(cohort, model="evo2"):
    features = open_store(cohort / "genetics" / model, verify=True)
    return features.vectors.haplotypes(np.arange(features.n_subjects))


def tree(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_both_haplotypes_go_into_a_dictionary_and_the_counts_are_said(cohort, by_gene, done):
    said = done("import", "--dna", "evo2", by_gene, "--cohort", cohort)
    np.testing.assert_array_equal(kept(cohort), haplotypes())
    assert (cohort / "genetics" / "evo2" / "dictionary.npy").exists()
    assert "30 people (30 of the cohort's 40) x 3 genes x 1920 values, both haplotypes" in said.err
    assert (
        "people: 25 with DNA and recordings, 5 of the cohort with DNA only, 1 with recordings "
        "only, 0 with DNA whom the cohort does not know, 0 without any vector"
    ) in said.err
    # The facts' own table: what differs by 3e-4 of a vector is mostly lost in bfloat16.
    shares = dict(re.findall(r"([\w ]+?) ([\d.]+)%", said.err.split("would keep:")[1]))
    shares = {name.strip(): float(share) for name, share in shares.items()}
    assert shares["float32"] == shares["centred float16"] == 100.0
    assert shares["bfloat16"] < 40 < shares["float16"] < 99
    assert not any(subject in said.err + said.out for subject in SUBJECTS)


@pytest.mark.parametrize("storage", ["float32", "centred-float16"])
def test_a_storage_can_be_asked_for_and_haplotypes_merged(cohort, by_gene, done, storage):
    flags = ("--storage", storage, "--haplotypes", "mean")
    done("import", "--dna", "evo2", by_gene, "--cohort", cohort, *flags)
    features = open_store(cohort / "genetics" / "evo2")
    expected = haplotypes().mean(axis=2, dtype=np.float32)
    lost = 0 if storage == "float32" else 2.0**-11 * 1e-2
    np.testing.assert_allclose(np.asarray(features.vectors), expected, rtol=0, atol=lost)
    assert features.n_haplotypes == 1
    assert "mean of two haplotypes" in features.provenance.steps


def test_two_processes_and_files_by_person_give_the_same_store(cohort, by_gene, by_person, done):
    command = ("import", "--dna", "evo2", "--cohort", cohort)
    assert "read 3 blocks" in done(*command, by_gene).err
    expected = tree(cohort / "genetics" / "evo2")
    said = done(*command, by_gene, "--workers", 2)
    assert "2 processes" in said.err
    assert "genetics/evo2 is there: the new store replaces it" in said.err
    assert tree(cohort / "genetics" / "evo2") == expected
    done(*command, by_person)
    np.testing.assert_array_equal(kept(cohort), haplotypes())


def test_an_import_that_was_stopped_goes_on_and_an_unfinished_one_is_no_store(
    cohort, by_person, call, done, monkeypatch
):
    """Blocks of six people, in this process; the files are checked as they are read."""
    six = 6 * len(GENES) * 2 * WIDTH * 4
    monkeypatch.setattr(source, "BLOCK_BYTES", six)
    command = ("import", "--dna", "evo2", by_person, "--cohort", cohort, "--workers", 1)
    read, loaded = grid.open_container, []

    def open_container(path):
        loaded.append(path.stem)
        if path.stem == SUBJECTS[20] and broken:
            raise UserError("the disk is gone")
        return read(path)

    monkeypatch.setattr(grid, "open_container", open_container)
    broken = True
    assert "the disk is gone" in call(*command).error
    [parts] = (cohort / "genetics").iterdir()
    assert parts.name == ".evo2-parts"
    broken = False
    loaded.clear()
    said = done(*command)
    assert "going on with an import that was stopped: 3 of 5 blocks are here" in said.err
    assert not set(loaded[1:]).intersection(SUBJECTS[:18])  # the first is opened for its shape
    np.testing.assert_array_equal(kept(cohort), haplotypes())
    assert [path.name for path in (cohort / "genetics").iterdir()] == ["evo2"]


def test_parts_of_files_that_have_changed_are_read_again(
    cohort, by_person, call, done, monkeypatch
):
    six = 6 * len(GENES) * 2 * WIDTH * 4
    monkeypatch.setattr(source, "BLOCK_BYTES", six)
    command = ("import", "--dna", "evo2", by_person, "--cohort", cohort, "--workers", 1)
    last = by_person / f"{SUBJECTS[-1]}.npy"
    last.write_bytes(last.read_bytes()[:-3])
    assert "cannot be read" in call(*command).error
    other = haplotypes(seed=3)
    for subject, vectors in zip(SUBJECTS, other, strict=True):
        np.save(by_person / f"{subject}.npy", vectors)
    assert "have changed since an import was stopped" in done(*command).err
    np.testing.assert_array_equal(kept(cohort), other)


def test_people_are_appended_and_other_provenance_needs_a_word(
    cohort, by_gene, call, done, tmp_path
):
    done("import", "--dna", "evo2", by_gene, "--cohort", cohort)
    more = tmp_path / "more"
    more.mkdir()
    np.save(more / "embeddings.npy", haplotypes(n=4, seed=1))
    (more / "genes.txt").write_text("\n".join(GENES))
    (more / "subjects.txt").write_text("\n".join(f"other{i}" for i in range(4)))
    write_json(more / "provenance.json", {**PROVENANCE, "device": "L40S", "layer": "blocks.12"})
    command = ("import", "--dna", "evo2", more, "--cohort", cohort, "--append")
    before = tree(cohort / "genetics")
    error = call(*command).error
    assert "made differently (layer: blocks.20, blocks.12; device: None, L40S)" in error
    assert tree(cohort / "genetics") == before
    error = call(*command[:3], by_gene, *command[4:]).error
    assert "30 of the 30 people are in" in error
    said = done(*command, "--mixed-provenance")
    assert "34 people (34 of the cohort's 40)" in said.err
    assert "26 with DNA and recordings" in said.err
    expected = np.concatenate([haplotypes(), haplotypes(n=4, seed=1)])
    np.testing.assert_array_equal(kept(cohort), expected)
    alarms = open_store(cohort / "genetics" / "evo2").alarms
    assert "mixed provenance" in [alarm.name for alarm in alarms]


def test_a_store_can_be_imported_as_another_storage(cohort, by_gene, done, tmp_path):
    done("import", "--dna", "evo2", by_gene, "--cohort", cohort)
    store = tmp_path / "store"
    (cohort / "genetics" / "evo2").rename(store)
    done("import", "--dna", "evo2", store, "--cohort", cohort, "--storage", "float32")
    assert (cohort / "genetics" / "evo2" / "vectors.npy").exists()
    np.testing.assert_array_equal(kept(cohort), haplotypes())


def test_strict_makes_an_alarm_an_error_and_leaves_no_store(cohort, by_gene, call):
    provenance = {k: v for k, v in PROVENANCE.items() if k != "reference"}
    write_json(by_gene / "provenance.json", provenance)
    error = call("import", "--dna", "evo2", by_gene, "--cohort", cohort, "--strict").error
    assert "undeclared: provenance does not say reference" in error
    assert not (cohort / "genetics" / "evo2").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--storage", "float16"], "float16"),
        (["--haplotypes", "sum"], "sum"),
        (["--workers", "-1"], "--workers -1: expected 0 or more"),
        (["--mixed-provenance"], "give --append, too"),
        (["--append", "--layer", "blocks.24"], "'blocks.24' is asked for"),
        (["--strands", "both"], "strands"),
        (["--files", "{person}"], "files has '{person}'"),
        (["--special-tokens", "1"], "special-tokens"),
    ],
)
def test_options_that_make_no_sense_are_one_line(cohort, by_gene, call, flags, says):
    assert says in call("import", "--dna", "evo2", by_gene, "--cohort", cohort, *flags).error
    assert not (cohort / "genetics").exists()


def test_flags_that_a_store_cannot_follow_are_refused(cohort, by_gene, call, done):
    done("import", "--dna", "evo2", by_gene, "--cohort", cohort)
    store = cohort / "genetics" / "evo2"
    assert (
        "there is nothing to import"
        in call("import", "--dna", "evo2", store, "--cohort", cohort).error
    )
    store = store.rename(cohort / "store")
    command = ("import", "--dna", "evo2", store, "--cohort", cohort)
    assert "--trim-left would have no effect" in call(*command, "--trim-left", 15).error
    assert "leave --haplotypes out" in call(*command, "--haplotypes", "mean").error
    assert "says model 'evo2', but" in call(*command[:2], "caduceus", *command[3:]).error
