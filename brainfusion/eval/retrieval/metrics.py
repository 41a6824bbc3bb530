"""Cross-modal retrieval: how well one modality of a person finds the other among many people.

Every number comes with its chance level, its gallery and its unit. AUC, the share of other people
whom the partner outranks, is the headline: chance is 0.5 in every gallery, so cohorts compare;
recall at k shrinks with the gallery. Ties, several positives and chance levels: `rank_summary`.

Interval: bootstrap over families. A person enters the AUC twice, as a query and as a competitor of
all others; resampling queries alone would ignore the second and give intervals that are too short.
The bootstrap acts on both parts in the linear expansion of the AUC (Hajek projection), so it needs
no n x n matrix; its ends are taken on the logit scale, with Student's t for few families. p-value:
the partners are reassigned between families that are exchangeable
(`statistics.block_permutations`), and every reassignment is scored in the same gallery. Both were
held against simulated cohorts (`benchmarks/calibration.py`).

Shape legend: n queries, m gallery entries, d width, b draws.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from brainfusion.eval.retrieval.rank_summary import rank_summary
from brainfusion.eval.retrieval.ranking import Ranking, rank_pairs
from brainfusion.eval.retrieval.score_table import ScoreTable, as_array
from brainfusion.eval.statistics import (
    LEVEL,
    Labels,
    block_codes,
    block_permutations,
    bootstrap_weights,
    family_codes,
    interval,
    midranks,
    p_value,
)
from brainfusion.runtime.errors import UserError

MAX_PERMUTED = 8000
"""People in a permutation test: it holds their n x n ranks. Of more, random families are tested."""

DIRECTIONS = ("query_to_gallery", "gallery_to_query")

Positives = Sequence[Any] | np.ndarray


def retrieval_metrics(
    queries: ArrayLike,
    gallery: ArrayLike,
    *,
    positives: Positives | None = None,
    families: Labels | None = None,
    blocks: Labels | None = None,
    n_permutations: int = 0,
    n_bootstrap: int = 0,
    seed: int = 0,
    tile: int = 1024,
    unit: str = "person",
) -> dict[str, dict[str, Any]]:
    """Score retrieval by inner product, in both directions.

    Args:
        queries: [n, d], an array or a tensor of any float type; products are in float32. Rows are
            taken as they are: unit vectors give cosines, vectors of a log density ratio that ratio.
        gallery: [m, d].
        positives: The gallery entries that belong to each query: one index a query [n], or a
            sequence of index lists. Row i belongs to row i if omitted (then n = m).
        families: Family of each query; the bootstrap and the permutation keep families whole.
        blocks: Within what people are exchangeable, for example their site.
        n_permutations: For `p_value`; needs one gallery entry of its own for each query.
        n_bootstrap: For `ci_low`, `ci_high` (95 %) and `standard_error` of the AUC.
        seed: Of permutations and bootstrap.
        tile: Scores are made in tiles of this size; memory does not grow with n x m.
        unit: What a row is, for the record.

    Returns:
        For "query_to_gallery" and "gallery_to_query": `auc`, `chance` (its level), `recall_at_k`
        (k = 1, 5, 10), `median_rank`, `mean_rank`, `mrr`, `map`, each with `_optimistic` and
        `_pessimistic`, and but for the AUC with `_chance`; `n_queries`, `n_gallery`, `unit`, and
        what was asked for of `ci_low`, `ci_high`, `standard_error`, `p_value`, `n_permutations`.
        Ranks start at 1. A gallery entry that is nobody's positive is a competitor, never a query.
    """
    table = ScoreTable.from_vectors(queries, gallery)
    return _metrics(
        table, positives, families, blocks, n_permutations, n_bootstrap, seed, tile, unit
    )


def metrics_from_scores(
    scores: ArrayLike,
    *,
    positives: Positives | None = None,
    families: Labels | None = None,
    blocks: Labels | None = None,
    n_permutations: int = 0,
    n_bootstrap: int = 0,
    seed: int = 0,
    tile: int = 1024,
    unit: str = "person",
) -> dict[str, dict[str, Any]]:
    """`retrieval_metrics` of scores [n, m] that are no inner product; higher is a better match."""
    table = ScoreTable.from_scores(scores)
    return _metrics(
        table, positives, families, blocks, n_permutations, n_bootstrap, seed, tile, unit
    )


def stratified_auc(
    queries: ArrayLike,
    gallery: ArrayLike,
    strata: Mapping[str, Labels],
    *,
    families: Labels | None = None,
    blocks: Labels | None = None,
    n_permutations: int = 0,
    n_bootstrap: int = 0,
    seed: int = 0,
    tile: int = 1024,
) -> list[dict[str, Any]]:
    """AUC when each person competes only with people of the same stratum.

    Alignment that rests on a confound (all of one site look alike in both modalities) disappears.

    Args:
        queries: [n, d]; row i belongs to row i of the gallery.
        gallery: [n, d].
        strata: Name of the row, for example "same site", -> the label of each person. People of
            unknown label, or alone in their stratum, are left out and counted.
        families: Family of each person.
        blocks: Exchangeability blocks; permutations stay within the stratum in any case.
        n_permutations: As in `retrieval_metrics`.
        n_bootstrap: As in `retrieval_metrics`.
        seed: Of permutations and bootstrap.
        tile: Size of a tile of scores.

    Returns:
        For each name and direction a row: `name`, `direction`, `auc` (mean over people), `chance`,
        `n_queries`, `n_strata`, `n_left_out`, `n_gallery` (median), and `ci_low`, `ci_high`,
        `standard_error`, `p_value` as asked. `auc` is None when no stratum has 2 people.
    """
    queries, gallery = as_array(queries), as_array(gallery)
    if len(queries) != len(gallery):
        raise UserError(
            f"{len(queries)} queries and {len(gallery)} gallery vectors: strata need pairs, row i "
            "of one for row i of the other."
        )
    family, block = family_codes(families, len(queries)), block_codes(blocks, len(queries))
    rows = []
    for name, labels in strata.items():
        groups = _strata(labels, len(queries))
        parts = [
            _part(ScoreTable.from_vectors(queries[g], gallery[g]), g, g, _diagonal(len(g)), tile)
            for g in groups
        ]
        cell = [f"{stratum}/{own}" for stratum, own in zip(labels, block, strict=True)]
        people = np.sort(np.concatenate(groups)) if groups else np.empty(0, np.int64)
        about = {
            "chance": 0.5,
            "n_queries": len(people),
            "n_strata": len(groups),
            "n_left_out": len(queries) - len(people),
            "n_gallery": int(np.median([len(g) for g in groups])) if groups else 0,
        }
        null = _null(parts, people, family, cell, n_permutations, seed) if groups else None
        for side, direction in enumerate(DIRECTIONS):
            found: dict[str, Any] = {"auc": None}
            if groups:
                found = _inference(parts, side, family, family, null, n_bootstrap, seed)
            rows.append({"name": name, "direction": direction, **found, **about})
    return rows


@dataclass(frozen=True, eq=False)
class _Part:
    """One gallery with its queries; `people` and `entries` are their places in the whole."""

    table: ScoreTable
    people: np.ndarray
    entries: np.ndarray
    pairs: np.ndarray
    rankings: tuple[Ranking, Ranking]


def _part(
    table: ScoreTable, people: np.ndarray, entries: np.ndarray, pairs: np.ndarray, tile: int
) -> _Part:
    return _Part(table, people, entries, pairs, rank_pairs(table, pairs, tile=tile))


def _metrics(
    table: ScoreTable,
    positives: Positives | None,
    families: Labels | None,
    blocks: Labels | None,
    n_permutations: int,
    n_bootstrap: int,
    seed: int,
    tile: int,
    unit: str,
) -> dict[str, dict[str, Any]]:
    n, m = len(table.row_of), len(table.col_of)
    pairs = _pairs(positives, n, m)
    part = _part(table, np.arange(n), np.arange(m), pairs, tile)
    family = family_codes(families, n)
    # An entry belongs to the family of its (first) query; one without a query is nobody's relative.
    entry_family = family.max() + 1 + np.arange(m)
    entry_family[pairs[::-1, 1]] = family[pairs[::-1, 0]]
    null = None
    if n_permutations:
        one_to_one = len(pairs) == n == len(np.unique(pairs[:, 1]))
        if not one_to_one:
            raise UserError(
                "n_permutations needs one gallery entry of its own for each query; average the "
                "entries of a person first, or set n_permutations=0."
            )
        cell = block_codes(blocks, n).tolist()
        null = _null([part], np.arange(n), family, cell, n_permutations, seed)
    out = {}
    for side, direction in enumerate(DIRECTIONS):
        found = _inference([part], side, family, entry_family, null, n_bootstrap, seed)
        out[direction] = {**found, **rank_summary(part.rankings[side]), "unit": unit}
    return out


def _inference(
    parts: Sequence[_Part],
    side: int,
    family: np.ndarray,
    entry_family: np.ndarray,
    null: tuple[np.ndarray, np.ndarray] | None,
    n_bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """AUC of one direction over all parts, with its interval and p-value."""
    asks, answers = (family, entry_family) if side == 0 else (entry_family, family)
    places = [(p.people, p.entries) if side == 0 else (p.entries, p.people) for p in parts]
    rankings = [part.rankings[side] for part in parts]
    auc = np.concatenate([r.auc for r in rankings])
    found: dict[str, Any] = {"auc": float(auc.mean())}
    if n_bootstrap:
        resisted = np.concatenate([r.resisted - r.resisted.mean() for r in rankings])
        who_asks = [asks[own[r.queries]] for r, (own, _) in zip(rankings, places, strict=True)]
        who_answers = [answers[other] for _, other in places]
        units, unit = np.unique(np.concatenate(who_asks + who_answers), return_inverse=True)
        weights = bootstrap_weights(len(units), n_bootstrap, seed).astype(np.float64)
        draws = auc.mean() + _weighted_mean(weights, unit[: len(auc)], auc - auc.mean())
        draws += _weighted_mean(weights, unit[len(auc) :], resisted)
        # A sample's spread falls short of the population's by the one mean that is fitted.
        draws = auc.mean() + (draws - auc.mean()) * np.sqrt(len(units) / max(len(units) - 1, 1))
        low, high = _auc_interval(float(auc.mean()), draws, len(units))
        found |= {"ci_low": low, "ci_high": high, "standard_error": float(draws.std(ddof=1))}
    if null is not None:
        observed, draws = null[0][side], null[1][:, side]
        found |= {"p_value": p_value(float(observed), draws), "n_permutations": len(draws)}
    return found


def _auc_interval(auc: float, draws: np.ndarray, n_units: int) -> tuple[float, float]:
    """Interval of an AUC from its draws: on the logit scale, by Student's t of `n_units` families.

    Near 1 an AUC can err by more downwards than upwards; on the logit scale both ends miss alike.
    """
    from scipy.special import expit, logit
    from scipy.stats import norm, t

    quantile = (1 + LEVEL) / 2
    wider = t.ppf(quantile, max(n_units - 1, 1)) / norm.ppf(quantile)
    ends = np.array(interval(draws)) - auc
    room = auc * (1 - auc)
    if room < 1e-12:
        return max(0.0, auc + float(ends[0])), min(1.0, auc + float(ends[1]))
    low, high = expit(logit(auc) + wider * ends / room)
    return float(low), float(high)


def _weighted_mean(weights: np.ndarray, unit: np.ndarray, values: np.ndarray) -> np.ndarray:
    n_units = weights.shape[1]
    totals = weights @ np.bincount(unit, values, minlength=n_units)
    return totals / np.maximum(weights @ np.bincount(unit, minlength=n_units), 1)


def _null(
    parts: Sequence[_Part],
    people: np.ndarray,
    family: np.ndarray,
    cell: Sequence[object],
    n_permutations: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray] | None:
    """AUC in both directions, as observed [2] and with partners reassigned [b, 2]."""
    if not n_permutations:
        return None
    chosen = _families_up_to(MAX_PERMUTED, people, family, seed)
    labels = [cell[i] for i in chosen]
    moves = block_permutations(len(chosen), family[chosen], labels, n_permutations, seed)
    moves = np.concatenate([np.arange(len(chosen), dtype=moves.dtype)[None], moves])
    sums = np.zeros((len(moves), 2))
    for part in parts:
        entry_of = np.empty(len(part.people), np.int64)
        entry_of[part.pairs[:, 0]] = part.pairs[:, 1]
        rows = np.flatnonzero(np.isin(part.people, chosen))
        at = np.searchsorted(chosen, part.people[rows])
        place = np.empty(len(chosen), np.int64)
        place[at] = np.arange(len(rows))
        partners = place[moves[:, at]]  # (1 + b, rows of this part)
        cols, whole = entry_of[rows], len(rows) == len(part.people)
        # In a whole gallery, entries that are nobody's partner compete too.
        scores = part.table.block(rows, np.arange(len(part.entries)) if whole else cols)
        for side, matrix in enumerate((scores, scores.T)):
            outranked = _outranked(matrix) if side == 0 else _outranked(matrix).T
            if whole:
                outranked = outranked[:, cols]
            for b, partner in enumerate(partners):
                sums[b, side] += outranked[np.arange(len(rows)), partner].sum(dtype=np.float64)
    sums /= len(chosen)
    return sums[0], sums[1:]


def _outranked(scores: np.ndarray) -> np.ndarray:
    """For each entry [n, m]: the share of the others in its row that it outranks, ties half."""
    out = np.empty(scores.shape, np.float32)
    for start in range(0, len(scores), 512):
        ranks = midranks(np.ascontiguousarray(scores[start : start + 512]))
        out[start : start + 512] = (ranks - 1) / max(scores.shape[1] - 1, 1)
    return out


def _families_up_to(n: int, people: np.ndarray, family: np.ndarray, seed: int) -> np.ndarray:
    """All people, or whole random families of them, about `n` in all; sorted."""
    if len(people) <= n:
        return people
    order = np.random.default_rng([seed, 3]).permutation(int(family.max()) + 1)
    rank = order[family[people]]
    return np.sort(people[np.argsort(rank, kind="stable")][:n])


def _pairs(positives: Positives | None, n: int, m: int) -> np.ndarray:
    """(query, gallery entry) pairs, int64 [P, 2]."""
    if positives is None:
        if n != m:
            raise UserError(
                f"{n} queries and {m} gallery entries: without `positives` row i belongs to row i, "
                "so both need the same people in the same order."
            )
        return _diagonal(n)
    if len(positives) != n:
        raise UserError(f"positives has {len(positives)} entries for {n} queries: give one each.")
    lists = [np.unique(np.atleast_1d(np.asarray(p, np.int64))) for p in positives]
    if not all(len(p) for p in lists):
        raise UserError("a query has no positive: leave out the people who have no partner.")
    pairs = np.stack([np.repeat(np.arange(n), list(map(len, lists))), np.concatenate(lists)], 1)
    if pairs[:, 1].min() < 0 or pairs[:, 1].max() >= m:
        raise UserError(f"positives must be gallery rows, 0 to {m - 1}; check their indices.")
    return pairs


def _diagonal(n: int) -> np.ndarray:
    return np.stack([np.arange(n)] * 2, axis=1)


def _strata(labels: Labels, n: int) -> list[np.ndarray]:
    """Rows of each known stratum with 2 people or more."""
    codes = family_codes(labels, n)
    groups = [np.flatnonzero(codes == code) for code in np.unique(codes)]
    return [group for group in groups if len(group) > 1]
