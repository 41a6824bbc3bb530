"""A whole cohort as one batch: what an alignment costs in time and in memory.

A process of its own aligns random features of so many training people (and 500 validation people)
and says: CPU seconds of conditioning, and of a step without a look at the validation people (on
CUDA: seconds by the clock); the largest resident set; and what the matrix products of the loss
alone, 8 n^2 d operations, would take at the rate of one that is timed in the same process.

    python benchmarks/alignment.py                            # 8,000 people
    python benchmarks/alignment.py --people 40000 --steps 2   # some 6e12 operations a step
    python benchmarks/alignment.py --people 40000 --components 0   # all columns, no PCA
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainfusion.alignment import AlignConfig, train
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.logs import MetricsLog
from brainfusion.runtime.memory import device_peak_mib, peak_mib
from brainfusion.runtime.threads import use_threads

WIDTHS = {"brain": 1024, "dna": 4096}
N_VALIDATION = 500


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Align once, in this process."""
    use_threads(options.threads)
    device = torch.device(options.device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    random = np.random.default_rng(0)
    n = options.people + N_VALIDATION
    latents = random.standard_normal((n, 16), dtype=np.float32)
    features: dict[str, Any] = {}
    for name, width in WIDTHS.items():
        features[name] = random.standard_normal((n, width), dtype=np.float32)
        features[name][:, :16] += latents
    rate = _rate(options.dim_out, device, clock)
    at_rest = peak_mib()
    marks: list[float] = []
    _note_time(marks, clock)
    config = AlignConfig(
        n_components=options.components,
        dim_out=options.dim_out,
        max_steps=options.steps,
        eval_every=options.steps + 1,
    )
    begin = clock()
    with tempfile.TemporaryDirectory() as folder:
        train(
            features,
            ["train"] * options.people + ["validation"] * N_VALIDATION,
            config=config,
            run_dir=Path(folder),
            ranks=Ranks(device=device),
        )
    steps = np.diff(marks[:-1]) if len(marks) > 2 else np.diff(marks)
    return {
        "people": options.people,
        "step_s": float(steps.min()),
        "conditioning_and_first_step_s": marks[0] - begin,
        "all_s": clock() - begin,
        "products_s": 8 * options.people**2 * options.dim_out / rate,
        "features_mib": sum(x.nbytes for x in features.values()) / 2**20,
        "before_mib": at_rest,
        "peak_mib": peak_mib(),
        **device_peak_mib(device),
    }


def _note_time(marks: list[float], clock: Callable[[], float]) -> None:
    """Note the time whenever a step is logged."""
    real = MetricsLog.write

    def write(self: MetricsLog, **row: Any) -> None:
        marks.append(clock())
        real(self, **row)

    MetricsLog.write = write  # type: ignore[method-assign]


def _rate(width: int, device: torch.device, clock: Callable[[], float]) -> float:
    """Operations a second of a product like those of a tile."""
    a, b = torch.randn(2, 1024, width, device=device)
    best = float("inf")
    for _ in range(5):
        begin = clock()
        last = [a @ b.T for _ in range(10)][-1]
        float(last[0, 0])  # waits for a device
        best = min(best, (clock() - begin) / 10)
    return 2 * 1024 * 1024 * width / best


def main(argv: list[str] | None = None) -> None:
    """Measure in a process of its own, and print a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--people", type=int, default=8000, help="training people")
    parser.add_argument("--components", type=int, default=AlignConfig().n_components)
    parser.add_argument("--dim-out", type=int, default=AlignConfig().dim_out)
    parser.add_argument("--steps", type=int, default=3, help="2 or more; the last one is not timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.steps < 2:
        parser.error("--steps: the first one is not timed, so 2 or more.")
    if options.child:
        print(json.dumps(measure(options)))
        return
    words = [sys.executable, __file__, *(argv if argv is not None else sys.argv[1:]), "--child"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{found['people']:,} people, widths {' and '.join(f'{w:,}' for w in WIDTHS.values())}, "
        f"{options.components or 'no'} components, {options.threads} thread(s), {options.device}\n"
        f"step            {found['step_s']:8.2f} s; the loss's products alone "
        f"{found['products_s']:.2f} s\n"
        f"before          {found['conditioning_and_first_step_s'] - found['step_s']:8.2f} s\n"
        f"all             {found['all_s']:8.2f} s, {options.steps} steps\n"
        f"peak memory     {found['peak_mib']:8.0f} MiB, of which features "
        f"{found['features_mib']:.0f} MiB; before training {found['before_mib']:.0f} MiB"
        + (f"; GPU {found['gpu_peak_mib']:.0f} MiB" if "gpu_peak_mib" in found else "")
    )


if __name__ == "__main__":
    main()
