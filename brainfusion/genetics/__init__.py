"""Precomputed DNA embeddings: read what the models' users store, refuse what would mislead.

No DNA language model is imported here: only its saved output is read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brainfusion.genetics import caduceus, evo2, generator, generic
from brainfusion.genetics.adapter import Adapter
from brainfusion.genetics.checks import Alarm, variance_kept
from brainfusion.genetics.declared import check_agreement, read_declared
from brainfusion.genetics.features import GeneticFeatures, Provenance
from brainfusion.genetics.files import open_source
from brainfusion.genetics.layout import Wanted
from brainfusion.genetics.store import is_store, open_store, write_store
from brainfusion.genetics.stream import ReadyBlock, Stream
from brainfusion.genetics.variants import VariantEmbeddings, read_variants
from brainfusion.runtime import logs
from brainfusion.runtime.errors import UserError, nearest

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Alarm",
    "GeneticFeatures",
    "Provenance",
    "ReadyBlock",
    "Stream",
    "VariantEmbeddings",
    "announce",
    "open_store",
    "open_stream",
    "read",
    "read_variants",
    "variance_kept",
    "write_store",
]

ADAPTERS: dict[str, Adapter] = {
    "evo2": evo2.ADAPTER,
    "generator": generator.ADAPTER,
    "caduceus": caduceus.ADAPTER,
    "dnabert2": generic.DNABERT2,
    "nucleotide-transformer": generic.NUCLEOTIDE_TRANSFORMER,
    "hyenadna": generic.HYENADNA,
    "generic": generic.GENERIC,
    "dosage": generic.DOSAGE,
    "pgs": generic.PGS,
}


def read(
    model: str,
    path: str | Path,
    *,
    checkpoint: str | None = None,
    layer: str | None = None,
    strands: str | None = None,
    strict: bool = False,
    declare: Mapping[str, Any] | None = None,
) -> GeneticFeatures:
    """Read a model's embeddings from the files its users write, or from a store.

    Args:
        model: A key of `ADAPTERS`.
        path: A file or folder as `genetics.files` describes, with `provenance.json` beside; or a
            store's folder.
        checkpoint: What made the files, where there is no `provenance.json` (with `strands`).
        layer: The layer to read, where files hold several.
        strands: How the files hold both strands, where there is no `provenance.json`.
        strict: Make every alarm an error.
        declare: Any other keys of provenance ("level", "pooling", "special_tokens" ...).

    Returns:
        One float32 vector a person and gene; tokens pooled, strands folded, chunks averaged.
        Vectors that are absent, NaN or zero are masked. Alarms are said on standard error and kept.

    Raises:
        UserError: An unknown model; files that are missing, unreadable or not what provenance
            says; people who all have the same vectors; an alarm, if `strict`.
    """
    given = {"checkpoint": checkpoint, "layer": layer, "strands": strands, **(declare or {})}
    path = _existing(model, path)
    if is_store(path):
        features = open_store(path)
        said = features.provenance.to_dict()
        check_agreement(said, {"model": model, **given}, where=str(path))
    else:
        features = open_stream(model, path, **_arguments(given)).gathered()
    announce(features.alarms, where=str(path), strict=strict)
    return features


def open_stream(
    model: str,
    path: str | Path,
    *,
    checkpoint: str | None = None,
    layer: str | None = None,
    strands: str | None = None,
    declare: Mapping[str, Any] | None = None,
) -> Stream:
    """Open a model's files to be read block by block, never all at once.

    Arguments are those of `read`. Iterate over the stream, then ask it for `provenance` and
    `alarms`, and hand the latter to `announce`.

    Raises:
        UserError: As `read`; what only the vectors can show is raised while they are read.
    """
    path = _existing(model, path)
    given = {"checkpoint": checkpoint, "layer": layer, "strands": strands, **(declare or {})}
    adapter = ADAPTERS[model]
    declared = read_declared(path, adapter, given)
    provenance = declared.provenance
    wanted = Wanted(
        model=model,
        checkpoint=provenance.checkpoint,
        layer=provenance.layer,
        level=provenance.level,
        layout=declared.layout,
    )
    source = open_source(path, wanted)
    source.findings.add(declared.findings)
    return adapter.stream(source, provenance, declared.spec, where=str(path))


def announce(alarms: tuple[Alarm, ...], *, where: str, strict: bool = False) -> None:
    """Say alarms on standard error.

    Raises:
        UserError: There are any, if `strict`.
    """
    if strict and alarms:
        raise UserError(f"{where}: " + " | ".join(str(alarm) for alarm in alarms) + ".")
    for alarm in alarms:
        logs.say(f"{where}: {alarm}")


def _existing(model: str, path: str | Path) -> Path:
    if model not in ADAPTERS:
        raise UserError(f"unknown DNA model '{model}'. {nearest(model, ADAPTERS)}")
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"{path} does not exist: expected {model}'s embeddings, or a store of them."
        )
    return path


def _arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of provenance as the arguments of `open_stream`."""
    named = ("checkpoint", "layer", "strands")
    rest = {key: value for key, value in given.items() if key not in named}
    return {**{key: given[key] for key in named}, "declare": rest}
