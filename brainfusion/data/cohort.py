"""A cohort is a folder: people, an atlas, recordings, splits, DNA embeddings (docs/formats.md)."""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from brainfusion.data.atlas import Atlas
from brainfusion.data.parquet import read_table
from brainfusion.data.recordings import Recordings, check_bold
from brainfusion.data.splits import Splits
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import atomic_file, hash_file, hash_json, read_json, write_json
from brainfusion.runtime.logs import say

FORMAT = 1
ORIGINS = ("imported", "simulated")
_TEXT_COLUMNS = ("family", "site", "sex", "group")
_NUMBER_COLUMNS = ("age", "motion")


class Cohort:
    """One cohort, opened. Opening is cheap: tables and shard headers are read, no recording."""

    def __init__(
        self,
        path: Path,
        *,
        facts: dict[str, Any],
        subjects: pl.DataFrame,
        atlas: Atlas,
        recordings: Recordings,
    ) -> None:
        self.path, self.subjects, self.atlas, self.recordings = path, subjects, atlas, recordings
        self.name, self.origin, self.notes = facts["name"], facts["origin"], facts["notes"]

    @classmethod
    def open(cls, path: Path) -> "Cohort":
        """Open a cohort folder and check everything that is cheap.

        Raises:
            UserError: The folder or a file is absent or broken, ids repeat, a recording's subject
                is not in the table, or the atlas has another size than the recordings.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(
                f"{path} does not exist: --cohort expects a cohort folder; make one with "
                "'brainfusion import' or 'brainfusion simulate'."
            )
        facts = _read_facts(path / "cohort.json")
        subjects = read_subjects(path / "subjects.parquet")
        atlas = Atlas.load(path / "atlas.json")
        recordings = Recordings.open(path / "recordings")
        if recordings.n_parcels != atlas.n_parcels:
            raise UserError(
                f"{path}: recordings have {recordings.n_parcels} parcels but atlas.json has "
                f"{atlas.n_parcels} ('{atlas.name}'). Parcel order carries meaning, so nothing is "
                "padded or cut: put the atlas there that the recordings were made with."
            )
        unknown = recordings.index["subject"].unique(maintain_order=True)
        unknown = unknown.filter(~unknown.is_in(subjects["subject"].implode()))
        if len(unknown):
            n_lost = recordings.index["subject"].is_in(unknown.implode()).sum()
            raise UserError(
                f"{path}: {n_lost} recordings belong to {len(unknown)} people who are not in "
                f"subjects.parquet (for example {', '.join(unknown[:3].to_list())}): add their "
                "rows, or import again with --missing-subjects drop."
            )
        return cls(path, facts=facts, subjects=subjects, atlas=atlas, recordings=recordings)

    @cached_property
    def hash(self) -> str:
        """A hash of the tables, the atlas and the shards' sizes: another import, another hash."""
        folder = self.recordings.folder
        shards = self.recordings.index["shard"].unique().sort()
        return hash_json(
            {
                "subjects": hash_file(self.path / "subjects.parquet"),
                "atlas": self.atlas.to_dict(),
                "index": hash_file(folder / "index.parquet"),
                "shards": {shard: (folder / shard).stat().st_size for shard in shards},
            }
        )

    def splits(self) -> Splits:
        """The splits of `splits.json`, which is made with seed 0 when it is not there.

        Raises:
            UserError: The file was edited, or does not fit the table of subjects.
        """
        path = self.path / "splits.json"
        if path.exists():
            splits = Splits.load(path)
            splits.check_families(self.subjects)
            return splits
        splits = Splits.make(self.subjects)
        try:
            splits.save(path)
        except OSError as error:
            say(f"{path} cannot be written ({error.strerror}): the same split is made each time.")
        return splits

    def describe(self) -> dict[str, Any]:
        """Facts about the cohort for logs and reports: counts and summaries, no ids."""
        index, subjects = self.recordings.index, self.subjects
        n_scanned = index["subject"].n_unique()
        return {
            "name": self.name,
            "origin": self.origin,
            "notes": self.notes,
            "hash": self.hash,
            "atlas": self.atlas.name,
            "n_people": len(subjects),
            "n_people_without_recordings": len(subjects) - n_scanned,
            "n_recordings": len(index),
            "n_parcels": self.atlas.n_parcels,
            "n_trs": _range(index["n_trs"]),
            "tr_s": _values(index["tr_s"]),
            "coverage": _range(index["coverage"]),
            "families": _families(subjects),
            "sites": _counts(subjects, "site"),
            "sex": _counts(subjects, "sex"),
            "age": _moments(subjects, "age"),
            "motion": _moments(subjects, "motion"),
        }

    def validate(self) -> list[str]:
        """Read every recording and check it; returns plain warnings.

        Raises:
            UserError: A recording holds single NaN values or infinity, or its coverage is not what
                the index says.
        """
        warnings, n_constant, n_hit, n_flat = [], 0, 0, 0
        index = self.recordings.index
        for i, (name, stated) in enumerate(index.select("recording", "coverage").iter_rows()):
            bold, coverage = check_bold(self.recordings.read(i), recording=name)
            if not math.isclose(coverage, stated, abs_tol=1e-6):
                raise UserError(
                    f"recording '{name}' has data in {coverage:.1%} of its parcels but "
                    f"index.parquet says {stated:.1%}: import the cohort again."
                )
            constant = np.ptp(bold, axis=1) == 0
            n_constant += int(constant.sum())
            n_hit += bool(constant.any())
            n_flat += bool(constant.mean() > 0.5)
        if n_constant:
            warnings.append(
                f"{n_hit} recordings have {n_constant} constant parcels: they carry no signal; "
                "import again with constant parcels as missing."
            )
        if n_flat:
            warnings.append(f"{n_flat} recordings are constant in most parcels.")
        if n_idle := len(self.subjects) - index["subject"].n_unique():
            warnings.append(f"{n_idle} of {len(self.subjects)} people have no recording.")
        if n_unknown := index["tr_s"].null_count():
            warnings.append(f"{n_unknown} recordings have no TR in seconds.")
        if index["tr_s"].drop_nulls().n_unique() > 1:
            warnings.append(f"TRs differ between recordings: {_values(index['tr_s'])} s.")
        if (lowest := float(index["coverage"].min() or 0.0)) < 0.8:  # type: ignore[arg-type]
            n_low = int((index["coverage"] < 0.8).sum())
            warnings.append(f"{n_low} recordings cover under 80% of parcels (lowest {lowest:.0%}).")
        return warnings

    def truth(self) -> dict[str, Any] | None:
        """What a simulated cohort says of itself (`truth/truth.json`); None for a real one."""
        path = self.path / "truth" / "truth.json"
        return read_json(path) if path.is_file() else None


def write_cohort_tables(
    path: Path,
    *,
    name: str,
    origin: str,
    subjects: pl.DataFrame,
    atlas: Atlas,
    notes: str = "",
) -> None:
    """Write `cohort.json`, `subjects.parquet` and `atlas.json` into the folder `path`.

    Raises:
        UserError: The table of subjects is not one that `Cohort.open` would take.
    """
    if origin not in ORIGINS:
        raise UserError(f"origin='{origin}': expected one of {', '.join(ORIGINS)}.")
    check_subjects(subjects, where="the table of subjects")
    path.mkdir(parents=True, exist_ok=True)
    facts = {"name": name, "format": FORMAT, "origin": origin, "notes": notes}
    write_json(path / "cohort.json", facts)
    with atomic_file(path / "subjects.parquet") as aside:
        subjects.write_parquet(aside)
    atlas.save(path / "atlas.json")


def read_subjects(path: Path) -> pl.DataFrame:
    """Read and check `subjects.parquet`.

    Raises:
        UserError: The file is absent or broken, or `check_subjects` refuses it.
    """
    subjects = read_table(
        path, absent="a cohort needs a table with the column 'subject' (docs/formats.md)."
    )
    check_subjects(subjects, where=str(path))
    return subjects


def check_subjects(subjects: pl.DataFrame, *, where: str) -> None:
    """Check a table of people; `where` names it in errors.

    Raises:
        UserError: No people, no `subject` column, ids that are not text, are empty or repeat, or a
            known column of the wrong type.
    """
    if "subject" not in subjects.columns:
        raise UserError(
            f"{where} has no column 'subject': expected one row a person with their id as text; "
            f"it has {', '.join(subjects.columns[:8])}."
        )
    ids = subjects["subject"]
    if ids.dtype != pl.String:
        raise UserError(
            f"{where}: column 'subject' is {ids.dtype}, expected text: ids that were numbers may "
            "have lost leading zeros; write them as text."
        )
    if subjects.is_empty():
        raise UserError(f"{where} lists nobody: expected at least one person.")
    if n_empty := int((ids.fill_null("") == "").sum()):
        raise UserError(f"{where}: {n_empty} rows have no subject id: fill them in, or drop them.")
    if n_twice := len(ids) - ids.n_unique():
        twice = ids.filter(ids.is_duplicated()).unique(maintain_order=True)[:3].to_list()
        raise UserError(
            f"{where}: {n_twice} subject ids repeat (for example {', '.join(twice)}): expected one "
            "row a person; keep one row of each."
        )
    for name in _TEXT_COLUMNS:
        if name in subjects.columns and subjects[name].dtype not in (pl.String, pl.Null):
            raise UserError(
                f"{where}: column '{name}' is {subjects[name].dtype}, expected text: write it as "
                "text."
            )
    for name in _NUMBER_COLUMNS:
        if name in subjects.columns and not (
            subjects[name].dtype.is_numeric() or subjects[name].dtype == pl.Null
        ):
            raise UserError(
                f"{where}: column '{name}' is {subjects[name].dtype}, expected numbers."
            )
    if "sex" in subjects.columns:
        odd = sorted(set(subjects["sex"].drop_nulls().unique()) - {"F", "M"})
        if odd:
            raise UserError(
                f"{where}: column 'sex' holds {', '.join(map(repr, odd[:3]))}, expected 'F' or "
                "'M' (empty where unknown): recode it."
            )


def _read_facts(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{path} does not exist, so {path.parent} is not a cohort folder: make one with "
            "'brainfusion import' or 'brainfusion simulate'."
        )
    facts = read_json(path)
    if not isinstance(facts, dict) or "name" not in facts or "origin" not in facts:
        raise UserError(f"{path}: expected the keys name, format, origin, notes (docs/formats.md).")
    if facts.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {facts.get('format')!r}, this version reads {FORMAT}: make the "
            "cohort again, or use the version of brainfusion that made it."
        )
    return {"notes": "", **facts}


def _families(subjects: pl.DataFrame) -> dict[str, Any] | None:
    if "family" not in subjects.columns:
        return None
    named = subjects["family"].drop_nulls()
    named = named.filter(named != "") if named.dtype == pl.String else named
    sizes = named.value_counts()["count"] if len(named) else pl.Series([0])
    return {
        "n_families": len(subjects) - len(named) + named.n_unique(),
        "n_with_relatives": int(sizes.filter(sizes > 1).sum()),
        "largest": int(max(sizes.max(), 1)),  # type: ignore[type-var]
    }


def _counts(subjects: pl.DataFrame, name: str) -> dict[str, int] | None:
    if name not in subjects.columns:
        return None
    counts = subjects[name].cast(pl.String).fill_null("unknown").value_counts().sort(name)
    return dict(counts.iter_rows())


def _moments(subjects: pl.DataFrame, name: str) -> dict[str, float | int] | None:
    if name not in subjects.columns:
        return None
    values = subjects[name].cast(pl.Float64).drop_nulls().drop_nans()
    if values.is_empty():
        return None
    mean = float(values.mean())  # type: ignore[arg-type]
    std = float(values.std() or 0.0)  # type: ignore[arg-type]
    low, high = _range(values)
    return {"mean": mean, "sd": std, "min": low, "max": high, "n": len(values)}


def _range(values: pl.Series) -> list[Any]:
    return [values.min(), values.max()]


def _values(values: pl.Series) -> list[float]:
    return values.drop_nulls().unique().sort().to_list()
