import dataclasses

import numpy as np
import pytest
from sklearn.decomposition import PCA

from brainfusion.genetics import reduce
from brainfusion.genetics.features import GeneticFeatures, Provenance
from brainfusion.genetics.reduce import GenePCA
from brainfusion.genetics.store import open_store, write_store
from brainfusion.runtime.errors import UserError

PROVENANCE = Provenance(model="evo2", checkpoint="simulated", strands="averaged", simulated=True)
SUBJECTS = tuple(f"{i:03d}" for i in range(60))
TRAIN = SUBJECTS[::2] + SUBJECTS[1:20:2]
GENES = ("A", "B", "C")


def features(h=12, *, seed=0, scale=1e-3, n_haplotypes=1):
    """Vectors whose spread between people is a thousandth of their size, some of them absent."""
    rng = np.random.default_rng(seed)
    spread = np.linspace(1, 0.1, h) * rng.normal(size=(60, 3, n_haplotypes, h))
    vectors = (rng.normal(size=(3, 1, h)) + scale * spread).astype(np.float32)
    mask = rng.random((60, 3)) > 0.1
    vectors[~mask] = 0.0
    return GeneticFeatures(
        subjects=SUBJECTS,
        genes=GENES,
        vectors=vectors[:, :, 0] if n_haplotypes == 1 else vectors,
        mask=mask,
        provenance=PROVENANCE,
    )


def training_rows(table, gene):
    return [i for i, s in enumerate(SUBJECTS) if s in TRAIN and table.mask[i, gene]]


@pytest.mark.parametrize("h", [12, 100])  # more people than numbers, and fewer
def test_components_and_scores_equal_sklearns(h, monkeypatch):
    monkeypatch.setattr(reduce, "_BLOCK_ROWS", 7)
    table = features(h)
    fitted = GenePCA.fit(table, TRAIN, n_components=5)
    scores = fitted.transform(table)
    for gene in range(3):
        x = np.asarray(table.vectors)[:, gene].astype(np.float64)
        theirs = PCA(5, svd_solver="full").fit(x[training_rows(table, gene)])
        present = table.mask[:, gene]
        signs = np.sign((theirs.components_ * fitted.components[gene]).sum(axis=1))
        # float32 vectors a thousandth apart: 1e-4 of what differs is their own rounding.
        np.testing.assert_allclose(
            signs[:, None] * theirs.components_, fitted.components[gene], atol=2e-4
        )
        np.testing.assert_allclose(theirs.explained_variance_, fitted.variances[gene], rtol=1e-5)
        expected = signs * theirs.transform(x[present])
        np.testing.assert_allclose(scores.vectors[present, gene], expected, atol=1e-6)
        assert fitted.shares[gene] == pytest.approx(theirs.explained_variance_ratio_.sum())
        assert not scores.vectors[~present, gene].any()
    np.testing.assert_array_equal(scores.mask, table.mask)
    assert "PCA to 5 a gene, fitted on 40 people" in scores.provenance.steps


def test_incremental_blocks_find_the_same_space(monkeypatch):
    monkeypatch.setattr(reduce, "MAX_EXACT", 8)
    monkeypatch.setattr(reduce, "_BLOCK_ROWS", 16)
    table = features(12)
    exactly = GenePCA.fit(table, TRAIN, n_components=12)
    monkeypatch.undo()
    expected = GenePCA.fit(table, TRAIN, n_components=12)
    # With all components kept, merging blocks loses nothing.
    np.testing.assert_allclose(exactly.variances, expected.variances, rtol=1e-6)
    np.testing.assert_allclose(exactly.components, expected.components, atol=1e-3)


@pytest.mark.parametrize("h", [12, 100])
def test_people_outside_the_training_set_have_no_influence(h):
    table = features(h)
    fitted = GenePCA.fit(table, TRAIN, n_components=4)
    vectors, mask = np.array(table.vectors), table.mask.copy()
    others = [i for i, s in enumerate(SUBJECTS) if s not in TRAIN]
    vectors[others] = 1e6
    mask[others] = True
    again = GenePCA.fit(
        dataclasses.replace(table, vectors=vectors, mask=mask), TRAIN, n_components=4
    )
    for name in ("means", "components", "variances", "shares"):
        np.testing.assert_array_equal(getattr(again, name), getattr(fitted, name))
    vectors[[SUBJECTS.index(TRAIN[0])]] *= 1.1
    changed = GenePCA.fit(
        dataclasses.replace(table, vectors=vectors, mask=mask), TRAIN, n_components=4
    )
    assert not np.array_equal(changed.components, fitted.components)


@pytest.mark.parametrize("storage", ["float32", "dictionary"])
def test_a_store_gives_the_same_components_as_memory(tmp_path, storage):
    table = features(12, n_haplotypes=2).with_haplotypes("mean-absdiff")
    write_store(tmp_path / "s", table, storage=storage)
    stored = open_store(tmp_path / "s", haplotypes="mean-absdiff")
    one, other = (GenePCA.fit(t, TRAIN, n_components=3) for t in (table, stored))
    assert one.components.shape == (3, 3, 24)
    np.testing.assert_array_equal(one.components, other.components)
    np.testing.assert_array_equal(one.transform(table).vectors, other.transform(stored).vectors)


def test_beyond_the_rank_components_are_zero_rather_than_noise():
    table = features(12)
    vectors = np.array(table.vectors)
    vectors[:, 1] = vectors[0, 1] + np.outer(np.arange(60) % 2, np.ones(12))  # one direction
    vectors[:, 2] = 1.0  # none
    table = dataclasses.replace(table, vectors=vectors, mask=np.ones((60, 3), dtype=bool))
    fitted = GenePCA.fit(table, TRAIN, n_components=3)
    assert fitted.shares[1:] == pytest.approx([1.0, 0.0])
    assert np.abs(fitted.components[1, 0]).sum() > 0
    assert not fitted.components[1, 1:].any()
    assert not fitted.components[2].any()
    assert not fitted.transform(table).vectors[:, 2].any()


def test_saved_and_loaded_it_transforms_the_same(tmp_path):
    table = features()
    fitted = GenePCA.fit(table, TRAIN, n_components=4)
    fitted.save(tmp_path / "pca")
    loaded = GenePCA.load(tmp_path / "pca")
    np.testing.assert_array_equal(loaded.transform(table).vectors, fitted.transform(table).vectors)
    for name in ("genes", "n_people", "subjects_hash", "provenance", "haplotypes"):
        assert getattr(loaded, name) == getattr(fitted, name)
    (tmp_path / "pca" / "means.npy").unlink()
    with pytest.raises(UserError, match=r"lacks means\.npy: fit it again"):
        GenePCA.load(tmp_path / "pca")


def test_genes_are_matched_by_name_and_what_does_not_fit_is_refused():
    table = features()
    fitted = GenePCA.fit(table, TRAIN, n_components=2)
    turned = table.select(SUBJECTS, ["C", "A", "B"])
    np.testing.assert_array_equal(fitted.transform(turned).vectors, fitted.transform(table).vectors)
    with pytest.raises(UserError, match="1 of the 3 genes of this PCA are not in the features"):
        fitted.transform(table.select(SUBJECTS, ["C", "A"]))
    with pytest.raises(UserError, match="vectors of 20 numbers"):
        fitted.transform(features(20))
    with pytest.raises(UserError, match="13 components of vectors of 12 numbers"):
        GenePCA.fit(table, TRAIN, n_components=13)
    with pytest.raises(UserError, match="2 training people or more, got 1"):
        GenePCA.fit(table, TRAIN[:1], n_components=2)
