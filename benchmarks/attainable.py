"""How much of what is attainable an alignment attains, on simulated cohorts with a known optimum.

    python benchmarks/attainable.py --sizes 2000 5000 --seeds 0 1 2
    python benchmarks/attainable.py --cohorts skewed --sizes 5000

Two cohorts of two views, 256 and 384 wide; validation 1,000 people, test gallery 1,000 people:

- linear: 32 shared latents z ~ N(0, I), x = A z + e, y = B z + f, with canonical correlations of
  0.85 to 0.15. The noise has the eigenvalues i^-0.75, and the shared directions have the noise's
  variances: the leading components of each view are its own. The optimal score is the log density
  ratio (brainfusion.data.oracle), for it is a linear-Gaussian cohort.
- skewed: 8 shared latents, of which x shows exp(z), standardised, and y shows z; the noise
  leaves what 0.98 to 0.80 would be as correlations of two views of z. Shared directions are
  orthogonal in the metric of the noise, so that one number a latent and view is sufficient, and the
  optimal score is a sum over latents of log ratios of one-dimensional integrals (quadrature).

No score of one pair at a time can beat the optimal one in any recall or in the mean rank. Columns:
(AUC - 0.5) and R@1 as shares of the optimum's, median rank of 1,000, CPU seconds to fit. Both are
means of the two directions. One process a cohort and seed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from brainfusion.data.cca_choice import choose_cca
from brainfusion.data.oracle import both_directions, pmi_scores
from brainfusion.runtime.threads import set_environment, use_threads

WIDTHS = {"brain": 256, "dna": 384}
N_VALIDATION, N_TEST = 1000, 1000
CORRELATIONS = {"linear": np.linspace(0.85, 0.15, 32), "skewed": np.linspace(0.98, 0.80, 8)}
BATCH = 1024
"""People in a batch of InfoNCE; 2,048 where there are 20,000 or more."""


class Cohort:
    """Two views of the same people, and what the optimal score needs of the test people."""

    def __init__(self, name: str, n_train: int, seed: int) -> None:
        rng = np.random.default_rng([seed, 77])
        n, rho = n_train + N_VALIDATION + N_TEST, CORRELATIONS[name]
        z = rng.standard_normal((n, len(rho)))
        self.name, self.rho, self.precision = name, rho, rho / (1 - rho)
        self.labels = ["train"] * n_train + ["validation"] * N_VALIDATION + ["test"] * N_TEST
        self.features: dict[str, np.ndarray] = {}
        self.sufficient: dict[str, np.ndarray] = {}
        for view, width in WIDTHS.items():
            axes = np.linalg.qr(rng.standard_normal((width, width)))[0]
            root = (axes * np.arange(1, width + 1) ** -0.375) @ axes.T
            directions = np.linalg.qr(rng.standard_normal((width, len(rho))))[0]
            shown = skew(z) if name == "skewed" and view == "brain" else z
            noise = rng.standard_normal((n, width))
            rows = (shown * np.sqrt(self.precision)) @ directions.T + noise
            self.features[view] = (rows @ root).astype(np.float32)
            known = shown + (noise @ directions) / np.sqrt(self.precision)
            self.sufficient[view] = known[-N_TEST:]

    def rows(self, split: str) -> dict[str, np.ndarray]:
        """The features of one split."""
        keep = np.array(self.labels) == split
        return {view: x[keep] for view, x in self.features.items()}

    def optimal(self) -> np.ndarray:
        """Log density ratio of every test brain with every test DNA, in nats."""
        x, y = self.sufficient["brain"], self.sufficient["dna"]
        if self.name == "linear":
            return pmi_scores(x * np.sqrt(self.rho), y * np.sqrt(self.rho), self.rho)
        z = np.linspace(-6, 6, 601)
        weight = np.exp(-(z**2) / 2)
        weight /= weight.sum()
        total = np.zeros((len(x), len(y)))
        for latent, precision in enumerate(self.precision):
            likelihoods = [
                np.exp(-0.5 * precision * (values[:, latent, None] - shown) ** 2)
                for values, shown in ((x, skew(z)), (y, z))
            ]
            joint = (likelihoods[0] * weight) @ likelihoods[1].T
            alone = [values @ weight for values in likelihoods]
            with np.errstate(divide="ignore"):
                total += np.log(joint) - np.log(alone[0])[:, None] - np.log(alone[1])
        return total


def skew(z: np.ndarray) -> np.ndarray:
    """The exponential of a standard normal value, standardised: monotone, of skewness 6."""
    return (np.exp(z) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)


# -- methods ---------------------------------------------------------------------------------------


def canonical(cohort: Cohort) -> Iterator[tuple[str, np.ndarray]]:
    """Ridge CCA of the views as they are; ridges, components, correlations of validation people."""
    train, held_out, test = (cohort.rows(split) for split in ("train", "validation", "test"))
    cca, rho = choose_cca(train["brain"], train["dna"], held_out["brain"], held_out["dna"])
    (u, v), (at_u, at_v) = (
        (cca.variates_x(rows["brain"]), cca.variates_y(rows["dna"])) for rows in (test, held_out)
    )
    yield "plain rCCA, cosine", unit(u) @ unit(v).T
    u, v = (u - at_u.mean(0)) / at_u.std(0), (v - at_v.mean(0)) / at_v.std(0)
    yield "plain rCCA, density ratio", pmi_scores(u, v, rho)


def linear(cohort: Cohort, method: str) -> Iterator[tuple[str, np.ndarray]]:
    """`brainfusion align --method rcca`, `pls` or `ridge`."""
    from brainfusion.alignment.config import AlignConfig
    from brainfusion.alignment.linear import fit_linear

    with tempfile.TemporaryDirectory() as folder:
        found = fit_linear(
            cohort.features,
            cohort.labels,
            method=method,  # type: ignore[arg-type]
            config=AlignConfig(n_components=0),
            run_dir=Path(folder) / "run",
        ).alignment
    test = cohort.rows("test")
    yield f"{method}, cosine", found.embed_brain(test["brain"]) @ found.embed_dna(test["dna"]).T
    if found.head is not None:
        vectors = [found.score_vectors(side, rows) for side, rows in test.items()]
        yield f"{method}, density ratio", vectors[0] @ vectors[1].T


def contrastive(cohort: Cohort, kind: str) -> Iterator[tuple[str, np.ndarray]]:
    """`brainfusion align` ("ours"), without training ("start"), or from random weights."""
    from brainfusion.alignment.config import AlignConfig
    from brainfusion.alignment.train import train

    n_train = cohort.labels.count("train")
    config = AlignConfig(
        n_components=512,
        shrinkage=1.0,
        lr=3e-4,
        dropout=0.5,
        early_stopping="information",
        batch_size=2048 if n_train >= 20_000 else min(BATCH, n_train),
    )
    if kind == "infonce":
        config = replace(config, init="random", lr=1e-3, dropout=0.1, average_decay=0.0)
    if kind == "start":
        config = replace(config, max_steps=1, warmup_steps=0, lr=1e-12)
    with tempfile.TemporaryDirectory() as folder:
        found = train(
            cohort.features, cohort.labels, config=config, run_dir=Path(folder) / "run"
        ).alignment
    test = cohort.rows("test")
    cosine = found.embed_brain(test["brain"]) @ found.embed_dna(test["dna"]).T
    ratio = found.score_vectors("brain", test["brain"]) @ found.score_vectors("dna", test["dna"]).T
    name = {"infonce": "InfoNCE, random start", "start": "ours untrained", "ours": "ours"}[kind]
    yield f"{name}, cosine", cosine
    yield f"{name}, density ratio", ratio


METHODS: dict[str, Callable[[Cohort], Iterator[tuple[str, np.ndarray]]]] = {
    "plain-rcca": canonical,
    "rcca": lambda cohort: linear(cohort, "rcca"),
    "pls": lambda cohort: linear(cohort, "pls"),
    "ridge": lambda cohort: linear(cohort, "ridge"),
    "infonce": lambda cohort: contrastive(cohort, "infonce"),
    "start": lambda cohort: contrastive(cohort, "start"),
    "ours": lambda cohort: contrastive(cohort, "ours"),
}


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# -- the table -------------------------------------------------------------------------------------


def measure(name: str, n_train: int, seed: int, methods: list[str]) -> list[dict]:
    """All methods on one cohort: a row each, the optimum first."""
    cohort = Cohort(name, n_train, seed)
    best = both_directions(cohort.optimal())
    rows = [{"method": "optimum", "seconds": 0.0, **shares(best, best)}]
    for method in methods:
        begin = time.process_time()
        for label, scores in METHODS[method](cohort):
            seconds = time.process_time() - begin
            rows.append({"method": label, "seconds": seconds, **shares(measured(scores), best)})
    return [{"cohort": name, "n": n_train, "seed": seed, **row} for row in rows]


def measured(scores: np.ndarray) -> dict[str, float]:
    return both_directions(np.asarray(scores, np.float64))


def shares(found: dict[str, float], best: dict[str, float]) -> dict[str, float]:
    return {
        "auc": found["auc"],
        "recall_at_1": found["recall_at_1"],
        "auc_share": (found["auc"] - 0.5) / (best["auc"] - 0.5),
        "recall_share": found["recall_at_1"] / best["recall_at_1"],
        "median_rank": found["median_rank"],
    }


def print_table(rows: list[dict]) -> None:
    """Means over seeds with their standard error."""
    keys = dict.fromkeys((row["cohort"], row["n"], row["method"]) for row in rows)
    print(f"{'cohort':<8} {'n':>6} {'method':<38} {'AUC share':>15} {'R@1 share':>15}", end="")
    print(f" {'R@1':>6} {'median rank':>12} {'CPU s':>7} {'seeds':>6}")
    for cohort, n, method in keys:
        same = (
            row for row in rows if (row["cohort"], row["n"], row["method"]) == (cohort, n, method)
        )
        own = list({row["seed"]: row for row in same}.values())
        text = f"{cohort:<8} {n:>6} {method:<38}"
        for key in ("auc_share", "recall_share"):
            values = np.array([row[key] for row in own])
            error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
            text += f" {values.mean():>6.3f} +- {error:.3f}"
        recall, rank, seconds = (
            np.mean([row[key] for row in own]) for key in ("recall_at_1", "median_rank", "seconds")
        )
        print(f"{text} {recall:>6.3f} {rank:>12.1f} {seconds:>7.1f} {len(own):>6}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cohorts", nargs="+", choices=list(CORRELATIONS), default=["linear"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2000, 5000, 20000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="append the rows to this file, a JSON object each")
    parser.add_argument("--read", type=Path, nargs="+", help="only print what these files hold")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.read:
        lines = [line for path in options.read for line in path.read_text().splitlines()]
        print_table([json.loads(line) for line in lines])
        return
    if options.one:
        set_environment()
        use_threads(options.threads)
        (name,), (n,), (seed,) = options.cohorts, options.sizes, options.seeds
        print(json.dumps(measure(name, n, seed, options.methods)))
        return
    rows = []
    for name in options.cohorts:
        for n in options.sizes:
            for seed in options.seeds:
                command = [sys.executable, __file__, "--one", "--threads", str(options.threads)]
                command += ["--cohorts", name, "--sizes", str(n), "--seeds", str(seed)]
                out = subprocess.run(
                    [*command, "--methods", *options.methods], check=True, stdout=subprocess.PIPE
                ).stdout
                found = json.loads(out.splitlines()[-1])
                rows += found
                if options.out:
                    with options.out.open("a", encoding="utf-8") as handle:
                        handle.writelines(json.dumps(row) + "\n" for row in found)
    print_table(rows)


if __name__ == "__main__":
    main()
