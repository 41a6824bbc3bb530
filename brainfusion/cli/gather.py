"""What a run and its workspace hold, as one results.json: every number of a report.

What is about one run lies in the workspace's folder where the run was named by its sides, and in
the run's own folder where it was named by that (`--run`): two runs never overwrite each other's.
"""

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from brainfusion import __version__
from brainfusion.cli.runs import AlignmentRun, check_cohort
from brainfusion.cli.workspace import Place, Workspace
from brainfusion.data.cohort import Cohort
from brainfusion.runtime import config
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import read_json
from brainfusion.runtime.logs import say


def home_of(workspace: Workspace, run: AlignmentRun, *, by_folder: bool) -> Path:
    """The folder that probes and reports of a run go into."""
    return run.path if by_folder else workspace.root


def is_alignment(folder: Path) -> bool:
    """Whether a folder is that of an alignment run, scored or not."""
    return (folder / "embeddings").is_dir() or (folder / "retrieval.json").is_file()


def place_of(place: Place, folders: Sequence[Path]) -> Place:
    """The place that was named or, without, the workspace with a cohort in it that runs lie in."""
    if place.cohort is not None or place.workspace is not None:
        return place
    roots = {folder.parent.parent for folder in folders if folder.parent.name == "align"}
    known = [root for root in roots if (root / "cohort" / "cohort.json").is_file()]
    return Place(workspace=known[0]) if len(roots) == len(known) == 1 else place


def check_people(workspace: Workspace, run: AlignmentRun) -> None:
    """Check that a run was made of the workspace's people.

    Raises:
        UserError: There is no cohort, or one of other people.
    """
    path, name = workspace.cohort_path, "name the cohort that it was made from with --cohort."
    if not (path / "cohort.json").is_file():
        raise UserError(f"there is no cohort in {path} to report {run.path} with: {name}")
    cohort = Cohort.open(path)
    if not is_of(run.path, cohort):
        raise UserError(
            f"{run.path} was made from other people, or another split of them, than those of "
            f"{path}: {name}"
        )
    check_cohort(run, cohort)


def is_of(folder: Path, cohort: Cohort) -> bool:
    """Whether a run was split as the cohort is; one that does not say is taken to be."""
    meta = read_json(folder / "summary.json").get("meta", {})
    return meta.get("provenance", {}).get("splits_hash") in (None, cohort.splits().hash)


def gather(workspace: Workspace, run: AlignmentRun, *, home: Path) -> dict[str, Any]:
    """All numbers of a run, as docs/formats.md lays them out; the demo's are made if need be.

    Args:
        workspace: With the cohort, and what was pretrained.
        run: Scored.
        home: Where results.json goes: paths in it are relative to this folder.

    Raises:
        UserError: The run has not been scored.
    """
    _ensure_scored(workspace, run)
    cohort = workspace.open_cohort()
    splits, summary = cohort.splits(), read_json(run.path / "summary.json")
    facts = cohort.describe() | {
        "splits": {side: len(getattr(splits, side)) for side in ("train", "validation", "test")}
        | {"hash": splits.hash},
        "flow": summary.pop("flow", []),
        **_imported(cohort),
    }
    attribution, stages = run.path / "attribution.json", workspace.root / "stages.json"
    shared = home == workspace.root
    kept = "finetune" if summary.get("finetune") else "align"
    return {
        "format": 1,
        "package_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "cohort": facts,
        "truth": cohort.truth(),
        "config": {kept: config.read_yaml(run.path / "config.yaml")}
        | {
            path.parent.name: config.read_yaml(path)
            for path in _pretraining(workspace, run, home, "config.yaml")
        },
        "pretraining": {
            path.parent.name: read_json(path)
            | {"metrics": os.path.relpath(path.parent / "metrics.jsonl", home)}
            for path in _pretraining(workspace, run, home, "summary.json")
        },
        "alignment": {"brain": run.brain_name, "dna": run.dna_name}
        | summary
        | {"metrics": os.path.relpath(run.path / "metrics.jsonl", home)},
        "retrieval": read_json(run.path / "retrieval.json"),
        "probes": _belonging("probes.json", workspace, run, home) or [],
        "cca": _belonging("cca.json", workspace, run, home) or {},
        "attribution": read_json(attribution) if attribution.exists() else {},
        "stages": read_json(stages)["stages"] if shared and stages.exists() else [],
        "figures": {"similarity": os.path.relpath(run.path / "similarity.npz", home)},
    }


def _imported(cohort: Cohort) -> dict[str, Any]:
    """How many recordings were read and left out when the cohort was imported: counts alone."""
    path = cohort.path / "import.json"
    if not path.is_file():
        return {}
    counts = {key: value for key, value in read_json(path).items() if key.startswith("n_")}
    return {"import": {key: value for key, value in counts.items() if isinstance(value, int)}}


def _ensure_scored(workspace: Workspace, run: AlignmentRun) -> None:
    scores = run.path / "retrieval.json"
    if scores.exists():
        return
    from brainfusion.cli import retrieve

    flags = run.flags(workspace)
    if not workspace.demo:
        raise UserError(
            f"{scores} does not exist: run 'brainfusion retrieve {' '.join(flags)}' first."
        )
    say(f"{scores} is missing: scoring {run.brain_name} and {run.dna_name}")
    retrieve.main(flags)


def _pretraining(workspace: Workspace, run: AlignmentRun, home: Path, name: str) -> list[Path]:
    """Files of the workspace's encoders; in a run's own folder, of those that its sides name."""
    paths = sorted((workspace.root / "pretrain").glob(f"*/{name}"))
    if home == workspace.root:
        return paths
    return [path for path in paths if any(_made_by(path.parent.name, one) for one in run.brain)]


def _made_by(encoder: str, features: str) -> bool:
    """Whether features are named after an encoder: brainjepa, brainjepa-lora."""
    return features == encoder or features.startswith(f"{encoder}-")


def _belonging(name: str, workspace: Workspace, run: AlignmentRun, home: Path) -> Any:
    """What `probe` wrote of this run; None where there is nothing, or only what is of others.

    The workspace's own files are of runs in their usual place, so they may be of this run's sides
    or of other sides; a run elsewhere has its own or none.
    """
    usual = workspace.align_dir(run.brain_name, run.dna_name).resolve() == run.path.resolve()
    shared = [workspace.root] if usual else []
    for folder in [run.path, *shared] if home == run.path else [*shared, run.path]:
        path = folder / name
        if not path.is_file():
            continue
        found = read_json(path)
        if found and _is_about(found, run):
            return found
        say(
            f"{path} is not of {run.brain_name} and {run.dna_name}, so it is left out: "
            f"'brainfusion probe {' '.join(_flags(workspace, run, home))}' makes what is."
        )
    return None


def _flags(workspace: Workspace, run: AlignmentRun, home: Path) -> list[str]:
    """The flags with which a command writes into `home` what is about the run."""
    if home == run.path:
        return ["--run", str(run.path), *workspace.options()]
    return run.flags(workspace)


def _is_about(found: Any, run: AlignmentRun) -> bool:
    """Whether rows of probes, or a CCA, are of a run's sides."""
    if isinstance(found, dict):
        return (found.get("brain"), found.get("dna")) == (run.brain_name, run.dna_name)
    probed = {row["features"] for row in found}
    asked = {f"{name} features" for name in run.brain} | {f"{name} vectors" for name in run.dna}
    return asked <= probed
