"""Do the statistics keep their promises? p-values, intervals, blocks and power, on known cohorts.

Cohorts of 80 to 250 people, in families of 1 to 4 who resemble each other in both modalities or
unrelated, without and with a link in each person. Measured:

- null cohorts: p-values are uniform (Kolmogorov-Smirnov p > 0.01), for the AUC of retrieval in both
  directions, for the difference of two equal models, for DeLong's test in families and for probes;
- 95 % intervals cover the truth in 93 % to 97 % of cohorts: without a link 1/2, with one what 4,000
  cohorts of the same design have in the mean, or the exact value;
- traps, where relatives or sites imitate a link: the naive test rejects, the blocked one does not;
- planted links: the share of rejections is that of `brainfusion power` to 5 points.

    python benchmarks/calibration.py                   # all; some minutes on one core
    python benchmarks/calibration.py --cohorts 200 --only null traps
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import polars as pl

from brainfusion.data.oracle import inner_product_form
from brainfusion.eval.paired import compare_auroc
from brainfusion.eval.power import best_auc, effect_of
from brainfusion.eval.probing.probes import probe
from brainfusion.eval.retrieval.comparison import compare_retrieval
from brainfusion.eval.retrieval.metrics import DIRECTIONS, retrieval_metrics

KS_P, COVER, POWER_POINTS = 0.01, (0.93, 0.97), 0.05
N_PERMUTATIONS, N_BOOTSTRAP = 199, 1000

Line = tuple[str, str, bool]
"""What was measured, the figures, whether they are as promised."""


# -- cohorts -----------------------------------------------------------------------------------


def families(rng: np.random.Generator, n_families: int) -> np.ndarray:
    """Family of each person [n]; families have 1 to 4 members, small ones more often."""
    sizes = rng.choice([1, 2, 3, 4], n_families, p=[0.5, 0.25, 0.15, 0.1])
    return np.repeat(np.arange(n_families), sizes)


def alike(rng: np.random.Generator, family: np.ndarray, width: int, shared: float) -> np.ndarray:
    """Standard normal values [n, width] of which relatives share a part of the variance."""
    common = rng.standard_normal((family.max() + 1, width))[family]
    own = rng.standard_normal((len(family), width))
    return np.sqrt(shared) * common + np.sqrt(1 - shared) * own


def linked(
    rng: np.random.Generator, family: np.ndarray, rho: np.ndarray, shared: float
) -> tuple[np.ndarray, np.ndarray]:
    """Canonical variates of both modalities [n, k], correlated by `rho`; 0 for no link."""
    u = alike(rng, family, len(rho), shared)
    noise = alike(rng, family, len(rho), shared)
    return u, rho * u + np.sqrt(1 - rho**2) * noise


# -- p-values without a link --------------------------------------------------------------------


def null(n_cohorts: int) -> Iterator[Line]:
    """p-values and intervals of the AUC on cohorts without a link."""
    p, covered = [], []
    for seed in range(n_cohorts):
        rng = np.random.default_rng([1, seed])
        family = families(rng, 90)
        found = retrieval_metrics(
            *linked(rng, family, np.zeros(6), 0.6), families=family, seed=seed,
            n_permutations=N_PERMUTATIONS, n_bootstrap=N_BOOTSTRAP,
        )  # fmt: skip
        p.append([found[d]["p_value"] for d in DIRECTIONS])
        covered.append([found[d]["ci_low"] <= 0.5 <= found[d]["ci_high"] for d in DIRECTIONS])
    for at, direction in enumerate(DIRECTIONS):
        yield _uniform(f"retrieval AUC, {direction}, families of 1 to 4", np.array(p)[:, at])
    yield _covers("retrieval AUC without a link, families of 1 to 4", np.array(covered))


def null_comparisons(n_cohorts: int) -> Iterator[Line]:
    """p-values of the difference between models that are equally good."""
    retrieval, classifiers, swapped = [], [], []
    for seed in range(n_cohorts):
        rng = np.random.default_rng([2, seed])
        family = families(rng, 80)
        u, v = linked(rng, family, np.full(4, 0.4), 0.5)
        equal = [(u, v + 0.7 * alike(rng, family, 4, 0.5)) for _ in range(2)]
        rows = compare_retrieval(*equal, families=family, n_permutations=N_PERMUTATIONS,
                                 n_bootstrap=2, seed=seed)  # fmt: skip
        retrieval.append(rows[0]["p_value"])
        positive = u[:, 0] + 0.5 * alike(rng, family, 1, 0.5)[:, 0] > 0.4
        scores = u[:, :1].T + alike(rng, family, 2, 0.5).T
        found = compare_auroc(positive, *scores, families=family,
                              n_permutations=N_PERMUTATIONS, seed=seed)  # fmt: skip
        classifiers.append(found["p_value"])
        swapped.append(found["p_permutation"])
    yield _uniform("two equal retrievers, AUC", np.array(retrieval))
    yield _uniform("two equal classifiers, DeLong over families", np.array(classifiers))
    yield _uniform("two equal classifiers, ranks swapped by families", np.array(swapped))


def null_probes(n_cohorts: int) -> Iterator[Line]:
    """p-values of a ridge and a logistic probe of traits that the features do not know."""
    p = []
    for seed in range(n_cohorts):
        rng = np.random.default_rng([3, seed])
        family = families(rng, 70)
        features = alike(rng, family, 5, 0.6)
        trait, liability = alike(rng, family, 2, 0.6).T
        people = pl.DataFrame({"family": family, "trait": trait, "ill": liability > 0.3})
        table = probe(features, people, ["trait", "ill"], confounds=(), n_bootstrap=0, seed=seed,
                      n_permutations=99, penalties=[1.0, 10.0, 100.0])  # fmt: skip
        p.append(table["p_value"].to_list()[:2])
    yield _uniform("ridge probe, R2, families", np.array(p)[:, 0])
    yield _uniform("logistic probe, AUROC, families", np.array(p)[:, 1])


# -- intervals with a link -----------------------------------------------------------------------


def coverage(n_cohorts: int) -> Iterator[Line]:
    """Intervals of the AUC on cohorts with a link, in families and without."""
    for rho, n in (((0.2,), 150), ((0.5, 0.4, 0.3), 150), ((0.7,) * 6, 100)):
        truth, known = best_auc(rho), np.array(rho)
        covered = []
        for seed in range(n_cohorts):
            rng = np.random.default_rng([4, seed])
            u, v = linked(rng, np.arange(n), known, 0.0)
            vectors = inner_product_form(u, v, known)
            found = retrieval_metrics(*vectors, n_bootstrap=N_BOOTSTRAP, seed=seed)
            row = found["query_to_gallery"]
            covered.append([row["ci_low"] <= truth <= row["ci_high"]])
        yield _covers(f"best score, AUC {truth:.3f} exactly, {n} people", np.array(covered))
    for rho in ((0.3,) * 4, (0.7,) * 6):
        known, aucs, covered = np.array(rho), [], []
        for seed in range(4000 + n_cohorts):
            rng = np.random.default_rng([5, seed])
            family = families(rng, 90)
            u, v = linked(rng, family, known, 0.5)
            measured = seed < 4000
            found = retrieval_metrics(
                u, v, families=family, n_bootstrap=0 if measured else N_BOOTSTRAP, seed=seed
            )
            if measured:
                aucs.append([found[d]["auc"] for d in DIRECTIONS])
                continue
            truth = np.mean(aucs, axis=0)
            rows = [found[d] for d in DIRECTIONS]
            covered.append(
                [row["ci_low"] <= t <= row["ci_high"] for row, t in zip(rows, truth, strict=True)]
            )
        name = f"inner product, AUC {np.mean(aucs):.3f} by simulation, families of 1 to 4"
        yield _covers(name, np.array(covered))


# -- traps and power -----------------------------------------------------------------------------


def traps(n_cohorts: int) -> Iterator[Line]:
    """Cohorts that a naive permutation takes for linked: by site, by ancestry, by relatives."""
    for name, build in (("sites", _site_trap), ("families", _family_trap)):
        p = np.empty((n_cohorts, 2))
        for seed in range(n_cohorts):
            u, v, how = build(np.random.default_rng([6, seed]))
            for at, given in enumerate(({}, how)):
                found = retrieval_metrics(u, v, n_permutations=N_PERMUTATIONS, seed=seed, **given)
                p[seed, at] = found["query_to_gallery"]["p_value"]
        naive, blocked = (p <= 0.05).mean(axis=0)
        # At most what 5 % give by chance in so many cohorts.
        limit = 0.05 + 3 * np.sqrt(0.05 * 0.95 / n_cohorts)
        figures = f"rejects: naive {naive:.1%}, blocked {blocked:.1%}"
        yield f"trap of {name}", figures, bool(naive > 0.15 and blocked <= limit)


def _site_trap(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Sites whose scanners and recruitment both leave a mark; nobody's brain knows the genome."""
    site = rng.integers(0, 4, 160)
    u, v = (rng.standard_normal((4, 6))[site] + rng.standard_normal((160, 6)) for _ in "uv")
    marks = rng.standard_normal((4, 6))[site]
    return u + marks, v + marks, {"blocks": site}


def _family_trap(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Large families that are alike in each modality, without a link between modalities."""
    family = np.repeat(np.arange(40), 4)
    u, v = (alike(rng, family, 3, 0.9) for _ in "uv")
    return u, v, {"families": family}


def power(n_cohorts: int) -> Iterator[Line]:
    """Share of planted cohorts whose test rejects, beside what was promised."""
    for rho, n in (((0.2,), 100), ((0.2,), 250), ((0.3,), 100), ((0.2, 0.2, 0.1), 120)):
        known, rejected = np.array(rho), []
        for seed in range(n_cohorts):
            rng = np.random.default_rng([7, seed])
            u, v = linked(rng, np.arange(n), known, 0.0)
            vectors = inner_product_form(u, v, known)
            found = retrieval_metrics(*vectors, n_permutations=N_PERMUTATIONS, seed=seed)
            rejected.append(found["query_to_gallery"]["p_value"] <= 0.05)
        measured, promised = float(np.mean(rejected)), effect_of(rho).power(n)
        name = f"correlations {', '.join(map(str, rho))}, {n} people"
        figures = f"rejects {measured:.1%}, promised {promised:.1%}"
        yield name, figures, abs(measured - promised) <= POWER_POINTS


# -- verdicts ------------------------------------------------------------------------------------


def _uniform(name: str, p: np.ndarray) -> Line:
    from scipy.stats import kstest

    # A permutation p is a step of 1 / (1 + draws); spread over its step it is uniform under the
    ks = float(kstest(p, "uniform").pvalue)
    figures = f"KS p {ks:.3f}, p <= 0.05 in {(p <= 0.05).mean():.1%} of {len(p)}"
    return f"p: {name}", figures, ks > KS_P


def _covers(name: str, covered: np.ndarray) -> Line:
    share, low = float(covered.mean()), COVER
    figures = f"{share:.1%} of {len(covered)} cohorts"
    return f"95 % interval: {name}", figures, low[0] <= share <= low[1]


STUDIES: dict[str, tuple[Callable[[int], Iterator[Line]], int]] = {
    "null": (null, 1000),
    "comparisons": (null_comparisons, 200),
    "probes": (null_probes, 200),
    "coverage": (coverage, 1000),
    "traps": (traps, 200),
    "power": (power, 1000),
}
"""Name -> what yields its lines, and cohorts by default: enough to tell 93 % from 95 %."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--cohorts", type=int, help="cohorts of each study")
    options = parser.parse_args(argv)
    missed = 0
    for name in options.only:
        study, n_cohorts = STUDIES[name]
        begin = time.process_time()
        for what, figures, holds in study(options.cohorts or n_cohorts):
            missed += not holds
            print(f"{'holds' if holds else 'MISSED':<7} {what:<72} {figures}", flush=True)
        print(f"        ({name}: {time.process_time() - begin:.0f} CPU s)", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
