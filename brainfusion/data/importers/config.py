"""What an import is told, and what it says it did."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from brainfusion.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig:
    """Where recordings come from and how to read them."""

    source: Path
    """A folder of recordings, or one file that holds all."""
    out: Path
    """The cohort folder to make."""
    tr_s: float | None = None
    """Time between frames in seconds (HCP 0.72, UK Biobank 0.735).
    Default: what images, their JSON files (BIDS) or HDF5 attributes say; others need it."""
    kind: Literal["auto", "npy", "tables", "mat", "array", "cifti", "nifti", "hdf5", "arrow"] = (
        "auto"
    )
    """npy: a folder of .npy; tables: TSV, CSV or whitespace text; mat: a folder of MATLAB files;
    cifti: ptseries, or dtseries with --labels; nifti: 4-D images with --labels;
    hdf5: a data set a recording, or one array of all; arrow: BrainLM's data sets;
    array: one .npy, [recording, parcel, TR] or [recording, TR, parcel]; auto: by the file names."""
    orientation: Literal["auto", "parcels-first", "trs-first"] = "auto"
    """Which axis comes first. auto decides by the number of parcels of the atlas or the names."""
    atlas: Path | None = None
    """An atlas.json (docs/formats.md). Without it the atlas is the names in the files."""
    parcels: Path | None = None
    """A text file with the parcel names of unnamed recordings, one a line, in their order.
    For kind nifti: of the labels in the order of their numbers, or a table with index and name."""
    labels: Path | None = None
    """An atlas to make parcels with: a dlabel.nii for dtseries;
    for NIfTI an image of whole numbers in the same space."""
    entities: tuple[str, ...] = ()
    """For BIDS derivatives: what a name must have, for example seg-4S456Parcels task-rest."""
    subjects: Path | None = None
    """A table of people (Parquet, CSV or TSV): ids, and site, age, sex, family, phenotypes."""
    subject_column: str | None = None
    """The column of ids. Default: subject, participant_id, subject_id, eid or id."""
    ids: Path | None = None
    """For one array of all, in its order: a text file with one subject a line,
    or a table with the column `subject` (and `session`, `recording`)."""
    id_column: str | None = None
    """For kind arrow: the column that names who was scanned.
    Default: Patient ID, else Filename.
    For kind hdf5: the data set with the ids of an array of all."""
    pattern: str | None = None
    """A regular expression, searched in the path below SOURCE, that names who was scanned when:
    with a group (?P<subject>...), and (?P<session>...) if you like.
    Default: the file name up to its first underscore;
    the session of BIDS (ses-), or UK Biobank's instance (<eid>_<field>_<instance>_<array>)."""
    glob: str = "*"
    """Which files to take, for example '*_run-1_*.tsv'; folders are searched all the way down."""
    variable: str | None = None
    """For kinds mat, hdf5 and arrow: the name of the variable, data set or column.
    Default: the only one that can be a recording (hdf5: all of them)."""
    drop_columns: tuple[str, ...] = ()
    """For kind tables: columns that are no parcels (an index, a global signal):
    their names, or positions from 0."""
    constant_as_missing: bool = True
    """Count a parcel that never changes as missing: it carries no signal."""
    min_coverage: float = 0.8
    """The least share of atlas parcels with data."""
    low_coverage: Literal["refuse", "skip"] = "refuse"
    """What to do with a recording below it: stop, or leave it out and count it."""
    missing_subjects: Literal["refuse", "drop"] = "refuse"
    """What to do with recordings of people who are not in the table: stop, or leave them out."""
    name: str | None = None
    """The cohort's name. Default: the name of the folder."""
    notes: str = ""
    """Anything worth keeping: the pipeline, denoising, the atlas version."""
    overwrite: bool = False
    """Replace a cohort that is there."""
    workers: int = 1
    """Processes that read; the result is the same."""
    keep_parts: bool = True
    """Keep what was read when an import is stopped, so that the same command goes on from there."""

    def __post_init__(self) -> None:
        if not 0 < self.min_coverage <= 1:
            raise UserError(
                f"min_coverage={self.min_coverage} must be a share above 0 and at most 1."
            )
        if self.tr_s is not None:
            check_tr(self.tr_s, where="tr_s")
        if self.workers < 1:
            raise UserError(f"workers={self.workers}: expected at least one process.")


def check_tr(tr_s: float, *, where: str) -> float:
    """Check a TR.

    Raises:
        UserError: It is no number of seconds between frames.
    """
    if not 0.01 < tr_s < 60:
        raise UserError(
            f"{where}={tr_s:g} is no repetition time in seconds: expected between 0.01 and 60; a "
            "TR in milliseconds is divided by 1000."
        )
    return tr_s


@dataclass(kw_only=True)
class ImportReport:
    """What was read, what was dropped and why; it is kept as the cohort's `import.json`."""

    source: str
    kind: str
    tr_s: float = 0.0
    """Seconds between frames; the shortest where they differ."""
    max_tr_s: float = 0.0
    names: str = "file names"
    """How file names were understood: "file names", "pattern", "BIDS", "UK Biobank", a column."""
    atlas: str = ""
    n_parcels: int = 0
    n_files: int = 0
    n_recordings: int = 0
    n_people: int = 0
    n_people_without_recordings: int = 0
    orientation: str = ""
    """The first axis in the files: "parcels-first", "trs-first", or "mixed"."""
    min_trs: int = 0
    max_trs: int = 0
    mean_coverage: float = 0.0
    min_coverage: float = 0.0
    n_permuted: int = 0
    """Recordings whose parcels were put into the atlas's order by name."""
    n_extra_parcels: int = 0
    """Different parcel names in the files that the atlas does not have; dropped."""
    n_with_missing: int = 0
    """Recordings that lack some of the atlas's parcels."""
    n_with_constant: int = 0
    """Recordings with constant parcels (counted as missing)."""
    n_constant_parcels: int = 0
    """Different parcels that were constant in some recording."""
    n_other_files: int = 0
    """Files of this kind that were left out: no time series, or other entities."""
    n_other_tr: int = 0
    """Recordings whose files say another TR than --tr-s, which was used."""
    n_dropped_columns: int = 0
    """Columns dropped from each table, as the user asked."""
    n_skipped_coverage: int = 0
    """Recordings left out because their coverage was too low."""
    n_dropped_recordings: int = 0
    """Recordings left out because their subject is not in the table."""
    n_dropped_people: int = 0
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def warn(self, text: str) -> None:
        """Keep a warning, once."""
        if text not in self.warnings:
            self.warnings.append(text)

    def lines(self) -> list[str]:
        """The report in words, a fact a line."""
        trs = (
            f"{self.min_trs}" if self.min_trs == self.max_trs else f"{self.min_trs}-{self.max_trs}"
        )
        tr = f"{self.tr_s:g}" if self.max_tr_s <= self.tr_s else f"{self.tr_s:g}-{self.max_tr_s:g}"
        lines = [
            f"read {self.n_files} {self.kind} recordings of {self.source} ({self.orientation})",
            f"kept {self.n_recordings} recordings of {self.n_people} people: {self.n_parcels} "
            f"parcels ({self.atlas}) x {trs} TRs, TR {tr} s",
            f"coverage: mean {self.mean_coverage:.1%}, lowest {self.min_coverage:.1%} of parcels",
        ]
        facts = {
            "other files of this kind were left out (no time series, or other entities)": (
                self.n_other_files
            ),
            "recordings say another TR than --tr-s, which was used": self.n_other_tr,
            "recordings put into the atlas's parcel order by name": self.n_permuted,
            "parcel names that are not in the atlas: dropped": self.n_extra_parcels,
            "recordings lack some parcels: kept as NaN": self.n_with_missing,
            "recordings have constant parcels: counted as missing": self.n_with_constant,
            "columns dropped from each table, as asked": self.n_dropped_columns,
            "recordings skipped: coverage too low": self.n_skipped_coverage,
            "recordings dropped: their subject is not in the table": self.n_dropped_recordings,
            "people in the table have no recording: kept": self.n_people_without_recordings,
        }
        lines += [f"{count} {text}" for text, count in facts.items() if count]
        return lines + [f"warning: {text}" for text in self.warnings]
