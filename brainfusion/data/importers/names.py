"""Who was scanned when, from the names of files: a pattern, BIDS derivatives, UK Biobank, plain.

BIDS: sub-01_ses-2_task-rest_space-fsLR_seg-4S456Parcels_stat-mean_timeseries.ptseries.nii, as
XCP-D and fMRIPrep write them (`atlas-` in place of `seg-` before the atlas extension of BIDS). UK
Biobank: <eid>_<field>_<instance>_<array>, where the instance is the visit.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from brainfusion.runtime.errors import UserError

_ENDINGS = (".ptseries.nii", ".dtseries.nii", ".nii.gz")
_BIDS = re.compile(r"sub-[A-Za-z0-9+]+(?:_[a-z]+-[A-Za-z0-9+.]+)*_[A-Za-z0-9]+")
_BIOBANK = re.compile(r"(?P<subject>\d+)_(?P<field>\d{4,6})_(?P<session>\d+)_(?P<array>\d+)")
# Entities that tell one run from another; all others say what was made of it.
_RUN = ("sub", "ses", "sample", "task", "acq", "ce", "trc", "dir", "rec", "run", "echo", "part")
_SUFFIXES = {"tables": ("timeseries",), "cifti": ("timeseries", "bold"), "nifti": ("bold",)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """What a file's name says."""

    path: Path
    recording: str
    subject: str
    session: str


def stem(path: Path) -> str:
    """A file's name without its ending; `.nii.gz` and `.ptseries.nii` are one ending."""
    for ending in _ENDINGS:
        if path.name.endswith(ending):
            return path.name.removesuffix(ending)
    return path.stem


def bids_entities(path: Path) -> dict[str, str] | None:
    """The entities of a BIDS name, and its suffix as `suffix`; None for any other name."""
    name = stem(path)
    if not _BIDS.fullmatch(name):
        return None
    *pairs, suffix = name.split("_")
    return {**dict(pair.split("-", 1) for pair in pairs), "suffix": suffix}


def choose_files(
    files: Sequence[Path], kind: str, *, entities: Sequence[str], has_labels: bool
) -> tuple[list[Path], int]:
    """Of a folder of derivatives, the time series that were asked for; any other folder is whole.

    Derivatives hold much beside: confounds, coverage, masks, references. Where files have BIDS
    names, only time series are taken (`*_seg-..._timeseries`, `*_bold` of images).

    Args:
        files: All files of the kind.
        kind: As `ImportConfig.kind`.
        entities: What a name must have, such as "seg-4S456Parcels".
        has_labels: Whether there is an atlas to make parcels with.

    Returns:
        The files, and how many others were left out.

    Raises:
        UserError: An entity that no file has.
    """
    chosen = list(files)
    if kind == "cifti":
        ending = ".dtseries.nii" if has_labels else ".ptseries.nii"
        chosen = [path for path in chosen if path.name.endswith(ending)] or chosen
    named = {path: found for path in chosen if (found := bids_entities(path))}
    series = [path for path, found in named.items() if _is_series(found, kind)]
    if series:
        chosen = series
    for wanted in entities:
        key, _, value = wanted.partition("-")
        if not value:
            raise UserError(
                f"--entities {wanted}: expected a key and a value of BIDS names, for example "
                "seg-4S456Parcels or task-rest."
            )
        found = Counter(named[path][key] for path in chosen if key in named.get(path, {}))
        if chosen and value not in found:
            known = ", ".join(f"{key}-{name}" for name in sorted(found)[:8]) or f"no '{key}-'"
            raise UserError(f"--entities {wanted}: no file has it; their names have {known}.")
        chosen = [path for path in chosen if named.get(path, {}).get(key) == value]
    return chosen, len(files) - len(chosen)


def name_files(root: Path, files: Sequence[Path], pattern: str | None) -> tuple[str, list[Named]]:
    """How the names were understood ("pattern", "BIDS", "UK Biobank" or "file names"), and them.

    Raises:
        UserError: A pattern that is none or does not fit, or names that do not tell recordings
            apart.
    """
    if pattern is not None:
        return "pattern", _by_pattern(root, files, compile_pattern(pattern), pattern)
    stems = [stem(path) for path in files]
    repeated = [name for name, count in Counter(stems).items() if count > 1]
    if repeated:
        raise UserError(
            f"{len(repeated)} file names stand in several folders ('{repeated[0]}', ...), so "
            "they do not name the subject: give --pattern, for example "
            "'subjects/(?P<subject>[^/]+)/', which is searched in the path below the source."
        )
    found = [_BIOBANK.fullmatch(name) for name in stems]
    if all(found):
        fields = sorted({match["field"] for match in found if match})
        if len(fields) > 1:
            raise UserError(
                f"{root} holds {len(fields)} data fields of UK Biobank ({', '.join(fields[:4])}): "
                f"different measures of the same runs; choose with --glob '*_{fields[0]}_*'."
            )
        kind = "UK Biobank"
    else:
        kind = "BIDS" if all(bids_entities(path) for path in files) else "file names"
    if kind == "BIDS":
        _check_runs(files)
    return kind, [
        Named(
            path=path,
            recording=_recording(root, path),
            subject=name.split("_")[0] or name,
            session=match["session"] if kind == "UK Biobank" and match else _session(name),
        )
        for path, name, match in zip(files, stems, found, strict=True)
    ]


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The user's regular expression.

    Raises:
        UserError: It is none, or has no group `subject`.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"--pattern '{pattern}' is no regular expression ({error}): expected for example "
            "'sub-(?P<subject>[^_]+)_run-(?P<session>[0-9]+)'."
        ) from error
    if "subject" not in compiled.groupindex:
        raise UserError(
            f"--pattern '{pattern}' has no group (?P<subject>...): expected for example "
            "'sub-(?P<subject>[^_]+)'."
        )
    return compiled


def identify(text: str, pattern: re.Pattern[str] | None) -> tuple[str, str] | None:
    """Subject and session from a path or the name of a data set; None where it does not fit."""
    if pattern is not None:
        match = pattern.search(text)
        if match is None or not match["subject"]:
            return None
        return match["subject"], match.groupdict().get("session") or "1"
    name = stem(Path(text))
    if match := _BIOBANK.fullmatch(name):
        return match["subject"], match["session"]
    return name.split("_")[0] or name, _session(name)


def _session(name: str) -> str:
    session = re.search(r"(?:^|_)ses-([^_]+)", name)
    return session[1] if session else "1"


def _recording(root: Path, path: Path) -> str:
    return (path.relative_to(root).parent / stem(path)).as_posix()


def _by_pattern(
    root: Path, files: Sequence[Path], compiled: re.Pattern[str], pattern: str
) -> list[Named]:
    items, unnamed = [], []
    for path in files:
        relative = path.relative_to(root).as_posix()
        if (named := identify(relative, compiled)) is None:
            unnamed.append(relative)
            continue
        subject, session = named
        recording = _recording(root, path)
        items.append(Named(path=path, recording=recording, subject=subject, session=session))
    if unnamed:
        raise UserError(
            f"{len(unnamed)} of {len(files)} files do not fit --pattern '{pattern}' (for "
            f"example {unnamed[0]}): correct it, or choose the files with --glob."
        )
    return items


def _is_series(entities: dict[str, str], kind: str) -> bool:
    """Whether a name is that of a run's time series, and of no confounds, coverage or map."""
    if entities["suffix"] not in _SUFFIXES.get(kind, (entities["suffix"],)):
        return False
    if kind == "tables" and not ({"seg", "atlas"} & set(entities)):
        return False
    return entities.get("stat", "mean") == "mean" and entities.get("desc") != "confounds"


def _check_runs(files: Sequence[Path]) -> None:
    """Refuse several versions of one run: other atlases, spaces, denoisings."""
    runs: dict[tuple[str | None, ...], list[dict[str, str]]] = defaultdict(list)
    for path in files:
        entities = bids_entities(path) or {}
        runs[tuple(entities.get(key) for key in _RUN)].append(entities)
    several = [versions for versions in runs.values() if len(versions) > 1]
    if not several:
        return
    keys = sorted({key for versions in several for version in versions for key in version})
    for key in keys:
        values = sorted({version.get(key, "") for versions in several for version in versions})
        if key not in _RUN and len(values) > 1:
            named = ", ".join(f"{key}-{value}" if value else f"no {key}-" for value in values[:5])
            given = next(value for value in values if value)
            raise UserError(
                f"{len(several)} of {len(runs)} runs are there {len(several[0])} times ({named}): "
                f"a cohort has each run once; choose with --entities {key}-{given}, or --glob."
            )
