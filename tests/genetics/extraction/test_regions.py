import gzip

import polars as pl
import pytest

from brainfusion.genetics.extraction.fasta import match_chromosomes, normalised, records
from brainfusion.genetics.extraction.reference import read_reference
from brainfusion.genetics.extraction.regions import Region, read_regions
from brainfusion.genetics.strands import reverse_complement
from brainfusion.runtime.errors import UserError
from tests.genetics.extraction.people import write_fasta


def region(gene="ABC", chromosome="7", start=2, end=8, strand="+") -> Region:
    return Region(gene=gene, chromosome=chromosome, start=start, end=end, strand=strand)


def test_a_bed_file_and_a_table_that_counts_from_1_give_the_same_region(tmp_path):
    (tmp_path / "genes.bed").write_text("# a comment\n7\t2\t8\tABC\t0\t+\n")
    (tmp_path / "genes.tsv").write_text("gene_name\tchrom\tstart\tend\tstrand\nABC\t7\t3\t8\t1\n")
    table = {"gene": ["ABC"], "chr": ["7"], "start": [2], "stop": [8], "strand": ["+"]}
    pl.DataFrame(table).write_parquet(tmp_path / "genes.parquet")
    with gzip.open(tmp_path / "more.bed.gz", "wt") as handle:
        handle.write("7\t2\t8\tABC\t0\t+\n")
    assert read_regions(tmp_path / "genes.bed") == [region()]
    assert read_regions(tmp_path / "more.bed.gz") == [region()]
    assert read_regions(tmp_path / "genes.tsv", coordinates="1-based") == [region()]
    assert read_regions(tmp_path / "genes.parquet", coordinates="0-based") == [region()]


@pytest.mark.parametrize(
    ("name", "text", "coordinates", "words"),
    [
        ("x.tsv", "gene\tchromosome\tstart\tend\tstrand\nA\t7\t1\t9\t+\n", None, "say how it"),
        ("x.bed", "7\t2\t8\tA\t0\t+\n", "1-based", "counts from 0 by definition"),
        ("x.bed", "7\t2\t8\tA\n", None, "fewer than 6 columns"),
        ("x.bed", "\n", None, "no regions"),
        ("x.tsv", "name2\tchrom\tstart\tend\tstrand\nA\t7\t1\t9\t+\n", "1-based", "no column"),
        ("x.csv", "gene,chrom,start,end,strand\nA,7,0,9,+\n", "1-based", "1 <= start <= end"),
        ("x.csv", "gene,chrom,start,end,strand\nA,7,9,9,+\n", "0-based", "0 <= start < end"),
        ("x.csv", "gene,chrom,start,end,strand\nA,7,1,9,.\n", "1-based", "of gene A, expected"),
        ("x.csv", "gene,chrom,start,end,strand\nA,7,one,9,+\n", "1-based", "whole numbers"),
        ("x.csv", "gene,chrom,start,end,strand\nA,7,1,9,+\nA,7,1,9,+\n", "1-based", "duplicate"),
        ("x.gff", "", "1-based", "expected regions as"),
    ],
)  # fmt: skip
def test_regions_that_cannot_be_understood_are_refused(tmp_path, name, text, coordinates, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        read_regions(tmp_path / name, coordinates=coordinates)


def test_reference_sequences_are_upper_case_widened_and_matched_with_or_without_chr(
    tmp_path, capsys
):
    fasta = write_fasta(tmp_path / "x.fa", **{"chr7": "ACGTacgtRTacgtACGT", "chr8": "TTTTTTTTTT"})
    regions = [region(start=4, end=16), region("DEF", "chr8", 0, 10, "-")]
    wide, sequences = read_reference(fasta, regions, flank_bp=3)
    said = capsys.readouterr().err
    assert sequences == {"ABC": "CGTACGTNTACGTACGT", "DEF": "TTTTTTTTTT"}
    assert [(r.start, r.end) for r in wide] == [(1, 18), (0, 10)]
    assert "7 bases of flanks" in said  # 1 behind ABC, 3 and 3 around DEF
    assert "differ by 'chr'" in said
    assert "1 of 2 regions have lower-case bases" in said
    assert "1 letters that are none of ACGTN become N" in said


def test_regions_beyond_the_chromosome_or_of_unknown_bases_are_refused(tmp_path):
    fasta = write_fasta(tmp_path / "x.fa", **{"7": "ACGT" * 10, "8": "N" * 10 + "ACGT"})
    with pytest.raises(UserError, match="outside the chromosome, which has 40 bases"):
        read_reference(fasta, [region(start=30, end=41)])
    with pytest.raises(UserError, match="83% of its bases are unknown"):
        read_reference(fasta, [region(chromosome="8", start=0, end=12)])
    with pytest.raises(UserError, match="no chromosome 9"):
        read_reference(fasta, [region(chromosome="9")])


def test_files_that_are_no_fasta_are_refused(tmp_path):
    (tmp_path / "x.fa").write_text("ACGT\n>7\nACGT\n")
    (tmp_path / "empty.fa").write_text("")
    (tmp_path / "cut.fa.gz").write_bytes(gzip.compress(b">7\n" + b"ACGT" * 1000)[:-20])
    for name, words in (
        ("x.fa", "does not begin with '>'"),
        ("empty.fa", "no FASTA records"),
        ("cut.fa.gz", "cannot be read as FASTA"),
        ("absent.fa", "No such file"),
    ):
        with pytest.raises(UserError, match=words):
            list(records(tmp_path / name))


def test_reverse_complement_and_normal_letters():
    assert reverse_complement("AACGTN") == "NACGTT"
    assert normalised("acgtRYn-") == "ACGTNNNN"
    assert match_chromosomes(["chr1", "2"], ["1", "chr2"], where="x") == {"chr1": "1", "2": "chr2"}
