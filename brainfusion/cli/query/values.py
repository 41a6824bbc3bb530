"""NAME=VALUE words of a query: who is searched (--where, --same), and who asks (--about)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from brainfusion.alignment.conditioning import design_matrix
from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.logs import say

_TABLES = (".csv", ".tsv", ".parquet")
_LISTED = 20
"""Different values up to which a message lists them."""


def pairs_of(flag: str, words: Sequence[str]) -> dict[str, list[str]]:
    """`site=A,B sex=F` as {"site": ["A", "B"], "sex": ["F"]}.

    Raises:
        UserError: A word without a name or a value, or a name that comes twice.
    """
    found: dict[str, list[str]] = {}
    for word in words:
        name, _, text = word.partition("=")
        values = [value for value in text.split(",") if value]
        if not name or not values:
            raise UserError(f"{flag} {word}: expected NAME=VALUE, for example site=A.")
        if name in found:
            raise UserError(f"{flag} names '{name}' twice: give one, of several values site=A,B.")
        found[name] = values
    return found


# -- who is searched -------------------------------------------------------------------------------


def chosen_people(
    people: pl.DataFrame, where: Mapping[str, Sequence[str]], same: Mapping[str, Any]
) -> np.ndarray:
    """Who of a gallery is searched, bool [n].

    Args:
        people: The columns of subjects.parquet, one row a person of the gallery.
        where: Column -> values as typed, one of which a person has to have.
        same: Column -> the asker's own value.

    Raises:
        UserError: An unknown column or value, or nobody is left.
    """
    chosen = np.ones(len(people), bool)
    for name, texts in where.items():
        column = column_of(people, name, "--where")
        one_of = np.zeros(len(people), bool)
        for text in texts:
            has = (column == _typed(column, text, f"--where {name}={text}")).fill_null(False)
            if not has.any():
                raise UserError(
                    f"nobody in the gallery has {name} '{text}'. {_known(column, text)}"
                )
            one_of |= has.to_numpy()
        chosen &= one_of
    for name, value in same.items():
        chosen &= (column_of(people, name, "--same") == value).fill_null(False).to_numpy()
    if not chosen.any():
        said = [f"{name}={','.join(texts)}" for name, texts in where.items()]
        said += [f"{name}={value} (--same)" for name, value in same.items()]
        raise UserError(
            f"nobody of the {len(people)} people in the gallery has {' and '.join(said)}: widen "
            "the filters."
        )
    return chosen


def column_of(people: pl.DataFrame, name: str, flag: str) -> pl.Series:
    """A column that people can be told apart by.

    Raises:
        UserError: There is none of that name; the nearest is named.
    """
    known = [column for column in people.columns if column != "subject"]
    if name not in known:
        raise UserError(
            f"{flag} {name}: no such column in subjects.parquet. {nearest(name, known)}"
        )
    return people[name]


def _typed(column: pl.Series, text: str, what: str) -> Any:
    """A typed value as the column holds it."""
    if column.dtype == pl.Boolean:
        words = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in words:
            raise UserError(f"{what}: the column is true or false.")
        return words[text.lower()]
    if not column.dtype.is_numeric():
        return text
    return _number(text, what)


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise UserError(f"{what}: expected a number.")
    return value


def _known(column: pl.Series, text: str) -> str:
    values = column.drop_nulls().unique().sort()
    if len(values) <= _LISTED:
        return nearest(text, [str(value) for value in values])
    if column.dtype.is_numeric():
        return f"It goes from {values[0]:g} to {values[-1]:g}."
    return f"There are {len(values)} other values."


# -- who asks --------------------------------------------------------------------------------------


def about_askers(words: Sequence[str], ids: Sequence[str]) -> list[dict[str, str]]:
    """What is known of each who asks with a file, as text.

    Args:
        words: NAME=VALUE each, or one table with a row for each of `ids`.
        ids: The people of the file, where it names them.

    Raises:
        UserError: Neither, or somebody is not in the table.
    """
    if len(words) != 1 or "=" in words[0]:
        known = pairs_of("--about", words)
        if several := [name for name, values in known.items() if len(values) > 1]:
            raise UserError(f"--about {several[0]} has several values: expected the asker's own.")
        if known and len(ids) > 1:
            say(f"--about is taken of all {len(ids)} people of the file; a table tells them apart.")
        return [{name: values[0] for name, values in known.items()} for _ in ids]
    path = Path(words[0])
    if path.suffix not in _TABLES:
        raise UserError(f"--about {path}: expected NAME=VALUE, or a table ({', '.join(_TABLES)}).")
    from brainfusion.data.importers.tables import read_table

    columns, table = read_table(path, text=("subject",))
    if "subject" not in columns:
        raise UserError(f"{path} has no column 'subject'; it has {', '.join(columns[:8])}.")
    rows = {str(row["subject"]): row for row in table.iter_rows(named=True)}
    if n_absent := sum(name not in rows for name in ids):
        raise UserError(
            f"{path} lacks {n_absent} of the {len(ids)} people who ask: expected a row for each."
        )
    return [
        {key: str(v) for key, v in rows[name].items() if key != "subject" and v is not None}
        for name in ids
    ]


def covariates_of(
    names: Sequence[str], known: Sequence[Mapping[str, str]], *, used: Sequence[str] = ()
) -> np.ndarray | None:
    """The design matrix float64 [q, c] of who asks; None where nothing is residualised.

    Args:
        names: `Alignment.covariates`.
        known: What is known of each.
        used: Columns that serve something else, so that no warning is due.

    Raises:
        UserError: Something is missing, or a value that nobody had when the model was fitted.
    """
    needed = list(dict.fromkeys(name.split("=", 1)[0] for name in names))
    given = list(dict.fromkeys(name for row in known for name in row))
    if idle := [name for name in given if name not in (*needed, *used)]:
        say(f"warning: --about {', '.join(idle)} has no effect: this alignment does not use it.")
    if not needed:
        return None
    if absent := [name for name in needed if any(name not in row for row in known)]:
        raise UserError(
            f"this alignment has {', '.join(needed)} taken out of the features, so they must be "
            f"known of who asks: missing {', '.join(absent)} "
            f"(--about {' '.join(f'{name}=...' for name in absent)})."
        )
    text = {name.split("=", 1)[0] for name in names if "=" in name}
    table = pl.DataFrame(
        {
            name: [
                row[name] if name in text else _number(row[name], f"--about {name}={row[name]}")
                for row in known
            ]
            for name in needed
        }
    )
    return design_matrix(table, needed, names=names)[0]


def same_values(
    people: pl.DataFrame, same: Sequence[str], known: Mapping[str, Any]
) -> dict[str, Any]:
    """The asker's own value of each column of --same, as the column holds it.

    Raises:
        UserError: An unknown column, or it is not known of the asker.
    """
    values = {}
    for name in same:
        column = column_of(people, name, "--same")
        if known.get(name) is None:
            raise UserError(
                f"--same {name}: it is not known of who asks; give --about {name}=..., or leave "
                "it out."
            )
        own = known[name]
        values[name] = _typed(column, own, f"--about {name}={own}") if isinstance(own, str) else own
    return values
