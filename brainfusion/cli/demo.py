"""`brainfusion demo`: every stage on a simulated cohort, from recordings to a report.

Each stage is a command that you could type, and is printed as one. Run it again and finished stages
are not done again; after an error, mend it and run the demo again.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from brainfusion import __version__
from brainfusion.cli.options import parse
from brainfusion.cli.workspace import check_replaceable, known_dna
from brainfusion.runtime import threads
from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.files import check_writable, hash_json, read_json, write_json
from brainfusion.runtime.logs import say


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoOptions:
    """Options of `brainfusion demo`."""

    preset: str = "demo"
    """Which cohort: demo (a planted link), moderate, realistic, null (nothing to find),
    or a trap that looks like a link: stratification, family."""
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
    options = parse(DemoOptions, argv, prog="brainfusion demo", description=__doc__ or "")
    _check(options)
    name = "demo" if options.preset == "demo" else f"demo-{options.preset}"
    root = options.out or Path("runs") / name
    if options.fresh or _is_of_another_cohort(options, root):
        check_replaceable(root, "cohort/truth")
        if root.exists():
            say(f"{root} is made anew.")
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
                waiting.append(stage.again() if before and before["key"] != stage.key else stage)
        finished, failed = _run_side_by_side(waiting)
        rows += finished
        stale = stale or bool(waiting)
        write_json(root / "stages.json", {"stages": rows})
        if failed:
            raise UserError(
                f"{' and '.join(failed)} failed; the message is above. Finished stages are kept: "
                "mend it and run the demo again."
            )
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
        return hash_json([__version__, [word for word in self.command if word != "--restart"]])

    def again(self) -> "Stage":
        """The same after an earlier version of it, which pretraining would go on from."""
        pretraining = self.command[0] == "pretrain"
        return replace(self, command=[*self.command, "--restart"]) if pretraining else self


def _check(options: DemoOptions) -> None:
    """Refuse what a late stage would refuse, before the first one runs."""
    from brainfusion.data.simulate import PRESETS
    from brainfusion.encoders import ENCODERS

    if options.preset not in PRESETS:
        raise UserError(f"unknown preset '{options.preset}'. {nearest(options.preset, PRESETS)}")
    if options.brain not in ENCODERS:
        raise UserError(f"unknown encoder '{options.brain}'. {nearest(options.brain, ENCODERS)}")
    known_dna(options.dna)
    if options.n_people is not None and options.n_people < 40:
        raise UserError(
            f"--n-people {options.n_people}: expected 40 or more: a tenth of them validates, and "
            "that takes 4."
        )


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
            Stage("probe", ["probe", *pair, "--cca", "3", *place], root / "probes.json"),
        ],
        [
            Stage(
                "attribute",
                ["attribute", *pair, "--target", "cognition", "mdd", *place],
                align / "attribution.json",
            )
        ],
        [Stage("report", ["report", *pair, *place], root / "report.html")],
    ]


def _run_side_by_side(stages: list[Stage]) -> tuple[list[dict[str, Any]], list[str]]:
    """Run each stage in a process of its own; its seconds and its own peak memory.

    Returns:
        A row for each stage that ended well, and the others in words.
    """
    environment = dict(os.environ)
    if len(stages) > 1:
        # A share of the cores each, and plain lines of progress instead of rewritten ones.
        share = max(1, threads.available_cores() // len(stages))
        environment |= {"OMP_NUM_THREADS": str(share), "TERM": "dumb"}
    begin, running = time.monotonic(), {}
    for stage in stages:
        say(f"[{stage.name}] brainfusion {shlex.join(stage.command)}")
        words = [sys.executable, "-m", "brainfusion.cli", *stage.command]
        process = subprocess.Popen(words, env=environment)
        running[process.pid] = stage, process
    rows, failed = {}, []
    while running:
        pid, status, usage = os.wait4(-1, 0)
        if pid not in running:
            continue
        stage, process = running.pop(pid)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            failed.append(f"'{stage.name}' (exit code {process.returncode})")
            continue
        rows[stage.name] = {
            "name": stage.name,
            "key": stage.key,
            "seconds": round(time.monotonic() - begin, 2),
            "peak_mib": round(usage.ru_maxrss / 1024, 1),
            "cached": False,
        }
    return [rows[stage.name] for stage in stages if stage.name in rows], failed


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
