import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brainfusion.data.oracle import inner_product_form, pmi_scores
from brainfusion.eval.retrieval import metrics as retrieval
from brainfusion.eval.retrieval.metrics import (
    metrics_from_scores,
    retrieval_metrics,
    stratified_auc,
)
from brainfusion.eval.statistics import block_permutations
from brainfusion.runtime.errors import UserError
from tests.oracles import retrieval as oracle


def coupled(n: int, rho: float, *, k: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((n, k))
    return u, rho * u + np.sqrt(1 - rho**2) * rng.standard_normal((n, k))


@st.composite
def tied_problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    # Few small whole numbers: exact in every precision, and full of ties and repeats.
    n, m, d = draw(st.integers(1, 7)), draw(st.integers(3, 9)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    top = draw(st.integers(0, 2))
    queries, gallery = rng.integers(-top, top + 1, (n, d)), rng.integers(-top, top + 1, (m, d))
    sizes = rng.integers(1, draw(st.integers(1, 3)) + 1, n)  # one positive, or up to three
    return queries, gallery, [list(rng.choice(m, min(s, m - 1), replace=False)) for s in sizes]


def as_given(values: np.ndarray, dtype: str) -> np.ndarray | torch.Tensor:
    """The numbers as a caller may hold them."""
    if dtype.startswith("torch"):
        return torch.from_numpy(values).to(getattr(torch, dtype.removeprefix("torch.")))
    return values.astype(dtype)


@settings(max_examples=150, deadline=None)
@given(
    tied_problems(),
    st.sampled_from([1, 2, 3, 2048]),
    st.sampled_from(["f2", "f4", "f8", "torch.bfloat16", "torch.float32"]),
)
def test_metrics_equal_brute_force_with_ties_in_any_tile(problem, tile, dtype) -> None:
    queries, gallery, positives = problem
    scores = queries @ gallery.T
    turned = oracle.turned(positives, len(gallery))
    if any(len(own) == len(queries) for own in turned):
        return  # an entry that belongs to all queries has no negative
    q, g = as_given(queries, dtype), as_given(gallery, dtype)
    for found in (
        retrieval_metrics(q, g, positives=positives, tile=tile),
        metrics_from_scores(as_given(scores, dtype), positives=positives, tile=tile),
    ):
        for direction, matrix, own in (
            ("query_to_gallery", scores, positives),
            ("gallery_to_query", scores.T, turned),
        ):
            for name, value in oracle.metrics(matrix, own).items():
                assert found[direction][name] == pytest.approx(value, abs=1e-9), (direction, name)


def test_a_collapsed_encoder_scores_chance() -> None:
    gallery = np.random.default_rng(0).standard_normal((40, 16))
    for queries in (np.ones((40, 16)), gallery * 0 + 0.3):
        found = retrieval_metrics(queries, np.ones((40, 16)) / 3)["query_to_gallery"]
        for name in (
            "recall_at_1",
            "recall_at_5",
            "recall_at_10",
            "mrr",
            "median_rank",
            "mean_rank",
            "map",
        ):
            assert found[name] == pytest.approx(found[f"{name}_chance"])
        assert found["auc"] == 0.5 == found["chance"]
        # How wide the ties are shows: all others are better, or none.
        assert (found["auc_optimistic"], found["auc_pessimistic"]) == (1, 0)
        assert (found["mean_rank_optimistic"], found["mean_rank_pessimistic"]) == (1, 40)


def test_identical_vectors_tie_exactly_wherever_their_tiles_are() -> None:
    rng = np.random.default_rng(1)
    distinct = rng.standard_normal((5, 384)).astype(np.float32)
    kind = np.arange(300) % 5
    found = retrieval_metrics(distinct[kind], distinct[kind], tile=37)["query_to_gallery"]
    # The 59 others of the same vector tie with the partner; nobody else is nearer than itself.
    assert found["auc"] == pytest.approx(1 - 59 / 2 / 299, abs=1e-12)
    assert found["recall_at_10"] == pytest.approx(10 / 60, abs=1e-12)


def test_chance_levels_have_their_closed_forms() -> None:
    found = retrieval_metrics(*coupled(25, 0.5))["gallery_to_query"]
    assert found["recall_at_5_chance"] == pytest.approx(5 / 25)
    assert found["median_rank_chance"] == 13
    assert found["mean_rank_chance"] == pytest.approx(13)
    assert found["mrr_chance"] == pytest.approx((1 / np.arange(1, 26)).sum() / 25)
    assert (found["n_gallery"], found["n_queries"], found["unit"]) == (25, 25, "person")


def test_map_is_the_mrr_for_one_positive_and_its_chance_level_that_of_random_scores() -> None:
    one = retrieval_metrics(*coupled(40, 0.6))["query_to_gallery"]
    for ending in ("", "_optimistic", "_pessimistic", "_chance"):
        assert one[f"map{ending}"] == pytest.approx(one[f"mrr{ending}"])
    rng = np.random.default_rng(0)
    own = [[0, 1, 2], [3, 4], [5]]
    drawn = [
        metrics_from_scores(rng.standard_normal((3, 9)), positives=own)["query_to_gallery"]
        for _ in range(800)
    ]
    values = [row["map"] for row in drawn]
    assert np.mean(values) == pytest.approx(
        drawn[0]["map_chance"], abs=4 * np.std(values) / np.sqrt(800)
    )


def test_vectors_are_taken_as_they_are_and_not_made_unit_norm() -> None:
    u, v = coupled(80, 0.5, k=3)
    rho = np.full(3, 0.5)
    queries, entries = inner_product_form(u, v, rho)
    found = retrieval_metrics(queries, entries)["query_to_gallery"]
    exact = metrics_from_scores(pmi_scores(u, v, rho))["query_to_gallery"]
    assert found["auc"] == pytest.approx(exact["auc"], abs=1e-4)
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, entries)]
    assert abs(retrieval_metrics(*units)["query_to_gallery"]["auc"] - found["auc"]) > 0.003


def test_recall_beyond_the_gallery_is_certain() -> None:
    found = retrieval_metrics(*coupled(4, 0.0))["query_to_gallery"]
    assert found["recall_at_5"] == found["recall_at_10_chance"] == 1


def test_gallery_entries_without_a_query_compete_but_do_not_ask() -> None:
    u, v = coupled(20, 0.9)
    more = np.concatenate([np.random.default_rng(3).standard_normal((30, 8)), v])
    found = retrieval_metrics(u, more, positives=np.arange(30, 50), n_permutations=50)
    assert found["query_to_gallery"]["n_gallery"] == 50
    assert found["gallery_to_query"]["n_queries"] == 20
    assert found["gallery_to_query"]["n_gallery"] == 20
    assert found["query_to_gallery"]["p_value"] < 0.05


def test_permutation_p_value_is_that_of_reassigned_partners() -> None:
    rng = np.random.default_rng(4)
    scores = rng.integers(0, 3, (12, 12)) + 0.7 * np.eye(12)
    families = ["a", "a", "b", "b", "c", "c", None, None, None, None, None, None]
    blocks = [0] * 6 + [1] * 6
    found = metrics_from_scores(scores, families=families, blocks=blocks, n_permutations=60, seed=5)
    moves = block_permutations(12, families, blocks, 60, seed=5)
    for direction, matrix in (("query_to_gallery", scores), ("gallery_to_query", scores.T)):
        observed = oracle.permuted_auc(matrix, range(12))
        turned = moves if direction == "query_to_gallery" else np.argsort(moves, axis=1)
        null = np.array([oracle.permuted_auc(matrix, move) for move in turned])
        assert found[direction]["auc"] == pytest.approx(observed)
        expected = (1 + (null >= observed - 1e-6).sum()) / 61
        assert found[direction]["p_value"] == pytest.approx(expected)


def test_signal_is_found_and_shuffled_partners_are_not() -> None:
    u, v = coupled(150, 0.4)
    found = retrieval_metrics(u, v, n_permutations=200, n_bootstrap=200)
    shuffled = retrieval_metrics(
        u, v[np.random.default_rng(1).permutation(150)], n_permutations=200, n_bootstrap=200
    )
    for direction in found:
        assert found[direction]["p_value"] == pytest.approx(1 / 201)
        assert found[direction]["ci_low"] > 0.6
        control = shuffled[direction]
        assert control["p_value"] > 0.01
        assert abs(control["auc"] - 0.5) < 3 * control["standard_error"]


def test_p_values_of_unrelated_modalities_are_uniform() -> None:
    p = []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        family = rng.integers(0, 25, 40)
        u, v = (rng.standard_normal((25, 4))[family] + rng.standard_normal((40, 4)) for _ in "uv")
        found = retrieval_metrics(u, v, families=family, n_permutations=99, seed=seed)
        p.append(found["query_to_gallery"]["p_value"])
    # 120 uniform draws: the Kolmogorov distance stays below 0.15 with probability 0.99.
    steps = np.arange(1, 121) / 120
    assert np.abs(np.sort(p) - steps).max() < 0.15


def test_standard_error_is_the_spread_over_fresh_cohorts() -> None:
    # 150 cohorts: their spread is known to 6 %, the mean of 20 standard errors better than that.
    aucs, errors = [], []
    for seed in range(150):
        u, v = coupled(60, 0.35, k=4, seed=seed)
        found = retrieval_metrics(u, v, n_bootstrap=200 if seed < 20 else 0)["query_to_gallery"]
        aucs.append(found["auc"])
        errors += [found["standard_error"]] if seed < 20 else []
    assert np.mean(errors) == pytest.approx(np.std(aucs), rel=0.2)


def test_relatives_widen_the_interval() -> None:
    u, v = coupled(40, 0.4)
    rng = np.random.default_rng(0)
    u, v = np.repeat(u, 4, axis=0), np.repeat(v, 4, axis=0)
    u, v = (x + 0.05 * rng.standard_normal(x.shape) for x in (u, v))
    errors = [
        retrieval_metrics(u, v, families=families, n_bootstrap=400)["query_to_gallery"]
        for families in (np.repeat(np.arange(40), 4), None)
    ]
    assert errors[0]["standard_error"] > 1.5 * errors[1]["standard_error"]


def test_alignment_that_rests_on_site_disappears_within_site_and_in_blocks() -> None:
    rng = np.random.default_rng(7)
    site = rng.integers(0, 3, 120)
    centre = rng.standard_normal((3, 8))
    u, v = (2 * centre[site] + rng.standard_normal((120, 8)) for _ in range(2))
    naive = retrieval_metrics(u, v, n_permutations=100)["query_to_gallery"]
    blocked = retrieval_metrics(u, v, blocks=site, n_permutations=100)["query_to_gallery"]
    assert naive["auc"] > 0.6
    assert naive["p_value"] < 0.02
    assert blocked["p_value"] > 0.05
    labels = {"same site": [f"s{s}" for s in site[:-1]] + [None]}
    rows = stratified_auc(u, v, labels, n_permutations=100, n_bootstrap=100)
    assert [row["direction"] for row in rows] == ["query_to_gallery", "gallery_to_query"]
    for row in rows:
        assert (row["n_strata"], row["n_left_out"]) == (3, 1)
        assert abs(row["auc"] - 0.5) < 3 * row["standard_error"]
        assert row["p_value"] > 0.05


def test_stratified_auc_is_the_mean_over_people_of_separate_galleries() -> None:
    u, v = coupled(30, 0.6)
    site = np.array([0] * 8 + [1] * 22)
    row = stratified_auc(u, v, {"site": site})[0]
    parts = [retrieval_metrics(u[site == s], v[site == s])["query_to_gallery"] for s in (0, 1)]
    expected = (8 * parts[0]["auc"] + 22 * parts[1]["auc"]) / 30
    assert row["auc"] == pytest.approx(expected)
    alone = stratified_auc(u, v, {"everyone alone": np.arange(30)}, n_permutations=5)[0]
    assert alone["auc"] is None
    assert alone["n_left_out"] == 30


def test_a_permutation_of_too_many_people_tests_whole_families(monkeypatch) -> None:
    monkeypatch.setattr(retrieval, "MAX_PERMUTED", 30)
    u, v = coupled(60, 0.8)
    found = retrieval_metrics(u, v, families=np.repeat(np.arange(30), 2), n_permutations=99)
    assert found["query_to_gallery"]["p_value"] == 0.01


def test_the_seed_decides_everything() -> None:
    u, v = coupled(30, 0.3)
    runs = [retrieval_metrics(u, v, n_permutations=20, n_bootstrap=20, seed=s) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gallery": np.zeros((4, 3))}, "wide"),
        ({"gallery": np.zeros((5, 2))}, "without `positives`"),
        ({"gallery": np.full((4, 2), np.nan)}, "4 of 4 vectors have NaN"),
        ({"positives": [0, 1, 2, 9]}, "0 to 3"),
        ({"positives": [[0], [], [1], [2]]}, "no positive"),
        ({"positives": [0, 0, 1, 2], "n_permutations": 5}, "of its own"),
        ({"families": ["a"]}, "1 labels for 4 people"),
    ],
)
def test_wrong_input_is_one_clear_line(change, message) -> None:
    given = {"queries": np.zeros((4, 2)), "gallery": np.zeros((4, 2))} | change
    with pytest.raises(UserError, match=message) as caught:
        retrieval_metrics(given.pop("queries"), given.pop("gallery"), **given)
    assert "\n" not in str(caught.value)
