"""Retrieval metrics: ours, a matrix product alone, and a full score matrix with top-k.

Each measurement is a process of its own: CPU seconds and the largest resident set, inputs included.
Ours gives full ranks, ties, recall, MRR, MAP and AUC of both directions; the product is the same
tiles of scores made and dropped; CLIP_benchmark's formulation gives recall at 1, 5 and 10 of both
directions from a score matrix, a boolean matrix of positives and one-hot tensors in batches of 64,
as its `metrics/zeroshot_retrieval.py` has it (commit 48de38c; written anew from its description).
Where both can be held their recalls must agree.

    python benchmarks/retrieval.py                        # n = 2,000 to 20,000, d 512
    python benchmarks/retrieval.py --sizes 100000         # 1e13 operations: minutes
    python benchmarks/retrieval.py --limit-gib 2          # what the full matrix may take
"""

import argparse
import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np

from brainfusion.runtime.memory import peak_mib

if TYPE_CHECKING:
    from torch import Tensor

WIDTH, TILE = 512, 1024
RECALL_AT = (1, 5, 10)


def pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors [n, WIDTH] and their noisy partners; some of them are hard to find."""
    rng = np.random.default_rng(0)
    sides = []
    hidden = rng.standard_normal((n, 64), np.float32)
    mix = rng.standard_normal((64, WIDTH), np.float32) / 8
    for noise in (0.6, 0.6):
        side = rng.standard_normal((n, WIDTH), np.float32)
        side *= noise
        side += (hidden + 0.5 * rng.standard_normal(hidden.shape, np.float32)) @ mix
        side /= np.linalg.norm(side, axis=1, keepdims=True)
        sides.append(side)
    return sides[0], sides[1]


def ours(queries: np.ndarray, gallery: np.ndarray) -> dict[str, float]:
    from brainfusion.eval.retrieval.metrics import retrieval_metrics

    found = retrieval_metrics(queries, gallery, tile=TILE)
    return {
        f"{direction} R@{k}": found[direction][f"recall_at_{k}"]
        for direction in ("query_to_gallery", "gallery_to_query")
        for k in RECALL_AT
    }


def product(queries: np.ndarray, gallery: np.ndarray) -> dict[str, float]:
    for row in range(0, len(queries), TILE):
        for column in range(0, len(gallery), TILE):
            queries[row : row + TILE] @ gallery[column : column + TILE].T
    return {}


def full_matrix(queries: np.ndarray, gallery: np.ndarray) -> dict[str, float]:
    import torch

    scores = torch.from_numpy(queries) @ torch.from_numpy(gallery).T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), torch.arange(len(scores))] = True
    found = {}
    for direction, s, own in (
        ("query_to_gallery", scores, positive),
        ("gallery_to_query", scores.T, positive.T),
    ):
        for k in RECALL_AT:
            hits = [
                _recall(s[at : at + 64], own[at : at + 64], k) for at in range(0, len(scores), 64)
            ]
            found[f"{direction} R@{k}"] = float((torch.cat(hits) > 0).float().mean())
    return found


def _recall(scores: "Tensor", positive: "Tensor", k: int) -> "Tensor":
    """Share of each query's positives in its first k, through a one-hot tensor [b, k, n]."""
    import torch

    first = torch.topk(scores, k, dim=1).indices
    found = torch.nn.functional.one_hot(first, num_classes=scores.shape[1])
    return (found * positive[:, None]).sum(dim=(1, 2)) / positive.sum(dim=1)


METHODS = {"ours": ours, "product alone": product, "full matrix, top-k": full_matrix}


def matrix_gib(n: int) -> float:
    """What the full-matrix formulation needs: scores, positives, one-hot and its product."""
    return (5 * n**2 + 2 * 64 * 10 * 8 * n + 8 * n * WIDTH) / 2**30


def measure(name: str, n: int) -> dict[str, object]:
    """CPU seconds and memory of one method, in this process."""
    queries, gallery = pairs(n)
    METHODS[name](queries[:64], gallery[:64])  # imports
    before = peak_mib()
    begin = time.process_time()
    found = METHODS[name](queries, gallery)
    seconds = time.process_time() - begin
    return {"cpu_s": seconds, "peak_mib": peak_mib(), "inputs_mib": before, "found": found}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[2000, 5000, 10_000, 20_000])
    parser.add_argument("--limit-gib", type=float, default=4.0, help="memory of the full matrix")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return 0
    print(f"{'n':>8} {'method':<20} {'CPU s':>9} {'x product':>10} {'peak MiB':>9}")
    for n in options.sizes:
        rows: dict[str, dict] = {}
        # The product goes first and, unless that takes minutes, last: its rate drifts.
        order = ["product alone", "ours", "full matrix, top-k"]
        for name in order + order[: n < 50_000]:
            if name == "full matrix, top-k" and matrix_gib(n) > options.limit_gib:
                print(f"{n:>8} {name:<20} needs {matrix_gib(n):.1f} GiB or more: left out")
                continue
            out = subprocess.run(
                [sys.executable, __file__, "--one", name, str(n)],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            row = json.loads(out.stdout)
            if name in rows:
                row["cpu_s"] = (row["cpu_s"] + rows[name]["cpu_s"]) / 2
            rows[name] = row
        base = rows["product alone"]["cpu_s"]
        for name, row in rows.items():
            print(
                f"{n:>8} {name:<20} {row['cpu_s']:>9.2f} {row['cpu_s'] / base:>10.2f} "
                f"{row['peak_mib']:>9.0f}",
                flush=True,
            )
        if "full matrix, top-k" in rows:
            other = rows["full matrix, top-k"]["found"]
            for key, value in rows["ours"]["found"].items():
                # Two ways of multiplying round differently: a query in a thousand may change sides.
                if abs(value - other[key]) > 2e-3:
                    raise SystemExit(f"{key} is {value} here and {other[key]} by top-k.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
