"""People of a small site as strangers: their recordings and DNA vectors written to files."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from brainfusion.data.cohort import Cohort
from brainfusion.genetics import open_store


def answered(said: Any) -> dict[str, Any]:
    """The JSON object of a query."""
    return json.loads(said.out)


def ranked(answer: dict[str, Any]) -> list[str]:
    return [row["id"] for row in answer["rows"]]


def scores(answer: dict[str, Any]) -> np.ndarray:
    return np.array([row["score"] for row in answer["rows"]])


def assert_same_answer(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same order, and scores to 1e-5."""
    assert ranked(one) == ranked(other)
    np.testing.assert_allclose(scores(one), scores(other), rtol=0, atol=1e-5)


def bold_of(cohort: Cohort, person: str) -> np.ndarray:
    """The recording [p, t] of somebody who has one."""
    [row] = cohort.recordings.rows([person])
    return cohort.recordings.read(int(row))


def write_table(path: Path, bold: np.ndarray, names: list[str]) -> Path:
    """A TSV with a column a parcel."""
    pl.DataFrame(dict(zip(names, bold, strict=True))).write_csv(path, separator="\t")
    return path


def native_evo2(source: Path, people: list[str], folder: Path) -> Path:
    """Some people's files in Evo 2's own form: a gene a file."""
    folder.mkdir()
    known = (source / "subjects.txt").read_text().split()
    rows = [known.index(person) for person in people]
    for file in source.glob("*.pt"):
        layers = torch.load(file, weights_only=True)
        torch.save(
            {name: rows_of[rows].clone() for name, rows_of in layers.items()}, folder / file.name
        )
    (folder / "subjects.txt").write_text("\n".join(people) + "\n")
    shutil.copy(source / "provenance.json", folder)
    return folder


def native_caduceus(source: Path, people: list[str], folder: Path) -> Path:
    """Some people's rows in the table that Caduceus' users write."""
    folder.mkdir()
    table = pl.read_parquet(source / "embeddings.parquet").filter(pl.col("eid").is_in(people))
    table.write_parquet(folder / "embeddings.parquet")
    shutil.copy(source / "provenance.json", folder)
    return folder


def stored_vector(cohort: Path, model: str, person: str) -> np.ndarray:
    """Somebody's vectors float32 [g, h] in the cohort's order of genes."""
    store = open_store(cohort / "genetics" / model)
    return np.asarray(store.rows([store.subjects.index(person)]))[0]
