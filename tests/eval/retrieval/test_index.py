import numpy as np
import polars as pl
import pytest

from brainfusion.data.oracle import inner_product_form
from brainfusion.eval.retrieval import index as module
from brainfusion.eval.retrieval.index import RetrievalIndex
from brainfusion.runtime.errors import UserError


def gallery(n: int, dim: int = 16, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    vectors = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), [f"{i:04d}" for i in range(n)]


def test_exact_answers_are_those_of_a_full_sort() -> None:
    vectors, ids = gallery(200)
    index = RetrievalIndex.build(vectors, ids)
    queries = gallery(5, seed=1)[0]
    rows = index.query(queries, k=7)
    scores = queries @ vectors.T
    assert index.kind == "exact"
    assert [row.id for row in rows] == [ids[j] for s in scores for j in np.argsort(-s)[:7]]
    assert [(row.query, row.rank) for row in rows] == [
        (q, r) for q in range(5) for r in range(1, 8)
    ]
    np.testing.assert_allclose([row.score for row in rows[:7]], -np.sort(-scores[0])[:7], atol=1e-6)


def test_more_neighbours_than_entries_gives_them_all() -> None:
    vectors, ids = gallery(4)
    rows = RetrievalIndex.build(vectors, ids).query(vectors[2], k=10)
    assert [row.rank for row in rows] == [1, 2, 3, 4]
    assert rows[0].id == "0002"


def test_equal_scores_come_in_the_order_of_entry() -> None:
    rows = RetrievalIndex.build(np.ones((5, 3)), list("edcba")).query(np.ones(3), k=5)
    assert [row.id for row in rows] == list("edcba")


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_a_saved_index_answers_the_same(tmp_path, kind) -> None:
    vectors, ids = gallery(300)
    built = RetrievalIndex.build(vectors, ids, kind=kind)
    built.save(tmp_path / "index")
    loaded = RetrievalIndex.load(tmp_path / "index")
    assert loaded.query(vectors[:9], k=5) == built.query(vectors[:9], k=5)
    assert (loaded.kind, loaded.recall_at_10, len(loaded)) == (kind, built.recall_at_10, 300)
    assert loaded.ids == tuple(ids)
    assert sorted(p.name for p in (tmp_path / "index").iterdir()) == [
        "ids.parquet",
        "index.faiss",
        "meta.json",
    ]


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_added_entries_are_found_and_repeated_ids_refused(kind) -> None:
    vectors, ids = gallery(60)
    index = RetrievalIndex.build(vectors[:40], ids[:40], kind=kind)
    index.add(vectors[40:], ids[40:])
    assert index.query(vectors[55], k=1)[0].id == "0055"
    with pytest.raises(UserError, match="2 ids are in the index already"):
        index.add(vectors[:3], ["new", "0000", "0001"])
    assert len(index) == 60


def test_auto_becomes_approximate_beyond_its_limit_and_says_what_that_loses(
    monkeypatch, capsys
) -> None:
    monkeypatch.setattr(module, "EXACT_UP_TO", 500)
    vectors, ids = gallery(600)
    index = RetrievalIndex.build(vectors, ids)
    assert index.kind == "hnsw"
    assert 0.95 < index.recall_at_10 <= 1
    assert f"{index.recall_at_10:.1%} of the exact 10 nearest" in capsys.readouterr().err


def test_quantised_index_reports_its_measured_recall(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(module, "MIN_IVFPQ", 2_000)
    vectors, ids = gallery(2_000, dim=8)
    built = RetrievalIndex.build(vectors, ids, kind="ivfpq")
    assert built.recall_at_10 > 0.6
    exact = RetrievalIndex.build(vectors, ids, kind="exact")
    queries = gallery(50, dim=8, seed=2)[0]
    same = {(r.query, r.id) for r in exact.query(queries)} & {
        (r.query, r.id) for r in built.query(queries)
    }
    assert len(same) / 500 == pytest.approx(built.recall_at_10, abs=0.1)
    built.save(tmp_path / "index")
    loaded = RetrievalIndex.load(tmp_path / "index")
    assert loaded.query(queries) == built.query(queries)
    loaded.add(gallery(1, dim=8, seed=9)[0], ["new"])
    assert loaded.query(gallery(1, dim=8, seed=9)[0], k=1)[0].id == "new"
    assert "ivfpq over 2,001 vectors" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["exact", "hnsw", "ivfpq"])
def test_a_search_narrowed_by_covariates_is_exact_in_every_kind(
    tmp_path, kind, monkeypatch
) -> None:
    monkeypatch.setattr(module, "MIN_IVFPQ", 1_000)
    vectors, ids = gallery(1_000, dim=8)
    site = [("A", "B", "C", None)[i % 4] for i in range(1_000)]
    about = pl.DataFrame({"site": site, "wave": [i % 2 + 1 for i in range(1_000)]})
    built = RetrievalIndex.build(vectors, ids, kind=kind, about=about)
    built.save(tmp_path / "index")
    index = RetrievalIndex.load(tmp_path / "index")
    assert index.about.equals(about)
    queries = gallery(3, dim=8, seed=5)[0]
    stored = vectors.astype(np.float16) if kind == "ivfpq" else vectors
    scores = queries @ stored.astype(np.float32).T
    even = np.array(["0", "2", "4", "6", "8"])
    for mask, narrowed in (
        (np.array([s == "B" for s in site]), {"where": {"site": "B"}}),
        (np.array([s in "AC" for s in map(str, site)]), {"where": {"site": ["A", "C"], "wave": 1}}),
        (np.arange(1_000) < 4, {"among": ids[:4]}),
        (np.array([i[-1] in even for i in ids]), {"among": np.arange(1_000) % 2 == 0}),
        (np.arange(1_000) == 1, {"among": ids[:4], "where": {"site": "B"}}),
    ):
        allowed = np.flatnonzero(mask)
        expected = [ids[j] for s in scores for j in allowed[np.argsort(-s[allowed])[:6]]]
        assert [row.id for row in index.query(queries, k=6, **narrowed)] == expected


def test_what_cannot_be_narrowed_is_one_clear_line() -> None:
    vectors, ids = gallery(6)
    index = RetrievalIndex.build(vectors, ids, about={"site": list("ABABAB"), "wave": [1] * 6})
    for how, message in (
        ({"where": {"stie": "A"}}, "no 'stie' of its entries. Did you mean 'site'"),
        ({"where": {"site": "D"}}, "no entry has site 'D'"),
        ({"where": {"wave": 2}}, "no entry has wave '2'"),
        ({"among": ["0001", "x", "y"]}, "2 of 3 ids"),
        ({"among": np.ones(5, bool)}, "each of the 6 entries"),
        ({"among": np.zeros(6, bool)}, "none of the 6 entries is left"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            index.query(vectors[0], **how)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="2 values for 6 vectors"):
        RetrievalIndex.build(vectors, ids, about={"site": ["A", "B"]})
    with pytest.raises(UserError, match="column 'id'"):
        RetrievalIndex.build(vectors, ids, about={"id": ids})
    with pytest.raises(
        UserError, match="knows site, wave of its entries but the new ones come with"
    ):
        index.add(gallery(1, seed=3)[0], ["new"])
    index.add(gallery(1, seed=3)[0], ["new"], about={"wave": [2], "site": ["D"]})
    assert index.query(vectors[0], where={"site": "D"})[0].id == "new"


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
def test_an_index_of_score_vectors_of_unequal_norm_still_finds_the_nearest(
    tmp_path, kind, monkeypatch
) -> None:
    # The vectors of a log density ratio: a plain graph finds under half of the nearest here.
    monkeypatch.setattr(module, "MIN_IVFPQ", 1_000)
    rng = np.random.default_rng(0)
    rho = np.full(48, 0.6)
    u = rng.standard_normal((3_000, 48))
    v = rho * u + np.sqrt(1 - rho**2) * rng.standard_normal(u.shape)
    queries, entries = inner_product_form(u, v, rho)
    ids = [str(i) for i in range(3_000)]
    index = RetrievalIndex.build(entries, ids, kind=kind, queries=queries[:200])
    assert index.recall_at_10 > {"hnsw": 0.9, "ivfpq": 0.55}[kind]
    assert index.dim == entries.shape[1]
    exact = RetrievalIndex.build(entries, ids, kind="exact")
    index.save(tmp_path / "index")
    for found in (index, RetrievalIndex.load(tmp_path / "index")):
        ours = {(r.query, r.id): r.score for r in found.query(queries[:50])}
        theirs = {(r.query, r.id): r.score for r in exact.query(queries[:50])}
        both = ours.keys() & theirs.keys()
        assert len(both) > {"hnsw": 450, "ivfpq": 270}[kind]
        np.testing.assert_allclose([ours[x] for x in both], [theirs[x] for x in both], atol=0.05)
    index.add(2 * entries[:5], [f"long {i}" for i in range(5)])
    assert len(index) == 3_005


def test_a_larger_gallery_becomes_quantised_and_the_thresholds_are_said(
    monkeypatch, capsys
) -> None:
    monkeypatch.setattr(module, "EXACT_UP_TO", 500)
    monkeypatch.setattr(module, "HNSW_UP_TO", 900)
    monkeypatch.setattr(module, "MIN_IVFPQ", 900)
    for n, kind in ((500, "exact"), (600, "hnsw"), (1_000, "ivfpq")):
        assert RetrievalIndex.build(*gallery(n, dim=8)).kind == kind
        said = capsys.readouterr().err
        assert f"index: {kind} search over {n:,} entries (by size: exact up to 500, hnsw" in said


def test_wrong_input_is_one_clear_line(tmp_path) -> None:
    vectors, ids = gallery(5)
    index = RetrievalIndex.build(vectors, ids)
    with pytest.raises(UserError, match="8 wide but the index has 16"):
        index.query(np.zeros((2, 8)))
    with pytest.raises(UserError, match="k=0"):
        index.query(vectors, k=0)
    with pytest.raises(UserError, match="1 ids repeat"):
        RetrievalIndex.build(vectors, ["a", "a", "b", "c", "d"])
    with pytest.raises(UserError, match="4 ids for 5 vectors"):
        RetrievalIndex.build(vectors, ids[:4])
    with pytest.raises(UserError, match="Did you mean 'hnsw'"):
        RetrievalIndex.build(vectors, ids, kind="hnws")
    with pytest.raises(UserError, match="10,000 vectors or more"):
        RetrievalIndex.build(vectors, ids, kind="ivfpq")
    with pytest.raises(UserError, match="NaN"):
        RetrievalIndex.build(vectors * np.nan, ids)
    with pytest.raises(UserError, match="no retrieval index"):
        RetrievalIndex.load(tmp_path / "nowhere")


def test_a_damaged_index_is_refused(tmp_path) -> None:
    vectors, ids = gallery(30)
    RetrievalIndex.build(vectors, ids).save(tmp_path / "index")
    file = tmp_path / "index" / "index.faiss"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        RetrievalIndex.load(tmp_path / "index")


def test_recall_counts_equal_entries_alike_and_facts_are_kept(tmp_path):
    # Shared haplotypes are equal vectors: which of them is found makes no difference.
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.normal(size=(60, 8)), 20, axis=0)
    queries = rng.normal(size=(30, 8))
    ids = [str(i) for i in range(len(vectors))]
    facts = {"model_hash": "abc", "gallery": "genes"}
    index = RetrievalIndex.build(vectors, ids, "hnsw", queries=queries, facts=facts)
    found, exact = index.query(queries, 10), -np.sort(-(queries @ vectors.T), axis=1)[:, 9]
    hits = sum(row.score >= exact[row.query] - 1e-5 for row in found)
    assert index.recall_at_10 == pytest.approx(hits / 300, abs=0.02)
    index.save(tmp_path / "index")
    assert RetrievalIndex.load(tmp_path / "index").facts == facts
    assert RetrievalIndex.build(vectors, ids, "exact").facts == {}
