"""`brainfusion report`: gather a workspace's numbers and draw them as one HTML page.

Writes <workspace>/results.json, results.parquet (the same, a row a metric), report.html (one file,
no network) and model_card.md from what pretrain, align, retrieve, probe and attribute have left
there, and prints what was found in a few sentences. Given the folder of a pretraining run, draws
that run instead, into its report.html; it may still be going on. Given several alignment runs, sets
them side by side and compares them on the test people that all of them have.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tyro

from brainfusion import __version__
from brainfusion.cli.options import parse
from brainfusion.cli.pairs import dna_models, dna_name
from brainfusion.cli.workspace import Place, Workspace
from brainfusion.runtime import config
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import read_json, write_json
from brainfusion.runtime.logs import say


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportOptions:
    """Options of `brainfusion report`."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """A pretraining run, to draw that alone; or alignment runs, to set side by side."""
    brain: str = "brainjepa"
    """Brain features of the alignment to report."""
    dna: tuple[str, ...] = ("evo2",)
    """DNA embeddings of the alignment to report: one model or several."""
    place: tyro.conf.OmitArgPrefixes[Place] = field(default_factory=Place)
    out: Path | None = None
    """The page of runs side by side; <workspace>/comparison.html by default."""


def main(argv: list[str]) -> int:
    """Write results.json and report.html, and print the verdict."""
    from brainfusion.eval.report.model_card import write_model_card
    from brainfusion.eval.report.page import write_report
    from brainfusion.eval.report.tidy import write_tidy
    from brainfusion.eval.report.verdict import verdict

    options = parse(ReportOptions, argv, prog="brainfusion report", description=__doc__ or "")
    workspace = Workspace.of(options.place)
    if options.runs:
        if len(options.runs) == 1 and not (options.runs[0] / "retrieval.json").exists():
            return _report_pretraining(options.runs[0])
        return _compare(options, workspace)
    if options.out is not None:
        raise UserError("--out goes with several runs; the report is <workspace>/report.html.")
    results = gather(workspace, options.brain, dna_models(options.dna))
    write_json(workspace.root / "results.json", results)
    page = write_report(workspace.root)
    table = write_tidy(workspace.root / "results.parquet", results)
    card = write_model_card(workspace.root / "model_card.md", results)
    print("\n".join(verdict(results)))
    say(f"written: {workspace.root / 'results.json'}, {table.name}, {page.name}, {card.name}")
    return 0


def _compare(options: ReportOptions, workspace: Workspace) -> int:
    """Set alignment runs side by side."""
    from brainfusion.eval.report.compare import (
        compare_runs,
        findings,
        read_alignment_runs,
        write_comparison,
    )

    runs = read_alignment_runs(options.runs)
    families = None
    if (workspace.cohort_path / "cohort.json").exists():
        subjects = workspace.open_cohort().subjects
        if "family" in subjects.columns:
            families = dict(subjects.drop_nulls("family").select("subject", "family").iter_rows())
    if families is None:
        say("no families are known: people count as unrelated (--cohort names the cohort).")
    compared = compare_runs(runs, families=families)
    page = write_comparison(options.out or workspace.root / "comparison.html", runs, compared)
    print("\n".join(findings(runs, compared)))
    say(f"written: {page}")
    return 0


def _report_pretraining(folder: Path) -> int:
    """Draw one pretraining run, and print how it stands."""
    from brainfusion.eval.report.pretraining import status, write_pretraining_report
    from brainfusion.eval.report.pretraining_run import read_run

    page = write_pretraining_report(folder)
    print("\n".join(status(read_run(folder))))
    say(f"written: {page}")
    return 0


def gather(workspace: Workspace, brain: str, dna: Sequence[str]) -> dict[str, Any]:
    """All numbers of a workspace, as docs/formats.md lays them out; the demo's are made if need be.

    Raises:
        UserError: There is no alignment to report.
    """
    run_dir = workspace.align_dir(brain, dna_name(dna))
    if not (run_dir / "retrieval.json").exists():
        from brainfusion.cli import retrieve

        flags = ["--brain", brain, "--dna", *dna, *workspace.options()]
        if not workspace.demo:
            raise UserError(
                f"{run_dir / 'retrieval.json'} does not exist: run 'brainfusion retrieve "
                f"{' '.join(flags)}' first."
            )
        say(f"{run_dir / 'retrieval.json'} is missing: scoring {brain} and {dna_name(dna)}")
        retrieve.main(flags)
    cohort = workspace.open_cohort()
    splits, summary = cohort.splits(), read_json(run_dir / "summary.json")
    facts = cohort.describe() | {
        "splits": {side: len(getattr(splits, side)) for side in ("train", "validation", "test")}
        | {"hash": splits.hash},
        "flow": summary.pop("flow", []),
    }
    attribution = run_dir / "attribution.json"
    probes, stages = workspace.root / "probes.json", workspace.root / "stages.json"
    truth = cohort.truth()
    return {
        "format": 1,
        "package_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "cohort": facts,
        "truth": truth,
        "config": {"align": config.read_yaml(run_dir / "config.yaml")}
        | {
            path.parent.name: config.read_yaml(path)
            for path in _pretraining(workspace, "config.yaml")
        },
        "pretraining": {
            path.parent.name: read_json(path)
            | {"metrics": str((path.parent / "metrics.jsonl").relative_to(workspace.root))}
            for path in _pretraining(workspace, "summary.json")
        },
        "alignment": {"brain": brain, "dna": dna_name(dna)}
        | summary
        | {"metrics": str((run_dir / "metrics.jsonl").relative_to(workspace.root))},
        "retrieval": read_json(run_dir / "retrieval.json"),
        "probes": read_json(probes) if probes.exists() else [],
        "attribution": read_json(attribution) if attribution.exists() else {},
        "stages": read_json(stages)["stages"] if stages.exists() else [],
        "figures": {"similarity": str((run_dir / "similarity.npz").relative_to(workspace.root))},
    }


def _pretraining(workspace: Workspace, name: str) -> list[Path]:
    return sorted((workspace.root / "pretrain").glob(f"*/{name}"))
