"""A gallery on disk that answers "who is nearest to this vector", by inner product, with FAISS.

Exact search is the default: at 100,000 people of width 512, 1,000 queries cost about a second of
CPU, as much as 0.7 % of building an HNSW graph. Approximate kinds say what they lose: recall@10
against exact search, measured on the index itself.

Sources: Douze et al. 2024, arXiv:2401.08281 (FAISS); Malkov and Yashunin 2018 (HNSW); Jegou et al.
2011 (product quantisation).

Shape legend: n gallery entries, d width, q queries.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl

from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.files import atomic_folder, read_json, write_json
from brainfusion.runtime.logs import say
from brainfusion.runtime.threads import one_thread

Kind = Literal["auto", "exact", "hnsw", "ivfpq"]
KINDS = ("exact", "hnsw", "ivfpq")
EXACT_UP_TO = 200_000
"""Entries up to which "auto" is exact."""
MIN_IVFPQ = 10_000
"""Entries that product quantisation needs to train 256 centroids."""

_FORMAT = 1
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
        self, index: Any, ids: Sequence[str], kind: str, recall_at_10: float = 1.0
    ) -> None:
        self._index, self._ids = index, list(ids)
        self.kind = kind
        """What it is: "exact", "hnsw" or "ivfpq"."""
        self.recall_at_10 = recall_at_10
        """Share of the exact 10 nearest that it finds; 1 if exact, measured otherwise."""

    @classmethod
    def build(
        cls,
        vectors: np.ndarray,
        ids: Sequence[str],
        kind: Kind = "auto",
        *,
        queries: np.ndarray | None = None,
    ) -> "RetrievalIndex":
        """Index vectors.

        Args:
            vectors: [n, d], any float type, searched in float32. Unit vectors give cosines.
            ids: Unique texts, in row order.
            kind: "auto" is exact up to `EXACT_UP_TO` entries and HNSW beyond. "ivfpq" stores an
                eighth or less of the memory plus float16 copies for an exact re-ranking.
            queries: Vectors of the kind that will be asked, to measure recall with; entries of the
                gallery if omitted. Exact search needs none.

        Raises:
            UserError: Shapes, ids or kind are wrong; vectors are not finite.
        """
        vectors = _vectors(vectors)
        ids = _ids(ids, len(vectors))
        if kind not in ("auto", *KINDS):
            raise UserError(f"index kind '{kind}' is unknown. {nearest(kind, ('auto', *KINDS))}")
        chosen = kind
        if kind == "auto":
            chosen = "exact" if len(vectors) <= EXACT_UP_TO else "hnsw"
        if chosen == "ivfpq" and len(vectors) < MIN_IVFPQ:
            raise UserError(
                f"an ivfpq index needs {MIN_IVFPQ:,} vectors or more to train, got "
                f"{len(vectors):,}: use kind='exact', which is faster at this size."
            )
        made = cls(_make(vectors, chosen), ids, chosen)
        made._measure(vectors, queries)
        return made

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return int(self._index.d)

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids in the order of their vectors."""
        return tuple(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, vectors: np.ndarray, ids: Sequence[str]) -> None:
        """Add entries; the recall of an approximate index is measured again.

        Raises:
            UserError: Another width, or an id that is there already.
        """
        vectors = self._fitting(vectors)
        ids = _ids(ids, len(vectors))
        if known := set(self._ids).intersection(ids):
            raise UserError(
                f"{len(known)} ids are in the index already, for example '{min(known)}': expected "
                "new ones; build the index again to replace entries."
            )
        self._index.add(vectors)
        self._ids += ids
        if self.kind != "exact":
            self._measure(self._stored(), None)

    def query(self, vectors: np.ndarray, k: int = 10) -> list[Neighbour]:
        """The `k` entries of largest inner product with each query.

        Args:
            vectors: One query [d] or several [q, d].
            k: How many; all entries if there are fewer.

        Returns:
            Rows (query, rank, id, score), by query and rank; equal scores in the order of entry.
        """
        if k < 1:
            raise UserError(f"k={k}: ask for 1 neighbour or more.")
        queries = self._fitting(np.atleast_2d(vectors))
        with self._threads(len(queries)):
            scores, places = self._index.search(queries, min(k, len(self)))
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
            pl.DataFrame({"id": self._ids}, schema={"id": pl.String}).write_parquet(
                aside / "ids.parquet"
            )
            meta = {
                "format": _FORMAT,
                "kind": self.kind,
                "n": len(self),
                "dim": self.dim,
                "metric": "inner product",
                "recall_at_10": self.recall_at_10,
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
        if meta.get("format") != _FORMAT:
            raise UserError(
                f"{folder} has format {meta.get('format')}, expected {_FORMAT}: build it again."
            )
        try:
            index = faiss.read_index(str(folder / "index.faiss"))
            ids = pl.read_parquet(folder / "ids.parquet")["id"].to_list()
        except (RuntimeError, pl.exceptions.PolarsError) as error:
            text = " ".join(str(error).split())[:200]
            raise UserError(f"{folder} is damaged ({text}): build the index again.") from error
        if not index.ntotal == len(ids) == meta["n"]:
            raise UserError(
                f"{folder} holds {index.ntotal} vectors and {len(ids)} ids, expected {meta['n']} "
                "of both: build the index again."
            )
        return cls(index, ids, meta["kind"], meta["recall_at_10"])

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

    def _stored(self) -> np.ndarray:
        """The vectors of an approximate index, as exactly as it keeps them."""
        import faiss

        index: Any = faiss.downcast_index(self._index)
        exact = index.refine_index if self.kind == "ivfpq" else index
        return faiss.downcast_index(exact).reconstruct_n(0, len(self))

    def _measure(self, vectors: np.ndarray, queries: np.ndarray | None) -> None:
        """Compare an approximate index with exact search, and say so."""
        if self.kind == "exact":
            return
        if queries is None:
            rng = np.random.default_rng(0)
            queries = vectors[rng.choice(len(vectors), min(_N_MEASURED, len(vectors)), False)]
        asked = self._fitting(queries)
        k = min(10, len(self))
        _, found = self._index.search(asked, k)
        hits = 0
        for query, places in zip(asked, found, strict=True):
            scores = vectors @ query
            hits += len(np.intersect1d(np.argpartition(-scores, k - 1)[:k], places))
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


def _ids(ids: Sequence[str], n: int) -> list[str]:
    ids = [str(value) for value in ids]
    if len(ids) != n:
        raise UserError(f"{len(ids)} ids for {n} vectors: give one each, in row order.")
    if len(set(ids)) != n:
        raise UserError(f"{n - len(set(ids))} ids repeat: expected unique ids; drop the copies.")
    return ids
