"""One person's features, from recordings that are no cohort's: as `embed` makes them.

Shape legend: p parcels, t TRs, f features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from brainfusion.data.atlas import Atlas, match_parcels
from brainfusion.data.importers.recording import Recording
from brainfusion.data.input_statistics import InputStatistics
from brainfusion.encoders.checkpoints import Pretrained
from brainfusion.encoders.embed import (
    EmbedSettings,
    FrozenEncoder,
    default_pooling,
    poolings,
    shortest_trs,
)
from brainfusion.encoders.pooling import check_pooling
from brainfusion.encoders.preflight import compare
from brainfusion.runtime.errors import CheckpointError, UserError
from brainfusion.runtime.logs import say

LEAST_COVERAGE = 0.8
"""Share of the encoder's parcels that must have data; an import's default."""
_MADE = ("encoder", "checkpoint_hash", "pooling")


def person_features(
    pretrained: Pretrained,
    recordings: Sequence[Recording],
    *,
    made: Mapping[str, Any] | None = None,
    centroids: Atlas | None = None,
    device: torch.device | None = None,
) -> Float[np.ndarray, "1 f"]:
    """The features of a person: recordings conditioned, encoded, pooled, and averaged.

    Where they look unlike those that the encoder was trained on, it is said.

    Args:
        pretrained: Encoder with its conditioning and atlas; parcels are matched to it by name.
        recordings: All of one person.
        made: What a feature file says of how it was made (`Alignment.made_of("brain")`): the same
            is done here, and another encoder is refused. The pooling that fits the encoder's size
            if omitted.
        centroids: An atlas with coordinates of all parcels, for a BrainLM that has none.
        device: The CPU if omitted.

    Returns:
        float32, one row.

    Raises:
        UserError: Parcels are missing, a recording is too short, or it is another encoder.
    """
    if not recordings:
        raise UserError("no recording: expected one or several of the same person.")
    if made is not None:
        check_maker(pretrained, made)
    pooling = (made or {}).get("pooling") or default_pooling(pretrained)
    check_pooling(pooling, poolings(pretrained.module))
    settings = EmbedSettings(precision=(made or {}).get("precision", "float32"))
    encode = FrozenEncoder(
        pretrained, _xyz(pretrained, centroids), pooling, settings, device or torch.device("cpu")
    )
    conditioned = [_conditioned(pretrained, recording, pooling) for recording in recordings]
    _compare(pretrained, conditioned, recordings)
    total = sum(encode(bold[None]).astype(np.float64) for bold in conditioned)
    return np.asarray(total / len(conditioned), dtype=np.float32)


def check_maker(pretrained: Pretrained, made: Mapping[str, Any]) -> None:
    """Check that an encoder is the one that features were made with.

    Args:
        pretrained: The encoder.
        made: What the feature file says of how it was made; with `finetuned_from`, of the
            features before the encoder was tuned.

    Raises:
        UserError: The features do not say how they were made.
        CheckpointError: It is another one, or its inputs would be conditioned otherwise.
    """
    if absent := [key for key in _MADE if key not in made]:
        raise UserError(
            f"the features do not say how they were made ({absent[0]}): expected those of "
            "'brainfusion embed', so that a new recording becomes the same; embed and align again."
        )
    own = pretrained.hash
    if "finetuned_from" in made:
        own = pretrained.state.get("finetuned", {}).get("from", f"{own}, which was not fine-tuned")
    if (made["encoder"], made["checkpoint_hash"]) != (pretrained.model, own):
        raise CheckpointError(
            f"{pretrained.path} is {pretrained.model} with the hash {own}, but the "
            f"features were made by {made['encoder']} with {made['checkpoint_hash']}: give the "
            "checkpoint that made them (--checkpoint), or embed with this one and align again."
        )
    conditioning = pretrained.conditioning
    for key, own in (("standardiser", conditioning.standardiser.kind), ("tr_s", conditioning.tr_s)):
        if key in made and made[key] != own:
            raise CheckpointError(
                f"{pretrained.path} would condition recordings by {key} '{own}', but the features "
                f"were made with '{made[key]}': give the options that they were embedded with."
            )


def _conditioned(pretrained: Pretrained, recording: Recording, pooling: str) -> np.ndarray:
    """float32 [p, t'] in the encoder's parcels and TR."""
    match = match_parcels(recording.atlas.parcels, pretrained.atlas)
    if match.missing:
        raise UserError(
            f"{recording.path.name} ({recording.atlas.name}, {recording.atlas.n_parcels} parcels) "
            f"lacks {len(match.missing)} of the {pretrained.atlas.n_parcels} parcels of the "
            f"{pretrained.model} ({pretrained.atlas.name}), for example "
            f"{list(match.missing)[:2]}: re-parcellate it."
        )
    bold = recording.bold[match.order]
    if (coverage := 1.0 - float(np.isnan(bold[:, 0]).mean())) < LEAST_COVERAGE:
        raise UserError(
            f"{recording.path.name} has data in {coverage:.1%} of the {len(bold)} parcels that "
            f"this {pretrained.model} reads ({pretrained.atlas.name}), expected at least "
            f"{LEAST_COVERAGE:.0%}: re-parcellate it."
        )
    conditioning, shortest = pretrained.conditioning, shortest_trs(pretrained.module, pooling)
    n_trs = conditioning.length(bold.shape[1], tr_s=recording.tr_s)
    if n_trs < shortest:
        at = f" at its TR of {conditioning.tr_s:g} s" if conditioning.tr_s else ""
        raise UserError(
            f"{recording.path.name} has {n_trs} TRs{at}, and this {pretrained.model} needs "
            f"{shortest} or more: give a longer recording."
        )
    return conditioning.prepare(bold, tr_s=recording.tr_s)


def _compare(
    pretrained: Pretrained, conditioned: Sequence[np.ndarray], recordings: Sequence[Recording]
) -> None:
    """Say in what the recordings differ from those of training."""
    conditioning = pretrained.conditioning
    if conditioning.statistics is None:
        return
    tr_s = recordings[0].tr_s if conditioning.tr_s is None else conditioning.tr_s
    seen = InputStatistics.of(conditioned, n_recordings=len(conditioned), tr_s=tr_s)
    for sentence in compare(seen, conditioning.statistics):
        # The sentences are about a cohort; this one is one recording, or one person's.
        say(f"warning: {sentence.replace('cohort', 'recording')}")


def _xyz(pretrained: Pretrained, centroids: Atlas | None) -> np.ndarray | None:
    """float32 [p, 3] centroids in mm for an encoder that reads them; the checkpoint's own first."""
    if pretrained.model == "brainjepa":
        return None
    own = pretrained.atlas.xyz_mm
    if own is None and centroids is not None and centroids.xyz_mm is not None:
        own = centroids.xyz_mm[match_parcels(centroids.parcels, pretrained.atlas).order]
    if own is None:
        raise UserError(
            f"the atlas '{pretrained.atlas.name}' has no coordinates, which BrainLM reads: give "
            "an atlas with 'xyz_mm' (MNI millimetres, one row a parcel)."
        )
    return np.ascontiguousarray(own, dtype=np.float32)
