"""`brainfusion report`: gather a workspace's numbers and draw them as one HTML page.

Writes <workspace>/results.json, results.parquet (the same, a row a metric), report.html (one file,
no network) and model_card.md from what pretrain, align, retrieve, probe and attribute have left
there, and prints what was found in a few sentences. Given the folder of an alignment run, does the
same for it, into that folder. Given that of a pretraining run, draws it into its report.html; it
may still be going on. Given several alignment runs, sets them side by side and compares them on the
test people that all of them have: comparison.html, comparison.json, comparison.parquet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro

from brainfusion.cli.gather import check_people, gather, home_of, is_alignment, is_of, place_of
from brainfusion.cli.options import parse
from brainfusion.cli.runs import WhichRun, find_run
from brainfusion.cli.workspace import Place, Workspace
from brainfusion.data.cohort import Cohort
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import write_json
from brainfusion.runtime.logs import say


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportOptions:
    """Options of `brainfusion report`."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """The folder of an alignment or pretraining run; or several alignment runs, side by side."""
    alignment: tyro.conf.OmitArgPrefixes[WhichRun] = field(default_factory=WhichRun)
    place: tyro.conf.OmitArgPrefixes[Place] = field(default_factory=Place)
    out: Path | None = None
    """The page of runs side by side; <workspace>/comparison.html by default.
    Its numbers go beside it, with the endings .json and .parquet."""


def main(argv: list[str]) -> int:
    """Write the numbers and the page of a run, or of several, and print the verdict."""
    options = parse(ReportOptions, argv, prog="brainfusion report", description=__doc__ or "")
    if len(options.runs) > 1:
        return _compare(options)
    if options.out is not None:
        raise UserError("--out goes with several runs; one run's report has its own place.")
    if not options.runs:
        return _report(options)
    [folder] = options.runs
    if not folder.exists():
        raise UserError(
            f"{folder} does not exist: expected the folder of an alignment or pretraining run, "
            "such as runs/demo/align/brainjepa-evo2."
        )
    if not is_alignment(folder):
        return _report_pretraining(folder)
    if options.alignment.run is not None:
        raise UserError(f"--run {options.alignment.run} beside {folder}: name one run.")
    return _report(replace(options, alignment=replace(options.alignment, run=folder)))


def _report(options: ReportOptions) -> int:
    """The page of one alignment run."""
    from brainfusion.eval.report.model_card import write_model_card
    from brainfusion.eval.report.page import write_report
    from brainfusion.eval.report.tidy import write_tidy
    from brainfusion.eval.report.verdict import verdict

    folder = options.alignment.run
    place = options.place if folder is None else place_of(options.place, [folder])
    workspace = Workspace.of(place)
    run = find_run(workspace, options.alignment)
    if folder is not None:
        check_people(workspace, run)
    home = home_of(workspace, run, by_folder=folder is not None)
    results = gather(workspace, run, home=home)
    write_json(home / "results.json", results)
    page = write_report(home)
    table = write_tidy(home / "results.parquet", results)
    card = write_model_card(home / "model_card.md", results)
    print("\n".join(verdict(results)))
    say(f"written: {home / 'results.json'}, {table.name}, {page.name}, {card.name}")
    return 0


def _compare(options: ReportOptions) -> int:
    """Set alignment runs side by side."""
    from brainfusion.eval.report.compare import compare_runs, read_alignment_runs
    from brainfusion.eval.report.comparison import write_comparison
    from brainfusion.eval.report.findings import findings

    if options.alignment != WhichRun():
        say("warning: --brain, --dna and --run have no effect beside several runs.")
    workspace = Workspace.of(place_of(options.place, options.runs))
    out = options.out or workspace.root / "comparison.html"
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {out}: expected the name of a page, such as {out.stem}.html.")
    runs = read_alignment_runs(options.runs)
    compared = compare_runs(runs, families=_families(workspace, options.runs))
    page, numbers, table = write_comparison(out, runs, compared)
    print("\n".join(findings(runs, compared)))
    say(f"written: {page}, {numbers.name}, {table.name}")
    return 0


def _families(workspace: Workspace, folders: Sequence[Path]) -> Mapping[str, str] | None:
    """The families of the runs' people; None, which is said, where they are not known."""
    why = "the cohort has no families"
    if not (workspace.cohort_path / "cohort.json").is_file():
        why = f"there is no cohort in {workspace.cohort_path}"
    else:
        cohort = Cohort.open(workspace.cohort_path)
        if not all(is_of(folder, cohort) for folder in folders):
            why = f"a run was not made from the people of {workspace.cohort_path}"
        elif "family" in cohort.subjects.columns:
            known = cohort.subjects.drop_nulls("family")
            return dict(known.select("subject", "family").iter_rows())
    say(f"{why}: people count as unrelated (--cohort names the cohort).")
    return None


def _report_pretraining(folder: Path) -> int:
    """Draw one pretraining run, and print how it stands."""
    from brainfusion.eval.report.pretraining import status, write_pretraining_report
    from brainfusion.eval.report.pretraining_run import read_run

    page = write_pretraining_report(folder)
    print("\n".join(status(read_run(folder))))
    say(f"written: {page}")
    return 0
