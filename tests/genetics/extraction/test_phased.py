from pathlib import Path

import numpy as np
import pytest

from brainfusion.genetics.extraction.phased import PhasedVariants
from brainfusion.genetics.extraction.regions import Region
from brainfusion.genetics.extraction.sequences import GeneHaplotypes
from brainfusion.runtime.errors import UserError
from tests.genetics.extraction.people import write_vcf

pytest.importorskip("pysam", reason="pysam, which reads VCF, is not installed")

BASES = "ACGTACGTACGTACGTACGTACGTACGTAC"  # chromosome 7, 30 bases
REGION = Region(gene="ABC", chromosome="7", start=5, end=25, strand="+")
REFERENCE = BASES[5:25]


def read(
    folder: Path, *rows: tuple, samples: tuple[str, ...] = ("p1",), name="x.vcf.gz", **options
) -> GeneHaplotypes:
    path = write_vcf(folder / name, list(rows), list(samples), contigs={"7": 30})
    variants = PhasedVariants(str(path), regions=[REGION], references={"ABC": REFERENCE}, **options)
    return variants.gene(0)


def both(found: GeneHaplotypes, person: int = 0) -> tuple[str, str]:
    first, second = found.index[person]
    return found.sequences[first], found.sequences[second]


def with_base(position: int, base: str) -> str:
    """The region's reference with one base changed; positions count from 1 on the chromosome."""
    at = position - 1 - REGION.start
    return REFERENCE[:at] + base + REFERENCE[at + 1 :]


def snv(position: int, alt: str, *genotypes: str, form: str = "GT", filters: str = "PASS") -> tuple:
    return ("7", position, BASES[position - 1], alt, filters, form, *genotypes)


@pytest.mark.parametrize("name", ["x.vcf.gz", "x.bcf"])
def test_each_haplotype_gets_its_own_alleles(tmp_path, name):
    found = read(
        tmp_path, snv(10, "T", "0|1", "1|1"), snv(12, "A", "1|0", "0|0"),
        samples=("p1", "p2"), name=name,
    )  # fmt: skip
    assert both(found) == (with_base(12, "A"), with_base(10, "T"))
    assert both(found, 1) == (with_base(10, "T"),) * 2
    assert not found.counts
    assert found.n_variants == 2


def test_other_fields_beside_the_genotype_are_ignored(tmp_path):
    found = read(tmp_path, snv(10, "T", "0|1:0.9", form="GT:DS"))
    assert both(found) == (REFERENCE, with_base(10, "T"))


def test_several_alternative_alleles_are_each_haplotypes_own(tmp_path):
    found = read(tmp_path, snv(10, "T,G", "2|1"))
    assert both(found) == (with_base(10, "G"), with_base(10, "T"))
    assert found.counts == {"multi-allelic": 1}


def test_insertions_and_deletions_are_left_out_or_applied_with_a_flag(tmp_path):
    rows = [("7", 10, "CGT", "C", "PASS", "GT", "1|0"), ("7", 15, "G", "GAA", "PASS", "GT", "0|1")]
    skipped = read(tmp_path, *rows)
    assert both(skipped) == (REFERENCE, REFERENCE)
    assert skipped.counts == {"indels left out": 2}
    assert not skipped.indels.any()
    assert skipped.n_variants == 0
    applied = read(tmp_path, *rows, apply_indels=True)
    assert both(applied) == (
        (BASES[:10] + BASES[12:])[5:23], (BASES[:15] + "AA" + BASES[15:])[5:27]
    )  # fmt: skip
    assert applied.counts == {"indels applied": 2}
    assert applied.indels[applied.index].all()


def test_a_substitution_of_equal_length_is_applied_whatever_is_done_with_indels(tmp_path):
    found = read(tmp_path, ("7", 10, "CG", "TA", "PASS", "GT", "1|1"))
    assert both(found)[0] == with_base(10, "T")[:5] + "A" + REFERENCE[6:]
    assert not found.counts


def test_symbolic_alleles_filtered_records_and_changes_beyond_the_region_are_left_out(tmp_path):
    found = read(
        tmp_path,
        ("7", 4, "TACGT", "T", "PASS", "GT", "1|1"),  # begins before the region
        ("7", 10, "C", "<DEL>,T", "PASS", "GT", "1|2"),
        snv(12, "A", "1|1", filters="bad"),
        ("7", 14, "C", "*", "PASS", "GT", "1|0"),
        ("7", 24, "TAC", "GGG", "PASS", "GT", "1|1"),  # ends behind it
        apply_indels=True,
    )
    assert both(found) == (REFERENCE, with_base(10, "T"))
    assert found.counts == {
        "symbolic": 2, "filtered": 1, "beyond the region": 2, "multi-allelic": 1
    }  # fmt: skip


def test_missing_alleles_are_the_reference_and_people_with_many_have_no_vector(tmp_path):
    rows = [snv(7 + k, "ACGT"[(k + 3) % 4], "0|0", "0|0", "0|0") for k in range(12)]
    rows[3] = snv(10, "T", "0|1", ".|1", "./.")
    rows[4] = snv(11, "A", "0|0", "0|0", ".")
    found = read(tmp_path, *rows, samples=("p1", "p2", "p3"))
    assert both(found, 1) == (REFERENCE, with_base(10, "T"))
    assert found.mask.tolist() == [True, True, False]  # 0, 1 and 2 of 12
    assert found.counts == {"missing": 3, "masked": 1}


def test_a_few_unphased_genotypes_are_the_reference_and_many_are_refused(tmp_path):
    rows = [snv(10, "T", *["0|1"] * 150, "0/1"), snv(12, "A", *["0|0"] * 150, "1/1")]
    names = tuple(f"p{k}" for k in range(151))
    found = read(tmp_path, *rows, samples=names)
    assert both(found, 150) == (with_base(12, "A"),) * 2  # homozygous ones need no phase
    assert found.counts == {"unphased": 1}
    with pytest.raises(UserError, match="1 of 1 heterozygous genotypes have no phase"):
        read(tmp_path, snv(10, "T", "0/1"))


def test_one_allele_stands_for_both_haplotypes(tmp_path):
    found = read(tmp_path, snv(10, "T", "1"))
    assert both(found) == (with_base(10, "T"),) * 2
    assert found.counts == {"haploid": 1}


def test_phase_sets_are_said(tmp_path):
    found = read(tmp_path, snv(10, "T", "0|1:5", form="GT:PS"))
    assert found.counts == {"phase sets": 1}


def test_overlapping_changes_of_one_haplotype_are_counted(tmp_path):
    found = read(tmp_path, snv(10, "T", "1|1"), snv(10, "G", "0|1"))
    assert both(found) == (with_base(10, "T"),) * 2
    assert found.counts == {"overlapping": 1}


def test_another_reference_is_refused_with_counts(tmp_path):
    with pytest.raises(UserError, match="1 of 2 REF alleles are not what the reference has"):
        read(tmp_path, snv(10, "T", "0|1"), ("7", 12, "A", "G", "PASS", "GT", "0|1"))


def test_people_are_read_in_the_order_asked_for_and_absent_ones_are_counted(tmp_path):
    rows = [snv(10, "T", "0|0", "0|1", "1|1")]
    found = read(tmp_path, *rows, samples=("p1", "p2", "p3"), subjects=("p3", "p1"))
    assert both(found) == (with_base(10, "T"),) * 2
    assert both(found, 1) == (REFERENCE, REFERENCE)
    with pytest.raises(UserError, match="1 of the 2 people who are asked for") as error:
        read(tmp_path, *rows, samples=("p1", "p2", "p3"), subjects=("p3", "secret"))
    assert "secret" not in str(error.value)


def test_a_file_a_chromosome_is_found_by_the_template(tmp_path):
    other = BASES.replace("A", "N")
    write_vcf(tmp_path / "c7.vcf.gz", [snv(10, "T", "0|1")], ["p1"], contigs={"7": 30})
    write_vcf(
        tmp_path / "c8.vcf.gz", [("chr8", 10, "C", "A", "PASS", "GT", "1|0")], ["p1"],
        contigs={"chr8": 30},
    )  # fmt: skip
    second = Region(gene="DEF", chromosome="8", start=5, end=25, strand="-")
    variants = PhasedVariants(
        str(tmp_path / "c{chromosome}.vcf.gz"),
        regions=[REGION, second],
        references={"ABC": REFERENCE, "DEF": other[5:25]},
    )
    assert both(variants.gene(0)) == (REFERENCE, with_base(10, "T"))
    assert both(variants.gene(1))[0] == other[5:9] + "A" + other[10:25]
    assert both(variants.gene(0)) == (REFERENCE, with_base(10, "T"))


def test_files_that_cannot_be_searched_are_refused(tmp_path):
    path = write_vcf(tmp_path / "x.vcf.gz", [snv(10, "T", "0|1")], ["p1"], contigs={"7": 30})
    arguments = {"regions": [REGION], "references": {"ABC": REFERENCE}}
    path.with_name("x.vcf.gz.tbi").unlink()
    with pytest.raises(UserError, match="has no index"):
        PhasedVariants(str(path), **arguments)
    with pytest.raises(UserError, match="does not exist"):
        PhasedVariants(str(tmp_path / "absent.vcf.gz"), **arguments)
    (tmp_path / "no.vcf.gz").write_text("nothing")
    with pytest.raises(UserError, match="cannot be opened as VCF"):
        PhasedVariants(str(tmp_path / "no.vcf.gz"), **arguments)


def test_a_region_without_variants_is_everyones_reference(tmp_path):
    found = read(tmp_path, snv(28, "A", "0|1"))
    assert found.sequences == (REFERENCE,)
    assert np.array_equal(found.index, [[0, 0]])
