"""A gallery on disk that answers "who is nearest to this vector", by inner product, with FAISS.

Exact search is the default: at 100,000 people of width 512, 1,000 queries cost about a second of
CPU, as much as 0.7 % of building an HNSW graph. Beyond `EXACT_UP_TO` entries "auto" builds a graph,
beyond `HNSW_UP_TO` it quantises, and says so. Approximate kinds say what they lose: recall@10
against exact search, measured on the index itself.

A search may be narrowed to some entries, by covariates ("same site only") or by a selection; it is
then exact in every kind of index.

Vectors need no unit norm: those of a log density ratio are searched by that ratio. A graph over
vectors of unequal norm loses its way (of the 10 nearest it found 0.2 % to 16 % in 20,000 vectors of
32 and 64 strong correlations), so approximate kinds add a column that makes all norms equal and is
zero in every query: products stay, and 92 % to 97 % are found.

Sources: Douze et al. 2024, arXiv:2401.08281 (FAISS); Malkov and Yashunin 2018 (HNSW); Jegou et al.
2011 (product quantisation); Bachrach et al. 2014, RecSys (the added column).

Shape legend: n gallery entries, d width, q queries.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl

from brainfusion.eval.retrieval.entries import About, chosen_entries, entry_table, listed
from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.files import atomic_folder, read_json, write_json
from brainfusion.runtime.logs import say
from brainfusion.runtime.threads import one_thread

Kind = Literal["auto", "exact", "hnsw", "ivfpq"]
KINDS = ("exact", "hnsw", "ivfpq")
EXACT_UP_TO = 200_000
"""Entries up to which "auto" is exact."""
HNSW_UP_TO = 2_000_000
"""Entries up to which "auto" is a graph of float32 vectors; beyond, they are quantised."""
MIN_IVFPQ = 10_000
"""Entries that product quantisation needs to train 256 centroids."""

_FORMAT, _READABLE = 2, (1, 2)
_HNSW_LINKS, _HNSW_BUILD, _HNSW_SEARCH = 32, 100, 128
_N_MEASURED = 256


class Neighbour(NamedTuple):
    """One answer: the `rank`-th nearest entry (from 1) of query number `query`."""

    query: int
    rank: int
    id: str
    score: float


class RetrievalIndex:
    """Vectors with ids, searched by inner product. Make one with `build` or `load`."""

    def __init__(
        self,
        index: Any,
        entries: pl.DataFrame,
        kind: str,
        *,
        dim: int,
        recall_at_10: float = 1.0,
        norm: float | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self._index, self._norm = index, norm
        self._entries, self._ids = entries, entries["id"].to_list()
        self.kind = kind
        """What it is: "exact", "hnsw" or "ivfpq"."""
        self.recall_at_10 = recall_at_10
        """Share of the exact 10 nearest that it finds; 1 if exact, measured otherwise."""
        self.dim = dim
        """Width of the vectors."""
        self.facts = dict(facts or {})
        """What whoever built it wanted to be kept with it."""

    @classmethod
    def build(
        cls,
        vectors: np.ndarray,
        ids: Sequence[str],
        kind: Kind = "auto",
        *,
        queries: np.ndarray | None = None,
        about: About | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> "RetrievalIndex":
        """Index vectors.

        Args:
            vectors: [n, d], any float type, searched in float32. Unit vectors give cosines.
            ids: Unique texts, in row order.
            kind: "auto" is exact up to `EXACT_UP_TO` entries, "hnsw" up to `HNSW_UP_TO`, "ivfpq"
                beyond, and says which. "ivfpq" stores an eighth or less of the memory plus float16
                copies for an exact re-ranking.
            queries: Vectors of the kind that will be asked, to measure recall with; entries of the
                gallery if omitted. Exact search needs none.
            about: Covariates of the entries, in row order, for example `{"site": [...]}`: what a
                query can be narrowed by. They are saved with the index.
            facts: JSON values to keep with it, for example which model the vectors are of.

        Raises:
            UserError: Shapes, ids or kind are wrong; vectors are not finite.
        """
        vectors = _vectors(vectors)
        entries = entry_table(ids, about, len(vectors))
        if kind not in ("auto", *KINDS):
            raise UserError(f"index kind '{kind}' is unknown. {nearest(kind, ('auto', *KINDS))}")
        chosen = kind
        if kind == "auto":
            bounds = zip(KINDS, (EXACT_UP_TO, HNSW_UP_TO, np.inf), strict=True)
            chosen = next(name for name, bound in bounds if len(vectors) <= bound)
            say(
                f"index: {chosen} search over {len(vectors):,} entries (by size: exact up to "
                f"{EXACT_UP_TO:,}, hnsw up to {HNSW_UP_TO:,}, ivfpq beyond)."
            )
        if chosen == "ivfpq" and len(vectors) < MIN_IVFPQ:
            raise UserError(
                f"an ivfpq index needs {MIN_IVFPQ:,} vectors or more to train, got "
                f"{len(vectors):,}: use kind='exact', which is faster at this size."
            )
        norm = None if chosen == "exact" else _uneven_norm(vectors)
        index = _make(_lifted(vectors, norm), chosen)
        made = cls(index, entries, chosen, dim=vectors.shape[1], norm=norm, facts=facts)
        made._measure(vectors, queries)
        return made

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids in the order of their vectors."""
        return tuple(self._ids)

    @property
    def about(self) -> pl.DataFrame:
        """Covariates of the entries, in their order; no columns if none were given."""
        return self._entries.drop("id")

    def __len__(self) -> int:
        return len(self._ids)

    def add(
        self,
        vectors: np.ndarray,
        ids: Sequence[str],
        *,
        about: About | None = None,
    ) -> None:
        """Add entries; the recall of an approximate index is measured again.

        Raises:
            UserError: Another width, an id that is there already, or other covariates.
        """
        vectors = self._fitting(vectors)
        more = entry_table(ids, about, len(vectors))
        if known := set(self._ids).intersection(more["id"]):
            raise UserError(
                f"{len(known)} ids are in the index already: expected new ones; build the index "
                "again to replace entries."
            )
        if set(more.columns) != set(self._entries.columns):
            raise UserError(
                f"the index knows {listed(self.about)} of its entries but the new ones come with "
                f"{listed(more.drop('id'))}: give `about` the same columns."
            )
        # An entry longer than all before keeps its products; only the graph's way there is worse.
        self._index.add(_lifted(vectors, self._norm))
        self._entries = pl.concat(
            [self._entries, more.select(self._entries.columns)], how="vertical_relaxed"
        )
        self._ids = self._entries["id"].to_list()
        if self.kind != "exact":
            stored = self._store().reconstruct_n(0, len(self))
            self._measure(stored[:, : self.dim], None)

    def query(
        self,
        vectors: np.ndarray,
        k: int = 10,
        *,
        where: Mapping[str, Any] | None = None,
        among: np.ndarray | Sequence[str] | None = None,
    ) -> list[Neighbour]:
        """The `k` entries of largest inner product with each query.

        Args:
            vectors: One query [d] or several [q, d].
            k: How many; all entries if there are fewer.
            where: Only entries with these covariates: `{"site": "Leeds"}`, or several values in a
                list. The search is then exact, whatever the kind.
            among: Only these entries: a bool array [n] or ids. As exact as `where`.

        Returns:
            Rows (query, rank, id, score), by query and rank; equal scores in the order of entry.

        Raises:
            UserError: Another width, an unknown covariate or id, or no entry is left.
        """
        if k < 1:
            raise UserError(f"k={k}: ask for 1 neighbour or more.")
        queries = _lifted(self._fitting(np.atleast_2d(vectors)), self._norm, query=True)
        chosen = chosen_entries(self._entries, where, among)
        n_chosen = len(self) if chosen is None else int(chosen.sum())
        with self._threads(len(queries)):
            scores, places = self._search(queries, min(k, n_chosen), chosen)
        rows = []
        for query, (values, found) in enumerate(zip(scores, places, strict=True)):
            # An approximate search may find fewer than k: the rest is -1.
            known = found >= 0
            order = np.lexsort((found[known], -values[known]))
            rows += [
                Neighbour(query, rank, self._ids[found[known][i]], float(values[known][i]))
                for rank, i in enumerate(order, start=1)
            ]
        return rows

    def save(self, path: Path | str) -> None:
        """Write a folder: index.faiss, ids.parquet and meta.json, wholly or not at all."""
        import faiss

        with atomic_folder(Path(path)) as aside:
            faiss.write_index(self._index, str(aside / "index.faiss"))
            self._entries.write_parquet(aside / "ids.parquet")
            meta = {
                "format": _FORMAT,
                "kind": self.kind,
                "n": len(self),
                "dim": self.dim,
                "metric": "inner product",
                "recall_at_10": self.recall_at_10,
                "norm": self._norm,
                "facts": self.facts,
            }
            write_json(aside / "meta.json", meta)

    @classmethod
    def load(cls, path: Path | str) -> "RetrievalIndex":
        """Open a folder that `save` wrote.

        Raises:
            UserError: It is no index, of another format, or its parts do not fit.
        """
        import faiss

        folder = Path(path)
        names = ("meta.json", "ids.parquet", "index.faiss")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise UserError(
                f"{folder} is no retrieval index ({missing[0]} is missing): expected a folder that "
                "RetrievalIndex.save wrote."
            )
        meta = read_json(folder / "meta.json")
        if meta.get("format") not in _READABLE:
            raise UserError(
                f"{folder} has format {meta.get('format')}, expected {_FORMAT}: build it again."
            )
        try:
            index = faiss.read_index(str(folder / "index.faiss"))
            entries = pl.read_parquet(folder / "ids.parquet")
        except (RuntimeError, pl.exceptions.PolarsError) as error:
            text = " ".join(str(error).split())[:200]
            raise UserError(f"{folder} is damaged ({text}): build the index again.") from error
        if not index.ntotal == len(entries) == meta["n"]:
            raise UserError(
                f"{folder} holds {index.ntotal} vectors and {len(entries)} ids, expected "
                f"{meta['n']} of both: build the index again."
            )
        kept = {key: meta.get(key) for key in ("norm", "facts")}
        recall = meta["recall_at_10"]
        return cls(index, entries, meta["kind"], dim=meta["dim"], recall_at_10=recall, **kept)

    def _fitting(self, vectors: np.ndarray) -> np.ndarray:
        vectors = _vectors(vectors)
        if vectors.shape[1] != self.dim:
            raise UserError(
                f"the vectors are {vectors.shape[1]} wide but the index has {self.dim}: ask with "
                "embeddings of the model that the index was built with."
            )
        return vectors

    def _threads(self, n_queries: int) -> AbstractContextManager[None]:
        small = len(self) * self.dim * n_queries < 2**28
        return one_thread() if small else nullcontext()

    def _search(
        self, queries: np.ndarray, k: int, chosen: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and places [q, k]; exact among the chosen entries, if some are."""
        import faiss

        if chosen is None:
            return self._index.search(queries, k)
        bits = np.packbits(chosen, bitorder="little")
        selector: Any = faiss.IDSelectorBitmap
        parameters: Any = faiss.SearchParameters
        only = parameters(sel=selector(bits))
        return self._store().search(queries, k, params=only)

    def _store(self) -> Any:
        """The flat index inside: the vectors as exactly as they are kept."""
        import faiss

        index: Any = faiss.downcast_index(self._index)
        if self.kind == "hnsw":
            return faiss.downcast_index(index.storage)
        return faiss.downcast_index(index.refine_index) if self.kind == "ivfpq" else index

    def _measure(self, vectors: np.ndarray, queries: np.ndarray | None) -> None:
        """Compare an approximate index with exact search, and say so."""
        if self.kind == "exact":
            return
        if queries is None:
            rng = np.random.default_rng(0)
            queries = vectors[rng.choice(len(vectors), min(_N_MEASURED, len(vectors)), False)]
        asked = self._fitting(queries)
        k = min(10, len(self))
        _, found = self._index.search(_lifted(asked, self._norm, query=True), k)
        hits = 0
        for query, places in zip(asked, found, strict=True):
            scores = vectors @ query
            # By score: of entries that are equal, as shared haplotypes are, any will do.
            least = -np.partition(-scores, k - 1)[k - 1]
            hits += int((scores[places[places >= 0]] >= least).sum())
        self.recall_at_10 = hits / (k * len(asked))
        say(
            f"index: {self.kind} over {len(self):,} vectors finds {self.recall_at_10:.1%} of the "
            f"exact {k} nearest ({len(asked)} queries); kind 'exact' finds all."
        )


def _make(vectors: np.ndarray, kind: str) -> Any:
    import faiss

    n, dim = vectors.shape
    metric = faiss.METRIC_INNER_PRODUCT
    index: Any
    if kind == "exact":
        index = faiss.IndexFlatIP(dim)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, _HNSW_LINKS, metric)
        index.hnsw.efConstruction, index.hnsw.efSearch = _HNSW_BUILD, _HNSW_SEARCH
    else:
        # As many codes of 8 bits as divide the width, at least 4 numbers each where possible.
        n_codes = max(m for m in range(1, max(dim // 4, 1) + 1) if dim % m == 0)
        n_lists = int(4 * np.sqrt(n))
        # "np": no polysemous training, which takes minutes and serves a search that is not used.
        index = faiss.index_factory(dim, f"IVF{n_lists},PQ{n_codes}np,Refine(SQfp16)", metric)
        index.k_factor = 10
        inverted: Any = faiss.downcast_index(index.base_index)
        inverted.nprobe = max(n_lists // 8, 1)
        # Fewer points than FAISS would like for so many lists only makes them less even.
        inverted.cp.min_points_per_centroid = 1
        index.train(vectors)
    index.add(vectors)
    return index


def _vectors(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise UserError(
            f"vectors have shape {list(vectors.shape)}: expected [n, width], not empty."
        )
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if not np.isfinite(vectors).all():
        raise UserError(
            "vectors have NaN or infinite values: drop those entries or make them again."
        )
    return vectors


def _uneven_norm(vectors: np.ndarray) -> float | None:
    """The largest norm; None if all are equal to 1 %, as those of unit vectors are."""
    norms = np.linalg.norm(vectors, axis=1)
    return float(norms.max()) if norms.min() < 0.99 * norms.max() else None


def _lifted(vectors: np.ndarray, norm: float | None, *, query: bool = False) -> np.ndarray:
    """With a column that makes all norms `norm`, and is zero in queries; as they are for None."""
    if norm is None:
        return vectors
    # More columns of zeros make the width a multiple of 4, which product quantisation divides.
    more = np.zeros((len(vectors), 4 - vectors.shape[1] % 4), np.float32)
    if not query:
        more[:, 0] = np.sqrt(np.maximum(norm**2 - (vectors**2).sum(axis=1), 0))
    return np.concatenate([vectors, more], axis=1)
