"""What is declared of files: `provenance.json` in or beside them, in their subfolders, arguments.

An argument fills a gap in the file, and never overrides it. Subfolders (one a batch, a person or a
gene) may have a `provenance.json` each: what makes vectors what they are must agree, and all else
that differs (device, version, window ...) is counted for an alarm.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brainfusion.genetics.adapter import Adapter
from brainfusion.genetics.features import MINIMAL, Provenance
from brainfusion.genetics.layout import Layout, read_layout
from brainfusion.genetics.models import Checkpoint
from brainfusion.genetics.source import Findings
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import read_json

_DEFINING = ("model", "checkpoint", "layer", "pooling", "strands", "level", "token_unit")
_DONE = (("ps_raw", "ps_folded"), ("pair", "averaged"), ("token", "gene"))
"""What files were, and what a store of them is."""
_FREE = ("notes", "date", "created", "steps", "files", "n_tokens", "length_bp", "n_chunks")
"""Keys that may differ between subfolders without a word."""


@dataclass(frozen=True, kw_only=True)
class Declared:
    """Provenance, the checkpoint in it, and how files are read."""

    provenance: Provenance
    spec: Checkpoint
    layout: Layout
    findings: Findings
    """Of provenance that differs between subfolders."""


def read_declared(path: Path, adapter: Adapter, given: Mapping[str, Any]) -> Declared:
    """What provenance and arguments say together.

    Args:
        path: The file or folder of embeddings.
        adapter: The model's.
        given: Arguments, by the keys of provenance; None where nothing is said.

    Raises:
        UserError: Nothing says how the vectors were made, the file and an argument disagree, or
            what they say makes no sense for the model.
    """
    values, file, findings = _read_provenance(path)
    filled = {key: value for key, value in given.items() if value is not None}
    if values is None:
        start = {**adapter.defaults, **filled}
        if missing := [key for key in ("checkpoint", "strands") if key not in start]:
            raise UserError(
                f"{file} is missing, so nobody knows how these vectors were made: give it (a "
                f"minimal one is {MINIMAL}), or the arguments {' and '.join(missing)}."
            )
        values = {"model": adapter.model, "pooling": "unknown"}
        if "pooling" in start:
            values.pop("pooling")
    values = {key: value for key, value in values.items() if value is not None}
    said = {**adapter.defaults, **filled, **values}
    # Positions are pooled on reading, so what comes out is of the gene.
    as_read = {**said, "level": "gene"} if said.get("level") == "token" else said
    provenance = Provenance.from_dict(as_read, where=str(file))
    check_agreement(said, {"model": adapter.model, **filled}, where=str(file))
    spec = adapter.checked(provenance, where=str(path))
    layout = read_layout(said, spec, where=str(file))
    return Declared(provenance=provenance, spec=spec, layout=layout, findings=findings)


def check_agreement(said: Mapping[str, Any], given: Mapping[str, Any], *, where: str) -> None:
    """Refuse arguments that contradict what provenance says.

    Raises:
        UserError: As above, with both values.
    """
    for key, value in given.items():
        declared = said.get(key)
        if value is None or declared is None or str(value) == str(declared):
            continue
        if (value, declared) in _DONE and said.get("steps"):
            continue  # a store of what was raw
        raise UserError(
            f"{where} says {key} '{declared}', but '{value}' is asked for: correct the one "
            "that is wrong."
        )


def _read_provenance(path: Path) -> tuple[dict[str, Any] | None, Path, Findings]:
    """What the file says (None without one), where it belongs, and how subfolders differ."""
    root = path if path.is_dir() else path.parent
    file = root / "provenance.json"
    values = _read_object(file) if file.exists() else None
    findings = Findings()
    below = sorted(root.glob("*/provenance.json")) if path.is_dir() else []
    for other in below:
        said = _read_object(other)
        if values is None:
            values, file = said, root / "*" / "provenance.json"
        for key in _DEFINING:
            if key in said and said[key] != values.get(key, said[key]):
                raise UserError(
                    f"{root}: a subfolder's provenance.json says {key} '{said[key]}', another (or "
                    f"the folder's) '{values[key]}': vectors of different making are not put into "
                    "one table; import them apart."
                )
        for key, value in said.items():
            if key not in (*_DEFINING, *_FREE):
                findings.covariates.setdefault(key, Counter())[str(value)] += 1
    return values, file, findings


def _read_object(file: Path) -> dict[str, Any]:
    values = read_json(file)
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object, such as {MINIMAL}.")
    return values
