"""Feature files: a round trip, files of others' making, and every way in which one can be wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainfusion.data.features import Features, read_features, write_features
from brainfusion.runtime.errors import UserError

SUBJECTS = ("007", "12", "sub-\u00e9")
VECTORS = np.arange(12, dtype=np.float32).reshape(3, 4) / 7


def write(path: Path, **columns: Any) -> Path:
    """A file of someone else's making."""
    pq.write_table(pa.table(columns), path)
    return path


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_features(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


def test_a_feature_file_holds_what_was_written(tmp_path):
    path = tmp_path / "new" / "x.parquet"
    provenance = {"kind": "features", "encoder": "brainlm", "n": 3, "nested": {"a": [1.5, None]}}
    split = ["train", "test", "train"]
    write_features(path, SUBJECTS, VECTORS, provenance=provenance, extra={"split": split})
    found = read_features(path)
    assert found.subjects == SUBJECTS
    assert found.vectors.dtype == np.float32
    np.testing.assert_array_equal(found.vectors, VECTORS)
    assert found.provenance == provenance
    assert found.extra is not None
    assert found.extra.to_dict(as_series=False) == {"split": split}
    assert list(path.parent.iterdir()) == [path]


def test_any_parquet_reader_finds_the_format_of_the_documents(tmp_path):
    path = tmp_path / "x.parquet"
    write_features(path, SUBJECTS, VECTORS.astype(np.float64), provenance={"kind": "features"})
    table = pq.read_table(path)
    assert table.schema.field("subject").type == pa.string()
    kind = table.schema.field("vector").type
    assert (kind.list_size, kind.value_type) == (4, pa.float32())
    assert json.loads(table.schema.metadata[b"brainfusion"]) == {"kind": "features"}
    assert pl.read_parquet(path)["vector"].to_numpy().shape == (3, 4)


@given(n_people=st.integers(1, 7), width=st.integers(1, 5), chunk=st.integers(1, 7))
def test_every_form_of_list_column_gives_the_same_vectors(tmp_path_factory, n_people, width, chunk):
    path = tmp_path_factory.mktemp("forms") / "x.parquet"
    vectors = np.random.default_rng(n_people).normal(size=(n_people, width)).astype(np.float32)
    subjects = [f"{i:03d}" for i in range(n_people)]
    for kind in (
        pa.list_(pa.float32()),
        pa.list_(pa.float64()),
        pa.large_list(pa.float32()),
        pa.list_(pa.float32(), width),
    ):
        parts = [pa.array(vectors[i : i + chunk].tolist(), kind) for i in range(0, n_people, chunk)]
        table = pa.table({"subject": subjects, "vector": pa.chunked_array(parts)})
        pq.write_table(table, path, row_group_size=chunk)
        np.testing.assert_array_equal(read_features(path).vectors, vectors)


def test_a_polars_file_with_whole_numbers_is_read(tmp_path):
    path = tmp_path / "x.parquet"
    pl.DataFrame({"subject": ["a", "b"], "vector": [[1, 2], [3, 4]]}).write_parquet(path)
    found = read_features(path)
    assert found.vectors.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert found.provenance == {}
    assert found.extra is None


def test_people_are_selected_in_the_order_asked_for():
    features = Features(subjects=SUBJECTS, vectors=VECTORS)
    np.testing.assert_array_equal(features.select(["sub-\u00e9", "007"]), VECTORS[[2, 0]])
    message = "2 of 3 people have no features .for example 7, x.: embed their"
    with pytest.raises(UserError, match=message):
        features.select(["7", "007", "x"])


def test_a_failed_write_leaves_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    write_features(path, SUBJECTS, VECTORS, provenance={"run": 1})

    def fail(_: Any, aside: Path) -> None:
        Path(aside).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="No space"):
        write_features(path, SUBJECTS, VECTORS + 1, provenance={"run": 2})
    assert list(tmp_path.iterdir()) == [path]
    assert read_features(path).provenance == {"run": 1}


def test_a_file_that_is_not_there_says_how_to_make_it(tmp_path):
    assert "make it with 'brainfusion embed'" in refused(tmp_path / "x.parquet")


def test_a_broken_or_truncated_file_is_refused(tmp_path):
    path = tmp_path / "x.parquet"
    write_features(path, SUBJECTS, VECTORS, provenance={})
    whole = path.read_bytes()
    for content in (b"", b"PAR1", b"subject,vector\n1,2\n", whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert "is not a readable Parquet file" in refused(path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"vector": [[1.0]]}, "no column ['subject']"),
        ({"subject": ["a"], "vectors": [[1.0]]}, "no column ['vector']"),
        ({"subject": [7, 12], "vector": [[1.0], [2.0]]}, "'subject' is int64, expected text"),
        ({"subject": ["a", "b", "a"], "vector": [[1.0]] * 3}, "1 subject ids repeat"),
        ({"subject": ["a", None, ""], "vector": [[1.0]] * 3}, "2 rows have no subject id"),
        ({"subject": ["a", "b"], "vector": [[1.0], [2.0, 3.0]]}, "different widths: [1, 2]"),
        (
            {"subject": ["a", "b"], "vector": pa.array([[], []], pa.list_(pa.float32()))},
            "the vectors are empty",
        ),
        ({"subject": ["a", "b"], "vector": [[1.0], [np.nan]]}, "1 of 2 vectors hold NaN"),
        ({"subject": ["a", "b"], "vector": [[1.0], [-np.inf]]}, "1 of 2 vectors hold NaN"),
        ({"subject": ["a", "b"], "vector": [[1.0, 2.0], [1.0, None]]}, "1 of 2 vectors hold NaN"),
        ({"subject": ["a", "b"], "vector": [[1.0], None]}, "1 of 2 people have no vector"),
        ({"subject": ["a"], "vector": [1.0]}, "'vector' is double, expected a list"),
        ({"subject": ["a"], "vector": ["1 2"]}, "'vector' is string, expected a list"),
        ({"subject": ["a"], "vector": [["1", "2"]]}, "expected numbers in the lists"),
        (
            {"subject": pa.array([], pa.string()), "vector": pa.array([], pa.list_(pa.float32()))},
            "holds nobody",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(tmp_path, columns, message):
    assert message in refused(write(tmp_path / "x.parquet", **columns))


def test_a_person_without_a_vector_never_shifts_the_others(tmp_path):
    """Four people, four numbers each, one of them null: the twelve left fit a [4, 3] too."""
    vectors = pa.array([[1.0] * 4, None, [2.0] * 4, [3.0] * 4], pa.list_(pa.float32(), 4))
    path = write(tmp_path / "x.parquet", subject=["a", "b", "c", "d"], vector=vectors)
    assert "1 of 4 people have no vector" in refused(path)
