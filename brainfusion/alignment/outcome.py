"""What an alignment run came to: the score of pairs, the summary, a sentence."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from brainfusion.alignment.batches import Batch, embed
from brainfusion.alignment.conditioning import Conditioner
from brainfusion.alignment.config import AlignConfig
from brainfusion.alignment.density_ratio import DensityRatio
from brainfusion.alignment.genes.conditioning import GeneConditioner
from brainfusion.alignment.members import Outcome
from brainfusion.alignment.modalities import ModalityPair, side_mean, sides_of
from brainfusion.alignment.network import AlignmentModel
from brainfusion.alignment.validation import METRICS, Validation
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.logs import say

_NAMES = {"validation_auc": "the AUC", "validation_information": "the information in nats"}
_NO_SIGNAL = 0.99
"""A loss that never left this share of that of chance has told no pair from another."""


def settle(
    outcome: Outcome,
    model: AlignmentModel,
    origin: Mapping[str, Tensor],
    training: Batch,
    validation: Batch,
    config: AlignConfig,
    ranks: Ranks,
) -> tuple[Outcome, DensityRatio | None]:
    """The score of pairs, and the start again where that is scored better than what came of it.

    While an alignment trains, cosines are looked at. The density ratio may score a start in closed
    form much better than its cosines do, so what is kept has to beat it at that, too.

    Args:
        outcome: What is kept by the cosines.
        model: Has its weights, and gets those of the start where they are kept.
        origin: The weights of the start.
        training: Training people.
        validation: Validation people.
        config: The settings.
        ranks: Where this process stands.
    """
    head = fit_head(model, training, validation, config, ranks)
    if head is None or not outcome.start or outcome.best["kept"] == "start":
        return outcome, head
    trained = copy.deepcopy(model.state_dict())
    model.load_state_dict(origin)
    of_start = fit_head(model, training, validation, config, ranks)
    assert of_start is not None
    if of_start.information <= head.information:
        model.load_state_dict(trained)
        return outcome, head
    if ranks.is_main:
        say(
            f"scored by the density ratio, the start tells validation people apart better "
            f"({of_start.information:.4f} nats) than step {outcome.best['step']} does "
            f"({head.information:.4f}): the start is kept."
        )
    return replace(outcome, best=outcome.start), of_start


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
    outcome: Outcome,
    pairs: Sequence[ModalityPair],
    look: Validation,
    *,
    rows: Mapping[str, np.ndarray],
    present: Mapping[str, np.ndarray],
    conditioners: Mapping[str, Conditioner | GeneConditioner],
    config: AlignConfig,
    ranks: Ranks,
    begun: Mapping[str, float],
) -> dict[str, Any]:
    """The summary of a run: JSON values."""
    best = outcome.best
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
        "n_steps": outcome.n_steps,
        "best_step": best["step"],
        "kept": best["kept"],
        "loss": best["loss"],
        "loss_over_log_n": best["loss_over_log_n"],
        "least_loss": outcome.least_loss,
        "log_n": best["log_n"],
        "signal": outcome.least_share is None or outcome.least_share < _NO_SIGNAL,
        "logit_scale": best["logit_scale"],
        "logit_scale_bounds": [config.min_scale, config.max_scale],
        **{f"validation_{name}": best[f"validation_{name}"] for name in measures},
        "effective_rank": best["effective_rank"],
        "n_processes": ranks.world_size,
        **({"start": dict(begun)} if begun else {}),
        **outcome.members,
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


def sentences(summary: Mapping[str, Any]) -> Iterator[str]:
    """What came out, plainly: of the members, where there are several, and of the run."""
    if members := summary.get("members"):
        yield from _of_members(members, summary)
    averaged = f" ({summary['kept']})" if summary["kept"].startswith("average") else ""
    found = (
        f"aligned {summary['n_train']} people: best step {summary['best_step']} of "
        f"{summary['n_steps']}{averaged}, validation AUC "
        f"{summary['validation_auc']:.3f} (chance 0.5)"
    )
    if summary["signal"]:
        yield f"{found}."
        return
    yield (
        f"{found}. No pairing signal yet: the loss has stayed within 1% of log N = "
        f"{summary['log_n']:.3f}, where no pair is told from another."
    )


def _of_members(members: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> Iterator[str]:
    """A line on the candidates, and one on the seeds."""
    metric, chosen = METRICS[summary["chosen_by"]], summary["chosen"]
    candidates = [row for row in members if row["seed"] == members[0]["seed"]]
    if len(candidates) > 1:
        found = (
            f"weight decay {chosen['weight_decay']:g} and dropout {chosen['dropout']:g} chosen of "
            f"{len(candidates)} candidates by {_NAMES[metric]} of the validation people"
        )
        table = "; ".join(
            f"{row['weight_decay']:g} and {row['dropout']:g}: {row[metric]:.4f}"
            for row in candidates
        )
        if all(row["kept"] == "start" for row in candidates):
            yield f"{found}: the start is better than any step of any of them."
        else:
            yield f"{found} ({table})."
    if average := summary.get("average_over_seeds"):
        own = [row for row in members if all(row[k] == v for k, v in chosen.items())]
        kept = "is" if summary["kept"] == "average over seeds" else "is not"
        yield (
            f"{len(own)} seeds: the average of their weights {kept} kept, with {_NAMES[metric]} "
            f"{average[metric]:.4f} of the validation people; each by itself "
            f"{', '.join(f'{row[metric]:.4f}' for row in own)}."
        )
