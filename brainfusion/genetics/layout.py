"""What provenance declares of the files' axes and names, beyond what a vector is.

"level": "token"             positions are still there, and are pooled when read
"special_tokens": [1, 1]     how many before and behind the sequence (needed at token level)
"trim_left": 15, "trim_right": 0, "padding_side": "right"
"haplotypes": 2              an axis of two haplotypes behind the gene's
"strands": "pair"            an axis of forward and reverse complement behind that; averaged
"files": "{subject}/{gene}"  what the files' names are; {haplotype} and {strand} may be added
"""

import re
from dataclasses import dataclass
from typing import Any

from brainfusion.genetics.models import Checkpoint, unit_bp
from brainfusion.genetics.tokens import POOLINGS, TokenPool
from brainfusion.runtime.errors import UserError, nearest

PAIR = "pair"
_KEYS = ("special_tokens", "trim_left", "trim_right", "padding_side", "haplotypes", "files")
_FIELDS = ("subject", "gene", "haplotype", "strand")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How to read the axes and names of files."""

    pool: TokenPool | None = None
    """Pooling, where files hold positions."""
    has_haplotypes: bool = False
    has_strands: bool = False
    files: str | None = None
    """Template of the files' names, without the suffix."""

    @property
    def pair_axes(self) -> tuple[int, ...]:
        """The axes of two, haplotypes and strands, that stand before positions and width."""
        return (2,) * (self.has_haplotypes + self.has_strands)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Which vectors of a file are asked for, and how they lie there."""

    model: str
    """Picks rows of a table that holds several models."""
    checkpoint: str
    """Likewise."""
    layer: str | None
    """Needed where files hold several."""
    level: str
    """"subject" if rows are people without genes, else "gene"."""
    layout: Layout


def read_layout(values: dict[str, Any], spec: Checkpoint, *, where: str) -> Layout:
    """The layout that provenance (as a dict, token level still in it) declares.

    Raises:
        UserError: A misspelt key, a value of the wrong kind, or token level without its rules.
    """
    for key in values:
        close = nearest_key(key)
        if close is not None:
            raise UserError(f"{where}: unknown key '{key}'. Did you mean '{close}'?")
    haplotypes = values.get("haplotypes", 1)
    if haplotypes not in (1, 2) or isinstance(haplotypes, bool):
        raise UserError(
            f"{where}: haplotypes={haplotypes!r}, expected 2 (an axis of two) or 1 (merged)."
        )
    files = values.get("files")
    if files is not None:
        check_template(files, where=where)
    pool = None
    if values.get("level") == "token":
        pool = _token_pool(values, spec, where=where)
    return Layout(
        pool=pool,
        has_haplotypes=haplotypes == 2 or "{haplotype}" in (files or ""),
        has_strands=values.get("strands") == PAIR,
        files=files,
    )


def nearest_key(key: str) -> str | None:
    """The key of a layout that a misspelt one probably means."""
    from difflib import get_close_matches

    if key in _KEYS:
        return None
    close = get_close_matches(key, _KEYS, n=1, cutoff=0.85)
    return close[0] if close else None


def check_template(template: object, *, where: str) -> None:
    """Refuse a template of names that cannot be matched.

    Raises:
        UserError: No text, unknown or repeated fields, or none of subject and gene.
    """
    found = re.findall(r"\{(\w*)\}", template) if isinstance(template, str) else []
    for name in found:
        if name not in _FIELDS:
            raise UserError(f"{where}: files has '{{{name}}}'. {nearest(name, _FIELDS)}")
    if not {"subject", "gene"} & set(found) or len(found) != len(set(found)):
        raise UserError(
            f"{where}: files={template!r}, expected names such as '{{subject}}/{{gene}}' or "
            "'{gene}_{strand}', without the suffix."
        )


def _token_pool(values: dict[str, Any], spec: Checkpoint, *, where: str) -> TokenPool:
    pooling = values.get("pooling")
    if pooling not in POOLINGS:
        raise UserError(
            f"{where}: token level needs a pooling, '{pooling}' is none. "
            f"{nearest(str(pooling), POOLINGS)}"
        )
    special = values.get("special_tokens")
    if (
        not isinstance(special, list | tuple)
        or len(special) != 2
        or not all(map(_is_count, special))
    ):
        raise UserError(
            f"{where}: token level needs special_tokens, how many stand before and behind the "
            f'sequence, such as [0, 0], or [1, 1] for "<s>" + sequence + "<s>"; got {special!r}.'
        )
    for key in ("trim_left", "trim_right"):
        if not _is_count(values.get(key, 0)):
            raise UserError(f"{where}: {key}={values[key]!r}, expected a count of tokens.")
    side = values.get("padding_side", "right")
    if side not in ("right", "left"):
        raise UserError(f"{where}: padding_side='{side}', expected 'right' or 'left'.")
    if pooling == "separator" and special[1] == 0:
        raise UserError(
            f"{where}: pooling 'separator' needs a special token behind the sequence, but "
            f"special_tokens is {list(special)}: use 'last', or correct it."
        )
    return TokenPool(
        pooling=pooling,
        n_before=special[0],
        n_after=special[1],
        trim_left=values.get("trim_left", 0),
        trim_right=values.get("trim_right", 0),
        padding=side,
        mirrored=values.get("strands") == "ps_raw",
        unit_bp=unit_bp(spec.token_unit),
        length_bp=values.get("length_bp"),
    )


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
