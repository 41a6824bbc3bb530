"""`brainfusion import --dna MODEL PATH`: add a model's DNA embeddings to a cohort.

They are read block by block, checked, matched to the cohort's people by id, and kept in
COHORT/genetics/<model>, whole or not at all. No id is printed.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from brainfusion.cli.options import at_least, parse
from brainfusion.data.cohort import Cohort
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import Progress, say
from brainfusion.runtime.memory import peak_mib
from brainfusion.runtime.threads import available_cores

if TYPE_CHECKING:
    from brainfusion.genetics import GeneticFeatures, ReadyBlock, Stream

_DECLARED = (
    "level",
    "pooling",
    "special_tokens",
    "trim_left",
    "trim_right",
    "padding_side",
    "files",
)
_N_SAMPLED_GENES, _N_SAMPLED_PEOPLE = 8, 512


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportDnaOptions:
    """Options of `brainfusion import --dna`."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """A file or folder of embeddings, as the model's users store them, or a store of them."""
    dna: str
    """Whose embeddings they are: evo2, generator, caduceus, dnabert2, nucleotide-transformer,
    hyenadna, generic, dosage or pgs."""
    cohort: Path
    """The cohort that they are added to."""
    checkpoint: str | None = None
    """What made the files, where no provenance.json lies beside them."""
    layer: str | None = None
    """The layer to read, where files hold several."""
    strands: str | None = None
    """How the files hold both strands, where no provenance.json lies beside them."""
    level: str | None = None
    """What a vector is of, where provenance.json does not say: gene, subject or token."""
    pooling: str | None = None
    """How positions became one vector, or are to: mean, max, last."""
    special_tokens: tuple[int, int] | None = None
    """Token level: how many special tokens stand before and behind the sequence."""
    trim_left: int | None = None
    """Token level: positions to leave out at the beginning (Evo 2's first 15 are spikes)."""
    trim_right: int | None = None
    """Token level: positions to leave out at the end."""
    padding_side: Literal["left", "right"] | None = None
    """Token level: where sequences are padded."""
    files: str | None = None
    """What the files' names are, such as '{subject}/{gene}', without the suffix."""
    storage: Literal["auto", "float32", "centred-float16", "dictionary"] = "auto"
    """float32: as they are; centred-float16: half the size, 1e-7 of the variance lost;
    dictionary: each distinct vector of a gene once, exact;
    auto: dictionary where the files keep both haplotypes, otherwise float32."""
    haplotypes: Literal["keep", "mean"] = "keep"
    """Two haplotypes in the files: keep both, or store their mean."""
    append: bool = False
    """Add the people to those that the cohort's store has, instead of replacing it."""
    mixed_provenance: bool = False
    """With --append: put people together whose vectors were made differently."""
    workers: int = 0
    """Processes that read;
    0: a core each where reading takes work (tokens to pool, many files), otherwise one."""
    keep_parts: bool = True
    """Where reading takes work, keep what is read until the store is whole:
    an import that was stopped goes on where it was."""
    strict: bool = False
    """Make every alarm an error."""


def main(argv: list[str]) -> int:
    """Read the files, check them, write the store into the cohort."""
    empty = ImportDnaOptions(source=tyro.MISSING, dna=tyro.MISSING, cohort=tyro.MISSING)
    options = parse(
        ImportDnaOptions,
        argv,
        prog="brainfusion import --dna MODEL",
        description=__doc__ or "",
        default=empty,
    )
    path = run(options)
    say(f"next: brainfusion align --dna {options.dna} --cohort {options.cohort} (written: {path})")
    return 0


def import_dna(model: str, source: Path, cohort_path: Path) -> Path:
    """Import with the default options; returns the store's folder."""
    return run(ImportDnaOptions(dna=model, source=source, cohort=cohort_path))


def run(options: ImportDnaOptions) -> Path:
    """Read with the model's adapter and write the cohort's store; returns its folder.

    Raises:
        UserError: What reading finds, nobody whom the cohort knows, an alarm with `strict`.
    """
    from brainfusion.genetics import open_store
    from brainfusion.genetics.store import is_store

    at_least(options, 0, "workers")
    if options.mixed_provenance and not options.append:
        raise UserError("--mixed-provenance is about joining two stores: give --append, too.")
    cohort = Cohort.open(options.cohort)
    path = options.cohort / "genetics" / options.dna
    if is_store(options.source):
        _check_source_store(options, path)
        features = _read_store(options)
        subjects, write = features.subjects, partial(_copy_store, features, options)
    else:
        how = _how(options)
        stream = _open(options.dna, options.source, **how)
        subjects, write = stream.subjects, partial(_write_stream, stream, options, how)
    _check_people(subjects, cohort, options.source)
    before = None
    if options.append and is_store(path):
        before = open_store(path)
        _refuse_known_people(subjects, before.subjects, path)
    elif is_store(path):
        say(f"{path} is there: the new store replaces it")
    if before is None:
        write(path)
    else:
        _append(path, write, options)
    _report(open_store(path), cohort, path, options.dna)
    return path


# -- what to read ----------------------------------------------------------------------------------


def _how(options: ImportDnaOptions) -> dict[str, Any]:
    """The arguments of `open_stream`."""
    said = {key: getattr(options, key) for key in _DECLARED}
    said["special_tokens"] = said["special_tokens"] and list(said["special_tokens"])
    return {
        "checkpoint": options.checkpoint,
        "layer": options.layer,
        "strands": options.strands,
        "declare": {key: value for key, value in said.items() if value is not None},
    }


def _open(model: str, source: Path, **how: Any) -> "Stream":
    """Also called in reading processes, which get the arguments and not the stream."""
    from brainfusion.genetics import open_stream

    return open_stream(model, source, **how)


def _check_source_store(options: ImportDnaOptions, path: Path) -> None:
    if path.resolve() == options.source.resolve():
        raise UserError(f"{path} is the cohort's own store already: there is nothing to import.")
    if said := [f"--{key.replace('_', '-')}" for key in _DECLARED if getattr(options, key)]:
        raise UserError(
            f"{options.source} is a store, whose vectors are made already: {', '.join(said)} "
            "would have no effect; give the model's own files, or leave the flags out."
        )


def _read_store(options: ImportDnaOptions) -> "GeneticFeatures":
    from brainfusion.genetics import read

    return read(
        options.dna,
        options.source,
        checkpoint=options.checkpoint,
        layer=options.layer,
        strands=options.strands,
        strict=options.strict,
    )


# -- who is in it ----------------------------------------------------------------------------------


def _check_people(subjects: tuple[str, ...], cohort: Cohort, source: Path) -> None:
    known = set(cohort.subjects["subject"])
    if not known.intersection(subjects):
        raise UserError(
            f"none of the {len(subjects)} ids in {source} is a subject of the cohort "
            f"'{cohort.name}': compare them with subjects.parquet (leading zeros, suffixes)."
        )


def _refuse_known_people(subjects: tuple[str, ...], before: tuple[str, ...], path: Path) -> None:
    if n_known := len(set(subjects).intersection(before)):
        raise UserError(
            f"{n_known} of the {len(subjects)} people are in {path} already: leave them out of the "
            "new files, or import all people again without --append."
        )


def _report(features: "GeneticFeatures", cohort: Cohort, path: Path, model: str) -> None:
    """What was kept, how large it is, and whose ids meet; counts only."""
    n_people, n_genes, width = features.vectors.shape
    known = set(cohort.subjects["subject"])
    scanned = set(cohort.recordings.index["subject"])
    with_vector = {features.subjects[row] for row in np.flatnonzero(features.mask.any(axis=1))}
    size = sum(file.stat().st_size for file in path.iterdir())
    dense = 4 * n_people * n_genes * width * features.n_haplotypes
    pair = ", both haplotypes" if features.n_haplotypes == 2 else ""
    say(
        f"{model}: {n_people} people ({len(known & set(features.subjects))} of the cohort's "
        f"{len(known)}) x {n_genes} genes x {width} values{pair}, "
        f"{1 - float(features.mask.mean()):.1%} missing"
        + (", simulated" if features.provenance.simulated else "")
        + f"; {size / 2**20:.1f} MiB for {dense / 2**20:.1f} MiB of float32"
    )
    say(
        f"people: {len(with_vector & scanned)} with DNA and recordings, "
        f"{len(with_vector & known - scanned)} of the cohort with DNA only, "
        f"{len(scanned - with_vector)} with recordings only, "
        f"{len(with_vector - known)} with DNA whom the cohort does not know, "
        f"{n_people - len(with_vector)} without any vector"
    )


# -- writing ---------------------------------------------------------------------------------------


def _write_stream(
    stream: "Stream", options: ImportDnaOptions, how: dict[str, Any], path: Path
) -> None:
    """Read all blocks and write the store `path`."""
    from brainfusion.genetics import announce
    from brainfusion.genetics.parts import Parts, hash_source, ready_blocks
    from brainfusion.genetics.store_writer import StoreWriter

    begin = time.monotonic()
    merge = stream.has_haplotypes and options.haplotypes == "mean"
    if options.haplotypes == "mean" and not stream.has_haplotypes:
        say("--haplotypes mean: the files hold one vector a person and gene; nothing is merged")
    n_haplotypes = 2 if stream.has_haplotypes and not merge else 1
    takes_work = _takes_work(stream, options.source)
    n_workers = options.workers or (available_cores() if takes_work else 1)
    key = hash_source(options.source, how)
    parts = None
    if options.keep_parts and takes_work:
        parts = Parts(options.cohort / "genetics" / f".{options.dna}-parts", key)
        _say_parts(parts, stream.n_blocks)
    sample = _Sample(len(stream.genes))
    with StoreWriter(
        path,
        subjects=stream.subjects,
        genes=stream.genes,
        width=stream.width,
        storage=_storage(options.storage, n_haplotypes),
        n_haplotypes=n_haplotypes,
        source=key,
    ) as writer:
        blocks = ready_blocks(
            stream,
            partial(_open, options.dna, options.source, **how),
            n_workers=n_workers,
            parts=parts,
        )
        for block in _with_progress(blocks, stream.n_blocks, options.dna):
            vectors = block.vectors
            if merge:
                vectors = vectors.mean(axis=2, dtype=np.float32)
            writer.add(block.rows, block.columns, vectors, block.mask)
            sample.add(block)
        announce(stream.alarms, where=str(options.source), strict=options.strict)
        provenance = stream.provenance
        if merge:
            steps = (*provenance.steps, "mean of two haplotypes")
            provenance = replace(provenance, steps=steps)
        writer.finish(provenance, stream.alarms)
    if parts is not None:
        parts.remove()
    say(
        f"read {stream.n_blocks} blocks of {options.source} in {time.monotonic() - begin:.0f} s "
        f"({n_workers} process{'es' if n_workers > 1 else ''}, peak {peak_mib():.0f} MiB)"
    )
    sample.report()


def _copy_store(features: "GeneticFeatures", options: ImportDnaOptions, path: Path) -> None:
    """Write a store that is there already, as another storage if asked for."""
    from brainfusion.genetics import write_store

    if options.haplotypes == "mean" and features.n_haplotypes == 2:
        raise UserError(
            f"{options.source} is a store that keeps both haplotypes, which a copy keeps, too: "
            "they are combined as they are read; leave --haplotypes out."
        )
    write_store(path, features, storage=_storage(options.storage, features.n_haplotypes))


def _append(path: Path, write: Any, options: ImportDnaOptions) -> None:
    """Write the new people aside, then both as one."""
    from brainfusion.genetics.store import concatenate_stores

    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-append-", dir=path.parent))
    try:
        write(aside / path.name)
        storage = None if options.storage == "auto" else options.storage
        concatenate_stores(
            path, [path, aside / path.name], storage=storage, mixed=options.mixed_provenance
        )
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _storage(wanted: str, n_haplotypes: int) -> str:
    if wanted != "auto":
        return wanted
    return "dictionary" if n_haplotypes == 2 else "float32"


def _takes_work(stream: "Stream", source: Path) -> bool:
    """Whether reading a block is more than copying it: tokens to pool, or many files to open."""
    from brainfusion.genetics.files import SUFFIXES

    if stream.n_blocks < 2 or not source.is_dir():
        return False
    n_files = sum(file.suffix in SUFFIXES for file in source.rglob("*"))
    return bool(stream.source.steps) or n_files > stream.n_blocks


def _say_parts(parts: Any, n_blocks: int) -> None:
    if parts.discarded:
        say("the files or options have changed since an import was stopped: reading all again")
    elif len(parts):
        say(f"going on with an import that was stopped: {len(parts)} of {n_blocks} blocks are here")


def _with_progress(
    blocks: "Iterator[ReadyBlock]", n_blocks: int, model: str
) -> "Iterator[ReadyBlock]":
    progress = Progress(f"{model}, blocks", n_blocks)
    for number, block in enumerate(blocks, start=1):
        yield block
        progress.update(number)


class _Sample:
    """Some people's vectors of some genes, to say what each storage would keep of them."""

    def __init__(self, n_genes: int) -> None:
        genes = np.linspace(0, n_genes - 1, min(n_genes, _N_SAMPLED_GENES)).astype(np.int64)
        self._vectors: dict[int, list[np.ndarray]] = {int(gene): [] for gene in genes}

    def add(self, block: "ReadyBlock") -> None:
        """Take in the first people of each gene that is sampled."""
        start = block.columns.start
        for gene, taken in self._vectors.items():
            column = gene - start
            room = _N_SAMPLED_PEOPLE - sum(map(len, taken))
            if room <= 0 or not 0 <= column < block.mask.shape[1]:
                continue
            rows = np.flatnonzero(block.mask[:, column])[:room]
            vectors = block.vectors[rows, column]
            taken.append(vectors.mean(axis=1, dtype=np.float32) if vectors.ndim == 3 else vectors)

    def report(self) -> None:
        """Say the share of between-person variance that each way of storing keeps."""
        from brainfusion.genetics import variance_kept

        kept: dict[str, list[float]] = {}
        for taken in self._vectors.values():
            if sum(map(len, taken)) > 1:
                for name, share in variance_kept(np.concatenate(taken)).items():
                    kept.setdefault(name, []).append(share)
        shares = {
            name: float(np.nanmean(values))
            for name, values in kept.items()
            if not np.isnan(values).all()
        }
        if shares:
            said = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
            say(f"variance between people that a storage would keep: {said}")
