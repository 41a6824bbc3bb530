"""Inference that respects people: families are resampled and permuted whole, within blocks.

Relatives are alike, and so are people of one site. Treating them as independent makes intervals too
short and p-values too small, so the bootstrap draws families and the permutation moves families.

Sources: Efron and Tibshirani 1993 (bootstrap of clusters); Winkler et al. 2014 and 2015, NeuroImage
(exchangeability blocks); Phipson and Smyth 2010 (p-values of permutations are never zero);
Benjamini and Hochberg 1995 (false discovery rate).

Shape legend: n people, f families, b draws, c statistics.
"""

from collections.abc import Sequence

import numpy as np

from brainfusion.runtime.errors import UserError

LEVEL = 0.95
"""Coverage of every interval."""

Labels = Sequence[object] | np.ndarray
"""One label a person; None, NaN and empty text mean unknown."""


def family_codes(families: Labels | None, n: int) -> np.ndarray:
    """Families as int64 codes [n], numbered by first appearance.

    Someone without a family is nobody's relative: a family of one. Without `families`, so is
    everyone.
    """
    if families is None:
        return np.arange(n)
    labels = _labels(families, n, "families")
    names = [("alone", i) if label is None else ("family", label) for i, label in enumerate(labels)]
    return _codes(names)


def block_codes(blocks: Labels | None, n: int) -> np.ndarray:
    """Exchangeability blocks as int64 codes [n]; people of unknown block form one of their own."""
    return np.zeros(n, np.int64) if blocks is None else _codes(_labels(blocks, n, "blocks"))


def bootstrap_weights(n_families: int, n_draws: int, seed: int) -> np.ndarray:
    """How often each family is drawn in each of `n_draws` bootstrap samples: float32 [b, f]."""
    rng = np.random.default_rng([seed, 1])
    return rng.multinomial(n_families, np.full(n_families, 1 / n_families), n_draws).astype("f4")


def family_bootstrap(
    values: np.ndarray, families: Labels | None, n_draws: int, seed: int = 0
) -> np.ndarray:
    """Bootstrap means of per-person values, whole families drawn with replacement.

    Args:
        values: One value a person [n], or several statistics [n, c].
        families: Family of each person; None if nobody is related.
        n_draws: Bootstrap samples.
        seed: Of the draws.

    Returns:
        Means [b] or [b, c]. A sample's mean is over its people, however many its families have.
    """
    values = np.asarray(values, np.float64)
    codes = family_codes(families, len(values))
    n_families = int(codes.max()) + 1
    totals = np.zeros((n_families, *values.shape[1:]))
    np.add.at(totals, codes, values)
    weights = bootstrap_weights(n_families, n_draws, seed).astype(np.float64)
    n_drawn = weights @ np.bincount(codes, minlength=n_families)
    sums = weights @ totals
    return sums / n_drawn.reshape(-1, *[1] * (values.ndim - 1))


def interval(draws: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of bootstrap draws [b]; NaN draws are left out."""
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def block_permutations(
    n: int, families: Labels | None, blocks: Labels | None, n_permutations: int, seed: int = 0
) -> np.ndarray:
    """Random rearrangements of people that move whole families, within their block.

    Families change places when they have the same number of members in each block; members keep
    their order. A family that has no such partner stays where it is, which makes a test
    conservative: `n_fixed` counts those people.

    Args:
        n: People.
        families: Family of each person; None if nobody is related.
        blocks: Within what people are exchangeable, for example their site; None for everyone.
        n_permutations: How many to draw; the identity may be among them.
        seed: Of the draws.

    Returns:
        int32 [b, n]: row by row a permutation; person i receives what person `out[b, i]` had.
    """
    rng = np.random.default_rng([seed, 2])
    out = np.tile(np.arange(n, dtype=np.int32), (n_permutations, 1))
    for members in _exchangeable(n, families, blocks):
        n_alike = len(members)
        if n_alike > 1 and n_permutations:
            order = rng.permuted(np.tile(np.arange(n_alike), (n_permutations, 1)), axis=1)
            for position in range(members.shape[1]):
                column = members[:, position]
                out[:, column] = column[order]
    return out


def n_fixed(n: int, families: Labels | None, blocks: Labels | None) -> int:
    """People whom `block_permutations` cannot move: no other family is like theirs."""
    return sum(group.size for group in _exchangeable(n, families, blocks) if len(group) == 1)


def p_value(observed: float, null: np.ndarray) -> float:
    """One-sided permutation p, (1 + draws at or above the observed) / (1 + draws).

    Rounding must not turn a tie into a miss: draws within 1e-9 below the observed count.
    """
    return float((1 + (np.asarray(null) >= observed - 1e-9).sum()) / (1 + len(null)))


def fdr(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg adjusted p-values; NaN (a test that was not done) stays NaN."""
    from scipy.stats import false_discovery_control

    p = np.asarray(p_values, np.float64)
    out = np.full(p.shape, np.nan)
    done = np.isfinite(p)
    if done.any():
        out[done] = false_discovery_control(p[done])
    return out


def auroc(positive: np.ndarray, scores: np.ndarray) -> float:
    """Share of (positive, negative) pairs that the scores order rightly; a tie counts half.

    Args:
        positive: bool [n].
        scores: [n], higher for more likely positive.

    Returns:
        The area under the ROC curve; NaN if one of the classes is absent.
    """
    positive = np.asarray(positive, bool)
    n_positive = int(positive.sum())
    n_pairs = n_positive * (len(positive) - n_positive)
    if not n_pairs:
        return float("nan")
    rank_sum = midranks(np.asarray(scores)[None])[0][positive].sum()
    return float((rank_sum - n_positive * (n_positive + 1) / 2) / n_pairs)


def midranks(values: np.ndarray) -> np.ndarray:
    """Ranks within each row [r, n], 1 for the smallest; equal values share their mean rank."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    n_rows, n = values.shape
    place = np.broadcast_to(np.arange(n, dtype=np.float32), values.shape)
    new = np.ones((n_rows, n + 1), bool)
    new[:, 1:n] = ordered[:, 1:] != ordered[:, :-1]
    if new.all():
        mean_place = place
    else:
        first = np.maximum.accumulate(np.where(new[:, :n], place, 0), axis=1)
        last = np.where(new[:, 1:], place, n - 1)
        last = np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1]
        mean_place = (first + last) / 2
    out = np.empty(values.shape, np.float32)
    np.put_along_axis(out, order, mean_place + 1, axis=1)
    return out


def _exchangeable(n: int, families: Labels | None, blocks: Labels | None) -> list[np.ndarray]:
    """Groups of families that may change places: each [families, members] of row numbers."""
    family, block = family_codes(families, n), block_codes(blocks, n)
    order = np.lexsort((np.arange(n), block, family))
    starts = np.flatnonzero(np.r_[True, np.diff(family[order]) != 0])
    alike: dict[tuple[int, ...], list[np.ndarray]] = {}
    for rows in np.split(order, starts[1:]):
        alike.setdefault(tuple(block[rows].tolist()), []).append(rows)
    return [np.stack(rows) for rows in alike.values()]


def _labels(labels: Labels, n: int, name: str) -> list[object]:
    values = list(labels.tolist() if isinstance(labels, np.ndarray) else labels)
    if len(values) != n:
        raise UserError(
            f"{name} has {len(values)} labels for {n} people: give one a person, in row order."
        )
    return [None if value is None or value == "" or value != value else value for value in values]


def _codes(labels: Sequence[object]) -> np.ndarray:
    seen: dict[object, int] = {}
    return np.array([seen.setdefault(label, len(seen)) for label in labels], np.int64)
