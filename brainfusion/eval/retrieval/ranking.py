"""Where each positive ranks among its competitors: counted in tiles, both directions at once.

For a query i with positives P_i, and one of them p, over its negatives j:

    gt = #{j : S_ij > S_ip},   eq = #{j : S_ij == S_ip},   so the 0-based rank lies in [gt, gt + eq]

Equal scores must tie exactly, so identical vectors are scored once (`ScoreTable`) and the score of
a positive is read from the tile that its competitors are in.

Cost: one product of 2 n m d operations for both directions; counting adds a tenth of that at width
512 (`benchmarks/retrieval.py`). A tile's comparisons are kept as bytes and added eight at a time.

Shape legend: n queries, m gallery entries, u and v distinct ones, P pairs, d width.
"""

from dataclasses import dataclass

import numpy as np

from brainfusion.eval.retrieval.score_table import ScoreTable
from brainfusion.runtime.errors import UserError


@dataclass(frozen=True, eq=False)
class Ranking:
    """How the queries of one direction did; q of them, each with one positive or more.

    `gt` and `eq` belong to the best positive, over negatives only.
    """

    queries: np.ndarray
    """Index of each query among the rows (or columns) of the table, int64 [q]."""
    gt: np.ndarray
    eq: np.ndarray
    n_tied: np.ndarray
    """Positives that share the best score, itself among them."""
    n_positives: np.ndarray
    auc: np.ndarray
    """Share of negatives that a positive outranks, mean over the query's positives, float64 [q]."""
    auc_bounds: np.ndarray
    """The same with ties won and with ties lost, [q, 2]."""
    average_precision: np.ndarray
    """Mean over the query's positives of the precision at their place, [q, 3]: expected over the
    orders of equals, with positives before their equals, and after them."""
    resisted: np.ndarray
    """For each gallery entry: share of foreign queries that prefer their own positive, [m]."""

    @property
    def n_gallery(self) -> int:
        """Candidates of a query."""
        return len(self.resisted)


@dataclass
class _Side:
    """Counts of one direction while the tiles go by."""

    gt: np.ndarray
    eq: np.ndarray
    defeats: np.ndarray
    """For each distinct competitor: pairs that it outranks, ties half, by the pairs' shares."""


def rank_pairs(
    table: ScoreTable, pairs: np.ndarray, *, tile: int = 1024
) -> tuple[Ranking, Ranking]:
    """Rank the positives in both directions; every tile of scores is made once.

    Args:
        table: The scores.
        pairs: int64 [P, 2], (query, gallery entry) that belong together; each pair once.
        tile: Rows and columns of a tile: memory is a few tiles, whatever n and m.

    Returns:
        Query to gallery, gallery to query. A gallery entry without a pair is a competitor only.
    """
    query, entry = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].T
    # Columns in the order of their queries put the pairs into few tiles.
    table, (row, col) = _aligned(table, query, entry)
    scores = _pair_scores(table, row, col, tile)
    share = [1 / np.bincount(side)[side] for side in (query, entry)]
    weight = [_repeats(table.row_of, table.n_rows), _repeats(table.col_of, table.n_cols)]
    sides = [
        _Side(np.zeros(len(row)), np.zeros(len(row)), np.zeros(table.n_cols)),
        _Side(np.zeros(len(row)), np.zeros(len(row)), np.zeros(table.n_rows)),
    ]
    by_row, by_col = (
        _pairs_by_tile(row, table.n_rows, tile),
        _pairs_by_tile(col, table.n_cols, tile),
    )
    for i, of_rows in enumerate(by_row):
        at_row = slice(i * tile, min((i + 1) * tile, table.n_rows))
        for j, of_cols in enumerate(by_col):
            at_col = slice(j * tile, min((j + 1) * tile, table.n_cols))
            block = table.tile(at_row, at_col)
            _tally(sides[0], block, row, of_rows, scores, at_row, at_col, weight[1], share[0])
            _tally(sides[1], block.T, col, of_cols, scores, at_col, at_row, weight[0], share[1])
    forward = _finish(sides[0], scores, query, entry, share[0], table.col_of)
    backward = _finish(sides[1], scores, entry, query, share[1], table.row_of)
    return forward, backward


def _tally(
    side: _Side,
    block: np.ndarray,
    row: np.ndarray,
    pairs: np.ndarray,
    scores: np.ndarray,
    at_row: slice,
    at_col: slice,
    weight: np.ndarray | None,
    share: np.ndarray,
) -> None:
    """Count, for the pairs whose query is in this tile, its competitors above and level."""
    local = row[pairs] - at_row.start
    whole = len(pairs) == len(block) and (local == np.arange(len(block))).all()
    if whole and weight is None and (share[pairs] == 1).all():
        above, level, defeats = _count(block, scores[pairs])
        side.gt[pairs] += above
        side.eq[pairs] += level
        side.defeats[at_col] += defeats
        return
    step = max(len(block), 1024)
    for start in range(0, len(pairs), step):
        p = pairs[start : start + step]
        rows = block[local[start : start + step]]
        own = scores[p][:, None]
        for mask, counts, value in ((rows > own, side.gt, 1.0), (rows == own, side.eq, 0.5)):
            w = None if weight is None else weight[at_col]
            counts[p] += mask.sum(axis=1, dtype=np.int32) if w is None else mask @ w
            side.defeats[at_col] += value * (share[p] @ mask)


def _count(block: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores above and level with each row's own [rows], and by column those rows, level ones half.

    `block` may be the transpose of a tile: memory is walked in its own order.
    """
    turned = not block.flags.c_contiguous
    matrix = block.T if turned else block
    mine = own[None, :] if turned else own[:, None]
    lines, columns = np.zeros(len(matrix), np.int64), np.zeros(matrix.shape[1], np.int64)
    level = [np.zeros_like(lines), np.zeros_like(columns)]
    mask = np.zeros((_LANE, -(-matrix.shape[1] // 8) * 8), bool)
    for start in range(0, len(matrix), _LANE):
        part = matrix[start : start + _LANE]
        at = slice(start, start + len(part))
        against = mine if turned else mine[at]
        used = mask[: len(part)]
        found = []
        for compare in (np.greater, np.greater_equal):
            compare(part, against, out=used[:, : part.shape[1]])
            found.append(_sums(used))
        (lines_gt, columns_gt), (lines_ge, columns_ge) = found
        lines[at] += lines_gt
        columns += columns_gt[: len(columns)]
        level[0][at] += lines_ge - lines_gt
        level[1] += (columns_ge - columns_gt)[: len(columns)]
    if turned:
        return columns, level[1], lines + 0.5 * level[0]
    return lines, level[0], columns + 0.5 * level[1]


_LANE = 248
"""Rows, or words of a row, whose bytes of 0 and 1 are added within a byte: fewer than 256."""


def _sums(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of a contiguous bool array over its columns and over its rows, eight bytes at a time."""
    words = mask.view(np.uint64)
    by_column = words.sum(axis=0).view(np.uint8).astype(np.int64)
    by_row = np.zeros(len(mask), np.int64)
    for start in range(0, words.shape[1], _LANE):
        lanes = words[:, start : start + _LANE].sum(axis=1)
        by_row += lanes.view(np.uint8).reshape(-1, 8).sum(axis=1, dtype=np.int64)
    return by_row, by_column


def _finish(
    side: _Side,
    scores: np.ndarray,
    query: np.ndarray,
    entry: np.ndarray,
    share: np.ndarray,
    distinct_of: np.ndarray,
) -> Ranking:
    """Take the positives out of the counts and sum up by query."""
    gt, eq = side.gt, side.eq
    beats, ahead, level_with = np.zeros((3, len(scores)))
    order = np.argsort(query, kind="stable")
    queries, starts, sizes = np.unique(query[order], return_index=True, return_counts=True)
    best, n_tied = np.empty(len(queries), np.int64), np.empty(len(queries))
    for size in np.unique(sizes):
        at = np.flatnonzero(sizes == size)
        members = order[starts[at][:, None] + np.arange(size)]  # (queries, positives)
        own = scores[members]
        above = own[:, None, :] > own[:, :, None]
        level = own[:, None, :] == own[:, :, None]
        ahead[members], level_with[members] = above.sum(axis=2), level.sum(axis=2)
        beats[members] = (above + 0.5 * level).sum(axis=1)
        top = own.argmax(axis=1)
        best[at] = members[np.arange(len(at)), top]
        n_tied[at] = level[np.arange(len(at)), top].sum(axis=1)
    gt, eq = gt - ahead, eq - level_with
    n_gallery = len(distinct_of)
    n_negatives = n_gallery - sizes
    if (n_negatives < 1).any():
        raise UserError(
            f"a query has {n_gallery} candidates and all are its positives: retrieval needs 1 "
            "negative or more; give a larger gallery."
        )
    n_others = n_negatives[np.searchsorted(queries, query)]
    of_pair = [1 - (gt + tied * eq) / n_others for tied in (0.5, 0.0, 1.0)]
    of_pair += pair_precision(gt, eq, ahead, level_with, n_gallery)
    # Mean over a query's positives.
    mean = np.stack([np.bincount(query, share * value)[queries] for value in of_pair], axis=1)
    defeats = side.defeats[distinct_of]
    np.subtract.at(defeats, entry, share * beats)
    n_foreign = len(queries) - np.bincount(entry, minlength=n_gallery)
    resisted = 1 - defeats / np.maximum(n_foreign, 1)
    return Ranking(
        queries, gt[best], eq[best], n_tied, sizes, mean[:, 0], mean[:, 1:3], mean[:, 3:], resisted
    )


def pair_precision(
    gt: np.ndarray, eq: np.ndarray, ahead: np.ndarray, level: np.ndarray, n_gallery: int
) -> list[np.ndarray]:
    """Precision at the place of a positive: expected, optimistic, pessimistic; each [P].

    With A positives and G negatives above, and n = t + e level entries of which t are positives (a
    place i among them holds a positive with probability t / n, and (i - 1) (t - 1) / (n - 1) others
    before it), the mean over orders and over the t positives is

        1/n sum_i [A + 1 + (i - 1) (t - 1) / (n - 1)] / (A + G + i)

    written with harmonic numbers (McSherry and Najork 2008, ECIR).

    Args:
        gt: Negatives above each positive, G.
        eq: Negatives level with it, e.
        ahead: Positives above it, A.
        level: Positives level with it, itself among them, t.
        n_gallery: Entries in all.
    """
    harmonic = np.r_[0.0, np.cumsum(1 / np.arange(1, n_gallery + 1))]

    def reciprocals(first: np.ndarray, n: np.ndarray) -> np.ndarray:
        """Sum of 1 / place over the `n` places after the first ones."""
        return harmonic[(first + n).astype(np.int64)] - harmonic[first.astype(np.int64)]

    above, n_level = ahead + gt, eq + level
    others = (level - 1) / np.maximum(n_level - 1, 1)
    places = reciprocals(above, n_level)
    expected = ((ahead + 1) * places + others * (n_level - (above + 1) * places)) / n_level
    first, last = (
        1 - (gt + tied) * reciprocals(above + tied, level) / level
        for tied in (np.zeros_like(eq), eq)
    )
    return [expected, first, last]


def _pair_scores(table: ScoreTable, row: np.ndarray, col: np.ndarray, tile: int) -> np.ndarray:
    """The score of each pair, from the same tile in which its competitors will be counted."""
    out = np.empty(len(row), table.rows.dtype)
    n_across = -(-table.n_cols // tile)
    home = (row // tile) * n_across + col // tile
    order = np.argsort(home, kind="stable")
    for p in np.split(order, np.flatnonzero(np.diff(home[order])) + 1):
        i, j = row[p[0]] // tile * tile, col[p[0]] // tile * tile
        at_row, at_col = (
            slice(i, min(i + tile, table.n_rows)),
            slice(j, min(j + tile, table.n_cols)),
        )
        out[p] = table.tile(at_row, at_col)[row[p] - i, col[p] - j]
    return out


def _aligned(
    table: ScoreTable, query: np.ndarray, entry: np.ndarray
) -> tuple[ScoreTable, tuple[np.ndarray, np.ndarray]]:
    """The table with its columns in the order of the pairs, and the pairs' rows and columns."""
    row, col = table.row_of[query], table.col_of[entry]
    if table.cols is not None:
        wanted, first = np.unique(col, return_index=True)
        rank = np.full(table.n_cols, len(col), np.int64)
        rank[wanted] = row[first]
        order = np.argsort(rank, kind="stable")
        if (order != np.arange(len(order))).any():
            place = np.argsort(order)
            table = ScoreTable(table.row_of, place[table.col_of], table.rows, table.cols[order])
            col = place[col]
    return table, (row, col)


def _pairs_by_tile(row: np.ndarray, n_rows: int, tile: int) -> list[np.ndarray]:
    order = np.argsort(row, kind="stable")
    edges = np.searchsorted(row[order], np.arange(tile, n_rows, tile))
    return np.split(order, edges)


def _repeats(distinct_of: np.ndarray, n_distinct: int) -> np.ndarray | None:
    """How often each distinct vector occurs; None if all occur once."""
    if len(distinct_of) == n_distinct:
        return None
    return np.bincount(distinct_of, minlength=n_distinct).astype(np.float64)
