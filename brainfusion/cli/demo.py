"""`brainfusion demo`: every stage on a simulated cohort, from recordings to a report."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brainfusion import __version__
from brainfusion.cli.options import parse
from brainfusion.runtime import threads
from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.files import check_writable, hash_json, read_json, write_json
from brainfusion.runtime.logs import say


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoOptions:
    """Options of `brainfusion demo`."""

    preset: str = "demo"
    """Which cohort: demo (a planted link), null (nothing to find), moderate, realistic, and the
    traps stratification and family."""
    out: Path | None = None
    """The workspace; runs/demo, or runs/demo-<preset>."""
    brain: str = "brainjepa"
    """The encoder whose features are aligned."""
    dna: str = "evo2"
    """The DNA embeddings that they are aligned with."""
    n_people: int | None = None
    """People to simulate; the preset's number by default."""
    fresh: bool = False
    """Forget what an earlier demo made."""


def main(argv: list[str]) -> int:
    """Run the stages, each as the command that a user would type; skip finished ones."""
    from brainfusion.data.simulate import PRESETS

    options = parse(DemoOptions, argv, prog="brainfusion demo", description=__doc__ or "")
    if options.preset not in PRESETS:
        raise UserError(f"unknown preset '{options.preset}'. {nearest(options.preset, PRESETS)}")
    name = "demo" if options.preset == "demo" else f"demo-{options.preset}"
    root = options.out or Path("runs") / name
    if options.fresh or _is_of_another_cohort(options, root):
        shutil.rmtree(root, ignore_errors=True)
    check_writable(root)
    known, rows, stale = _finished(root), [], False
    for wave in _plan(options, root):
        waiting = []
        for stage in wave:
            before = known.get(stage.name)
            if not stale and before and before["key"] == stage.key and stage.product.exists():
                say(f"[{stage.name}] done before ({before['seconds']:.0f} s)")
                rows.append({**before, "cached": True})
            else:
                waiting.append(stage)
        rows += _run_side_by_side(waiting)
        stale = stale or bool(waiting)
        write_json(root / "stages.json", {"stages": rows})
    print(_table(rows))
    print(f"report:  {root / 'report.html'}\nnumbers: {root / 'results.json'}")
    return 0


@dataclass(frozen=True, slots=True)
class Stage:
    """A step of the demo: a command, and the file that shows that it is done."""

    name: str
    command: list[str]
    product: Path

    @property
    def key(self) -> str:
        """Changes with the command and with the package's version."""
        return hash_json([__version__, self.command])


def _plan(options: DemoOptions, root: Path) -> list[list[Stage]]:
    """Waves of stages: those of one wave need nothing of each other and run side by side."""
    cohort = root / "cohort"
    place = ["--cohort", str(cohort), "--workspace", str(root)]
    pair = ["--brain", options.brain, "--dna", options.dna]
    people = ["--n-people", str(options.n_people)] if options.n_people else []
    simulate = ["simulate", "--preset", options.preset, "--out", str(cohort), *people]
    models = [options.brain, *(m for m in ("brainjepa", "brainlm") if m != options.brain)]
    align = root / "align" / f"{options.brain}-{options.dna}"
    features = root / "features"

    def embed(model: str, *flags: str) -> Stage:
        name = "-".join([model, *(flag.strip("-") for flag in flags)])
        command = ["embed", "--model", model, *flags, *place]
        return Stage(f"embed {name}", command, features / f"{name}.parquet")

    return [
        [Stage("simulate", [*simulate, "--overwrite"], cohort / "cohort.json")],
        [
            Stage(
                f"pretrain {model}",
                ["pretrain", "--model", model, *place],
                root / "pretrain" / model / "summary.json",
            )
            for model in models
        ],
        [*(embed(model) for model in models), embed(options.brain, "--untrained")],
        [Stage("align", ["align", *pair, *place], align / "embeddings" / "dna.parquet")],
        [
            Stage("retrieve", ["retrieve", *pair, *place], align / "retrieval.json"),
            Stage("probe", ["probe", *pair, *place], root / "probes.json"),
        ],
        [Stage("report", ["report", *pair, *place], root / "report.html")],
    ]


def _run_side_by_side(stages: list[Stage]) -> list[dict[str, Any]]:
    """Run each stage in a process of its own; its seconds and its own peak memory."""
    environment = dict(os.environ)
    if len(stages) > 1:
        # A share of the cores each, and plain lines of progress instead of rewritten ones.
        share = max(1, threads.available_cores() // len(stages))
        environment |= {"OMP_NUM_THREADS": str(share), "TERM": "dumb"}
    begin, running = time.monotonic(), {}
    for stage in stages:
        say(f"[{stage.name}] brainfusion {shlex.join(stage.command)}")
        words = [sys.executable, "-m", "brainfusion.cli", *stage.command]
        running[subprocess.Popen(words, env=environment).pid] = stage
    rows, failed = {}, []
    while len(rows) < len(stages):
        pid, status, usage = os.wait4(-1, 0)
        stage = running[pid]
        if code := os.waitstatus_to_exitcode(status):
            failed.append(f"'{stage.name}' (exit code {code})")
        rows[stage.name] = {
            "name": stage.name,
            "key": stage.key,
            "seconds": round(time.monotonic() - begin, 2),
            "peak_mib": round(usage.ru_maxrss / 1024, 1),
            "cached": False,
        }
    if failed:
        raise UserError(
            f"the stage {' and '.join(failed)} failed; its own message is above. Finished stages "
            "are kept: mend it and run the demo again."
        )
    return [rows[stage.name] for stage in stages]


def _is_of_another_cohort(options: DemoOptions, root: Path) -> bool:
    """Whether the folder holds a demo of another preset or size: nothing in it can be kept."""
    path = root / "cohort" / "truth" / "truth.json"
    if not path.exists():
        return False
    from brainfusion.data.simulate import PRESETS

    made = read_json(path)["config"]
    n_people = options.n_people or PRESETS[options.preset].n_people
    return (made["preset"], made["n_people"]) != (options.preset, n_people)


def _finished(root: Path) -> dict[str, dict[str, Any]]:
    path = root / "stages.json"
    return {row["name"]: row for row in read_json(path)["stages"]} if path.exists() else {}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'stage':<28} {'seconds':>8} {'peak MiB':>9}"]
    for row in rows:
        note = "  done before" if row["cached"] else ""
        lines.append(f"{row['name']:<28} {row['seconds']:>8.1f} {row['peak_mib']:>9.0f}{note}")
    return "\n".join(lines)
