"""From files to a cohort folder: read, orient, match parcels by name, check, write."""

import errno
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import polars as pl

from brainfusion.data.cohort import Cohort, write_cohort_tables
from brainfusion.data.importers.config import ImportConfig, ImportReport
from brainfusion.data.importers.journal import KEEP_FROM, Journal
from brainfusion.data.importers.matching import Facts, Layout, Tally, make_layout
from brainfusion.data.importers.people import match_people
from brainfusion.data.importers.reading import read_all
from brainfusion.data.importers.sources import Item, find_items
from brainfusion.data.recordings import RecordingWriter
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import atomic_folder, check_writable, write_json
from brainfusion.runtime.logs import Progress, say


def import_npy_folder(config: ImportConfig) -> ImportReport:
    """Import a folder of .npy files, one recording [p, t] or [t, p] each."""
    return import_cohort(replace(config, kind="npy"))


def import_tables(config: ImportConfig) -> ImportReport:
    """Import a folder of text tables (TSV, CSV, white space), one recording each."""
    return import_cohort(replace(config, kind="tables"))


def import_mat(config: ImportConfig) -> ImportReport:
    """Import a folder of MATLAB files (v7 and older), one recording each."""
    return import_cohort(replace(config, kind="mat"))


def import_array(config: ImportConfig) -> ImportReport:
    """Import one .npy array [recording, p, t] or [recording, t, p], with a list of ids."""
    return import_cohort(replace(config, kind="array"))


def import_cohort(config: ImportConfig) -> ImportReport:
    """Make the cohort folder `config.out`, whole or not at all; memory holds some recordings.

    An import that is stopped after `KEEP_FROM` recordings, by an error or by force, leaves
    `.<out>-parts/` (`Journal`), and the same call goes on from there.

    Returns:
        What was read, dropped and why; the same is written to the cohort's `import.json`.

    Raises:
        UserError: Anything that is wrong with the input or the output folder, in one line.
    """
    if config.out.exists() and not config.overwrite:
        raise UserError(
            f"{config.out} exists: give another --out, or --overwrite to replace that cohort."
        )
    report = ImportReport(source=str(config.source), kind=config.kind)
    report.kind, items = find_items(config, report)
    report.n_files = len(items)
    if config.tr_s is None and report.kind in ("npy", "mat", "array", "arrow"):
        raise UserError(
            "the TR is not given: expected the seconds between frames, because windows and models "
            f"depend on it and {report.kind} files do not say it; add --tr-s, for example --tr-s "
            "0.72 for HCP."
        )
    subjects, items = match_people(config, items, report)
    layout = make_layout(config, report.kind, items[0], report)
    report.atlas, report.n_parcels = layout.atlas.name, layout.atlas.n_parcels
    check_writable(config.out.parent)
    journal, kept = Journal(config, report.kind, layout), False
    try:
        done = journal.open(items)
        try:
            with atomic_folder(config.out) as aside:
                tally = _write(journal, done, config, layout, items, report)
                _finish(aside, journal, config, layout, subjects, tally, report)
        except BaseException:
            kept = config.keep_parts and journal.n_done >= KEEP_FROM
            raise
        finally:
            journal.close(keep=kept)
            if kept:
                say(
                    f"{journal.n_done} recordings are kept in {journal.folder}: the same command "
                    "goes on from there."
                )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        left = f"what was read is in {journal.folder}" if kept else "nothing was left there"
        raise UserError(
            f"cannot write {config.out} ({error.strerror}): {left}; free space or give another "
            "--out."
        ) from error
    return report


def _write(
    journal: Journal,
    done: Sequence[tuple[Facts, tuple | None]],
    config: ImportConfig,
    layout: Layout,
    items: Sequence[Item],
    report: ImportReport,
) -> Tally:
    """Write all recordings into the journal's folder, after those that are there."""
    tally, atlas = Tally(), layout.atlas
    for item, (facts, row) in zip(items, done, strict=False):
        tally.count(facts)
        if row is None:
            report.n_skipped_coverage += 1
        else:
            tally.keep(item.subject, facts)
    if done:
        say(f"{len(done)} of {len(items)} recordings were read before: going on from there.")
    progress = Progress("import", len(items), start=len(done))
    rows = [row for _, row in done if row is not None]
    if not rows:
        journal.clear()
    left = items[len(done) :]
    with (
        RecordingWriter(journal.recordings, n_parcels=atlas.n_parcels, resume=rows) as writer,
        closing(read_all(config, report.kind, layout, left)) as read,
    ):
        for n_read, (item, (bold, facts)) in enumerate(
            zip(left, read, strict=True), start=len(done) + 1
        ):
            tally.count(facts)
            row = None
            if facts.coverage < config.min_coverage:
                _check_coverage(config, item, facts, atlas.name)
                report.n_skipped_coverage += 1
            else:
                row = writer.add(
                    bold,
                    recording=item.recording,
                    subject=item.subject,
                    session=item.session,
                    tr_s=facts.tr_s,
                )
                tally.keep(item.subject, facts)
            journal.write(item, facts, row)
            progress.update(n_read)
    return tally


def _check_coverage(config: ImportConfig, item: Item, facts: Facts, atlas: str) -> None:
    if config.low_coverage == "refuse":
        raise UserError(
            f"{item.path.name} ('{item.recording}') has data in {facts.coverage:.1%} of the "
            f"parcels of '{atlas}', expected at least {config.min_coverage:.0%}: "
            "leave such recordings out with --low-coverage skip, or lower --min-coverage."
        )


def _finish(
    folder: Path,
    journal: Journal,
    config: ImportConfig,
    layout: Layout,
    subjects: pl.DataFrame,
    tally: Tally,
    report: ImportReport,
) -> None:
    """Put tables beside the recordings, and open what came out."""
    if not len(tally):
        raise UserError(
            f"all {report.n_files} recordings have data in under {config.min_coverage:.0%} of the "
            f"parcels of '{layout.atlas.name}': check that it is their atlas, or lower "
            "--min-coverage."
        )
    if config.subjects is None:
        people = pl.Series(sorted(tally.people))
        subjects = subjects.filter(pl.col("subject").is_in(people.implode()))
    tally.fill(report, n_subjects=len(subjects))
    write_cohort_tables(
        folder,
        name=config.name or config.out.resolve().name,
        origin="imported",
        subjects=subjects,
        atlas=layout.atlas,
        notes=config.notes,
    )
    write_json(folder / "import.json", report.to_dict())
    journal.recordings.rename(folder / "recordings")
    Cohort.open(folder)
