"""InfoNCE, forward and backward: ours beside open_clip's and what one would write by hand.

Each measurement is a process of its own: least CPU seconds of its runs (on CUDA: seconds by the
clock, synchronised) and how far memory grew over the inputs, gradients included. A plain matrix
product is timed in the same process. The 8 n^2 d operations that an exact loss needs when it makes
its logits again in backward would take a certain time at that rate; `x torch.mm` is the CPU time as
a multiple of it, `x product` the same for the product that our tiles use.

What would need more memory than --limit-gib is not run, and said so.

    python benchmarks/losses.py                      # n = 1,024 to 8,192
    python benchmarks/losses.py --sizes 16384 32768 --limit-gib 8
    python benchmarks/losses.py --sizes 65536 262144 --device cuda
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from brainfusion.alignment.losses.info_nce import info_nce, open_clip_losses
from brainfusion.alignment.losses.tiles import product
from brainfusion.runtime.memory import peak_mib

WIDTH, SCALE, ROWS = 512, 20.0, 1024


def ours(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return info_nce(a, b, scale)


def ours_bfloat16(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return info_nce(a, b, scale, precision="bfloat16")


def open_clip(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return open_clip_losses().ClipLoss()(a, b, scale)


def cross_entropies(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits, labels = scale * a @ b.T, torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def row_loop(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Rows by the thousand, each made again in backward; one direction after the other."""

    def part(x: Tensor, keys: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scale * x @ keys.T, labels, reduction="sum")

    labels = torch.arange(len(a), device=a.device).split(ROWS)
    total = a.new_zeros(())
    for rows, keys in ((a, b), (b, a)):
        for x, right in zip(rows.split(ROWS), labels, strict=True):
            total = total + checkpoint(part, x, keys, right, use_reentrant=False)  # type: ignore
    return total / (2 * len(a))


# The loss, and how many n x n float32 matrices it holds at once.
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], float]] = {
    "ours": (ours, 0.0),
    "ours, bfloat16": (ours_bfloat16, 0.0),
    "open_clip ClipLoss": (open_clip, 4.1),
    "two cross-entropies": (cross_entropies, 5.1),
    "checkpointed rows": (row_loop, 0.0),
}


def seconds(function: Callable[[], object], device: str) -> float:
    """What `function` takes: CPU seconds of this process, on CUDA seconds by the clock."""
    clock = time.process_time
    if device != "cpu":
        clock = time.perf_counter
        torch.cuda.synchronize()
    begin = clock()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - begin


def measure(name: str, n: int, n_threads: int, device: str) -> dict[str, float]:
    """Seconds and memory of one loss, in this process."""
    torch.set_num_threads(n_threads)
    torch.manual_seed(0)
    size = 1024 if device == "cpu" else 8192
    x, y = (torch.randn(size, WIDTH, device=device) for _ in "xy")
    rates = []
    for multiply in (lambda: torch.mm(x, y.T), lambda: product(x, y)):
        multiply()
        best = min(seconds(multiply, device) for _ in range(20))
        rates.append(2 * size * size * WIDTH / best)
    a, b = (
        F.normalize(torch.randn(n, WIDTH, device=device), dim=-1).requires_grad_() for _ in "ab"
    )
    scale = torch.tensor(SCALE, requires_grad=True, device=device)
    loss = LOSSES[name][0]
    loss(a[:64], b[:64], scale).backward()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    memory = peak_mib if device == "cpu" else lambda: torch.cuda.max_memory_allocated() / 2**20

    def step() -> None:
        a.grad = b.grad = scale.grad = None
        loss(a, b, scale).backward()

    before = memory()
    taken = [seconds(step, device) for _ in range(3 if n <= 8192 else 2)]
    needed = 8 * n**2 * WIDTH
    return {
        "s": min(taken),
        "grown_mib": memory() - before,
        "over_mm": min(taken) * rates[0] / needed,
        "over_product": min(taken) * rates[1] / needed,
        "gflops_mm": rates[0] / 1e9,
        "gflops_product": rates[1] / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--limit-gib", type=float, default=6.0, help="of memory for one loss")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, n = options.one
        print(json.dumps(measure(name, int(n), options.threads, options.device)))
        return
    unit = "CPU s" if options.device == "cpu" else "s"
    print(
        f"{'n':>7} {'loss':<20} {unit:>8} {'x ours':>7} {'grown MiB':>10} {'x torch.mm':>11} "
        f"{'x product':>10} {'GFLOP/s':>10}"
    )
    for n in options.sizes:
        base = None
        for name in options.losses:
            gib = LOSSES[name][1] * 4 * n**2 / 2**30
            if gib > options.limit_gib:
                print(f"{n:>7} {name:<20} not run: would need {gib:.0f} GiB", flush=True)
                continue
            command = [sys.executable, __file__, "--threads", str(options.threads)]
            command += ["--device", options.device, "--one", name, str(n)]
            row = json.loads(subprocess.check_output(command, text=True))
            base = base or row["s"]
            print(
                f"{n:>7} {name:<20} {row['s']:>8.3f} {row['s'] / base:>7.2f} "
                f"{row['grown_mib']:>10.0f} {row['over_mm']:>11.2f} {row['over_product']:>10.2f} "
                f"{row['gflops_mm']:>5.0f} {row['gflops_product']:>4.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
