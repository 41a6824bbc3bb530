"""Small cohort folders for the tests of the data layer."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from brainfusion.data.atlas import Atlas
from brainfusion.data.cohort import write_cohort_tables
from brainfusion.data.importers import ImportConfig, import_cohort
from brainfusion.data.recordings import RecordingWriter
from brainfusion.runtime.errors import UserError


def small_atlas(n_parcels: int = 4) -> Atlas:
    return Atlas(name="small", parcels=tuple(f"p{i}" for i in range(n_parcels)))


def noise(rng: np.random.Generator, n_parcels: int = 4, n_trs: int = 20) -> np.ndarray:
    return rng.normal(size=(n_parcels, n_trs)).astype(np.float32)


def write_cohort(
    path: Path,
    *,
    n_people: int = 6,
    n_trs: int = 20,
    subjects: pl.DataFrame | None = None,
    atlas: Atlas | None = None,
    scanned: list[str] | None = None,
) -> Path:
    """A valid cohort of noise, unless the arguments say otherwise."""
    ids = [f"00{i}" for i in range(n_people)]
    table = pl.DataFrame({"subject": ids}) if subjects is None else subjects
    write_cohort_tables(
        path, name="small", origin="imported", subjects=table, atlas=atlas or small_atlas()
    )
    rng = np.random.default_rng(0)
    with RecordingWriter(path / "recordings", n_parcels=4) as writer:
        for subject in scanned or ids:
            writer.add(
                noise(rng, n_trs=n_trs), recording=f"{subject}_rest", subject=subject, tr_s=2.0
            )
    return path


def refused(config: ImportConfig, message: str) -> None:
    """The import fails in one line and leaves nothing behind."""
    before = sorted(config.out.parent.iterdir())
    with pytest.raises(UserError, match=message) as error:
        import_cohort(config)
    assert "\n" not in str(error.value)
    assert sorted(config.out.parent.iterdir()) == before
