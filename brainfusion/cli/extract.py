"""`brainfusion extract`: make DNA embeddings of everyone's own sequence, with a model you have.

Sequences come from a reference FASTA and a phased VCF or BCF (with pysam), or from a FASTA file a
person. Each distinct haplotype is read once; both strands are read and averaged, or folded; a run
that was stopped goes on. The model's package and weights are yours to install: what is missing is
said. No id is printed.
"""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from brainfusion.cli.options import at_least, parse
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import check_writable, hash_file
from brainfusion.runtime.logs import say

if TYPE_CHECKING:
    from brainfusion.genetics.extraction.models import ModelConfig
    from brainfusion.genetics.extraction.regions import Region
    from brainfusion.genetics.extraction.run import Haplotypes
    from brainfusion.genetics.extraction.windows import Reading


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractOptions:
    """Options of `brainfusion extract`."""

    model: Literal["evo2", "generator", "caduceus"]
    """The family."""
    out: Path
    """The folder for the store and its tables."""
    checkpoint: str | None = None
    """The weights' name; evo2_7b, GENERator-v2-eukaryote-1.2b-base or Caduceus-PS 131k by default.
    The code that comes with GENERator's and Caduceus' weights is run."""
    weights: Path | None = None
    """A local file (evo2) or folder, instead of the hub's."""
    revision: str | None = None
    """A commit or tag on the hub."""
    layer: str | None = None
    """The layer to read; the last by default, and for evo2 the one that is published, if any."""
    pooling: str = "mean"
    """How positions become one vector: mean; last; separator (generator)."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1."""
    dtype: str = "auto"
    """What generator and caduceus compute in; auto: float32."""
    batch_size: int = 8
    """Sequences of one length in a forward pass; the same for the whole cohort."""

    regions: Path | None = None
    """Where genes are: .bed, or .tsv, .csv, .parquet with gene, chromosome, start, end, strand."""
    coordinates: Literal["0-based", "1-based"] | None = None
    """How a table of regions counts; BED says it by itself."""
    flank_bp: int = 0
    """Bases to add on both sides of each gene."""
    reference: Path | None = None
    """FASTA of the reference, which the variants were called against."""
    variants: str | None = None
    """Phased VCF or BCF with an index; '{chromosome}' in the name stands for each chromosome's."""
    sequences: Path | None = None
    """Instead of a reference and variants: a folder of one FASTA file a person."""
    files: str = "{subject}"
    """How those files are named, such as '{subject}.{haplotype}', without the suffix."""
    records: Literal["genes", "chromosomes"] = "genes"
    """What their records are: genes ('|1' and '|2' behind the name tell haplotypes),
    or chromosomes, which are cut by --regions."""
    subjects: Path | None = None
    """Whom to extract, one id a line; everybody by default."""
    build: str | None = None
    """The reference's name for the provenance, such as GRCh38."""

    indels: Literal["skip", "apply"] = "skip"
    """Insertions and deletions: left out, or applied and flagged."""
    strands: Literal["both", "forward"] = "both"
    """Read both strands and average them, or one. Caduceus-PS reads both anyway."""
    orientation: Literal["gene", "genome"] = "gene"
    """Which strand, if one is read: the gene's own, or the reference's forward strand."""
    window_bp: int | None = None
    """Longest text; the checkpoint's context by default. Longer sequences are cut and averaged."""
    stride_bp: int | None = None
    """Start of a window to the next, at most; by default windows do not overlap."""
    trim_left: int = 0
    """Tokens at each text's beginning to leave out of the mean (Evo 2's first 15 are spikes)."""
    native: bool = False
    """Write OUT/native, too: the form in which the model's own users keep their embeddings."""
    strict: bool = False
    """Make every alarm an error."""


def main(argv: list[str]) -> int:
    """Read sequences, run the model, write the store."""
    empty = ExtractOptions(model=tyro.MISSING, out=tyro.MISSING)
    options = parse(
        ExtractOptions,
        argv,
        prog="brainfusion extract",
        description=__doc__ or "",
        default=empty,
    )
    path = run(options)
    say(f"next: brainfusion import --dna {options.model} {path} --cohort COHORT")
    return 0


def run(options: ExtractOptions) -> Path:
    """Extract; returns the store's folder.

    Raises:
        UserError: What options, files, packages, weights, the model or the disk give.
    """
    from brainfusion.genetics.extraction.models import PACKAGES, configure
    from brainfusion.genetics.extraction.native import write_native
    from brainfusion.genetics.extraction.packages import check_present
    from brainfusion.genetics.extraction.run import Extraction, extract

    at_least(options, 0, "flank_bp", "trim_left")
    config = configure(
        options.model,
        checkpoint=options.checkpoint,
        layer=options.layer,
        pooling=options.pooling,
        weights=options.weights,
        revision=options.revision,
        device=options.device,
        dtype=options.dtype,
    )
    reading = _reading(options, config)
    _check_inputs(options)
    # Whatever can be known to be missing is said now, not after hours.
    check_present(PACKAGES[options.model], purpose=f"--model {options.model}")
    check_writable(options.out)
    if options.indels == "apply" and config.unit_bp > 1:
        say(
            f"--indels apply: one base more or less shifts all {config.unit_bp}-mers behind it, so "
            "carriers will differ from the rest by an artefact; they are counted and flagged"
        )
    haplotypes, declared = _haplotypes(options)
    with closing(haplotypes):
        n, g = len(haplotypes.subjects), len(haplotypes.genes)
        say(f"{n} people x {g} genes, {haplotypes.n_haplotypes} haplotypes each; {_said(reading)}")
        extraction = Extraction(
            model=config,
            reading=reading,
            batch_size=options.batch_size,
            strict=options.strict,
            declared=declared,
        )
        store = extract(extraction, haplotypes, options.out)
    if options.native:
        write_native(options.out / "native", store)
    return store


# -- how sequences are read ------------------------------------------------------------------------


def _reading(options: ExtractOptions, config: "ModelConfig") -> "Reading":
    from brainfusion.genetics.extraction.windows import Reading

    context_bp = config.spec.context_bp
    window_bp = options.window_bp or context_bp
    if window_bp is None:
        raise UserError(f"--window-bp is needed: the context of '{config.checkpoint}' is unknown.")
    if context_bp is not None and window_bp > context_bp:
        raise UserError(
            f"--window-bp {window_bp} is more than the {context_bp} bp that '{config.checkpoint}' "
            "reads: leave it out, or give less."
        )
    if options.window_bp is None:
        window_bp -= window_bp % config.unit_bp
    if options.trim_left and options.model == "caduceus":
        raise UserError(
            "--trim-left is about the first tokens of a causal model; Caduceus reads both ways and "
            "has none: leave it out."
        )
    if options.strands == "forward" and config.is_equivariant:
        raise UserError(
            f"--strands forward: '{config.checkpoint}' gives both strands in one pass, and they "
            "are folded: leave it out."
        )
    if options.orientation == "genome" and options.strands == "both":
        say("--orientation has no effect: both strands are read")
    return Reading(
        unit_bp=config.unit_bp,
        window_bp=window_bp,
        stride_bp=options.stride_bp or window_bp,
        both_strands=options.strands == "both" and not config.is_equivariant,
        gene_orientation=options.orientation == "gene",
        trim_left=options.trim_left,
    )


def _said(reading: "Reading") -> str:
    overlap = "" if reading.stride_bp == reading.window_bp else f", every {reading.stride_bp}"
    strands = "both strands averaged" if reading.both_strands else "one pass a window"
    return f"windows of at most {reading.window_bp} bp{overlap}, {strands}"


# -- where sequences come from ---------------------------------------------------------------------


def _check_inputs(options: ExtractOptions) -> None:
    from_variants = options.reference is not None or options.variants is not None
    if from_variants == (options.sequences is not None):
        raise UserError(
            "give either --reference with --variants and --regions, or --sequences: a reference "
            "alone is the same in everyone."
        )
    if options.sequences is None:
        needed = ("reference", "variants", "regions")
        useless = ("records", "files")
    else:
        needed = ("regions",) if options.records == "chromosomes" else ()
        useless = ("indels",) if needed else ("indels", "regions", "coordinates", "flank_bp")
    if missing := [f"--{name}" for name in needed if getattr(options, name) is None]:
        expected = ", ".join(f"--{name}" for name in needed)
        raise UserError(f"{', '.join(missing)} missing: expected {expected}.")
    defaults = {field: getattr(_DEFAULTS, field) for field in useless}
    for name, default in defaults.items():
        if getattr(options, name) != default:
            say(f"--{name.replace('_', '-')} has no effect here")
    for name in ("regions", "reference", "subjects"):
        path = getattr(options, name)
        if path is not None and not path.is_file():
            raise UserError(f"--{name} {path} does not exist.")


_DEFAULTS = ExtractOptions(model="evo2", out=Path())


def _haplotypes(options: ExtractOptions) -> tuple["Haplotypes", dict[str, Any]]:
    """Everyone's sequences, and what provenance should say of them."""
    from brainfusion.genetics.extraction.packages import check_present
    from brainfusion.genetics.extraction.personal import PersonalSequences
    from brainfusion.genetics.extraction.phased import PhasedVariants
    from brainfusion.genetics.extraction.reference import read_reference

    subjects = None if options.subjects is None else _read_subjects(options.subjects)
    regions = None if options.regions is None else _read_regions(options)
    declared: dict[str, Any] = {"reference": options.build}
    if regions is not None and options.regions is not None:
        declared |= {"regions_hash": hash_file(options.regions), "flank_bp": options.flank_bp}
    if options.sequences is not None:
        use_regions = regions if options.records == "chromosomes" else None
        found = PersonalSequences(
            options.sequences, files=options.files, regions=use_regions, subjects=subjects
        )
        return found, {**declared, "indels": "included" if found.has_indels else "none"}
    assert regions is not None
    assert options.reference is not None
    assert options.variants is not None
    check_present("pysam", purpose="--variants")
    say(f"reading {len(regions)} regions of {options.reference}")
    wide, references = read_reference(options.reference, regions, flank_bp=options.flank_bp)
    variants = PhasedVariants(
        options.variants,
        regions=wide,
        references=references,
        subjects=subjects,
        apply_indels=options.indels == "apply",
    )
    return variants, {
        **declared,
        "reference_file": options.reference.name,
        "variant_source": Path(options.variants).name,
        "indels": "included" if options.indels == "apply" else "none",
    }


def _read_regions(options: ExtractOptions) -> "list[Region]":
    from brainfusion.genetics.extraction.regions import read_regions

    assert options.regions is not None
    return read_regions(options.regions, coordinates=options.coordinates)


def _read_subjects(path: Path) -> tuple[str, ...]:
    from brainfusion.genetics.ids import text_ids

    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    return text_ids([line for line in lines if line], what="subject", where=str(path))
