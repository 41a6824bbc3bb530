"""InfoNCE, forward and backward: ours, open_clip's ClipLoss, two cross-entropies on one product.

Each measurement is a process of its own: least CPU seconds of three runs, and how far the resident
set grew over the inputs. The rate of a plain matrix product is taken in the same process, and gives
the time that 8 n^2 d operations (what an exact loss with recomputation needs) would take.

    python benchmarks/losses.py                      # n = 1,024 to 8,192
    python benchmarks/losses.py --sizes 16384        # larger
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from brainfusion.alignment.losses import info_nce, open_clip_losses
from brainfusion.runtime.memory import peak_mib

WIDTH, SCALE = 512, 20.0


def ours(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return info_nce(a, b, scale)


def open_clip(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return open_clip_losses().ClipLoss()(a, b, scale)


def cross_entropies(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits, labels = scale * a @ b.T, torch.arange(len(a))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


LOSSES = {"ours": ours, "open_clip": open_clip, "cross_entropies": cross_entropies}


def measure(name: str, n: int, n_threads: int) -> dict[str, float]:
    """CPU seconds and memory of one loss, in this process."""
    torch.set_num_threads(n_threads)
    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(n, WIDTH), dim=-1).requires_grad_() for _ in range(2))
    scale = torch.tensor(SCALE, requires_grad=True)
    begin = time.process_time()
    square = torch.randn(1024, 1024)
    for _ in range(20):
        square @ square
    rate = 20 * 2 * 1024**3 / (time.process_time() - begin)
    LOSSES[name](*(x[:64] for x in (a, b)), scale).backward()
    before, seconds = peak_mib(), []
    for _ in range(3):
        begin = time.process_time()
        loss = LOSSES[name](a, b, scale)
        loss.backward()
        seconds.append(time.process_time() - begin)
    bound = 8 * n**2 * WIDTH / rate
    return {"cpu_s": min(seconds), "grown_mib": peak_mib() - before, "bound_s": bound}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=2, metavar=("NAME", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), options.threads)))
        return
    print(f"{'n':>7} {'loss':<16} {'CPU s':>8} {'x ours':>7} {'grown MiB':>10} {'bound/CPU':>10}")
    for n in options.sizes:
        base = None
        for name in LOSSES:
            command = [sys.executable, __file__, "--threads", str(options.threads)]
            out = subprocess.run(
                [*command, "--one", name, str(n)], check=True, capture_output=True, text=True
            )
            row = json.loads(out.stdout)
            base = base or row["cpu_s"]
            print(
                f"{n:>7} {name:<16} {row['cpu_s']:>8.3f} {row['cpu_s'] / base:>7.2f} "
                f"{row['grown_mib']:>10.0f} {row['bound_s'] / row['cpu_s']:>14.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
