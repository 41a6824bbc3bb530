"""From recordings to features: a frozen encoder over a whole cohort."""

from typing import Any

import numpy as np
import torch

from brainfusion import __version__
from brainfusion.data.atlas import match_parcels
from brainfusion.data.cohort import Cohort
from brainfusion.encoders.checkpoints import Pretrained
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import Progress, say


@torch.no_grad()
def embed(
    pretrained: Pretrained, cohort: Cohort, *, pooling: str, batch_size: int = 16
) -> tuple[list[str], np.ndarray, dict[str, Any]]:
    """One feature vector a person: standardised, encoded, pooled; recordings averaged.

    Args:
        pretrained: Encoder with its standardiser and atlas.
        cohort: Its parcels are matched to the encoder's by name.
        pooling: What the encoder offers of "mean", "cls", "parcel-mean" and "parcel-std".
        batch_size: Recordings at a time.

    Returns:
        Subjects (those with a recording, in the order of subjects.parquet), vectors float32
        [person, width], and the provenance that goes into the feature file.

    Raises:
        UserError: Parcels are missing, or recordings are too short for the encoder.
    """
    order = _parcel_order(pretrained, cohort)
    _check_tr(pretrained, cohort)
    module, recordings = pretrained.module, cohort.recordings
    index = recordings.index
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    progress = Progress(f"embedding with {pretrained.model}", len(index))
    done = 0
    for n_trs in index["n_trs"].unique().sort().to_list():
        rows = np.flatnonzero(index["n_trs"].to_numpy() == n_trs)
        for begin in range(0, len(rows), batch_size):
            part = rows[begin : begin + batch_size]
            bold = np.stack([recordings.read(int(row))[order] for row in part])
            batch = torch.from_numpy(pretrained.standardiser.transform(bold))
            vectors = _encode(pretrained, batch, cohort, order, pooling)
            for row, vector in zip(part, vectors.double().numpy(), strict=True):
                subject = index["subject"][int(row)]
                sums[subject] = sums.get(subject, 0.0) + vector
                counts[subject] = counts.get(subject, 0) + 1
            done += len(part)
            progress.update(done)
    subjects = [subject for subject in cohort.subjects["subject"] if subject in sums]
    vectors = np.stack([sums[subject] / counts[subject] for subject in subjects])
    provenance = {
        "kind": "features",
        "encoder": pretrained.model,
        "checkpoint_hash": pretrained.hash,
        "cohort_hash": cohort.hash,
        "pooling": pooling,
        "window_trs": module.window_trs,
        "standardiser": pretrained.standardiser.fitted_on,
        "n_recordings": len(index),
        "package_version": __version__,
    }
    return subjects, vectors.astype(np.float32), provenance


def _encode(
    pretrained: Pretrained, batch: torch.Tensor, cohort: Cohort, order: np.ndarray, pooling: str
) -> torch.Tensor:
    if pretrained.model == "brainjepa":
        return pretrained.module.encode(batch, pooling=pooling)  # type: ignore[operator]
    xyz = cohort.atlas.xyz_mm
    xyz = pretrained.atlas.xyz_mm if xyz is None else xyz[order]
    return pretrained.module.encode(  # type: ignore[operator]
        batch, torch.as_tensor(np.asarray(xyz), dtype=torch.float32), pooling=pooling
    )


def _parcel_order(pretrained: Pretrained, cohort: Cohort) -> np.ndarray:
    """Rows of the cohort's recordings in the encoder's parcel order."""
    match = match_parcels(cohort.atlas.parcels, pretrained.atlas)
    if len(match.missing):
        raise UserError(
            f"the cohort '{cohort.name}' ({cohort.atlas.name}, {cohort.atlas.n_parcels} parcels) "
            f"lacks {len(match.missing)} of the {pretrained.atlas.n_parcels} parcels that the "
            f"encoder was trained on ({pretrained.atlas.name}), for example "
            f"{list(match.missing)[:2]}: re-parcellate, or pretrain on this cohort."
        )
    if match.extra:
        say(
            f"{len(match.extra)} of {cohort.atlas.n_parcels} parcels are not in the encoder's "
            "atlas and are left out."
        )
    if match.permuted:
        say("parcels are in another order than the encoder's: matched by name.")
    return match.order


def _check_tr(pretrained: Pretrained, cohort: Cohort) -> None:
    trained = pretrained.state.get("tr_s")
    own = cohort.recordings.index["tr_s"].drop_nulls().to_numpy()
    if trained and len(own) and abs(float(np.median(own)) / trained - 1.0) > 0.05:
        say(
            f"warning: the encoder was trained at TR {trained:g} s, this cohort has "
            f"{float(np.median(own)):g} s: its features see other frequencies. Resample first."
        )
