"""Precomputed DNA embeddings: read what the models' users store, refuse what would mislead.

No DNA language model is imported here: only its saved output is read.
"""

from pathlib import Path
from typing import Any

from brainfusion.genetics import caduceus, evo2, generator
from brainfusion.genetics.adapter import Adapter
from brainfusion.genetics.checks import Alarm
from brainfusion.genetics.features import MINIMAL, GeneticFeatures, Provenance
from brainfusion.genetics.files import open_source, read_provenance
from brainfusion.genetics.store import is_store, open_store, write_store
from brainfusion.runtime import logs
from brainfusion.runtime.errors import UserError, nearest

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Alarm",
    "GeneticFeatures",
    "Provenance",
    "open_store",
    "read",
    "write_store",
]

ADAPTERS: dict[str, Adapter] = {
    "evo2": evo2.ADAPTER,
    "generator": generator.ADAPTER,
    "caduceus": caduceus.ADAPTER,
}


def read(
    model: str,
    path: str | Path,
    *,
    checkpoint: str | None = None,
    layer: str | None = None,
    strands: str | None = None,
    strict: bool = False,
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

    Returns:
        One float32 vector a person and gene; strands folded, chunks averaged. Vectors that are
        absent, NaN or zero are masked. Alarms are said on standard error and kept.

    Raises:
        UserError: An unknown model; files that are missing, unreadable or not what provenance
            says; people who all have the same vectors; an alarm, if `strict`.
    """
    if model not in ADAPTERS:
        raise UserError(f"unknown DNA model '{model}'. {nearest(model, ADAPTERS)}")
    adapter, path = ADAPTERS[model], Path(path)
    if not path.exists():
        raise UserError(
            f"{path} does not exist: expected {model}'s embeddings, or a store of them."
        )
    given = {"checkpoint": checkpoint, "layer": layer, "strands": strands}
    if is_store(path):
        features = open_store(path)
        _check_agreement(features.provenance, model, given, where=str(path))
    else:
        provenance, where = _provenance(path, model, given)
        spec = adapter.checked(provenance, where=where)
        source = open_source(
            path,
            model=model,
            checkpoint=provenance.checkpoint,
            layer=provenance.layer,
            level=provenance.level,
        )
        features = adapter.features(source, provenance, spec, where=where)
    if strict and features.alarms:
        raise UserError(f"{path}: " + " | ".join(str(alarm) for alarm in features.alarms) + ".")
    for alarm in features.alarms:
        logs.say(f"{path}: {alarm}")
    return features


def _provenance(path: Path, model: str, given: dict[str, str | None]) -> tuple[Provenance, str]:
    """What provenance.json and the arguments say together, and a name for errors."""
    values, file = read_provenance(path)
    if values is None:
        if missing := [key for key in ("checkpoint", "strands") if given[key] is None]:
            raise UserError(
                f"{file} is missing, so nobody knows how these vectors were made: give it (a "
                f"minimal one is {MINIMAL}), or the arguments {' and '.join(missing)}."
            )
        values = {"model": model, "pooling": "unknown"}
    # An argument fills a gap in the file, and never overrides it.
    filled: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    values = {key: value for key, value in values.items() if value is not None}
    provenance = Provenance.from_dict({**filled, **values}, where=str(file))
    _check_agreement(provenance, model, given, where=str(file))
    return provenance, str(path)


def _check_agreement(
    provenance: Provenance, model: str, given: dict[str, str | None], *, where: str
) -> None:
    for key, value in {"model": model, **given}.items():
        declared = getattr(provenance, key)
        if value is None or declared is None or value == declared:
            continue
        if (value, declared) == ("ps_raw", "ps_folded") and provenance.steps:
            continue  # a store of what was raw
        raise UserError(
            f"{where} says {key} '{declared}', but '{value}' is asked for: correct the one "
            "that is wrong."
        )
