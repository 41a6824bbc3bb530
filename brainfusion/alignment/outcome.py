"""What an alignment run came to: the score of pairs, the summary, a sentence."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from brainfusion.alignment.batches import Batch, embed
from brainfusion.alignment.conditioning import Conditioner
from brainfusion.alignment.config import AlignConfig
from brainfusion.alignment.density_ratio import DensityRatio
from brainfusion.alignment.genes.conditioning import GeneConditioner
from brainfusion.alignment.modalities import ModalityPair, side_mean, sides_of
from brainfusion.alignment.network import AlignmentModel
from brainfusion.alignment.resume import Progress
from brainfusion.alignment.validation import Validation
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.logs import say

_NO_SIGNAL = 0.99
"""A loss that never left this share of that of chance has told no pair from another."""


@torch.no_grad()
def fit_head(
    model: AlignmentModel, training: Batch, validation: Batch, config: AlignConfig, ranks: Ranks
) -> DensityRatio | None:
    """The density ratio of the two sides' embeddings, the same on all ranks; none for "cosine"."""
    sides = sides_of(training.inputs)
    if config.score == "cosine":
        return None
    if len(sides) != 2:
        say(f"{len(sides)} sides: a density ratio is of two, so pairs are scored by the cosine.")
        return None
    box: list[Any] = [None]
    if ranks.is_main:
        model.eval()
        box = [DensityRatio.fit(*(_complete(model, people) for people in (training, validation)))]
    if ranks.world_size > 1:
        dist.broadcast_object_list(box, src=0, device=ranks.device)
    return box[0]


def _complete(model: AlignmentModel, people: Batch) -> dict[str, np.ndarray]:
    """Side embeddings of the people who have both sides."""
    embedded = {name: x.cpu().numpy() for name, x in embed(model, people).items()}
    found, has = {}, np.ones(len(people), dtype=bool)
    for side, names in sides_of(people.inputs).items():
        present = {name: people.present[name] for name in names}
        found[side] = side_mean({name: embedded[name] for name in names}, present)
        has &= np.any(list(present.values()), axis=0)
    return {side: rows[has] for side, rows in found.items()}


def describe(
    progress: Progress,
    pairs: Sequence[ModalityPair],
    look: Validation,
    *,
    rows: Mapping[str, np.ndarray],
    present: Mapping[str, np.ndarray],
    conditioners: Mapping[str, Conditioner | GeneConditioner],
    config: AlignConfig,
    ranks: Ranks,
) -> dict[str, Any]:
    """The summary of a run: JSON values."""
    best = progress.best
    several = {}
    if len(conditioners) > 2:
        several = {
            "sides": {side: list(names) for side, names in sides_of(conditioners).items()},
            "n_people": {
                name: {split: int(has[people].sum()) for split, people in rows.items()}
                for name, has in present.items()
            },
            "pairs": [
                {
                    "first": pair.first,
                    "second": pair.second,
                    "weight": pair.weight,
                    "n_train": int(
                        (present[pair.first] & present[pair.second])[rows["train"]].sum()
                    ),
                    "n_validation": look.n_people(pair),
                    "validation_auc": best.get(f"validation_auc_{pair.first}_{pair.second}"),
                }
                for pair in pairs
            ],
        }
    measures = ("auc", "information", "alignment", "uniformity")
    return {
        "modalities": list(conditioners),
        **several,
        **{f"n_{split}": len(people) for split, people in rows.items()},
        "loss_name": config.loss,
        "n_steps": progress.step,
        "best_step": best["step"],
        "loss": best["loss"],
        "loss_over_log_n": best["loss_over_log_n"],
        "least_loss": progress.least_loss,
        "log_n": best["log_n"],
        "signal": progress.least_share is None or progress.least_share < _NO_SIGNAL,
        "logit_scale": best["logit_scale"],
        "logit_scale_bounds": [config.min_scale, config.max_scale],
        **{f"validation_{name}": best[f"validation_{name}"] for name in measures},
        "effective_rank": best["effective_rank"],
        "n_processes": ranks.world_size,
        **({"start": progress.facts} if progress.facts else {}),
        **describe_inputs(conditioners, config),
    }


def describe_inputs(
    conditioners: Mapping[str, Conditioner | GeneConditioner], config: AlignConfig
) -> dict[str, Any]:
    """What became of the columns and genes that were given, for the summary of any method."""
    return {
        "columns": {
            name: {
                "given": c.dim_in,
                "constant": c.n_dropped,
                "used": c.dim_out,
                "variance_kept": c.explained,
            }
            for name, c in conditioners.items()
        },
        **{
            f"{name}_genes": {
                "pool": config.dna_pool,
                "models": list(c.models),
                "given": len(c.genes),
                "used": len(c.used),
            }
            for name, c in conditioners.items()
            if isinstance(c, GeneConditioner)
        },
        "residualised_on": list(next(iter(conditioners.values())).covariates),
    }


def sentence(summary: Mapping[str, Any]) -> str:
    """What came out, plainly."""
    found = (
        f"aligned {summary['n_train']} people: best step {summary['best_step']} of "
        f"{summary['n_steps']}, validation AUC {summary['validation_auc']:.3f} (chance 0.5)"
    )
    if summary["signal"]:
        return f"{found}."
    return (
        f"{found}. No pairing signal yet: the loss has stayed within 1% of log N = "
        f"{summary['log_n']:.3f}, where no pair is told from another."
    )
