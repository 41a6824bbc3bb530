"""Where each positive ranks among its competitors: counted in tiles, both directions at once.

For a query i with positives P_i, and one of them p, over its negatives j:

    gt = #{j : S_ij > S_ip},   eq = #{j : S_ij == S_ip},   so the 0-based rank lies in [gt, gt + eq]

Identical vectors must tie exactly: two people of one gene sequence have one DNA embedding, and a
collapsed encoder gives one vector to all. Floating-point products of the same numbers may differ
with their place in a matrix product, so identical rows are scored once and counted as often as they
occur, and the score of a positive is read from the tile that its competitors are in.

Shape legend: n queries, m gallery entries, u and v distinct ones, P pairs, d width.
"""

from dataclasses import dataclass

import numpy as np

from brainfusion.runtime.errors import UserError


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Scores of n queries with m gallery entries: vectors to multiply, or a matrix given whole."""

    row_of: np.ndarray
    """Distinct row of each query, int64 [n]."""
    col_of: np.ndarray
    """Distinct column of each gallery entry, int64 [m]."""
    rows: np.ndarray
    """Distinct query vectors [u, d], or the scores [n, m]."""
    cols: np.ndarray | None
    """Distinct gallery vectors [v, d]; None when `rows` holds scores."""

    @property
    def n_rows(self) -> int:
        """Distinct queries."""
        return len(self.rows)

    @property
    def n_cols(self) -> int:
        """Distinct gallery entries."""
        return self.rows.shape[1] if self.cols is None else len(self.cols)

    @classmethod
    def from_vectors(cls, queries: np.ndarray, gallery: np.ndarray) -> "ScoreTable":
        """Inner products in float32 of vectors [n, d] and [m, d] of any float type."""
        queries, gallery = _vectors(queries, "queries"), _vectors(gallery, "gallery")
        if queries.shape[1] != gallery.shape[1]:
            raise UserError(
                f"queries are {queries.shape[1]} wide but the gallery is {gallery.shape[1]}: both "
                "must come from one shared space; project them with the same model."
            )
        row_of, rows = _distinct(queries)
        col_of, cols = _distinct(gallery)
        return cls(row_of, col_of, rows, cols)

    @classmethod
    def from_scores(cls, scores: np.ndarray) -> "ScoreTable":
        """Scores [n, m] of any kind, higher for a better match."""
        scores = np.asarray(scores)
        scores = scores.astype(
            np.float32 if scores.dtype.itemsize < 4 else scores.dtype, copy=False
        )
        if scores.ndim != 2 or not np.isfinite(scores).all():
            raise UserError(
                f"scores have shape {list(scores.shape)}: expected [queries, gallery], all finite."
            )
        return cls(np.arange(len(scores)), np.arange(scores.shape[1]), scores, None)

    def tile(self, rows: slice, cols: slice) -> np.ndarray:
        """Scores of some distinct queries with some distinct gallery entries."""
        if self.cols is None:
            return self.rows[rows, cols]
        return self.rows[rows] @ self.cols[cols].T

    def block(self, queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
        """Scores of these queries with these gallery entries (indices), repeats included."""
        if self.cols is None:
            return self.rows[np.ix_(queries, gallery)]
        rows, row_of = np.unique(self.row_of[queries], return_inverse=True)
        cols, col_of = np.unique(self.col_of[gallery], return_inverse=True)
        return (self.rows[rows] @ self.cols[cols].T)[row_of][:, col_of]


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
    table: ScoreTable, pairs: np.ndarray, *, tile: int = 2048
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
    step = max(len(block), 1024)
    for start in range(0, len(pairs), step):
        p = pairs[start : start + step]
        local = row[p] - at_row.start
        whole = len(p) == len(block) and (local == np.arange(len(block))).all()
        rows = block if whole else block[local]
        own = scores[p][:, None]
        shares = None if (share[p] == 1).all() else share[p]
        for mask, counts, value in ((rows > own, side.gt, 1.0), (rows == own, side.eq, 0.5)):
            w = None if weight is None else weight[at_col]
            counts[p] += mask.sum(axis=1, dtype=np.int32) if w is None else mask @ w
            beaten = mask.sum(axis=0, dtype=np.int32) if shares is None else shares @ mask
            side.defeats[at_col] += value * beaten


def _finish(
    side: _Side,
    scores: np.ndarray,
    query: np.ndarray,
    entry: np.ndarray,
    share: np.ndarray,
    distinct_of: np.ndarray,
) -> Ranking:
    """Take the positives out of the counts and sum up by query."""
    gt, eq = side.gt.copy(), side.eq.copy()
    beats = np.zeros(len(scores))
    order = np.argsort(query, kind="stable")
    queries, starts, sizes = np.unique(query[order], return_index=True, return_counts=True)
    best, n_tied = np.empty(len(queries), np.int64), np.empty(len(queries))
    for size in np.unique(sizes):
        at = np.flatnonzero(sizes == size)
        members = order[starts[at][:, None] + np.arange(size)]  # (queries, positives)
        own = scores[members]
        above = own[:, None, :] > own[:, :, None]
        level = own[:, None, :] == own[:, :, None]
        gt[members] -= above.sum(axis=2)
        eq[members] -= level.sum(axis=2)
        beats[members] = (above + 0.5 * level).sum(axis=1)
        top = own.argmax(axis=1)
        best[at] = members[np.arange(len(at)), top]
        n_tied[at] = level[np.arange(len(at)), top].sum(axis=1)
    n_gallery = len(distinct_of)
    n_negatives = n_gallery - sizes
    if (n_negatives < 1).any():
        raise UserError(
            f"a query has {n_gallery} candidates and all are its positives: retrieval needs 1 "
            "negative or more; give a larger gallery."
        )
    pair_auc = 1 - (gt + eq / 2) / n_negatives[np.searchsorted(queries, query)]
    auc = np.bincount(query, share * pair_auc)[queries]
    defeats = side.defeats[distinct_of]
    np.subtract.at(defeats, entry, share * beats)
    n_foreign = len(queries) - np.bincount(entry, minlength=n_gallery)
    resisted = 1 - defeats / np.maximum(n_foreign, 1)
    return Ranking(queries, gt[best], eq[best], n_tied, sizes, auc, resisted)


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


def _vectors(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or 0 in values.shape:
        raise UserError(f"{name} have shape {list(values.shape)}: expected [n, width], not empty.")
    # Adding zero turns -0.0 into 0.0: they are equal and must have equal bytes.
    values = np.ascontiguousarray(values, dtype=np.float32) + np.float32(0)
    if not np.isfinite(values).all():
        n_bad = int((~np.isfinite(values).all(axis=1)).sum())
        raise UserError(
            f"{name}: {n_bad} of {len(values)} vectors have NaN or infinite values (in float32); "
            "drop those people or make their embeddings again."
        )
    return values


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows in order of first appearance, and which of them each row is."""
    keys = _row_keys(values)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    if len(first) == len(values):
        return np.arange(len(values)), values
    order = np.argsort(first)
    return np.argsort(order)[inverse], values[first[order]]


def _row_keys(values: np.ndarray) -> np.ndarray:
    """A 64-bit key of each row's bytes: equal rows have equal keys, others differ but for 2^-64."""
    rng = np.random.default_rng(0)
    odd = rng.integers(0, 2**63, values.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    out = np.empty(len(values), np.uint64)
    for start in range(0, len(values), 4096):
        words = values[start : start + 4096].view(np.uint32).astype(np.uint64)
        words = (words + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        words ^= words >> np.uint64(29)
        words *= odd
        words ^= words >> np.uint64(32)
        out[start : start + 4096] = (words * odd).sum(axis=1, dtype=np.uint64)
    return out
