"""Probes beside scikit-learn, and the CCA permutation test beside cca-zoo, in CPU seconds.

Each measurement is a process of its own on one thread, the least of several where it is quick.
Where a side would take hours, a few of its repetitions are measured and scaled, and the row says
how many. Both sides of a case must agree (chosen penalties, predictions, log loss), or the case
fails.

a  100 targets, 20 penalties, 5 folds: RidgeProbe, and a GridSearchCV of Ridge for each target
b  1,000 permutations of a target: ours nested, the penalty chosen again in each fold of each
   permutation; permutation_test_score of Ridge with one penalty for all
c  12 penalties, 5 folds, and a fit of everyone with the best: LogisticProbe, and a loop of
   LogisticRegression by the quickest of its solvers, each with the loosest tolerance at which the
   log losses are within 1e-4 nats of the minimum's; columns of equal variance, and of variances
   that fall as those of embeddings do; features in float64 and in float32 for both sides
d  CCA of two views: Wilks' lambda of 3 components, and cca-zoo's test (of an interpreter that has
   it) or, without, a loop of whitening and SVD

    python benchmarks/probes.py
    python benchmarks/probes.py --cca-zoo venv/bin/python     # with cca-zoo installed there
    python benchmarks/probes.py --quick                       # a small run of everything
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

N_FOLDS = 5
RIDGE_GRID = np.logspace(-1, 5, 20)
LOGISTIC_GRID = np.logspace(-5, 6, 12)
"""1 / C: a value a decade over the range in which DINOv2's probe looks."""


@dataclass(frozen=True)
class Size:
    """Of a run."""

    n: int = 10_000
    dim: int = 512
    targets: int = 100
    permutations: int = 1000
    searches: int = 2
    """Of 100, that scikit-learn does; the others are scaled."""
    shuffles: int = 3
    """Of 1,000, that permutation_test_score does."""
    cca_ours: int = 100
    cca_theirs: int = 5


QUICK = Size(n=600, dim=24, targets=6, permutations=20, cca_ours=20, cca_theirs=3)


def features(size: Size, *, falling: bool = False) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((size.n, size.dim))
    if falling:
        rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((size.dim, size.dim)))[0]
        x = (x * np.arange(1, size.dim + 1) ** -0.75) @ rotation
    return x


def targets(size: Size) -> np.ndarray:
    rng = np.random.default_rng(2)
    x = features(size)
    signal = x @ rng.standard_normal((size.dim, size.targets)) / np.sqrt(size.dim)
    return signal + rng.standard_normal(signal.shape) * rng.uniform(0.5, 5, size.targets)


def labels(size: Size, *, falling: bool) -> np.ndarray:
    rng = np.random.default_rng(3)
    x = features(size, falling=falling)
    score = x @ rng.standard_normal(size.dim)
    return score / score.std() + rng.logistic(size=size.n) > 0.5


# -- cases: what is timed returns what both sides must agree on ------------------------------------


def ridge_ours(size: Size) -> tuple[float, dict[str, Any], str]:
    from brainfusion.eval.probing.estimators import RidgeProbe

    x, y = features(size), targets(size)
    seconds, probe = timed(lambda: RidgeProbe(RIDGE_GRID, scaled=False).fit(x, y))
    kept = slice(size.searches)
    return seconds, {"penalty": probe.penalty_[kept], "predicted": probe.predict(x)[:, kept]}, ""


def ridge_theirs(size: Size) -> tuple[float, dict[str, Any], str]:
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, PredefinedSplit

    x, y = features(size), targets(size)
    folds = PredefinedSplit(probe_folds(size))

    def search(target: np.ndarray) -> Any:
        scoring = "neg_mean_squared_error"
        return GridSearchCV(Ridge(), {"alpha": RIDGE_GRID}, cv=folds, scoring=scoring).fit(
            x, target
        )

    seconds, found = timed(lambda: [search(y[:, i]) for i in range(size.searches)])
    agreed = {
        "penalty": np.array([one.best_params_["alpha"] for one in found]),
        "predicted": np.stack([one.predict(x) for one in found], axis=1),
    }
    scaled = f"{size.searches} of {size.targets} targets measured"
    return seconds * size.targets / size.searches, agreed, scaled


def permutations_ours(size: Size) -> tuple[float, dict[str, Any], str]:
    import polars as pl

    from brainfusion.eval.probing.probes import probe

    x, people = features(size), pl.DataFrame({"y": targets(size)[:, 0]})
    about = {"n_permutations": size.permutations, "n_bootstrap": 0, "penalties": RIDGE_GRID}
    seconds, table = timed(lambda: probe(x, people, ["y"], confounds=[], **about))
    return seconds, {"p": np.array(table["p_value"][0])}, ""


def permutations_theirs(size: Size) -> tuple[float, dict[str, Any], str]:
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import PredefinedSplit, permutation_test_score

    x, y = features(size), targets(size)[:, 0]
    folds = PredefinedSplit(probe_folds(size))
    about = {"cv": folds, "scoring": "r2", "n_permutations": size.shuffles}
    seconds, _ = timed(lambda: permutation_test_score(Ridge(alpha=1000.0), x, y, **about))
    scaled = f"{size.shuffles} of {size.permutations} permutations measured"
    # One more fit than permutations: the true labels.
    p = np.array(1 / (1 + size.permutations))
    return seconds * (size.permutations + 1) / (size.shuffles + 1), {"p": p}, scaled


def logistic_ours(size: Size, *, falling: bool, dtype: str) -> tuple[float, dict[str, Any], str]:
    from brainfusion.eval.probing.estimators import LogisticProbe

    x, y = features(size, falling=falling).astype(dtype), labels(size, falling=falling)
    seconds, probe = timed(lambda: LogisticProbe(LOGISTIC_GRID, scaled=False).fit(x, y))
    found = {"loss": probe.losses_, "penalty": np.array(probe.penalty_)}
    return seconds, found, f"best log loss {probe.losses_.min():.6f}"


def logistic_theirs(size: Size, *, falling: bool, dtype: str) -> tuple[float, dict[str, Any], str]:
    exact, y = features(size, falling=falling), labels(size, falling=falling)
    x, folds = exact.astype(dtype), probe_folds(size, y)
    expected = logistic_loop(exact, y, folds == 0, "newton-cholesky", 1e-10)
    quickest, least = ("newton-cholesky", 1e-6), np.inf
    for solver, tolerances in SOLVERS.items():
        for tolerance in tolerances:
            begin = time.process_time()
            loss = logistic_loop(x, y, folds == 0, solver, tolerance)
            seconds = time.process_time() - begin
            if np.abs(loss - expected).max() < TOLERANCE["loss"]:
                if seconds < least:
                    quickest, least = (solver, tolerance), seconds
                break

    def loop() -> tuple[np.ndarray, float]:
        held_out = [folds == fold for fold in range(N_FOLDS)]
        loss = np.mean([logistic_loop(x, y, rows, *quickest) for rows in held_out], axis=0)
        best = float(LOGISTIC_GRID[loss.argmin()])
        logistic_model(best, *quickest).fit(x, y)
        return loss, best

    seconds, (loss, best) = timed(loop)
    note = f"{quickest[0]}, tol={quickest[1]:g}, best log loss {loss.min():.6f}"
    return seconds, {"loss": loss, "penalty": np.array(best)}, note


def logistic_model(penalty: float, solver: str, tolerance: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1 / penalty, solver=solver, tol=tolerance, max_iter=3000)


def logistic_loop(
    x: np.ndarray, y: np.ndarray, held_out: np.ndarray, solver: str, tolerance: float
) -> np.ndarray:
    """Log loss of held-out people for each penalty."""
    from sklearn.metrics import log_loss

    train, rows = (x[~held_out], y[~held_out]), x[held_out]
    fitted = (logistic_model(one, solver, tolerance).fit(*train) for one in LOGISTIC_GRID)
    return np.array([log_loss(y[held_out], one.predict_proba(rows)) for one in fitted])


def views(size: Size) -> tuple[np.ndarray, np.ndarray]:
    x, y = features(size), np.random.default_rng(4).standard_normal((size.n, size.dim))
    return x, y + 0.3 * x


def cca_ours(size: Size) -> tuple[float, dict[str, Any], str]:
    from brainfusion.eval.cca_permutation import cca_test

    x, y = views(size)
    count = size.cca_ours
    seconds, found = timed(lambda: cca_test(x, y, n_permutations=count, n_folds=0, n_components=3))
    scaled = f"{size.cca_ours} of {size.permutations} permutations measured"
    share = size.permutations / size.cca_ours
    return seconds * share, {"correlation": found.correlations}, scaled


def cca_theirs(size: Size) -> tuple[float, dict[str, Any], str]:
    x, y = views(size)
    count = size.cca_theirs
    try:
        from cca_zoo.linear import CCA  # pyright: ignore[reportMissingImports]
        from cca_zoo.model_selection import (  # pyright: ignore[reportMissingImports]
            permutation_test_significance,
        )
    except ImportError:
        seconds, found = timed(lambda: plain_cca(x, y, count))
        tool = "numpy loop"
    else:
        about = {"n_permutations": count, "random_state": 0}
        seconds, result = timed(
            lambda: permutation_test_significance(CCA(n_components=3), [x, y], **about)
        )
        found, tool = result.correlations, "cca-zoo"
    scaled = f"{tool}, {count} of {size.permutations} permutations measured"
    share = (size.permutations + 1) / (count + 1)
    return seconds * share, {"correlation": np.asarray(found)}, scaled


def plain_cca(x: np.ndarray, y: np.ndarray, n_permutations: int) -> np.ndarray:
    """Canonical correlations, and those of permuted pairs: every one fitted from the views."""
    rng, first = np.random.default_rng(0), np.empty(0)
    for i in range(n_permutations + 1):
        other = y if i == 0 else rng.permutation(y)
        sides = [np.linalg.svd(v - v.mean(axis=0), full_matrices=False)[0] for v in (x, other)]
        found = np.linalg.svd(sides[0].T @ sides[1], compute_uv=False)[:3]
        first = found if i == 0 else first
    return first


SOLVERS = {
    "lbfgs": (1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
    "newton-cg": (1e-2, 1e-3, 1e-4, 1e-5),
    "newton-cholesky": (1e-2, 1e-3, 1e-4),
}
"""Of LogisticRegression, with the tolerances tried."""

Side = Callable[[Size], tuple[float, dict[str, Any], str]]

CASES: dict[str, tuple[Side, Side]] = {
    "a ridge, targets": (ridge_ours, ridge_theirs),
    "b permutations": (permutations_ours, permutations_theirs),
    **{
        f"c logistic, {kind} variances, {dtype}": (
            partial(logistic_ours, falling=kind == "falling", dtype=dtype),
            partial(logistic_theirs, falling=kind == "falling", dtype=dtype),
        )
        for kind in ("equal", "falling")
        for dtype in ("float64", "float32")
    },
    "d CCA, permutations": (cca_ours, cca_theirs),
}
BARS = {"a": 100, "b": 30, "c": 6, "d": 5}
TOLERANCE = {"penalty": 1e-12, "predicted": 1e-5, "p": 1e-12, "loss": 1e-4, "correlation": 1e-4}


def probe_folds(size: Size, y: np.ndarray | None = None) -> np.ndarray:
    """The folds that the estimators make."""
    from brainfusion.eval.design import group_folds

    hot = np.empty((size.n, 0)) if y is None else y[:, None].astype(float)
    return group_folds(np.arange(size.n), N_FOLDS, balance=hot, seed=0)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, and what came out; the least of several where it is quick."""
    seconds, found = [], None
    while not seconds or sum(seconds) < 5 or (len(seconds) < 3 and sum(seconds) < 10):
        begin = time.process_time()
        found = work()
        seconds.append(time.process_time() - begin)
    return min(seconds), found


def measure(python: str, case: str, side: int, quick: bool) -> dict[str, Any]:
    """One side of one case, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.npz"
        words = [python, __file__, "--case", case, "--side", str(side), "--out", str(out)]
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        done = subprocess.run(
            [*words, "--quick"] if quick else words, env=os.environ | one, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        return json.loads(done.stdout.splitlines()[-1]) | {"found": dict(np.load(out))}


def agree(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether both sides say the same."""
    pairs = [
        (ours["found"][name], theirs["found"][name], TOLERANCE[name]) for name in ours["found"]
    ]
    return all(np.allclose(a, b, rtol=most, atol=most) for a, b, most in pairs)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", default="", help="the letters of the cases to run")
    parser.add_argument("--cca-zoo", default=sys.executable, help="an interpreter with cca-zoo")
    for name in ("--case", "--side", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    size = QUICK if options.quick else Size()
    if options.case:
        seconds, found, note = CASES[options.case][int(options.side)](size)
        np.savez(options.out, **found)
        print(json.dumps({"seconds": seconds, "note": note}))
        return 0
    print(f"n = {size.n:,}, d = {size.dim}; CPU seconds on one thread")
    print(f"{'case':<38} {'ours':>8} {'theirs':>9} {'ratio':>7} {'bar':>5}  note")
    for case in CASES:
        if options.only and case[0] not in options.only:
            continue
        ours = measure(sys.executable, case, 0, options.quick)
        other = options.cca_zoo if case[0] == "d" else sys.executable
        theirs = measure(other, case, 1, options.quick)
        if not agree(ours, theirs):
            raise SystemExit(f"{case}: the two sides differ; ours found {ours['found']}.")
        notes = [
            f"{side}: {one['note']}"
            for side, one in (("ours", ours), ("theirs", theirs))
            if one["note"]
        ]
        ratio = theirs["seconds"] / ours["seconds"]
        print(
            f"{case:<38} {ours['seconds']:>8.2f} {theirs['seconds']:>9.1f} {ratio:>6.1f}x "
            f"{BARS[case[0]]:>4}x  {'; '.join(notes)}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
