import json

import numpy as np
import pytest

from brainfusion import genetics
from brainfusion.genetics import source as source_module
from brainfusion.genetics.statistics import GeneStatistics, TableStatistics, row_hashes
from brainfusion.runtime.errors import UserError

N, G, WIDTH = 40, 5, 64


def people() -> np.ndarray:
    """Vectors that differ by 3e-4 of their size, with holes."""
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(G, WIDTH))
    vectors = mean * (1 + 3e-4 * rng.normal(size=(N, G, WIDTH)))
    vectors[3, 1], vectors[7] = np.nan, 0.0
    return vectors.astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    values = {"model": "evo2", "checkpoint": "simulated", "simulated": True}
    values |= {"pooling": "mean", "strands": "averaged"}
    (tmp_path / "provenance.json").write_text(json.dumps(values))
    subjects = np.array([f"{i:04d}" for i in range(N)])
    genes = np.array([f"G{j}" for j in range(G)])
    np.savez(tmp_path / "all.npz", embeddings=people(), subjects=subjects, genes=genes)
    return tmp_path


def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(source_module, "BLOCK_BYTES", 3 * G * WIDTH * 4)


def test_blocks_in_any_order_and_from_several_readers_give_the_same_books(folder, monkeypatch):
    whole = genetics.open_stream("evo2", folder)
    expected = whole.gathered()
    small_blocks(monkeypatch)
    main = genetics.open_stream("evo2", folder)
    assert main.n_blocks == 14
    readers = [genetics.open_stream("evo2", folder) for _ in range(3)]
    blocks = [
        block
        for reader, (start, stop) in zip(readers, [(9, 14), (0, 4), (4, 9)], strict=True)
        for block in reader.blocks(start, stop)
    ]
    vectors = np.zeros((N, G, WIDTH), dtype=np.float32)
    for block in blocks:
        vectors[block.rows, block.columns] = block.vectors
        main.account(block)
    main.finish()
    np.testing.assert_array_equal(vectors, expected.vectors)
    assert main.provenance == expected.provenance
    assert [(a.name, a.finding) for a in main.alarms] == [
        (a.name, a.finding) for a in expected.alarms
    ]
    assert {alarm.name for alarm in main.alarms} == {"missing vectors", "people without vectors"}


def test_provenance_and_alarms_are_only_there_after_the_last_block(folder, monkeypatch):
    small_blocks(monkeypatch)
    stream = genetics.open_stream("evo2", folder)
    last = 0
    for block in stream:
        last = block.rows.stop
        with pytest.raises(RuntimeError, match="after the last block"):
            stream.alarms  # noqa: B018
        with pytest.raises(RuntimeError, match="after the last block"):
            stream.provenance  # noqa: B018
    assert last == N
    assert stream.provenance.checkpoint == "simulated"


def test_reference_only_extraction_is_found_at_the_end_of_a_stream(folder, monkeypatch):
    data = dict(np.load(folder / "all.npz"))
    data["embeddings"] = np.repeat(data["embeddings"][:1], N, axis=0)
    np.savez(folder / "all.npz", **data)
    small_blocks(monkeypatch)
    stream = genetics.open_stream("evo2", folder)
    with pytest.raises(UserError, match="reference-only extraction"):
        for _ in stream:
            pass


def test_statistics_of_blocks_equal_those_of_the_whole():
    vectors = people()
    mask = np.isfinite(vectors).all(axis=2) & (vectors != 0).any(axis=2)
    vectors[~mask] = 0.0
    table = TableStatistics(N, G)
    order = np.random.default_rng(1).permutation(8)
    for piece in order:
        rows = slice(5 * piece, 5 * piece + 5)
        table.add(
            rows,
            slice(0, G),
            vectors[rows],
            mask[rows],
            dtype="float32",
            resolutions=["float32"] * G,
        )
    for gene, figures in enumerate(table.figures()):
        exact = vectors[mask[:, gene], gene].astype(np.float64)
        ratio = np.median(exact.std(axis=0, ddof=1) / np.abs(exact.mean(axis=0)))
        assert figures.ratio == pytest.approx(ratio, rel=1e-9)
        assert figures.n_present == mask[:, gene].sum()
        assert figures.stored == "float32"
    np.testing.assert_array_equal(table.n_genes_present, mask.sum(axis=1))
    assert table.largest_twin_group() == 1


def test_one_fine_block_shows_that_a_gene_was_never_rounded():
    statistics = GeneStatistics()
    rounded = np.ones((3, 4), dtype=np.float32)
    statistics.add(rounded, np.ones(3, dtype=bool), dtype="float32", resolution="bfloat16")
    assert statistics.figures().stored == "bfloat16"
    statistics.add(rounded / 3, np.ones(3, dtype=bool), dtype="float32", resolution="float32")
    assert statistics.figures().stored == "float32"
    statistics.add(rounded / 3, np.ones(3, dtype=bool), dtype="float16", resolution="float32")
    assert statistics.figures().stored == "float16"


@pytest.mark.parametrize("width", [1, 2, 7, 64])
def test_hashes_are_equal_for_equal_rows_only(width):
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(500, width)).astype(np.float32)
    again = np.concatenate([rows, rows[::-1]])
    hashes = row_hashes(again)
    np.testing.assert_array_equal(hashes[:500], hashes[500:][::-1])
    assert len(np.unique(hashes)) == 500
    flipped = rows.copy()
    flipped[:, : min(2, width)] *= -1  # top bits alone
    assert not np.any(row_hashes(rows) == row_hashes(flipped))
    assert not np.any(row_hashes(rows, seed=1) == row_hashes(rows, seed=2))


def test_people_with_the_same_vectors_in_all_genes_are_counted():
    vectors = people()
    vectors[~np.isfinite(vectors)] = 1.0
    vectors[7] += 1.0
    vectors[10:22] = vectors[10]
    vectors[30, 0] = vectors[31, 0]  # one gene alone is no twin
    table = TableStatistics(N, G)
    for gene in range(G):  # gene by gene, as gene-major files come
        column = vectors[:, gene : gene + 1]
        table.add(
            slice(0, N),
            slice(gene, gene + 1),
            column,
            np.ones((N, 1), dtype=bool),
            dtype="float32",
            resolutions=["float32"],
        )
    assert table.largest_twin_group() == 12
