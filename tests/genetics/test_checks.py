import numpy as np
import pytest
import torch

from brainfusion.genetics.checks import (
    find_alarms,
    indel_alarms,
    mixture_alarms,
    padding_alarms,
    to_bfloat16,
    to_float16,
    variance_kept,
)
from brainfusion.genetics.ids import text_ids
from brainfusion.genetics.statistics import clean, coarsest, describe, resolution
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
    found = find_alarms([figures], mask.astype(int), where="x.pt", **options)
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
    (alarm,) = find_alarms(figures, np.full(30, 4), where="x")
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
        (
            ["a", "b", "a", "c", "c", "d", "d", "e", "e"],
            r"4 duplicate.*\(row 3, row 5, row 7 \.\.\.\)",
        ),
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


# -- what storage keeps ----------------------------------------------------------------------------


def haplotype_people(ratio: float, *, n: int = 300, width: int = 512, seed: int = 0) -> np.ndarray:
    """People who differ by some dozens of alleles, each column by its own share of its mean."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=width)
    alleles = rng.binomial(1, 0.2, size=(n, 50)) @ rng.normal(size=(50, width))
    alleles = (alleles - alleles.mean(axis=0)) / alleles.std(axis=0)
    share = ratio * np.exp(rng.normal(size=width))  # the median column differs by `ratio`
    return (mean * (1 + share * alleles)).astype(np.float32)


@pytest.mark.parametrize(
    ("ratio", "bfloat16", "float16"), [(1e-3, 0.45, 0.93), (6e-4, 0.27, 0.83), (3.3e-4, 0.17, 0.69)]
)
def test_variance_kept_agrees_with_what_real_haplotypes_kept(ratio, bfloat16, float16):
    kept = variance_kept(haplotype_people(ratio))
    # 300 people of the 1000 Genomes at one locus; columns here are drawn, so within 0.06
    assert kept["bfloat16"] == pytest.approx(bfloat16, abs=0.06)
    assert kept["float16"] == pytest.approx(float16, abs=0.06)
    assert kept["centred bfloat16"] > 0.999
    assert kept["centred float16"] > 0.999
    assert kept["float32"] == 1.0


def test_variance_kept_is_the_mean_over_genes_and_leaves_out_absent_vectors():
    fine, coarse = haplotype_people(1e-2), haplotype_people(3e-4)
    both = np.stack([fine, coarse], axis=1)
    mask = np.ones((300, 2), dtype=bool)
    mask[:50, 0] = False
    both[:50, 0] = 0.0
    expected = [variance_kept(fine[50:])["float16"], variance_kept(coarse)["float16"]]
    assert variance_kept(both, mask)["float16"] == pytest.approx(np.mean(expected), rel=1e-12)
    flat = np.ones((10, 4), dtype=np.float32)
    assert np.isnan(variance_kept(flat)["bfloat16"])


def test_variance_kept_of_what_rounds_away_is_zero():
    vectors = (1 + 1e-5 * np.random.default_rng(0).normal(size=(50, 8))).astype(np.float32)
    kept = variance_kept(vectors)
    assert kept["bfloat16"] == 0.0
    assert kept["centred bfloat16"] > 0.999


def test_rounding_is_that_of_torch():
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    values[:4] = [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8]  # ties
    np.testing.assert_array_equal(to_bfloat16(values), rounded(values, torch.bfloat16))
    np.testing.assert_array_equal(to_float16(values), rounded(values, torch.float16))


# -- what was mixed --------------------------------------------------------------------------------


def test_several_devices_in_one_table_are_an_alarm_with_the_share_of_the_smaller():
    alarms = mixture_alarms({"device": {"H100": 75, "L40S": 25}, "version": {"0.6.0": 100}})
    (alarm,) = alarms
    assert (alarm.name, alarm.figure) == ("mixed device", 0.25)
    assert "H100 75%, L40S 25%" in alarm.finding


def test_indel_carriers_are_an_alarm_for_6_mers_only():
    assert indel_alarms(0.1, unit_bp=1) == []
    assert indel_alarms(0.0, unit_bp=6) == []
    assert indel_alarms(None, unit_bp=6) == []
    (alarm,) = indel_alarms(0.1, unit_bp=6)
    assert alarm.figure == 0.1
    assert "single-base variants only" in alarm.cure


def test_padding_is_an_alarm_where_the_model_has_no_mask():
    assert padding_alarms(0.5, model="evo2") == []
    (alarm,) = padding_alarms(0.5, model="caduceus")
    assert alarm.figure == 0.5


def test_many_people_with_the_same_vectors_are_an_alarm():
    vectors = people(n=40)
    assert "repeated people" not in alarms_of(vectors, n_twins=10)
    alarm = alarms_of(vectors, n_twins=11)["repeated people"]
    assert alarm.figure == pytest.approx(11 / 40)


def test_the_instance_of_a_visit_is_taken_off_ids_and_said(capsys):
    ids = text_ids(["1000234-2.0", "0001235-2.0"], what="subject", where="x")
    assert ids == ("1000234", "0001235")
    said = capsys.readouterr().err
    assert "took the instance (such as '-2.0') off 2 of 2 subject ids" in said
    assert "1000234" not in said
    with pytest.raises(UserError, match="1 duplicate"):
        text_ids(["1000234-2.0", "1000234-3.0"], what="subject", where="x")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["HGNC:8528", "OXT"], "HGNC's numbers, the others are not"),
        (["5020", "OXT"], "Entrez numbers, the others are not"),
        (["OXT", "oxt"], "only in upper and lower case"),
        (["OXT", "OXT"], r"1 duplicate gene ids \(OXT\)"),
    ],
)
def test_gene_ids_of_several_namespaces_are_refused(ids, message):
    with pytest.raises(UserError, match=message):
        text_ids(ids, what="gene", where="x")


def test_ids_of_people_are_in_no_error():
    for ids in (["12345", "12345"], ["12345.0"], ["-12345"], ["1.2345e+04"], ["12345 "]):
        with pytest.raises(UserError) as info:
            text_ids(ids, what="subject", where="x")
        assert "2345" not in str(info.value)
