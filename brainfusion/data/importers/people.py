"""The table of people beside the recordings, with ids as text."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from brainfusion.data.cohort import check_subjects
from brainfusion.data.importers.config import ImportConfig, ImportReport
from brainfusion.data.importers.sources import Item
from brainfusion.data.importers.tables import read_table
from brainfusion.runtime.errors import UserError, nearest

ID_COLUMNS = ("subject", "participant_id", "subject_id", "eid", "id")
_TEXT = ("subject", "family", "site", "sex", "group")
_SEX = {"f": "F", "female": "F", "m": "M", "male": "M"}


def match_people(
    config: ImportConfig, items: Sequence[Item], report: ImportReport
) -> tuple[pl.DataFrame, list[Item]]:
    """The cohort's table of people, and the recordings of those who are in it.

    Raises:
        UserError: The table is broken, or people with recordings are not in it and
            `missing_subjects` is "refuse".
    """
    scanned = {item.subject for item in items}
    if config.subjects is None:
        report.warn("no table of people was given: no site, age, sex, family or phenotypes")
        return pl.DataFrame({"subject": sorted(scanned)}, schema={"subject": pl.String}), list(
            items
        )
    subjects = read_people(config.subjects, id_column=config.subject_column)
    known = set(subjects["subject"].to_list())
    absent = sorted(scanned - known)
    if absent and (config.missing_subjects == "refuse" or len(absent) == len(scanned)):
        raise UserError(
            f"{len(absent)} of {len(scanned)} people with recordings are not in {config.subjects} "
            f"(for example {', '.join(absent[:3])}): add their rows, or leave their recordings out "
            f"with --missing-subjects drop.{_hint(absent, known)}"
        )
    kept = [item for item in items if item.subject in known]
    report.n_dropped_people = len(absent)
    report.n_dropped_recordings = len(items) - len(kept)
    return subjects, kept


def read_people(path: Path, *, id_column: str | None = None) -> pl.DataFrame:
    """Read a table of people; the id column becomes `subject`, as text.

    Raises:
        UserError: The file is absent, of another form, or not a table of people.
    """
    columns, table = read_table(path, text=(*_TEXT, *ID_COLUMNS, id_column or "subject"))
    if id_column is None:
        found = [name for name in ID_COLUMNS if name in columns]
        if not found:
            raise UserError(
                f"{path} has no column of subject ids: expected one of {', '.join(ID_COLUMNS)}; "
                f"name it with --subject-column (it has {', '.join(columns[:8])})."
            )
        id_column = found[0]
    elif id_column not in columns:
        raise UserError(f"{path} has no column '{id_column}'. {nearest(id_column, columns)}")
    if id_column != "subject" and "subject" in columns:
        raise UserError(
            f"{path}: ids were asked from '{id_column}' but there is a column 'subject' too: "
            "rename or remove that one."
        )
    if table[id_column].dtype.is_float():
        raise UserError(
            f"{path}: column '{id_column}' holds decimal numbers, expected ids: write it as text."
        )
    table = table.rename({id_column: "subject"})
    present = [name for name in _TEXT if name in table.columns]
    table = table.with_columns(pl.col(present).cast(pl.String).str.strip_chars())
    if "sex" in table.columns:
        words = pl.col("sex").str.to_lowercase()
        table = table.with_columns(words.replace_strict(_SEX, default=pl.col("sex")).alias("sex"))
    check_subjects(table, where=str(path))
    return table


def _hint(absent: Sequence[str], known: set[str]) -> str:
    """Name the commonest cause: BIDS file names carry `sub-`, tables often do not."""
    if any(name.removeprefix("sub-") in known for name in absent if name.startswith("sub-")):
        return " The table has them without 'sub-': add --pattern 'sub-(?P<subject>[^_/]+)'."
    if any(f"sub-{name}" in known for name in absent):
        return " The table has them with 'sub-': take it into the group of --pattern."
    return ""
