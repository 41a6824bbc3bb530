"""Small made-up cohorts: a reference, a phased VCF and regions, written with pysam."""

from pathlib import Path

import numpy as np

REFERENCE_BP = 3000


def reference(seed: int = 0, length_bp: int = REFERENCE_BP) -> str:
    """Random bases."""
    return "".join(np.random.default_rng(seed).choice(list("ACGT"), length_bp))


def write_fasta(path: Path, **records: str) -> Path:
    """Records in lines of 60."""
    lines = []
    for name, sequence in records.items():
        lines += [f">{name} a description"]
        lines += [sequence[start : start + 60] for start in range(0, len(sequence), 60)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_vcf(
    path: Path, rows: list[tuple], samples: list[str], *, contigs: dict[str, int], extra: str = ""
) -> Path:
    """Rows of (chromosome, position from 1, REF, ALT, FILTER, FORMAT, genotypes ...), indexed.

    `path` ends in `.vcf.gz` or `.bcf`.
    """
    import pysam
    import pysam.bcftools

    head = ["##fileformat=VCFv4.2", '##FILTER=<ID=bad,Description="bad">']
    head += ['##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">']
    head += ['##FORMAT=<ID=DS,Number=1,Type=Float,Description="Dosage">']
    head += ['##FORMAT=<ID=PS,Number=1,Type=Integer,Description="Phase set">']
    head += [f"##contig=<ID={name},length={length}>" for name, length in contigs.items()]
    columns = ["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", *samples]
    body = []
    for chromosome, position, ref, alt, filters, form, *genotypes in rows:
        fields = [chromosome, str(position), ".", ref, alt, ".", filters, ".", form, *genotypes]
        body.append("\t".join(fields))
    plain = path.with_name("plain.vcf")
    plain.write_text("\n".join([*head, "\t".join(columns), *body]) + "\n")
    if path.suffix == ".bcf":
        with (
            pysam.VariantFile(str(plain)) as source,
            pysam.VariantFile(str(path), "wb", header=source.header) as target,
        ):
            for record in source:
                target.write(record)
        pysam.bcftools.index("-f", str(path), catch_stdout=False)
    else:
        pysam.tabix_compress(str(plain), str(path), force=True)
        pysam.tabix_index(str(path), preset="vcf", force=True)
    plain.unlink()
    return path


def write_cohort(folder: Path, *, n_people: int = 6, n_variants: int = 40, seed: int = 0) -> Path:
    """ref.fa, people.vcf.gz (single bases only) and genes.tsv, of two genes on chromosome 7."""
    rng = np.random.default_rng(seed)
    bases = reference(seed)
    samples = [f"{1000 + number:07d}" for number in range(n_people)]
    rows = []
    for start in sorted(rng.choice(REFERENCE_BP, n_variants, replace=False).tolist()):
        alt = rng.choice([base for base in "ACGT" if base != bases[start]])
        alleles = (rng.random((n_people, 2)) < rng.uniform(0.1, 0.6)).astype(int)
        genotypes = [f"{a}|{b}" for a, b in alleles]
        rows.append(("7", start + 1, bases[start], str(alt), "PASS", "GT", *genotypes))
    write_fasta(folder / "ref.fa", **{"7": bases})
    write_vcf(folder / "people.vcf.gz", rows, samples, contigs={"7": REFERENCE_BP})
    table = ["gene\tchromosome\tstart\tend\tstrand", "ABC\t7\t301\t900\t+", "DEF\t7\t1501\t2107\t-"]
    (folder / "genes.tsv").write_text("\n".join(table) + "\n")
    return folder
