"""Everyone's haplotypes of every gene, through a model, into a store.

Each distinct sequence is read once: its windows, those of its reverse complement, and of those each
distinct text once. Texts of one length make up a batch, nothing is padded; the last batch of many
is filled up with texts that were read before, because a batch of another shape gives other numbers
(ArcInstitute/evo2#196), and what differs between people is about a thousandth of a vector.

    OUT/store/            a store (docs/formats.md), both haplotypes kept, each distinct vector once
    OUT/genes.parquet     a row a gene: lengths, variants, distinct sequences, windows, share of N
    OUT/indels.parquet    who carries an insertion or deletion, where they are applied
    OUT/extraction.json   the provenance, and counts of all that was left out or changed
    OUT/native/           on request, the same as the model's own users store it

Shape legend: n people, p haplotypes, u distinct sequences, t texts, w raw width, h width.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from brainfusion import __version__
from brainfusion.genetics.extraction.fasta import unknown_share
from brainfusion.genetics.extraction.models import (
    ModelConfig,
    SequenceModel,
    choose_device,
    device_facts,
    embed,
    hash_weights,
    load_model,
)
from brainfusion.genetics.extraction.packages import versions
from brainfusion.genetics.extraction.parts import GenePart, GeneParts
from brainfusion.genetics.extraction.phased import WORDS
from brainfusion.genetics.extraction.sequences import GeneHaplotypes
from brainfusion.genetics.extraction.windows import Reading, cut, gather
from brainfusion.genetics.features import Provenance
from brainfusion.genetics.models import SIMULATED, plain_name
from brainfusion.genetics.source import Block, Findings, Source, row_ranges
from brainfusion.genetics.store_writer import StoreWriter, is_store
from brainfusion.genetics.strands import fold_ps
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import check_writable, hash_json, write_json
from brainfusion.runtime.logs import Progress, say

_ABSENT = {"absent": "people times genes without a sequence, masked"}


class Haplotypes(Protocol):
    """Where sequences come from: `phased.PhasedVariants` or `personal.PersonalSequences`."""

    subjects: tuple[str, ...]
    genes: tuple[str, ...]
    n_haplotypes: int

    def gene(self, number: int) -> GeneHaplotypes:
        """Everyone's haplotypes of a gene."""
        ...

    def close(self) -> None:
        """Give files back."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Extraction:
    """How sequences become a store."""

    model: ModelConfig
    reading: Reading
    batch_size: int = 8
    """Sequences in a forward pass."""
    strict: bool = False
    """Make every alarm an error."""
    declared: dict[str, Any]
    """What provenance should say besides: reference, indels, flank_bp, hashes of files ..."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: expected 1 or more.")

    def key(self) -> str:
        """A hash of all that decides a sequence's vector."""
        device = choose_device("auto" if self.model.model == "evo2" else self.model.device)
        config = {**asdict(self.model), "weights": hash_weights(self.model.weights)}
        return hash_json(
            {
                "model": config,
                "reading": asdict(self.reading),
                "batch_size": self.batch_size,
                "device": device_facts(device),
                "versions": versions(),
            }
        )


def extract(
    extraction: Extraction,
    haplotypes: Haplotypes,
    out: Path,
    *,
    load: Callable[[ModelConfig], SequenceModel] = load_model,
) -> Path:
    """Embed everyone's haplotypes and write the store `out`/store; returns its folder.

    A run that was stopped goes on where it was when it is started again.

    Args:
        extraction: How.
        haplotypes: Of whom and of which genes.
        out: The folder for everything; made if it is not there.
        load: Loads the model, once the first gene's sequences are there.

    Raises:
        UserError: What reading sequences, loading or running the model, or writing finds; all
            people the same; an alarm, if `strict`.
    """
    check_writable(out)
    if (out / "store").exists() and not is_store(out / "store"):
        raise UserError(f"{out / 'store'} exists and is no store: give another --out.")
    parts = GeneParts(out / ".parts", extraction.key())
    n_before = len(parts)
    files, facts = _embed_genes(extraction, haplotypes, parts, load)
    if n_before:
        _say_resumed(n_before, facts)
    provenance = _provenance(extraction, facts)
    _write_store(extraction, haplotypes, out, parts, files, provenance)
    _write_tables(haplotypes, out, parts, files)
    values = provenance.to_dict()
    write_json(out / "extraction.json", {"provenance": values, "counts": facts["counts"]})
    parts.remove()
    return out / "store"


# -- sequences to vectors --------------------------------------------------------------------------


def _embed_genes(
    extraction: Extraction,
    haplotypes: Haplotypes,
    parts: GeneParts,
    load: Callable[[ModelConfig], SequenceModel],
) -> tuple[list[Path], dict[str, Any]]:
    """The part of each gene, and what is known of the model and of the run."""
    model: SequenceModel | None = None
    files: list[Path] = []
    counts: Counter[str] = Counter()
    n_genes = len(haplotypes.genes)
    n_found = 0
    progress: Progress | None = None
    for number in range(n_genes):
        found = haplotypes.gene(number)
        counts.update(found.counts)
        if model is None:
            say(f"loading {extraction.model.checkpoint} ({extraction.model.layer})")
            model = load(extraction.model)
        files.append(parts.file(number, found))
        if files[-1].exists():
            n_found += 1
            continue
        if progress is None:
            # In percent, since genes take unlike times; parts of an earlier run take none.
            label = f"{extraction.model.model}, percent of {n_genes} genes"
            progress = Progress(label, 100, start=100 * number // n_genes)
        note = f"{found.gene}: {len(found.sequences)} distinct of {found.index.size} haplotypes"
        show = partial(_show, progress, note, number, n_genes)
        parts.keep(files[-1], _embed_gene(found, extraction, model, show))
    assert model is not None
    for name, n_times in counts.items():
        say(f"{n_times} {(WORDS | _ABSENT)[name]}")
    return files, {"model": model.facts, "counts": dict(counts), "n_found": n_found}


def _show(progress: Progress, note: str, number: int, n_genes: int, share: float) -> None:
    progress.update(int(100 * (number + share) / n_genes), note)


def _embed_gene(
    found: GeneHaplotypes,
    extraction: Extraction,
    model: SequenceModel,
    show: Callable[[float], None],
) -> GenePart:
    reading, config = extraction.reading, extraction.model
    texts = cut(found.sequences, reading, gene=found.gene, strand=found.strand)
    vectors = np.empty((len(texts.texts), config.spec.output_width), dtype=np.float32)
    n_done = 0
    for places in batches(texts.texts, extraction.batch_size):
        batch = [texts.texts[place] for place in places]
        vectors[places] = embed(model, config, batch, trim_left=reading.trim_left)
        n_done += len(places)
        show(min(1.0, n_done / len(texts.texts)))
    gathered = gather(vectors, texts, reading)
    if config.is_equivariant:
        gathered = fold_ps(gathered)
    lengths = [len(sequence) for sequence in found.sequences]
    return GenePart(
        vectors=gathered,
        index=found.index,
        mask=found.mask,
        indels=found.indels,
        facts={
            "gene": found.gene,
            "strand": found.strand,
            "length_bp": lengths[int(found.index[0, 0])],
            "shortest_bp": min(lengths),
            "longest_bp": max(lengths),
            "n_variants": found.n_variants,
            "n_distinct": len(found.sequences),
            "n_haplotypes": int(found.index.size),
            "n_windows": texts.n_windows,
            "n_texts": len(texts.texts),
            "unknown_share": unknown_share(found.sequences),
            "n_not_finite": int((~np.isfinite(gathered).all(axis=1)).sum()),
        },
    )


def batches(texts: Sequence[str], size: int) -> Iterator[list[int]]:
    """Places of texts of one length, `size` of them or, of a length with fewer, all.

    The last batch of a length is filled up with places that came before.
    """
    by_length: dict[int, list[int]] = {}
    for place, text in enumerate(texts):
        by_length.setdefault(len(text), []).append(place)
    for places in by_length.values():
        for start in range(0, len(places), size):
            batch = places[start : start + size]
            if start and len(batch) < size:
                batch += places[: size - len(batch)]
            yield batch


def _say_resumed(n_before: int, facts: dict[str, Any]) -> None:
    n_found = facts["n_found"]
    if n_found:
        say(f"{n_found} genes were embedded by a run that was stopped")
    if n_before > n_found:
        say(
            f"{n_before - n_found} genes that an earlier run embedded with another model, device, "
            "version or other sequences were not used"
        )


# -- vectors to a store ----------------------------------------------------------------------------


def _provenance(extraction: Extraction, facts: dict[str, Any]) -> Provenance:
    config, reading = extraction.model, extraction.reading
    strands = "averaged" if reading.both_strands else "fwd_only"
    orientation = "both strands" if reading.both_strands else "genome"
    if not reading.both_strands and reading.gene_orientation and not config.is_equivariant:
        orientation = "gene"
    declared = dict(extraction.declared)
    return Provenance(
        model=config.model,
        checkpoint=plain_name(config.checkpoint),
        strands="ps_folded" if config.is_equivariant else strands,
        pooling=config.pooling,
        layer=config.layer,
        token_unit=config.spec.token_unit,
        reference=declared.pop("reference", None),
        sequence="personal",
        simulated=plain_name(config.checkpoint) == SIMULATED,
        notes=declared.pop("notes", ""),
        extra={
            **declared,
            **facts["model"],
            "orientation": orientation,
            "window_bp": reading.window_bp,
            "stride_bp": reading.stride_bp,
            "trim_left": reading.trim_left,
            "batch_size": extraction.batch_size,
            "case": "upper",
            "version": {"brainfusion": __version__, **versions()},
            "date": datetime.now(UTC).date().isoformat(),
        },
    )


def _write_store(
    extraction: Extraction,
    haplotypes: Haplotypes,
    out: Path,
    parts: GeneParts,
    files: Sequence[Path],
    provenance: Provenance,
) -> None:
    """Stream the parts through the model's adapter, as `brainfusion import` would, and write."""
    from brainfusion.genetics import ADAPTERS, announce

    source = _source(extraction, haplotypes, parts, files)
    adapter = ADAPTERS[extraction.model.model]
    spec = adapter.checked(provenance, where=str(out))
    stream = adapter.stream(source, provenance, spec, where=str(out))
    with StoreWriter(
        out / "store",
        subjects=haplotypes.subjects,
        genes=haplotypes.genes,
        width=stream.width,
        storage="dictionary",
        n_haplotypes=haplotypes.n_haplotypes,
        source=hash_json([file.stem for file in files]),
    ) as writer:
        for block in stream:
            writer.add(block.rows, block.columns, block.vectors, block.mask)
        announce(stream.alarms, where=str(out), strict=extraction.strict)
        writer.finish(stream.provenance, stream.alarms)


def _source(
    extraction: Extraction, haplotypes: Haplotypes, parts: GeneParts, files: Sequence[Path]
) -> Source:
    """The parts as blocks: some people of one gene."""
    n, p, width = len(haplotypes.subjects), haplotypes.n_haplotypes, extraction.model.spec.width
    ranges = row_ranges(n, bytes_per_row=4 * p * width)
    plan = [(gene, rows) for gene in range(len(files)) for rows in ranges]
    is_flagged = extraction.declared.get("indels") == "included"

    def load(start: int, stop: int) -> Iterator[Block]:
        opened: tuple[int, GenePart] | None = None
        for gene, rows in plan[start:stop]:
            if opened is None or opened[0] != gene:
                opened = (gene, parts.load(files[gene]))
            raw = opened[1].rows(rows)
            carriers = opened[1].carriers(rows)
            findings = Findings()
            if is_flagged:
                findings = Findings(n_flagged=carriers.size, n_indels=int(carriers.sum()))
            yield Block(
                rows=rows,
                columns=slice(gene, gene + 1),
                raw=raw[:, None] if p == 2 else raw,
                dtype="float32",
                findings=findings,
            )

    return Source(
        subjects=haplotypes.subjects,
        genes=haplotypes.genes,
        layer=extraction.model.layer,
        width=width,
        n_blocks=len(plan),
        load=load,
        has_haplotypes=p == 2,
    )


def _write_tables(
    haplotypes: Haplotypes, out: Path, parts: GeneParts, files: Sequence[Path]
) -> None:
    """genes.parquet and indels.parquet."""
    import polars as pl

    facts, carriers = [], []
    for file in files:
        part = parts.load(file)
        flags = part.carriers(slice(None))
        facts.append({**part.facts, "n_indel_carriers": int(flags.any(axis=1).sum())})
        for row in np.flatnonzero(flags.any(axis=1)):
            which = [bool(flag) for flag in flags[row]] + [False]
            carriers.append((haplotypes.subjects[row], part.facts["gene"], which[0], which[1]))
    pl.DataFrame(facts).write_parquet(out / "genes.parquet")
    schema = {"subject": pl.String, "gene": pl.String, "first": pl.Boolean, "second": pl.Boolean}
    pl.DataFrame(carriers, schema=schema, orient="row").write_parquet(out / "indels.parquet")
