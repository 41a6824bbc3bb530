"""Real haplotypes of 300 people (`tests/real_dna.py`), through models with random weights."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from brainfusion.genetics import open_store, variance_kept
from brainfusion.genetics.extraction.phased import PhasedVariants
from brainfusion.genetics.extraction.reference import read_reference
from brainfusion.genetics.extraction.regions import Region
from brainfusion.genetics.extraction.run import extract
from brainfusion.genetics.strands import reverse_complement
from brainfusion.runtime.errors import UserError
from tests.genetics.extraction import toys
from tests.genetics.extraction.test_run import MODELS, extraction, vectors_of
from tests.real_dna import AVP, OXT, chr20

pysam = pytest.importorskip("pysam", reason="pysam, which reads VCF, is not installed")

_MIDDLE = (OXT[0] + OXT[1]) // 2
_WINDOWS = {"1.2 kb": 1200, "6 kb": 6000, "24 kb": 24000}


def around(gene: str, width: int) -> Region:
    start = _MIDDLE - width // 2
    return Region(gene=gene, chromosome="20", start=start, end=start + width, strand="+")


REGIONS = [
    Region(gene="OXT", chromosome="chr20", start=OXT[0] - 2000, end=OXT[1] + 2000, strand="+"),
    Region(gene="AVP", chromosome="chr20", start=AVP[0], end=AVP[1], strand="-"),
    Region(gene="all", chromosome="chr20", start=1_000_000, end=4_000_000, strand="+"),
    *(around(name, width) for name, width in _WINDOWS.items()),
]


@pytest.fixture(scope="module")
def references() -> dict[str, str]:
    """The regions' bases; the FASTA file is read once."""
    return read_reference(chr20()[0], REGIONS)[1]


def variants(references: dict[str, str], genes: list[str], **options) -> PhasedVariants:
    regions = [region for region in REGIONS if region.gene in genes]
    return PhasedVariants(str(chr20()[1]), regions=regions, references=references, **options)


def test_every_reference_allele_is_the_fasta_files(references):
    bases, start = references["all"], REGIONS[2].start
    before = pysam.set_verbosity(0)
    with pysam.VariantFile(str(chr20()[1])) as opened:
        places = [(record.start - start, record.ref) for record in opened]
    pysam.set_verbosity(before)
    equal = sum(bases[at : at + len(ref)] == ref for at, ref in places)
    assert (equal, len(places)) == (24_990, 24_990)


def test_another_place_of_the_chromosome_is_refused_as_another_reference(references):
    shifted = {"OXT": references["all"][: len(references["OXT"])]}
    with pytest.raises(UserError, match="of 46 REF alleles are not what the reference has"):
        variants(shifted, ["OXT"]).gene(0)


def test_oxytocins_locus_has_97_distinct_haplotypes_of_600(references, capsys):
    found = variants(references, ["OXT"], apply_indels=True).gene(0)
    assert found.index.shape == (300, 2)
    assert len(found.sequences) == len(set(found.index.ravel().tolist())) == 97
    assert found.n_variants == 40  # of 46 records; nobody here carries the others
    assert found.counts["indels applied"] == 4
    single = variants(references, ["OXT"]).gene(0)
    assert len(single.sequences) == 75
    assert {len(sequence) for sequence in single.sequences} == {len(references["OXT"])}
    assert "differ by 'chr'" in capsys.readouterr().err


def test_each_haplotype_equals_a_patch_by_hand(references):
    """Edits from right to left, with pysam's own reading of the genotypes."""
    region = REGIONS[0]
    found = variants(references, ["OXT"], apply_indels=True).gene(0)
    before = pysam.set_verbosity(0)
    with pysam.VariantFile(str(chr20()[1])) as opened:
        records = list(opened.fetch("20", region.start, region.end))
        carried = [[sample["GT"] for sample in record.samples.values()] for record in records]
    pysam.set_verbosity(before)
    for person in range(300):
        for haplotype in (0, 1):
            bases = references["OXT"]
            for record, alleles in reversed(list(zip(records, carried, strict=True))):
                at = record.start - region.start
                allele = record.alleles[alleles[person][haplotype]]
                bases = bases[:at] + allele + bases[at + len(record.ref) :]
            assert found.sequences[found.index[person, haplotype]] == bases


@pytest.mark.parametrize("kind", list(MODELS))
def test_vectors_of_real_haplotypes_do_not_depend_on_the_strand(references, tmp_path, kind):
    settings = extraction(kind, batch_size=16, window_bp=996, stride_bp=996)
    # 2,160 of AVP's 2,169 bp are three windows of 720, whichever end they are counted from.
    region = Region(gene="AVP", chromosome="20", start=AVP[1] - 2160, end=AVP[1], strand="-")
    cut = {"AVP": references["AVP"][-2160:]}
    people = PhasedVariants(str(chr20()[1]), regions=[region], references=cut)
    one, other = (
        vectors_of(extract(settings, who, tmp_path / name, load=lambda _: MODELS[kind][3]()))
        for name, who in (("one", people), ("other", _Flipped(people)))
    )
    people.close()
    between = one.reshape(600, -1).std(axis=0).mean()
    assert np.abs(one - other).max() < 0.05 * between  # float32 rounding, of what differs


class _Flipped:
    """Everyone's sequences, written as the other strand."""

    def __init__(self, people: PhasedVariants) -> None:
        self._people, self.n_haplotypes = people, 2
        self.subjects, self.genes = people.subjects, people.genes

    def gene(self, number: int):
        found = self._people.gene(number)
        return replace(found, sequences=tuple(map(reverse_complement, found.sequences)))

    def close(self) -> None:
        pass


def people_vectors(references: dict[str, str], name: str) -> np.ndarray:
    """float32 [300, 64]: the mean of a person's haplotypes, both strands averaged."""
    people = variants(references, [name])
    found = people.gene(0)
    people.close()
    net = toys.ConvModel(5, causal=True)
    with torch.inference_mode():
        vectors = [
            sum(net(toys.letters([text])).mean(dim=1)[0] for text in (s, reverse_complement(s))) / 2
            for s in found.sequences
        ]
    return torch.stack(vectors).numpy()[found.index].mean(axis=1)


@pytest.mark.parametrize(
    ("name", "bfloat16", "float16"),
    [
        ("1.2 kb", 0.45, 0.93),
        ("6 kb", 0.27, 0.83),
        pytest.param("24 kb", 0.17, 0.69, marks=pytest.mark.slow),
    ],
)
def test_storage_in_16_bits_loses_what_differs_between_real_people(
    references, name, bfloat16, float16
):
    """Expected: what another random convolutional model kept of the same haplotypes."""
    kept = variance_kept(people_vectors(references, name))
    assert kept["bfloat16"] == pytest.approx(bfloat16, abs=0.06)
    assert kept["float16"] == pytest.approx(float16, abs=0.06)
    assert kept["centred bfloat16"] > 0.995
    assert kept["float32"] == pytest.approx(1.0)


def bed_file(folder: Path, *regions: Region) -> Path:
    lines = [f"20\t{r.start}\t{r.end}\t{r.gene}\t0\t{r.strand}" for r in regions]
    (folder / "genes.bed").write_text("\n".join(lines) + "\n")
    return folder / "genes.bed"


@pytest.fixture
def extracted(tmp_path, monkeypatch):
    """Runs the command on the public files, with a stand-in for the model's package."""
    from brainfusion.cli import main

    fasta, vcf = chr20()
    (tmp_path / "weights").mkdir()

    def run(model: str, *regions: Region, more: tuple[object, ...] = ()) -> Path:
        toy = toys.evo2_package() if model == "evo2" else toys.transformers_package(model)
        monkeypatch.setitem(sys.modules, "evo2" if model == "evo2" else "transformers", toy)
        words = ["--model", model, "--checkpoint", "simulated", "--weights", tmp_path / "weights",
                 "--reference", fasta, "--variants", vcf, "--window-bp", 1200, "--build", "GRCh37",
                 "--regions", bed_file(tmp_path, *regions), "--out", tmp_path / "out"]  # fmt: skip
        words += ["--layer", "blocks.0"] if model == "evo2" else []
        assert main(["extract", *map(str, words), *map(str, more)]) == 0
        return tmp_path / "out"

    return run


@pytest.mark.parametrize("model", ["evo2", "generator", "caduceus"])
def test_the_command_goes_from_public_files_to_a_store(model, references, extracted, capsys):
    genes = [Region(gene=name, chromosome="20", start=start, end=end, strand=strand)
             for name, (start, end, strand) in {"AVP": AVP, "OXT": OXT}.items()]  # fmt: skip
    out = extracted(model, *genes, more=("--flank-bp", 150))
    store = open_store(out / "store")
    assert store.vectors.shape == (300, 2, 64)
    assert store.genes == ("AVP", "OXT")
    assert store.mask.all()
    wide = [replace(gene, start=gene.start - 150, end=gene.end + 150) for gene in genes]
    first = REGIONS[2].start
    bases = {r.gene: references["all"][r.start - first : r.end - first] for r in wide}
    people = PhasedVariants(str(chr20()[1]), regions=wide, references=bases)
    distinct = [len(people.gene(number).sequences) for number in (0, 1)]
    offsets = np.load(out / "store" / "offsets.npy")
    assert np.diff(offsets).tolist() == distinct  # each distinct haplotype once
    said = capsys.readouterr().err
    assert "300 people x 2 genes" in said
    assert "HG0" not in said


def test_import_prints_what_each_storage_would_keep_of_real_people(extracted, tmp_path, capsys):
    from brainfusion.cli import main

    out = extracted("evo2", around("w", 1200), more=("--native",))
    (tmp_path / "bold").mkdir()
    recording = np.random.default_rng(0).normal(size=(4, 40)).astype(np.float32)
    for subject in open_store(out / "store").subjects:
        np.save(tmp_path / "bold" / f"{subject}.npy", recording)
    atlas = {"name": "a", "parcels": list("abcd"), "xyz_mm": None, "gradient": None}
    (tmp_path / "atlas.json").write_text(json.dumps(atlas))
    cohort = ["--out", str(tmp_path / "c"), "--atlas", str(tmp_path / "atlas.json"), "--tr-s", "2"]
    assert main(["import", str(tmp_path / "bold"), *cohort]) == 0
    capsys.readouterr()
    words = ["--dna", "evo2", str(out / "native"), "--cohort", str(tmp_path / "c")]
    assert main(["import", *words]) == 0
    said = capsys.readouterr().err
    kept = dict(re.findall(r"(float32|float16|bfloat16|centred \w+) ([\d.]+)%", said))
    assert float(kept["bfloat16"]) == pytest.approx(45, abs=8)
    assert float(kept["float16"]) == pytest.approx(93, abs=5)
    assert float(kept["float32"]) == 100.0
    assert "HG0" not in said
