"""The entries of an index: their ids and covariates, and which of them a search is narrowed to."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from brainfusion.runtime.errors import UserError, nearest

About = pl.DataFrame | Mapping[str, Sequence[Any]]
"""Covariates in row order: a table or columns by name."""


def entry_table(ids: Sequence[str], about: About | None, n: int) -> pl.DataFrame:
    """Ids (column `id`) and covariates of `n` entries, row by row.

    Raises:
        UserError: Ids or covariates are not `n`, ids repeat, or a covariate is called "id".
    """
    names = pl.DataFrame({"id": _ids(ids, n)}, schema={"id": pl.String})
    if about is None:
        return names
    columns = {name: list(values) for name, values in dict(_columns(about)).items()}
    if wrong := [name for name, values in columns.items() if len(values) != n]:
        raise UserError(
            f"about['{wrong[0]}'] has {len(columns[wrong[0]])} values for {n} vectors: give one "
            "each, in row order."
        )
    if "id" in columns:
        raise UserError("about has a column 'id', which the index keeps itself: rename or drop it.")
    return names.hstack(pl.DataFrame(columns)) if columns else names


def listed(about: pl.DataFrame) -> str:
    """The names of covariates, for a message."""
    return ", ".join(about.columns) or "nothing"


def chosen_entries(
    entries: pl.DataFrame,
    where: Mapping[str, Any] | None,
    among: np.ndarray | Sequence[str] | None,
) -> np.ndarray | None:
    """Which entries a search is narrowed to, bool [n]; None for all.

    Args:
        entries: What `entry_table` made.
        where: Covariate -> a value, or several in a list.
        among: A bool array [n], or ids.

    Raises:
        UserError: An unknown covariate, value or id, or nothing is left.
    """
    if where is None and among is None:
        return None
    chosen = np.ones(len(entries), bool)
    names = entries.drop("id").columns
    for name, wanted in (where or {}).items():
        if name not in names:
            raise UserError(
                f"the index knows no '{name}' of its entries. "
                + (nearest(name, names) if names else "")
                + " Build it with `about`."
            )
        values = [wanted] if isinstance(wanted, str) or not _is_list(wanted) else list(wanted)
        known = entries[name].to_list()
        if missing := [str(value) for value in values if value not in known]:
            examples = sorted({str(value) for value in known})[:10]
            raise UserError(f"no entry has {name} '{missing[0]}'. {nearest(missing[0], examples)}")
        chosen &= np.array([value in values for value in known])
    if among is not None:
        chosen &= _mask(entries, among)
    if not chosen.any():
        raise UserError(
            f"none of the {len(entries):,} entries is left to search: expected 1 or more; widen "
            "`where` or `among`."
        )
    return chosen


def _columns(about: About) -> Mapping[str, Sequence[Any]]:
    return about.to_dict(as_series=False) if isinstance(about, pl.DataFrame) else about


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence | set | frozenset | np.ndarray)


def _mask(entries: pl.DataFrame, among: np.ndarray | Sequence[str]) -> np.ndarray:
    values = np.asarray(among)
    if values.dtype == bool:
        if values.shape != (len(entries),):
            raise UserError(
                f"among has shape {list(values.shape)}: expected one bool for each of the "
                f"{len(entries)} entries, or ids."
            )
        return values
    wanted = {str(value) for value in among}
    if n_unknown := len(wanted - set(entries["id"])):
        raise UserError(
            f"{n_unknown} of {len(wanted)} ids in `among` are not in the index: give ids of "
            "its entries."
        )
    return entries["id"].is_in(list(wanted)).to_numpy()


def _ids(ids: Sequence[str], n: int) -> list[str]:
    ids = [str(value) for value in ids]
    if len(ids) != n:
        raise UserError(f"{len(ids)} ids for {n} vectors: give one each, in row order.")
    if len(set(ids)) != n:
        raise UserError(f"{n - len(set(ids))} ids repeat: expected unique ids; drop the copies.")
    return ids
