import numpy as np
import pytest
import torch

from brainfusion.genetics.checks import (
    clean,
    coarsest,
    describe,
    find_alarms,
    resolution,
    text_ids,
)
from brainfusion.runtime.errors import UserError


def people(n: int = 200, width: int = 64, *, ratio: float = 3e-4, seed: int = 0) -> np.ndarray:
    """Vectors of people who differ by `ratio` of the mean, as pooled embeddings do."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=width)
    return (mean * (1 + ratio * rng.normal(size=(n, width)))).astype(np.float32)


def rounded(vectors: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(vectors).to(dtype).float().numpy()


def alarms_of(vectors: np.ndarray, **options):
    vectors = vectors.copy()
    mask = clean(vectors)
    figures = describe(vectors, mask, stored=resolution(vectors))
    found = find_alarms([figures], mask[:, None], where="x.pt", **options)
    return {alarm.name: alarm for alarm in found}


def test_precision_alarm_rings_for_bfloat16_and_not_for_float32():
    vectors = people(ratio=3e-4)
    assert "precision" not in alarms_of(vectors)
    alarm = alarms_of(rounded(vectors, torch.bfloat16))["precision"]
    assert alarm.figure < 2**-8
    assert "bfloat16" in alarm.finding
    assert "float32" in alarm.cure


def test_precision_alarm_rings_for_float16_below_its_own_step_only():
    assert "precision" in alarms_of(rounded(people(ratio=3e-4), torch.float16))
    assert "precision" not in alarms_of(rounded(people(ratio=2e-3), torch.float16))
    assert "precision" in alarms_of(rounded(people(ratio=2e-3), torch.bfloat16))


def test_centring_before_rounding_keeps_the_alarm_silent():
    vectors = people(ratio=3e-4)
    assert "precision" not in alarms_of(rounded(vectors - vectors.mean(axis=0), torch.bfloat16))


def test_the_alarm_measures_a_real_loss_of_between_person_variance():
    vectors = people(ratio=3e-4).astype(np.float64)
    stored = rounded(vectors.astype(np.float32), torch.bfloat16).astype(np.float64)
    a, b = vectors - vectors.mean(axis=0), stored - stored.mean(axis=0)
    agreement = np.array([np.corrcoef(a[:, k], b[:, k])[0, 1] for k in range(64) if b[:, k].any()])
    kept = np.sum(agreement**2) / 64
    assert kept < 0.5  # facts: 0.17 to 0.45 on real haplotypes


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.bfloat16, "bfloat16"), (torch.float16, "float16"), (torch.float32, "float32")],
)
def test_resolution_sees_through_a_cast_back_to_float32(dtype, name):
    vectors = rounded(people(ratio=0.1), dtype)
    vectors[3] = np.nan
    assert resolution(vectors) == name


def test_coarsest_type_wins():
    assert coarsest(["float32", "float16", "bfloat16"]) == "bfloat16"
    assert coarsest(["float64", "float32"]) == "float32"


def test_figures_match_a_direct_computation():
    vectors = people(ratio=1e-3, n=3000)
    vectors[::7] = np.nan
    direct = vectors[~np.isnan(vectors).any(axis=1)].astype(np.float64)
    mask = clean(vectors)
    figures = describe(vectors, mask, stored="float32")
    expected = np.median(direct.std(axis=0, ddof=1) / np.abs(direct.mean(axis=0)))
    assert figures.ratio == pytest.approx(expected, rel=1e-9)
    assert figures.n_present == len(direct)


def test_everyone_the_same_is_an_error_that_names_reference_only_extraction():
    vectors = np.repeat(people(n=1), 20, axis=0)
    with pytest.raises(UserError, match="reference-only extraction"):
        alarms_of(vectors)


def test_one_person_is_not_mistaken_for_everyone_the_same():
    assert alarms_of(people(n=1)) == {}


def test_genes_without_variation_are_counted():
    varying, flat = people(n=30), np.repeat(people(n=1), 30, axis=0)
    mask = np.ones(30, dtype=bool)
    figures = [describe(v, mask, stored="float32") for v in (varying, flat, varying, flat)]
    (alarm,) = find_alarms(figures, np.ones((30, 4), dtype=bool), where="x")
    assert (alarm.name, alarm.figure) == ("constant genes", 0.5)


def test_constant_columns_are_counted_as_a_share():
    vectors = people(n=30)
    vectors[:, :16] = 0.5
    assert alarms_of(vectors)["constant columns"].figure == pytest.approx(0.25)


def test_nan_inf_and_zero_vectors_are_masked_and_zeroed():
    vectors = people(n=10)
    vectors[1, 5], vectors[4, 0], vectors[7] = np.nan, np.inf, 0.0
    mask = clean(vectors)
    assert list(np.flatnonzero(~mask)) == [1, 4, 7]
    assert not vectors[~mask].any()


def test_missing_vectors_alarm_and_then_refuse():
    vectors = people(n=10)
    vectors[:4] = np.nan
    found = alarms_of(vectors)
    assert found["missing vectors"].figure == pytest.approx(0.4)
    assert found["people without vectors"].figure == pytest.approx(0.4)
    vectors[:6] = np.nan
    with pytest.raises(UserError, match="60%"):
        alarms_of(vectors)


def test_undeclared_provenance_is_an_alarm_with_its_keys():
    alarm = alarms_of(people(), undeclared=["layer", "reference"])["undeclared"]
    assert alarm.figure == 2
    assert "layer, reference" in alarm.finding


def test_ids_stay_text_with_their_leading_zeros():
    assert text_ids(["007", "7"], what="subject", where="x") == ("007", "7")
    assert text_ids(np.array([1000234, 5]), what="subject", where="x") == ("1000234", "5")
    assert text_ids(np.array([b"01", b"02"]), what="subject", where="x") == ("01", "02")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["1000234.0", "1000235.0"], "2 subject ids end in '.0'.*Read the id column as text"),
        (np.array([1.0, 2.0]), "lost leading zeros"),
        (["a", "b", "a", "c", "c", "d", "d", "e", "e"], r"4 duplicate.*\(a, c, d \.\.\.\)"),
        (["a", None], "must be text"),
        (["a", ""], "1 subject ids are empty"),
        (["a", "b "], "space"),
        (["-1", "5"], "negative"),
        ([], "no subjects"),
    ],
)
def test_ids_that_would_join_wrongly_are_refused(ids, message):
    with pytest.raises(UserError, match=message):
        text_ids(ids, what="subject", where="x")


def test_genes_are_in_one_namespace_without_versions():
    text_ids(["OXT", "AVP"], what="gene", where="x")
    text_ids(["ENSG00000101405", "ENSG00000101200"], what="gene", where="x")
    with pytest.raises(UserError, match="one namespace"):
        text_ids(["OXT", "ENSG00000101200"], what="gene", where="x")
    with pytest.raises(UserError, match="versions"):
        text_ids(["ENSG00000101405.4"], what="gene", where="x")
