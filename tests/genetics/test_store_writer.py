import subprocess
import sys

import numpy as np
import pytest

from brainfusion.genetics.checks import Alarm
from brainfusion.genetics.features import GeneticFeatures, Provenance
from brainfusion.genetics.store import concatenate_stores, open_store, write_store
from brainfusion.genetics.store_writer import StoreWriter
from brainfusion.runtime.errors import UserError

EXACT = ("float32", "dictionary")
STORAGES = (*EXACT, "centred-float16")
PROVENANCE = Provenance(
    model="generator", checkpoint="simulated", strands="fwd_only", pooling="mean", simulated=True
)


def haplotypes(n=40, g=5, h=12, *, n_distinct=6, seed=0):
    """Vectors float32 [n, g, 2, h] that share `n_distinct` haplotypes a gene, and a mask [n, g].

    What differs between haplotypes is a thousandth of them, as in pooled embeddings.
    """
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(g, 1, h))
    distinct = (common * (1 + 1e-3 * rng.normal(size=(g, n_distinct, h)))).astype(np.float32)
    vectors = distinct[np.arange(g)[:, None], rng.integers(n_distinct, size=(n, g, 2))]
    mask = rng.random((n, g)) > 0.1
    return np.where(mask[:, :, None, None], vectors, np.float32(0)), mask


def ids(n, g):
    return [f"{i:04d}" for i in range(n)], [f"GENE{i}" for i in range(g)]


def people_first(n, g):
    return [(slice(row, min(row + 7, n)), slice(0, g)) for row in range(0, n, 7)]


def genes_first(n, g):
    return [(slice(0, n), slice(gene, gene + 1)) for gene in range(g)]


def shuffled_tiles(n, g):
    tiles = [
        (slice(row, min(row + 11, n)), slice(gene, min(gene + 2, g)))
        for row in range(0, n, 11)
        for gene in range(0, g, 2)
    ]
    return [tiles[i] for i in np.random.default_rng(1).permutation(len(tiles))]


def store(path, vectors, mask, storage, blocks=genes_first, subjects=None):
    (n, g), names = mask.shape, ids(*mask.shape)
    p = vectors.shape[2] if vectors.ndim == 4 else 1
    with StoreWriter(
        path,
        subjects=subjects or names[0],
        genes=names[1],
        width=vectors.shape[-1],
        storage=storage,
        n_haplotypes=p,
    ) as writer:
        for rows, columns in blocks(n, g):
            writer.add(rows, columns, vectors[rows, columns], mask[rows, columns])
        writer.finish(PROVENANCE)
    return open_store(path, verify=True)


# -- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [people_first, genes_first, shuffled_tiles])
@pytest.mark.parametrize("storage", EXACT)
def test_both_haplotypes_come_back_bit_for_bit_in_whatever_order_blocks_come(
    tmp_path, storage, blocks
):
    vectors, mask = haplotypes()
    back = store(tmp_path / "s", vectors, mask, storage, blocks)
    kept = back.vectors.haplotypes(np.arange(len(mask)))
    np.testing.assert_array_equal(kept.view(np.uint32), vectors.view(np.uint32))
    np.testing.assert_array_equal(back.mask, mask)
    assert (back.n_haplotypes, back.vectors.shape) == (2, (40, 5, 12))


@pytest.mark.parametrize("storage", EXACT)
def test_merged_vectors_come_back_bit_for_bit(tmp_path, storage):
    vectors, mask = haplotypes()
    merged = np.ascontiguousarray(vectors.mean(axis=2))
    back = store(tmp_path / "s", merged, mask, storage, shuffled_tiles)
    np.testing.assert_array_equal(np.asarray(back.vectors), merged)


@pytest.mark.parametrize("blocks", [people_first, genes_first, shuffled_tiles])
def test_centred_float16_is_within_its_bound_and_keeps_what_differs_between_people(
    tmp_path, blocks
):
    vectors, mask = haplotypes(n=200, n_distinct=60)
    vectors[:, 1] *= np.float32(1e4)  # the scale is the gene's own
    vectors[:, 2] *= np.float32(1e-6)
    back = store(tmp_path / "s", vectors, mask, "centred-float16", blocks)
    kept = back.vectors.haplotypes(np.arange(len(mask)))
    centre = np.load(tmp_path / "s" / "centre.npy")[:, None]
    largest = np.abs(vectors).max(axis=(0, 2, 3))[:, None, None]
    bound = 2.0**-11 * np.abs(vectors - centre) + 2.0**-37 * largest + 2.0**-23 * np.abs(vectors)
    present = mask[:, :, None, None]
    assert np.all(~present | (np.abs(kept.astype(np.float64) - vectors) <= bound))
    assert not np.any(kept[~mask])
    for gene in range(mask.shape[1]):
        true, read = vectors[mask[:, gene], gene].reshape(-1, 12), kept[mask[:, gene], gene]
        lost = np.var(read.reshape(-1, 12) - true, axis=0) / np.var(true, axis=0)
        plain = np.var(true.astype(np.float16).astype(np.float64) - true, axis=0)
        assert lost.max() < 1e-6
        if gene not in (1, 2):
            assert np.median(plain / np.var(true, axis=0)) > 1e-3  # what the centre saves


def test_dictionary_holds_each_haplotype_once_and_a_small_number_a_person(tmp_path):
    vectors, mask = haplotypes(n=300, g=3, h=32)
    store(tmp_path / "s", vectors, mask, "dictionary", people_first)
    offsets = np.load(tmp_path / "s" / "offsets.npy")
    dictionary = np.load(tmp_path / "s" / "dictionary.npy")
    for gene in range(3):
        own = dictionary[offsets[gene] : offsets[gene + 1]]
        expected = np.unique(vectors[:, gene].reshape(-1, 32), axis=0)
        np.testing.assert_array_equal(np.unique(own, axis=0), expected)
        assert len(own) == len(expected) == 7  # six haplotypes, and zeros where absent
    index = np.load(tmp_path / "s" / "index.npy")
    assert (index.dtype, index.shape) == (np.uint16, (300, 2, 3))


def test_dictionary_numbers_take_four_bytes_beyond_65536_vectors(tmp_path):
    vectors = np.arange(1, 70_001, dtype=np.float32).reshape(-1, 1, 1)
    mask = np.ones((70_000, 1), dtype=bool)
    back = store(tmp_path / "s", vectors, mask, "dictionary", people_first_wide)
    assert np.load(tmp_path / "s" / "index.npy", mmap_mode="r").dtype == np.uint32
    np.testing.assert_array_equal(back.rows([0, 65_536, 69_999])[:, 0, 0], [1, 65_537, 70_000])


def people_first_wide(n, g):
    return [(slice(row, min(row + 20_000, n)), slice(0, g)) for row in range(0, n, 20_000)]


@pytest.mark.parametrize("storage", STORAGES)
def test_the_same_blocks_give_the_same_bytes(tmp_path, storage):
    vectors, mask = haplotypes()
    for name in ("a", "b"):
        store(tmp_path / name, vectors, mask, storage)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("how", ["mean", "sum", "mean-absdiff"])
def test_rows_columns_pooled_and_means_agree_with_brute_force(tmp_path, storage, how):
    vectors, mask = haplotypes()
    mask[3], vectors[3] = False, 0.0  # nobody's genes
    store(tmp_path / "s", vectors, mask, storage)
    features = open_store(tmp_path / "s", haplotypes=how)
    first, second = (vectors[:, :, i].astype(np.float64) for i in (0, 1))
    mean, sum_ = (first + second) / 2, first + second
    both = {"mean": mean, "sum": sum_, "mean-absdiff": np.dstack([mean, abs(first - second)])}[how]
    # float16 residuals: 1e-3 of the vector at 2^-11; all else is float32's own rounding.
    close = {"rtol": 1e-6, "atol": 1e-5 if storage == "centred-float16" else 1e-6}
    chosen = [7, 3, 39, 0, 7]
    np.testing.assert_allclose(features.rows(chosen), both[chosen], **close)
    np.testing.assert_allclose(np.asarray(features.vectors), both, **close)
    np.testing.assert_allclose(features.vectors[2], both[2], **close)
    np.testing.assert_allclose(features.vectors[chosen, 4], both[chosen, 4], **close)
    np.testing.assert_allclose(features.vectors[1:9, 2:4, 1], both[1:9, 2:4, 1], **close)
    np.testing.assert_allclose(features.column(1, chosen), both[chosen, 1], **close)
    n_present = np.maximum(mask.sum(axis=1), 1)[:, None]
    np.testing.assert_allclose(features.pooled(chosen), (both.sum(1) / n_present)[chosen], **close)
    means = np.stack([both[mask[:, gene], gene].mean(axis=0) for gene in range(5)])
    np.testing.assert_allclose(features.gene_means(), means, **close)
    np.testing.assert_allclose(features.concatenated()[3], means.ravel(), **close)


@pytest.mark.parametrize("storage", STORAGES)
def test_selecting_from_a_store_reads_as_selecting_in_memory(tmp_path, storage):
    vectors, mask = haplotypes()
    stored = store(tmp_path / "s", vectors, mask, storage)
    loaded = GeneticFeatures(
        subjects=stored.subjects,
        genes=stored.genes,
        vectors=np.asarray(stored.vectors),
        mask=np.array(mask),
        provenance=PROVENANCE,
    )
    wanted, genes = ["0031", "0002", "0007"], ["GENE3", "GENE0"]
    for ours, theirs in (
        (stored.select(wanted), loaded.select(wanted)),
        (stored.select(wanted, genes), loaded.select(wanted, genes)),
        (stored.select(wanted).select(["0007"], genes), loaded.select(["0007"], genes)),
    ):
        np.testing.assert_array_equal(ours.vectors, theirs.vectors)
        np.testing.assert_array_equal(ours.mask, theirs.mask)
        np.testing.assert_allclose(ours.pooled([0]), theirs.pooled([0]), rtol=1e-5)


def test_swapping_haplotypes_changes_no_combination():
    vectors, mask = haplotypes()
    subjects, genes = ids(*mask.shape)

    def features(values):
        return GeneticFeatures(
            subjects=tuple(subjects),
            genes=tuple(genes),
            vectors=values,
            mask=mask,
            provenance=PROVENANCE,
        )

    for how in ("mean", "sum", "mean-absdiff"):
        one, other = features(vectors), features(vectors[:, :, ::-1])
        np.testing.assert_array_equal(
            one.with_haplotypes(how).vectors, other.with_haplotypes(how).vectors
        )


def test_merged_vectors_have_no_other_combination_than_their_mean(tmp_path):
    vectors, mask = haplotypes()
    back = store(tmp_path / "s", vectors[:, :, 0], mask, "float32")
    assert back.with_haplotypes("mean").haplotypes == "mean"
    with pytest.raises(UserError, match="already merged"):
        back.with_haplotypes("sum")
    with pytest.raises(UserError, match="Did you mean 'mean-absdiff'"):
        back.with_haplotypes("mean-absdif")


@pytest.mark.parametrize("key", [(..., 0), ([0, 1], [0, 1]), (None, 0)])
def test_ways_to_index_that_would_be_ambiguous_are_refused(tmp_path, key):
    vectors, mask = haplotypes()
    back = store(tmp_path / "s", vectors, mask, "dictionary")
    with pytest.raises(TypeError):
        back.vectors[key]


# -- whole or absent -------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
def test_a_crash_in_the_middle_leaves_what_was_there_and_no_debris(tmp_path, storage):
    vectors, mask = haplotypes()
    store(tmp_path / "s", vectors, mask, "float32")

    def crash(n, g):
        yield from people_first(n, g)[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "s", 2 * vectors, mask, storage, crash)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    kept = open_store(tmp_path / "s", verify=True).vectors.haplotypes(np.arange(40))
    np.testing.assert_array_equal(kept, vectors)


def test_blocks_that_are_forgotten_or_of_another_shape_are_no_store(tmp_path):
    vectors, mask = haplotypes()
    with pytest.raises(ValueError, match="cover 175 of 200"):
        store(tmp_path / "s", vectors, mask, "float32", lambda n, g: people_first(n, g)[:-1])
    with pytest.raises(ValueError, match="expected float32"):
        store(tmp_path / "s", vectors.astype(np.float64), mask, "float32")
    with (
        pytest.raises(ValueError, match="left before it was finished"),
        StoreWriter(tmp_path / "s", subjects=["1"], genes=["A"], width=2),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_an_error_before_anything_is_read(tmp_path):
    with (
        pytest.raises(UserError, match=r"cannot write the store .*: give another folder, or free"),
        StoreWriter(
            tmp_path / "s", subjects=["1"] * 2**20, genes=["A"] * 2**10, width=2**20
        ) as writer,
    ):
        writer.finish(PROVENANCE)
    assert not list(tmp_path.iterdir())


def test_a_value_beyond_what_centred_float16_holds_is_an_error_not_infinity(tmp_path):
    vectors, mask = haplotypes()
    vectors[35, 1], mask[35, 1] = 1e6, True
    with pytest.raises(UserError, match="gene GENE1: a value is more than 10 times as large"):
        store(tmp_path / "s", vectors, mask, "centred-float16", people_first)


def test_a_storage_that_does_not_exist_and_a_store_of_nobody_are_refused(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'float32'"):
        StoreWriter(tmp_path / "s", subjects=["1"], genes=["A"], width=2, storage="float23")
    with pytest.raises(UserError, match="0 people x 1 genes x 2 values"):
        StoreWriter(tmp_path / "s", subjects=[], genes=["A"], width=2)


# -- joining ---------------------------------------------------------------------------------------


def other_people(tmp_path, **changes):
    """A second store, of ten other people and with its genes in another order."""
    vectors, mask = haplotypes(n=10, seed=5)
    order = [3, 1, 0, 4, 2]
    features = GeneticFeatures(
        subjects=tuple(f"x{i}" for i in range(10)),
        genes=tuple(f"GENE{i}" for i in order),
        vectors=vectors[:, order],
        mask=mask[:, order],
        provenance=Provenance.from_dict({**PROVENANCE.to_dict(), **changes}, where="test"),
        alarms=(Alarm(name="a", figure=1.0, finding="b", cure="c"),),
    )
    write_store(tmp_path / "more", features, storage="float32")
    return vectors, mask


@pytest.mark.parametrize("storage", [None, "float32"])
def test_people_are_appended_with_genes_matched_by_name(tmp_path, storage):
    vectors, mask = haplotypes()
    store(tmp_path / "s", vectors, mask, "dictionary")
    more, more_mask = other_people(tmp_path, notes="another day")
    path = tmp_path / "s"
    assert concatenate_stores(path, [path, tmp_path / "more"], storage=storage) == []
    joined = open_store(path, verify=True)
    assert joined.subjects[-1] == "x9"
    assert joined.genes == tuple(f"GENE{i}" for i in range(5))
    kept = joined.vectors.haplotypes(np.arange(50))
    np.testing.assert_array_equal(kept, np.concatenate([vectors, more]))
    np.testing.assert_array_equal(joined.mask, np.concatenate([mask, more_mask]))
    assert (path / "index.npy").exists() == (storage is None)
    assert [alarm.name for alarm in joined.alarms] == ["a"]


def test_stores_of_other_provenance_do_not_mix_without_being_told_to(tmp_path):
    vectors, mask = haplotypes()
    store(tmp_path / "s", vectors, mask, "float32")
    other_people(tmp_path, device="L40S", layer="blocks.20")
    parts = [tmp_path / "s", tmp_path / "more"]
    with pytest.raises(UserError, match=r"layer: None, blocks\.20; device: None, L40S.*--mixed"):
        concatenate_stores(tmp_path / "both", parts)
    assert not (tmp_path / "both").exists()
    assert len(concatenate_stores(tmp_path / "both", parts, mixed=True)) == 2
    alarms = {alarm.name: alarm for alarm in open_store(tmp_path / "both").alarms}
    assert "device: None, L40S" in alarms["mixed provenance"].finding


def test_a_person_or_genes_or_haplotypes_that_do_not_fit_are_refused(tmp_path):
    vectors, mask = haplotypes()
    store(tmp_path / "s", vectors, mask, "float32")
    store(
        tmp_path / "few",
        vectors[:, :4],
        mask[:, :4],
        "float32",
        subjects=[f"y{i}" for i in range(40)],
    )
    store(
        tmp_path / "flat", vectors[:, :, 0], mask, "float32", subjects=[f"y{i}" for i in range(40)]
    )
    with pytest.raises(UserError, match="40 people are in more than one"):
        concatenate_stores(tmp_path / "both", [tmp_path / "s", tmp_path / "s"])
    with pytest.raises(UserError, match="1 genes are in one of the stores only"):
        concatenate_stores(tmp_path / "both", [tmp_path / "s", tmp_path / "few"])
    with pytest.raises(UserError, match="12 values and 1 haplotypes a gene, but 12 and 2"):
        concatenate_stores(tmp_path / "both", [tmp_path / "s", tmp_path / "flat"])


# -- memory ----------------------------------------------------------------------------------------

_GROWN = """
import sys, numpy as np
from pathlib import Path
from brainfusion.genetics.features import Provenance
from brainfusion.genetics.store import open_store
from brainfusion.genetics.store_writer import StoreWriter
from brainfusion.runtime.memory import peak_mib
import polars
n, g, h, storage = 2000, 40, 256, sys.argv[2]
rng = np.random.default_rng(0)
vectors, mask = rng.normal(size=(n, 1, 2, h)).astype(np.float32), np.ones((n, 1), dtype=bool)
distinct = vectors[rng.integers(100, size=n)]
before = peak_mib()
with StoreWriter(Path(sys.argv[1]), subjects=[str(i) for i in range(n)], width=h, n_haplotypes=2,
                 genes=[f"G{i}" for i in range(g)], storage=storage) as writer:
    for gene in range(g):
        values = (vectors if storage != "dictionary" else distinct) + np.float32(gene)
        writer.add(slice(0, n), slice(gene, gene + 1), values, mask)
    writer.finish(Provenance(model="evo2", checkpoint="simulated", strands="averaged"))
features = open_store(Path(sys.argv[1]))
features.rows([0, n - 1])
print(peak_mib() - before)
"""


@pytest.mark.parametrize("storage", STORAGES)
def test_memory_does_not_grow_with_the_store(tmp_path, storage):
    # 2,000 people x 40 genes x 2 haplotypes x 256 floats are 156 MiB; a block of one gene is 4.
    out = subprocess.run(
        [sys.executable, "-c", _GROWN, str(tmp_path / "s"), storage],
        check=True,
        capture_output=True,
        text=True,
    )
    assert float(out.stdout) < 60
