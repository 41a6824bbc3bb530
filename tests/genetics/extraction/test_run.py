import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from brainfusion.genetics import open_store, read
from brainfusion.genetics.extraction.models import ModelConfig, embed
from brainfusion.genetics.extraction.native import write_native
from brainfusion.genetics.extraction.personal import PersonalSequences
from brainfusion.genetics.extraction.run import Extraction, extract
from brainfusion.genetics.extraction.windows import Reading
from brainfusion.genetics.strands import fold_ps, reverse_complement
from brainfusion.genetics.vectors import StoredVectors
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import read_json
from tests.genetics.extraction import toys
from tests.genetics.extraction.people import reference, write_fasta

PH = "caduceus-ph_seqlen-1k_d_model-118_n_layer-4_lr-8e-3"
MODELS: dict[str, tuple[str, str, str, Any]] = {
    "evo2": ("evo2", "simulated", "blocks.1", toys.Evo2Like),
    "generator": ("generator", "simulated", "last", toys.GeneratorLike),
    "ph": ("caduceus", PH, "last", lambda: toys.PhLike(width=118)),
    "ps": ("caduceus", "simulated", "last", toys.PsLike),
}


def extraction(kind: str, *, batch_size=4, declared=None, strict=False, **changes) -> Extraction:
    model, checkpoint, layer, _ = MODELS[kind]
    unit = 6 if kind == "generator" else 1
    values = {
        "unit_bp": unit, "window_bp": 300, "stride_bp": 300, "both_strands": kind != "ps",
        "gene_orientation": True,
    }  # fmt: skip
    return Extraction(
        model=ModelConfig(model=model, checkpoint=checkpoint, layer=layer),
        reading=Reading(**{**values, **changes}),
        batch_size=batch_size,
        strict=strict,
        declared={"reference": "GRCh37", "indels": "none", **(declared or {})},
    )


def mutated(bases: str, place: int) -> str:
    other = "ACGT"[("ACGT".index(bases[place]) + 1) % 4]
    return bases[:place] + other + bases[place + 1 :]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six people, both haplotypes of two genes; haplotypes repeat, one person lacks a gene."""
    rng = np.random.default_rng(0)
    (tmp_path / "people").mkdir()
    one, two = reference(1, 600), reference(2, 906)
    ones = [one, mutated(one, 50), mutated(one, 400), mutated(mutated(one, 50), 420)]
    twos = [two, mutated(two, 700), mutated(two, 100)]
    for person in range(6):
        a, b = rng.choice(4, 2), rng.choice(3, 2)
        records = {"ABC|1": ones[a[0]], "ABC|2": ones[a[1]]}
        if person != 3:
            records |= {"DEF|1": twos[b[0]], "DEF|2": twos[b[1]]}
        write_fasta(tmp_path / "people" / f"{person:03d}.fa", **records)
    return tmp_path


@pytest.fixture
def people(folder):
    found = PersonalSequences(folder / "people")
    yield found
    found.close()


def vectors_of(store: Path) -> np.ndarray:
    """[n, g, 2, h]."""
    vectors = open_store(store).vectors
    assert isinstance(vectors, StoredVectors)
    return vectors.haplotypes(np.arange(len(vectors)))


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_store_holds_each_haplotypes_own_vector(people, folder, kind):
    model = MODELS[kind][3]()
    settings = extraction(kind, window_bp=1200, stride_bp=1200)
    store = extract(settings, people, folder / "out", load=lambda _: model)
    found = vectors_of(store)
    mask = open_store(store).mask
    assert mask.tolist() == [[True, person != 3] for person in range(6)]
    for gene in range(2):
        made = people.gene(gene)
        for person in np.flatnonzero(made.mask):
            for haplotype in range(2):
                sequence = made.sequences[made.index[person, haplotype]]
                alone = MODELS[kind][3]()
                raw = embed(alone, settings.model, [sequence])
                other = embed(alone, settings.model, [reverse_complement(sequence)])
                expected = fold_ps(raw) if kind == "ps" else (raw + other) / 2
                np.testing.assert_allclose(
                    found[person, gene, haplotype], expected[0], rtol=1e-5, atol=1e-5
                )
    provenance = open_store(store).provenance
    assert provenance.strands == ("ps_folded" if kind == "ps" else "averaged")
    assert provenance.sequence == "personal"
    assert provenance.extra["case"] == "upper"
    assert provenance.extra["version"]["torch"]


def test_each_distinct_text_is_read_once_in_batches_of_one_shape(people, folder):
    model = toys.Evo2Like()
    extract(extraction("evo2", batch_size=4), people, folder / "out", load=lambda _: model)
    read_texts = [text for batch in model.read for text in batch]
    expected = set()
    for gene in range(2):
        for sequence in people.gene(gene).sequences:
            n = -(-len(sequence) // 300)
            edges = [k * len(sequence) // n for k in range(n + 1)]
            windows = [sequence[a:b] for a, b in pairwise(edges)]
            expected |= {*windows, *map(reverse_complement, windows)}
    assert set(read_texts) == expected
    assert len(read_texts) < len(expected) + 4 * 3  # but for batches that were filled up
    assert {len(batch) for batch in model.read} == {4}
    assert all(len({len(text) for text in batch}) == 1 for batch in model.read)
    genes = pl.read_parquet(folder / "out" / "genes.parquet")
    assert genes["n_texts"].sum() == len(expected)
    assert genes["n_windows"].to_list() == [2, 4]


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("window_bp", [1200, 300])
def test_a_flipped_strand_annotation_changes_nothing(tmp_path, kind, window_bp):
    """The same DNA, written as the other strand."""
    rng = np.random.default_rng(1)
    bases = [reference(3, 600)]
    bases += [mutated(bases[0], place) for place in (10, 333, 599)]
    drawn = rng.choice(4, (5, 2))
    found = []
    for turn in (str, reverse_complement):
        folder = tmp_path / turn.__name__
        folder.mkdir()
        for person, (a, b) in enumerate(drawn):
            write_fasta(folder / f"{person}.fa", **{"G|1": turn(bases[a]), "G|2": turn(bases[b])})
        people = PersonalSequences(folder)
        settings = extraction(kind, window_bp=window_bp, stride_bp=window_bp)
        store = extract(settings, people, tmp_path / f"{turn.__name__}-out",
                        load=lambda _: MODELS[kind][3]())  # fmt: skip
        people.close()
        found.append(vectors_of(store))
    difference = np.abs(found[0] - found[1]).max() / np.abs(found[0]).max()
    assert difference < 1e-6


def test_one_strand_alone_does_change_with_the_annotation(tmp_path):
    settings = extraction("evo2", both_strands=False, window_bp=1200, stride_bp=1200)
    config = settings.model
    sequence = reference(3, 600)
    model = toys.Evo2Like()
    a, b = embed(model, config, [sequence]), embed(model, config, [reverse_complement(sequence)])
    assert np.abs(a - b).max() / np.abs(a).max() > 0.05


def test_a_run_that_was_stopped_goes_on_and_gives_the_same_store(people, folder, capsys):
    whole = extract(extraction("evo2"), people, folder / "whole", load=lambda _: toys.Evo2Like())
    model = toys.Evo2Like()
    usual = model.positions

    def stopped(texts):
        if len(model.read) == 4:
            raise KeyboardInterrupt
        return usual(texts)

    model.positions = stopped
    with pytest.raises(KeyboardInterrupt):
        extract(extraction("evo2"), people, folder / "out", load=lambda _: model)
    assert not (folder / "out" / "store").exists()
    assert len(list((folder / "out" / ".parts").glob("*.npz"))) == 1  # ABC is whole, DEF absent
    again = toys.Evo2Like()
    capsys.readouterr()
    store = extract(extraction("evo2"), people, folder / "out", load=lambda _: again)
    assert "1 genes were embedded by a run that was stopped" in capsys.readouterr().err
    assert not any(len(text) == 300 for batch in again.read for text in batch)  # none of ABC
    hashes = [read_json(path / "meta.json")["hash"] for path in (whole, store)]
    assert hashes[0] == hashes[1]
    assert not (folder / "out" / ".parts").exists()


@pytest.mark.parametrize("changed", ["window", "batch", "sequence", "carrier", "layer"])
def test_parts_of_anything_else_are_not_used(folder, capsys, changed):
    def stopped_at_def(texts):
        if len(texts[0]) != 300:
            raise KeyboardInterrupt
        return toys.Evo2Like().positions(texts)

    model = toys.Evo2Like()
    model.positions = stopped_at_def
    people = PersonalSequences(folder / "people")
    with pytest.raises(KeyboardInterrupt):
        extract(extraction("evo2"), people, folder / "out", load=lambda _: model)
    settings = extraction("evo2")
    if changed == "window":
        settings = extraction("evo2", trim_left=5)
    elif changed == "batch":
        settings = extraction("evo2", batch_size=3)
    elif changed == "layer":
        settings = replace(settings, model=replace(settings.model, layer="blocks.0"))
    elif changed == "sequence":  # everybody carries what they did, of another sequence
        for file in (folder / "people").iterdir():
            head, bases = file.read_text().split("\n", 1)
            file.write_text(f"{head}\n{bases}".replace(reference(1, 600)[120:180], "A" * 60))
    else:  # the same sequences in the same order, carried by others
        first, second = (folder / "people" / f"00{k}.fa" for k in (4, 5))
        texts = first.read_text(), second.read_text()
        first.write_text(texts[1])
        second.write_text(texts[0])
    again = toys.Evo2Like()
    before = people.gene(0)
    people.close()
    people = PersonalSequences(folder / "people")
    after = people.gene(0)
    assert (after.sequences == before.sequences) == (changed != "sequence")
    assert np.array_equal(after.index, before.index) == (changed != "carrier")
    extract(settings, people, folder / "out", load=lambda _: again)
    people.close()
    assert "1 genes that an earlier run embedded with another" in capsys.readouterr().err
    assert any(len(text) == 300 for batch in again.read for text in batch)


def test_tokens_at_the_beginning_are_left_out_of_the_mean_of_both_strands(people, folder):
    settings = extraction("evo2", trim_left=15, window_bp=1200, stride_bp=1200)
    store = extract(settings, people, folder / "out", load=lambda _: toys.Evo2Like())
    made = people.gene(0)
    sequence = made.sequences[made.index[0, 0]]
    model = toys.Evo2Like()
    tails = [
        model.positions([text])[0, 15:].mean(dim=0).detach().numpy()
        for text in (sequence, reverse_complement(sequence))
    ]
    np.testing.assert_allclose(vectors_of(store)[0, 0, 0], sum(tails) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["evo2", "generator", "ps"])
def test_the_native_form_reads_back_as_the_store(people, folder, kind):
    store = extract(extraction(kind), people, folder / "out", load=lambda _: MODELS[kind][3]())
    write_native(folder / "native", store)
    write_native(folder / "native", store)  # again, in its place
    back = read(MODELS[kind][0], folder / "native")
    expected = open_store(store)
    assert back.subjects == expected.subjects
    assert back.genes == expected.genes
    assert np.array_equal(back.mask, expected.mask)
    assert isinstance(back.vectors, StoredVectors)
    found = back.vectors.haplotypes(np.arange(6))
    assert np.array_equal(found, vectors_of(store))
    assert back.provenance.strands == expected.provenance.strands


def test_people_with_one_sequence_each_make_a_store_without_haplotypes(tmp_path):
    (tmp_path / "people").mkdir()
    for person in range(4):
        bases = mutated(reference(1, 300), 10 * person)
        write_fasta(tmp_path / "people" / f"{person}.fa", ABC=bases)
    people = PersonalSequences(tmp_path / "people")
    store = extract(extraction("evo2"), people, tmp_path / "out", load=lambda _: toys.Evo2Like())
    people.close()
    assert open_store(store).n_haplotypes == 1
    assert open_store(store).vectors.shape == (4, 1, 64)
    write_native(tmp_path / "native", store)
    assert np.array_equal(read("evo2", tmp_path / "native").vectors, open_store(store).vectors)


def test_indel_carriers_are_listed_and_alarm_a_model_of_six_mers(tmp_path, capsys):
    (tmp_path / "people").mkdir()
    bases = reference(1, 300)
    for person in range(4):
        other = bases[:100] + bases[101:] if person == 2 else mutated(bases, 10 * person)
        write_fasta(tmp_path / "people" / f"p{person}.fa", **{"ABC|1": bases, "ABC|2": other})
    people = PersonalSequences(tmp_path / "people")
    settings = extraction("generator", declared={"indels": "included"})
    store = extract(settings, people, tmp_path / "out", load=lambda _: toys.GeneratorLike())
    people.close()
    alarms = {alarm.name: alarm.figure for alarm in open_store(store).alarms}
    assert alarms["indel carriers"] == 1 / 8
    flags = pl.read_parquet(tmp_path / "out" / "indels.parquet")
    assert flags.rows() == [("p2", "ABC", False, True)]
    said = capsys.readouterr().err
    assert "indel carriers: 12.5%" in said
    assert "p2" not in said


def test_vectors_that_are_not_finite_are_masked(people, folder):
    model = toys.Evo2Like()
    usual = model.positions
    bad = people.gene(0).sequences[1][:300]

    def sometimes_nan(texts):
        hidden = usual(texts)
        for row, text in enumerate(texts):
            if text == bad:
                hidden = hidden.clone()
                hidden[row, 5, 7] = float("nan")
        return hidden

    model.positions = sometimes_nan
    store = extract(extraction("evo2"), people, folder / "out", load=lambda _: model)
    made = people.gene(0)
    carries = np.array([[made.sequences[k].startswith(bad) for k in row] for row in made.index])
    assert 0 < carries.any(axis=1).sum() < 6
    assert np.array_equal(open_store(store).mask[:, 0], ~carries.any(axis=1))
    assert pl.read_parquet(folder / "out" / "genes.parquet")["n_not_finite"][0] > 0


def test_everybody_having_the_same_sequence_is_refused(tmp_path):
    (tmp_path / "people").mkdir()
    for person in range(3):
        write_fasta(tmp_path / "people" / f"{person}.fa", ABC=reference(1, 300))
    people = PersonalSequences(tmp_path / "people")
    with pytest.raises(UserError, match="all people have the same vectors"):
        extract(extraction("evo2"), people, tmp_path / "out", load=lambda _: toys.Evo2Like())
    people.close()
    assert not (tmp_path / "out" / "store").exists()


def test_what_was_done_is_written_beside_the_store(people, folder):
    extract(extraction("evo2"), people, folder / "out", load=lambda _: toys.Evo2Like())
    said = json.loads((folder / "out" / "extraction.json").read_text())
    assert said["counts"] == {"absent": 1}
    assert said["provenance"]["window_bp"] == 300
    assert said["provenance"]["reference"] == "GRCh37"
    genes = pl.read_parquet(folder / "out" / "genes.parquet")
    assert genes["gene"].to_list() == ["ABC", "DEF"]
    assert genes["length_bp"].to_list() == [600, 906]


def test_folders_that_are_something_else_are_left_alone(people, folder):
    (folder / "out" / "store").mkdir(parents=True)
    (folder / "out" / "store" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is no store"):
        extract(extraction("evo2"), people, folder / "out", load=lambda _: toys.Evo2Like())
    with pytest.raises(UserError, match="--batch-size 0"):
        extraction("evo2", batch_size=0)
