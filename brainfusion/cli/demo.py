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
    """Run the stages in order, each as the command that a user would type; skip finished ones."""
    from brainfusion.data.simulate import PRESETS

    options = parse(DemoOptions, argv, prog="brainfusion demo", description=__doc__ or "")
    if options.preset not in PRESETS:
        raise UserError(f"unknown preset '{options.preset}'. {nearest(options.preset, PRESETS)}")
    name = "demo" if options.preset == "demo" else f"demo-{options.preset}"
    root = options.out or Path("runs") / name
    if options.fresh:
        shutil.rmtree(root, ignore_errors=True)
    check_writable(root)
    stages, key = _finished(root), __version__
    rows: list[dict[str, Any]] = []
    for stage, command, product in _plan(options, root):
        key = hash_json([key, command])
        known = stages.get(stage)
        if known and known["key"] == key and (root / product).exists():
            rows.append({**known, "cached": True})
            say(f"[{stage}] done before ({known['seconds']:.0f} s)")
            continue
        say(f"[{stage}] brainfusion {shlex.join(command)}")
        row = _run(command) | {"name": stage, "key": key, "cached": False}
        rows.append(row)
        stages = {k: v for k, v in stages.items() if k in {r["name"] for r in rows}} | {stage: row}
        write_json(root / "stages.json", {"stages": rows})
    write_json(root / "stages.json", {"stages": rows})
    print(_table(rows))
    print(f"report:  {root / 'report.html'}\nnumbers: {root / 'results.json'}")
    return 0


def _plan(options: DemoOptions, root: Path) -> list[tuple[str, list[str], str]]:
    """Stages in order: name, command, and the file that shows it is done."""
    place = ["--cohort", str(root / "cohort"), "--workspace", str(root)]
    pair = ["--brain", options.brain, "--dna", options.dna]
    people = ["--n-people", str(options.n_people)] if options.n_people else []
    simulate = [
        "simulate",
        "--preset",
        options.preset,
        "--out",
        str(root / "cohort"),
        "--overwrite",
    ]
    models = [options.brain] + [m for m in ("brainjepa", "brainlm") if m != options.brain]
    align = f"align/{options.brain}-{options.dna}"
    return [
        ("simulate", [*simulate, *people], "cohort/cohort.json"),
        *(
            (f"pretrain {m}", ["pretrain", "--model", m, *place], f"pretrain/{m}/summary.json")
            for m in models
        ),
        *((f"embed {m}", ["embed", "--model", m, *place], f"features/{m}.parquet") for m in models),
        ("align", ["align", *pair, *place], f"{align}/embeddings/dna.parquet"),
        ("retrieve", ["retrieve", *pair, *place], f"{align}/retrieval.json"),
        ("probe", ["probe", *pair, *place], "probes.json"),
        ("report", ["report", *pair, *place], "report.html"),
    ]


def _run(command: list[str]) -> dict[str, float]:
    """Run one stage in a process of its own; its time and its own peak memory."""
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "brainfusion.cli", *command])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(
            f"the stage '{command[0]}' ended with exit code {process.returncode}; its own "
            "message is above. Finished stages are kept: mend it and run the demo again."
        )
    return {
        "seconds": round(time.monotonic() - begin, 2),
        "peak_mib": round(usage.ru_maxrss / 1024, 1),
    }


def _finished(root: Path) -> dict[str, dict[str, Any]]:
    path = root / "stages.json"
    return {row["name"]: row for row in read_json(path)["stages"]} if path.exists() else {}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'stage':<20} {'seconds':>8} {'peak MiB':>9}"]
    for row in rows:
        note = "  done before" if row["cached"] else ""
        lines.append(f"{row['name']:<20} {row['seconds']:>8.1f} {row['peak_mib']:>9.0f}{note}")
    total = sum(row["seconds"] for row in rows if not row["cached"])
    peak = max(row["peak_mib"] for row in rows)
    lines.append(f"{'this run':<20} {total:>8.1f} {peak:>9.0f}")
    return "\n".join(lines)
