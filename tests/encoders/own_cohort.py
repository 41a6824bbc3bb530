"""Cohorts and encoders for the tests of embedding, made without training."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from brainfusion.data.atlas import Atlas
from brainfusion.data.cohort import Cohort, write_cohort_tables
from brainfusion.data.conditioning import InputConditioning
from brainfusion.data.recordings import SHARD_BYTES, RecordingWriter
from brainfusion.data.standardise import Standardiser
from brainfusion.encoders import build
from brainfusion.encoders.checkpoints import Pretrained
from tests.encoders.tiny_cohort import ATLAS, ENCODERS, N_PARCELS, TR_S


def written(
    path: Path,
    recordings: list[tuple[str, np.ndarray, float | None]],
    atlas: Atlas = ATLAS,
    shard_bytes: int = SHARD_BYTES,
) -> Cohort:
    """A cohort of these recordings: (subject, BOLD, TR)."""
    people = pl.DataFrame({"subject": sorted({subject for subject, _, _ in recordings})})
    write_cohort_tables(path, name="own", origin="imported", subjects=people, atlas=atlas)
    with RecordingWriter(
        path / "recordings", n_parcels=atlas.n_parcels, shard_bytes=shard_bytes
    ) as writer:
        for i, (subject, values, tr_s) in enumerate(recordings):
            writer.add(values, recording=f"r{i}", subject=subject, tr_s=tr_s)
    return Cohort.open(path)


def fresh(model: str, *, seed: int = 0) -> Pretrained:
    """An encoder with random weights, the same in every process."""
    torch.manual_seed(seed)
    table = np.random.default_rng(seed).normal(size=(N_PARCELS, 4)).astype(np.float32)
    config: Any = ENCODERS[model]
    module = build(model, config, gradient=table if model == "brainjepa" else None)
    standardiser = Standardiser(
        kind="recording-zscore", n_parcels=N_PARCELS, cohort="x", n_people=9, n_recordings=9
    )
    conditioning = InputConditioning(
        standardiser=standardiser, tr_s=TR_S, resampling="linear", statistics=None
    )
    return Pretrained(
        model=model,
        module=module.eval(),
        conditioning=conditioning,
        atlas=ATLAS,
        state={},
        path=Path("nowhere"),
        hash="untrained",
    )
