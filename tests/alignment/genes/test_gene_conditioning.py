import numpy as np
import pytest
from safetensors.numpy import load, save

from brainfusion.alignment import Conditioner, GeneArray, GeneConditioner, GeneVectors
from brainfusion.alignment.genes.conditioning import GeneArrays
from brainfusion.alignment.genes.vectors import Gene
from brainfusion.runtime.errors import UserError
from tests.alignment.genes.gene_cohort import gene_cohort

WAYS = {"together": {"together": True, "n_components": 10}, "apart": {"together": False}}
WAYS["apart"]["n_components"] = 4


def vectors(
    n: int = 60, g: int = 5, h: int = 6, *, missing: float = 0.0, seed: int = 0
) -> GeneVectors:
    random = np.random.default_rng(seed)
    x = np.einsum("ngh,ghk->ngk", random.normal(size=(n, g, h)), random.normal(size=(g, h, h)))
    x = (x * 0.01 + 20.0).astype(np.float32)
    mask = random.random((n, g)) >= missing
    mask[:, 0] = True
    return GeneVectors.of(
        {"evo2": GeneArray(genes=tuple("ABCDE"[:g]), vectors=x, mask=mask)},
    )


def changed(g: GeneVectors, /, **changes) -> GeneVectors:
    """The same with another array, mask or order of the only model's genes."""
    [(model, source)] = g.sources.items()
    assert isinstance(source, GeneArray)
    kept = {"genes": source.genes, "vectors": source.vectors, "mask": source.mask}
    return GeneVectors.of({model: GeneArray(**{**kept, **changes})})


def flat(out) -> np.ndarray:
    """Conditioned genes of either way as one table."""
    return out.x.reshape(len(out.x), -1) if isinstance(out, GeneArrays) else out


def arrays(genes: GeneVectors) -> GeneArray:
    [source] = genes.sources.values()
    assert isinstance(source, GeneArray)
    return source


def test_genes_together_are_what_one_conditioner_makes_of_them_side_by_side():
    genes, age = vectors(), np.random.default_rng(1).normal(size=(60, 1))
    wide = arrays(genes).vectors.reshape(60, -1)
    for covariates, names in ((None, ()), (age, ("age",))):
        how = {"n_components": 10, "covariate_names": names}
        rows = slice(0, 40)
        own = None if covariates is None else covariates[rows]
        one = Conditioner.fit(wide[rows], covariates=own, **how)
        ours = GeneConditioner.fit(genes.take(np.arange(40)), together=True, covariates=own, **how)
        # float32 between the two steps, where the other stays in float64
        np.testing.assert_allclose(
            ours.transform(genes, covariates), one.transform(wide, covariates), atol=2e-5
        )
        assert (ours.dim_in, ours.dim_out, ours.n_dropped) == (30, 10, 0)
        assert ours.explained == pytest.approx(one.explained, abs=1e-6)


def test_genes_apart_are_what_one_conditioner_makes_of_each():
    genes = vectors()
    out = GeneConditioner.fit(genes, together=False, n_components=4).transform(genes)
    assert isinstance(out, GeneArrays)
    assert out.x.shape == (60, 5, 4)
    assert out.mask.all()
    for gene in range(5):
        own = arrays(genes).vectors[:, gene]
        one = Conditioner.fit(own, n_components=4).transform(own)
        np.testing.assert_array_equal(out.x[:, gene], one)


def test_a_gene_of_fewer_components_is_filled_with_zeros():
    genes = vectors()
    x = arrays(genes).vectors.copy()
    x[:, 1, 2:] = 3.0
    conditioner = GeneConditioner.fit(changed(genes, vectors=x), together=False, n_components=4)
    assert conditioner.n_components == (4, 2, 4, 4, 4)
    out = conditioner.transform(changed(genes, vectors=x))
    assert isinstance(out, GeneArrays)
    assert not out.x[:, 1, 2:].any()
    assert conditioner.n_dropped == 4


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_gene_that_a_person_lacks_is_zeros_whatever_stands_there(way):
    genes = vectors(missing=0.3)
    mask = arrays(genes).mask
    spoilt = arrays(genes).vectors.copy()
    spoilt[~mask] = np.nan
    one = GeneConditioner.fit(genes, **way)
    two = GeneConditioner.fit(changed(genes, vectors=spoilt), **way)
    for fitted in (one, two):
        np.testing.assert_array_equal(
            flat(fitted.transform(changed(genes, vectors=spoilt))), flat(one.transform(genes))
        )
    out = GeneConditioner.fit(genes, together=False, n_components=0).transform(genes)
    assert isinstance(out, GeneArrays)
    assert not out.x[~mask].any()
    np.testing.assert_array_equal(out.mask, mask)
    # Each gene's mean and scale are those of the people who have it.
    for gene in range(5):
        own = out.x[mask[:, gene], gene]
        np.testing.assert_allclose(own.mean(0), 0.0, atol=1e-4)
        np.testing.assert_allclose(own.std(0), 1.0, atol=1e-4)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_hiding_a_gene_is_lacking_it(way):
    genes = vectors()
    conditioner = GeneConditioner.fit(genes, **way)
    shown = np.array([True, True, False, True, True])
    mask = np.broadcast_to(shown, (60, 5)).copy()
    lacking = conditioner.transform(changed(genes, mask=mask))
    for hidden in (shown, mask):
        np.testing.assert_array_equal(
            flat(conditioner.transform(genes, mask=hidden)), flat(lacking)
        )
    assert not np.allclose(flat(conditioner.transform(genes)), flat(lacking))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_genes_are_matched_by_name_and_others_are_not_looked_at(way):
    genes = vectors(missing=0.2)
    source, order = arrays(genes), [3, 0, 4, 2, 1]
    conditioner = GeneConditioner.fit(genes, **way)
    moved = changed(
        genes,
        genes=(*(source.genes[i] for i in order), "X"),
        vectors=np.concatenate([source.vectors[:, order], np.ones((60, 1, 6), np.float32)], axis=1),
        mask=np.concatenate([source.mask[:, order], np.ones((60, 1), bool)], axis=1),
    )
    np.testing.assert_array_equal(
        flat(conditioner.transform(moved)), flat(conditioner.transform(genes))
    )


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_only_the_people_it_was_fitted_on_matter(way):
    genes = vectors(missing=0.2)
    x = arrays(genes).vectors.copy()
    x[40:] = 100 * x[40:] + 7
    people = np.arange(40)
    one, two = (
        GeneConditioner.fit(g.take(people), **way) for g in (genes, changed(genes, vectors=x))
    )
    np.testing.assert_array_equal(flat(one.transform(genes)), flat(two.transform(genes)))


def test_a_gene_is_residualised_on_those_who_have_it():
    random = np.random.default_rng(3)
    genes, age = vectors(n=200, missing=0.3), random.normal(50, 9, size=(200, 1))
    mask = arrays(genes).mask
    older = changed(genes, vectors=(arrays(genes).vectors + age[:, :, None]).astype(np.float32))
    conditioner = GeneConditioner.fit(
        older, together=False, n_components=0, covariates=age, covariate_names=["age"]
    )
    out = conditioner.transform(older, age)
    assert isinstance(out, GeneArrays)
    assert conditioner.covariates == ("age",)
    for gene in range(5):
        has = mask[:, gene]
        centred = age[has, 0] - age[has, 0].mean()
        np.testing.assert_allclose(centred @ out.x[has, gene] / has.sum(), 0.0, atol=1e-4)
    assert not out.x[~mask].any()
    with pytest.raises(UserError, match="covariates have shape None"):
        conditioner.transform(older)


def test_a_large_mean_hides_no_difference_between_people():
    """Vectors of 5 that differ by some 1e-3, as a language model's do."""
    cohort = gene_cohort()
    x = arrays(cohort.genes).vectors
    assert 2e-4 < np.median(x.std(0) / np.abs(x.mean(0))) < 2e-3
    out = GeneConditioner.fit(cohort.genes, together=False, n_components=0).transform(cohort.genes)
    assert isinstance(out, GeneArrays)
    for gene in range(3):
        ours = np.corrcoef(out.x[:, gene], rowvar=False)
        truth = np.corrcoef(x[:, gene].astype(np.float64), rowvar=False)
        np.testing.assert_allclose(ours, truth, atol=1e-4)


def test_models_of_different_widths_stand_side_by_side():
    cohort = gene_cohort(n=80, n_genes=4, models=("evo2", "caduceus"))
    genes = cohort.genes
    assert genes.widths == {"evo2": 16, "caduceus": 8}
    apart = GeneConditioner.fit(genes, together=False, n_components=5)
    out = apart.transform(genes)
    assert isinstance(out, GeneArrays)
    assert out.x.shape == (80, 8, 5)
    assert apart.used == genes.genes == tuple(Gene(m, g) for m, g in genes.genes)
    together = GeneConditioner.fit(genes, together=True, n_components=12)
    assert together.dim_out == 24  # one PCA a model: the wider one does not outweigh the other
    for place, model in enumerate(genes.sources):
        own = GeneVectors.of({model: genes.sources[model]})
        alone = GeneConditioner.fit(own, together=True, n_components=12).transform(own)
        columns = slice(12 * place, 12 * place + 12)
        np.testing.assert_array_equal(flat(together.transform(genes))[:, columns], alone)


def test_genes_that_do_not_vary_are_left_out_and_counted():
    genes = vectors()
    x, mask = arrays(genes).vectors.copy(), arrays(genes).mask.copy()
    x[:, 1] = 4.0
    mask[3:, 2] = False  # three people have it
    for way in WAYS.values():
        conditioner = GeneConditioner.fit(changed(genes, vectors=x, mask=mask), **way)
        assert [gene.name for gene in conditioner.used] == ["A", "D", "E"]
        assert conditioner.n_dropped == 12
        assert np.isfinite(flat(conditioner.transform(changed(genes, vectors=x)))).all()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_saving_changes_no_number(way):
    genes = vectors(missing=0.2)
    x = arrays(genes).vectors.copy()
    x[:, 1] = 4.0
    genes = changed(genes, vectors=x)
    conditioner = GeneConditioner.fit(genes, **way)
    values = conditioner.to_dict()
    values["arrays"] = load(save(values["arrays"]))
    again = GeneConditioner.from_dict(values)
    np.testing.assert_array_equal(flat(again.transform(genes)), flat(conditioner.transform(genes)))
    assert (again.genes, again.used) == (conditioner.genes, conditioner.used)
    assert (again.dim_in, again.dim_out) == (conditioner.dim_in, conditioner.dim_out)


def test_nothing_is_read_to_take_people_or_to_shuffle_them():
    class Locked:
        genes, mask, width = ("A",), np.ones((9, 1), bool), 3

        def column(self, gene: int, positions: np.ndarray) -> np.ndarray:
            raise AssertionError("read")

    genes = GeneVectors.of({"evo2": Locked()}).take(np.array([4, 2, 2])).take(np.array([1, 0]))
    assert genes.rows.tolist() == [2, 4]
    assert len(genes) == 2
    assert genes.mask.shape == (2, 1)


def test_a_lacking_gene_side_by_side_is_its_mean_over_training_people():
    genes = vectors(n=6, g=2, h=3)
    mask = np.ones((6, 2), bool)
    mask[[1, 5], 1] = False
    x = arrays(genes).vectors
    wide = changed(genes, mask=mask).concatenated(known_from=np.array([0, 1, 2]))
    expected = x.reshape(6, -1).copy()
    expected[[1, 5], 3:] = x[[0, 2], 1].mean(0)
    np.testing.assert_allclose(wide, expected, rtol=1e-6)


BAD = [
    (lambda g: g.take(np.arange(3)), "3 people to fit on: expected at least 4"),
    (
        lambda g: changed(g, vectors=np.ones((60, 5, 6), np.float32)),
        "none of 5 genes varies among 60 training people: expected each person's own sequence",
    ),
    (
        lambda g: changed(g, vectors=np.where(np.arange(5)[:, None] == 1, np.nan, 1.0 + g_noise())),
        "evo2 vectors of B hold NaN or infinite values in 60 of 60 rows: mask these",
    ),
    (lambda g: GeneVectors.of({}), "no gene vectors: expected at least one DNA model"),
    (
        lambda g: changed(g, mask=np.ones((60, 5))),
        "the mask is float64 of shape .60, 5.: expected bool",
    ),
    (
        lambda g: changed(g, genes=tuple("ABCD")),
        "gene vectors have shape .60, 5, 6.: expected .people, 4 genes",
    ),
    (lambda g: changed(g, genes=tuple("ABCDA")), "1 gene names repeat"),
    (
        lambda g: GeneVectors.of({"evo2": arrays(g), "caduceus": arrays(vectors(n=59))}),
        "DNA models of different people .evo2 60, caduceus 59.",
    ),
]


def g_noise() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(60, 5, 6)).astype(np.float32)


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=range(len(BAD)))
def test_gene_vectors_that_cannot_be_fitted_on_are_refused_in_one_line(spoil, message):
    with pytest.raises(UserError, match=message) as caught:
        GeneConditioner.fit(spoil(vectors()), together=False, n_components=4)
    assert "\n" not in str(caught.value)


REFUSED = [
    (
        lambda g: changed(g, genes=tuple("ABCDX")),
        None,
        "1 of 5 genes that the model was trained on are not in these vectors, for example evo2's E",
    ),
    (
        lambda g: changed(g, vectors=np.ones((60, 5, 7), np.float32)),
        None,
        "evo2 vectors are 7 wide: expected 6, made by the same checkpoint",
    ),
    (
        lambda g: GeneVectors.of({"caduceus": arrays(g)}),
        None,
        "no vectors of evo2: expected those of evo2, which the model was trained on",
    ),
    (
        lambda g: changed(g, mask=np.arange(60)[:, None] >= np.full(5, 2)),
        None,
        "2 of 60 people have none of the 5 genes: expected at least one of each person",
    ),
    (lambda g: g, np.zeros(5, bool), "60 of 60 people have none of the 5 genes"),
    (lambda g: g, np.ones(4, bool), "the mask of genes is bool of shape .4,.: expected bool .5,."),
    (lambda g: g, np.ones(5), "the mask of genes is float64"),
]


@pytest.mark.parametrize(("spoil", "mask", "message"), REFUSED, ids=range(len(REFUSED)))
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_people_whose_genes_do_not_fit_are_refused_in_one_line(way, spoil, mask, message):
    conditioner = GeneConditioner.fit(vectors(), **way)
    with pytest.raises(UserError, match=message) as caught:
        conditioner.transform(spoil(vectors()), mask=mask)
    assert "\n" not in str(caught.value)
