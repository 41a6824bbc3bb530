"""Ids of people and genes: text, unique, in one namespace. People's ids are in no message."""

import re
from collections.abc import Sequence

import numpy as np

from brainfusion.runtime import logs
from brainfusion.runtime.errors import UserError

_INSTANCE = re.compile(r"(\d{4,})[-_]\d+\.\d+")
_NAMESPACES = {
    "Ensembl's": re.compile(r"ENS[A-Z]*G\d{11}(\.\d+)?"),
    "HGNC's numbers": re.compile(r"HGNC:\d+"),
    "Entrez numbers": re.compile(r"\d+"),
}


def text_ids(values: Sequence[object] | np.ndarray, *, what: str, where: str) -> tuple[str, ...]:
    """Ids as text, checked.

    Args:
        values: Text or whole numbers.
        what: "subject" or "gene".
        where: The file, for errors.

    Returns:
        The ids. The instance that biobanks add to a person's id ("1000234-2.0") is taken off, and
        how often is said.

    Raises:
        UserError: Absent, duplicate or empty ids, or ids that were numbers with a decimal point on
            the way: leading zeros are then lost, and "1000234.0" joins with nobody.
    """
    if isinstance(values, np.ndarray) and values.dtype.kind not in "USiuTO":
        raise UserError(
            f"{where}: {what} ids are {values.dtype}, which has lost leading zeros: write them as "
            "text, for example ids.astype(str) of what was read with dtype=str."
        )
    items = values.tolist() if isinstance(values, np.ndarray) else list(values)
    items = [value.decode("utf-8") if isinstance(value, bytes) else value for value in items]
    if any(not isinstance(value, (str, int)) or isinstance(value, bool) for value in items):
        raise UserError(f"{where}: {what} ids must be text; some are absent or of another type.")
    names = tuple(str(value) for value in items)
    if not names:
        raise UserError(f"{where}: no {what}s.")
    if n_bad := sum(not name or name != name.strip() for name in names):
        raise UserError(
            f"{where}: {n_bad} {what} ids are empty or begin or end with a space: correct them."
        )
    names = _checked_subjects(names, where=where) if what == "subject" else names
    if what == "gene":
        _check_genes(names, where=where)
    _refuse_duplicates(names, what=what, where=where)
    return names


def _refuse_duplicates(names: tuple[str, ...], *, what: str, where: str) -> None:
    n_twice = len(names) - len(set(names))
    if not n_twice:
        return
    seen: set[str] = set()
    rows = [row for row, name in enumerate(names, start=1) if name in seen or seen.add(name)]
    # People are named by their rows, genes by their names.
    twice = list(
        dict.fromkeys(f"row {row}" if what == "subject" else names[row - 1] for row in rows)
    )
    raise UserError(
        f"{where}: {n_twice} duplicate {what} ids ({', '.join(twice[:3])}"
        f"{' ...' if len(twice) > 3 else ''}): one row each is expected; average a person's "
        "haplotypes, and keep one of repeated rows."
    )


def _checked_subjects(names: tuple[str, ...], *, where: str) -> tuple[str, ...]:
    if n_float := sum(re.fullmatch(r"-?\d+\.0+", name) is not None for name in names):
        raise UserError(
            f"{where}: {n_float} subject ids end in '.0': they were read as numbers on the way, "
            "which drops leading zeros too. Read the id column as text (pandas dtype=str, polars "
            "pl.String) and write the file again."
        )
    if n_power := sum(re.fullmatch(r"\d(\.\d+)?[eE]\+?\d+", name) is not None for name in names):
        raise UserError(
            f"{where}: {n_power} subject ids are written like '1.0e+06', which has lost digits: "
            "read the id column as text (pandas dtype=str, polars pl.String) and write it again."
        )
    if n_negative := sum(re.fullmatch(r"-\d+", name) is not None for name in names):
        raise UserError(
            f"{where}: {n_negative} subject ids are negative numbers, as withdrawn people are "
            "marked: leave these rows out."
        )
    matches = [_INSTANCE.fullmatch(name) for name in names]
    if n_instances := sum(match is not None for match in matches):
        logs.say(
            f"{where}: took the instance (such as '-2.0') off {n_instances} of {len(names)} "
            "subject ids: DNA belongs to the person, not to the visit"
        )
    return tuple(
        name if match is None else match.group(1)
        for name, match in zip(names, matches, strict=True)
    )


def _check_genes(names: tuple[str, ...], *, where: str) -> None:
    for namespace, pattern in _NAMESPACES.items():
        matches = [pattern.fullmatch(name) for name in names]
        n_inside = sum(match is not None for match in matches)
        if any(match is not None and match.groups() and match.group(1) for match in matches):
            raise UserError(
                f"{where}: Ensembl gene ids carry versions (such as {_versioned(names)}): drop "
                "what follows the point, since versions differ between releases."
            )
        if 0 < n_inside < len(names):
            raise UserError(
                f"{where}: {n_inside} of {len(names)} gene ids are {namespace}, the others are "
                "not: use one namespace, so that a gene is not counted twice."
            )
    folded = {name.upper() for name in names}
    if n_cases := len(set(names)) - len(folded):
        raise UserError(
            f"{where}: {n_cases} gene ids differ from another only in upper and lower case: use "
            "one spelling."
        )


def _versioned(names: tuple[str, ...]) -> str:
    return next(name for name in names if re.fullmatch(r"ENS[A-Z]*G\d{11}\.\d+", name))
