import numpy as np
import pytest

from brainfusion.genetics.extraction.personal import PersonalSequences
from brainfusion.genetics.extraction.regions import Region
from brainfusion.runtime.errors import UserError
from tests.genetics.extraction.people import write_fasta


@pytest.fixture(autouse=True)
def closed(monkeypatch):
    """Close whatever a test opens."""
    made = []
    begin = PersonalSequences.__init__

    def watched(self, *arguments, **options):
        made.append(self)
        begin(self, *arguments, **options)

    monkeypatch.setattr(PersonalSequences, "__init__", watched)
    yield
    for found in made:
        if hasattr(found, "_spool"):
            found.close()


def sequences_of(found: PersonalSequences, gene: int) -> list[list[str]]:
    made = found.gene(gene)
    return [[made.sequences[number] for number in person] for person in made.index]


def test_records_named_by_gene_and_haplotype_are_put_together(tmp_path, capsys):
    write_fasta(tmp_path / "0001.fa", **{"OXT|1": "ACGT", "OXT|2": "AcGA", "AVP|1": "GG"})
    write_fasta(tmp_path / "0002.fa", **{"OXT|1": "ACGA", "OXT|2": "ACGA"})
    write_fasta(tmp_path / "0003.fa", **{"OXT|1": "ACGRT", "OXT|2": "ACGT"})
    found = PersonalSequences(tmp_path)
    assert found.subjects == ("0001", "0002", "0003")
    assert found.genes == ("OXT", "AVP")
    assert found.n_haplotypes == 2
    assert sequences_of(found, 0) == [["ACGT", "ACGA"], ["ACGA", "ACGA"], ["ACGNT", "ACGT"]]
    made = found.gene(0)
    assert made.indels[made.index].tolist() == [[False] * 2, [False] * 2, [True, False]]
    assert found.gene(1).mask.tolist() == [False, False, False]  # one haplotype is not enough
    said = capsys.readouterr().err
    assert "1 sequences with lower-case bases" in said
    assert "1 letters" in said
    assert "0001" not in said


def test_a_file_a_haplotype_and_chromosomes_cut_by_regions(tmp_path):
    for person, (first, second) in {"a": ("ACGTACGT", "ACGTACGA"), "b": ("ACTTACGT",) * 2}.items():
        write_fasta(tmp_path / f"{person}.1.fa", **{"chr7": first})
        write_fasta(tmp_path / f"{person}.2.fa", **{"chr7": second})
    (tmp_path / "notes.txt").write_text("no FASTA")
    regions = [Region(gene="OXT", chromosome="7", start=1, end=8, strand="-")]
    found = PersonalSequences(tmp_path, files="{subject}.{haplotype}", regions=regions)
    assert sequences_of(found, 0) == [["CGTACGT", "CGTACGA"], ["CTTACGT"] * 2]
    assert found.gene(0).strand == "-"
    write_fasta(tmp_path / "b.2.fa", **{"chr7": "ACTTACGTT"})
    with pytest.raises(UserError, match="has 9 bases in one person's file and 8 in another's"):
        PersonalSequences(tmp_path, files="{subject}.{haplotype}", regions=regions)


def test_one_sequence_a_person_keeps_one_haplotype_and_absent_genes_are_masked(tmp_path):
    write_fasta(tmp_path / "a.fa", OXT="ACGT", AVP="GGGG")
    write_fasta(tmp_path / "b.fa", OXT="ACGA")
    found = PersonalSequences(tmp_path, subjects=("b", "a"))
    assert found.n_haplotypes == 1
    assert found.gene(1).mask.tolist() == [False, True]
    assert found.gene(1).counts == {"absent": 1}
    assert np.array_equal(found.gene(0).index, [[1], [0]]) or sequences_of(found, 0) == [
        ["ACGA"],
        ["ACGT"],
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"files": "{person}"}, "expected '{subject}'"),
        ({"files": "{subject}_{haplotype}"}, "no file is named"),
        ({"subjects": ("a", "secret")}, "1 of the 2 people who are asked for have no file"),
        ({"genes": ("OXT", "NOPE")}, "1 of 2 genes are in nobody's file"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, options, words):
    write_fasta(tmp_path / "a.fa", OXT="ACGT")
    with pytest.raises(UserError, match=words) as error:
        PersonalSequences(tmp_path, **options)
    assert "secret" not in str(error.value)
