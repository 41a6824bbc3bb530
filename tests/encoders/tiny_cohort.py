"""A cohort that trains in a second, and encoders and settings that fit it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from brainfusion.data.atlas import Atlas
from brainfusion.data.cohort import Cohort, write_cohort_tables
from brainfusion.data.recordings import RecordingWriter
from brainfusion.encoders.brainjepa import BrainJEPAConfig
from brainfusion.encoders.brainlm import BrainLMConfig
from brainfusion.encoders.brainlm_image import BrainLMImageConfig
from brainfusion.encoders.pretrain_config import (
    EfficiencyConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    WatchConfig,
)

N_PARCELS, N_TRS, TR_S = 16, 64, 2.0
XYZ_MM = np.random.default_rng(7).uniform(-60, 60, size=(N_PARCELS, 3)).astype(np.float32)
ATLAS = Atlas(name="sixteen", parcels=tuple(f"p{i}" for i in range(N_PARCELS)), xyz_mm=XYZ_MM)

ENCODERS: dict[str, Any] = {
    "brainlm": BrainLMConfig(
        n_parcels=N_PARCELS, n_trs=N_TRS, patch_trs=16, width=16, depth=1, n_heads=2, dim_hidden=32,
        decoder_depth=1, decoder_n_heads=2, decoder_dim_hidden=32, conv_kernel_size=5,
        xyz_unit_mm=50.0,
    ),
    "brainjepa": BrainJEPAConfig(
        n_parcels=N_PARCELS, n_trs=N_TRS, patch_trs=16, width=16, depth=1, n_heads=2,
        predictor_width=8, predictor_depth=1, gradient_dim=4,
    ),
}  # fmt: skip
IMAGE = BrainLMImageConfig(
    n_parcels=N_PARCELS, n_trs=N_TRS, image_size=64, patch_size=16, width=16, depth=1, n_heads=2,
    dim_hidden=32, decoder_width=16, decoder_depth=1, decoder_n_heads=2, decoder_dim_hidden=32,
)  # fmt: skip


def settings(
    model: str,
    *,
    encoder: Any = None,
    run: dict[str, Any] | None = None,
    efficiency: dict[str, Any] | None = None,
    **optim: Any,
):
    """Settings of a short run; dropout is on where the model has it.

    `run` takes the seed and what is watched.
    """
    watch = {"log_every": 2, "validate_every": 3, "save_every": 2, "n_validation": 4, **(run or {})}
    seed = watch.pop("seed", 0)
    return PretrainConfig(
        model=model,
        encoder=ENCODERS[model] if encoder is None else encoder,
        optim=OptimConfig(**{"steps": 6, "batch_size": 4, "lr": 1e-2, **optim}),
        run=RunConfig(seed=seed),
        watch=WatchConfig(**watch),
        efficiency=EfficiencyConfig(**(efficiency or {})),
    )


def without_dropout(model: str) -> Any:
    """The encoder's config with nothing random in it."""
    config = ENCODERS[model]
    return dataclasses.replace(config, position_dropout=0.0) if model == "brainlm" else config


def bold(rng: np.random.Generator, n_trs: int = N_TRS) -> np.ndarray:
    """Slow signals that parcels share, a level that goes with the place, and noise."""
    slow = np.cumsum(rng.normal(size=(3, n_trs)), axis=1) / 16.0
    mixing = np.sin(XYZ_MM / 30.0)
    noise = rng.normal(size=(N_PARCELS, n_trs))
    return (mixing @ slow + 0.05 * XYZ_MM[:, :1] + 0.5 * noise).astype(np.float32)


def tiny_cohort(
    path: Path,
    *,
    n_people: int = 24,
    scanned: Sequence[tuple[int, int]] | None = None,
    missing: float = 0.0,
    order: Sequence[int] | None = None,
    atlas: Atlas = ATLAS,
    tr_s: float | None = TR_S,
) -> Cohort:
    """Write a cohort and open it.

    Args:
        path: Folder to make.
        n_people: People in the table.
        scanned: (person, TRs) of each recording; one of `N_TRS` for everyone if omitted.
        missing: Share of a recording's parcels that are NaN.
        order: Order of the parcels in this cohort, of those of `atlas`.
        atlas: Its parcels, before `order`.
        tr_s: Seconds between TRs; None where nobody knows.
    """
    order = range(atlas.n_parcels) if order is None else order
    xyz = None if atlas.xyz_mm is None else atlas.xyz_mm[list(order)]
    own = Atlas(name=atlas.name, parcels=tuple(atlas.parcels[i] for i in order), xyz_mm=xyz)
    ids = [f"{i:03d}" for i in range(n_people)]
    write_cohort_tables(
        path, name="tiny", origin="imported", subjects=pl.DataFrame({"subject": ids}), atlas=own
    )
    scanned = [(person, N_TRS) for person in range(n_people)] if scanned is None else scanned
    with RecordingWriter(path / "recordings", n_parcels=own.n_parcels) as writer:
        for i, (person, n_trs) in enumerate(scanned):
            rng = np.random.default_rng([3, i])
            values = bold(rng, n_trs)
            values[rng.random(N_PARCELS) < missing] = np.nan
            writer.add(values[list(order)], recording=f"run-{i}", subject=ids[person], tr_s=tr_s)
    return Cohort.open(path)
