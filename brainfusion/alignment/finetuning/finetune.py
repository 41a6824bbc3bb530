"""Fine-tuning: the brain encoder itself in the graph of an alignment, through gradient caching.

    windows -> encoder -> pooled features -> the conditioner's affine map -> projector -> InfoNCE

It starts from a trained alignment and the encoder whose features that was trained on, so that step
0 is the frozen model; the weights that are best on validation people are kept, step 0 among them.
The loss is exact over the whole batch (`grad_cache`), whatever the micro-batches and processes.
A run that was stopped goes on from its last checkpoint, to the bit (`loop`).

Shape legend: n people, m people of a micro-batch, f features, o width of the shared space.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from brainfusion.alignment.conditioning import Conditioner
from brainfusion.alignment.density_ratio import DensityRatio
from brainfusion.alignment.finetuning.config import FinetuneConfig
from brainfusion.alignment.finetuning.loop import optimise
from brainfusion.alignment.finetuning.lora import ATTENTION, Trained, choose_trained, merge_lora
from brainfusion.alignment.finetuning.resume import Checkpoints, Progress, run_facts
from brainfusion.alignment.finetuning.tower import Tower, Towers
from brainfusion.alignment.genes.conditioning import GeneConditioner
from brainfusion.alignment.genes.vectors import GeneVectors
from brainfusion.alignment.losses.pair_ids import PairIds
from brainfusion.alignment.model import Alignment
from brainfusion.alignment.network import AlignmentModel
from brainfusion.runtime import config as configs
from brainfusion.runtime.distributed import Ranks, barrier
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import check_writable, write_json
from brainfusion.runtime.logs import say
from brainfusion.runtime.memory import peak_mib

_NO_SIGNAL = 0.99


@dataclass(frozen=True, kw_only=True, eq=False)
class FinetuneResult:
    """What a run found; the tower's module holds the tuned encoder, with plain weights."""

    alignment: Alignment
    trained: Trained
    summary: dict[str, Any]
    embeddings: dict[str, np.ndarray]
    """float32 [n, o] of everybody, a modality."""
    run_dir: Path


def finetune(
    alignment: Alignment,
    tower: Tower,
    dna: np.ndarray | GeneVectors,
    labels: Sequence[str],
    *,
    config: FinetuneConfig,
    run_dir: Path,
    ids: PairIds | None = None,
    covariates: np.ndarray | None = None,
    meta: Mapping[str, Any] | None = None,
    ranks: Ranks | None = None,
    checkpoint_every: int = 0,
    resume: bool = False,
    made_of: Mapping[str, Any] | None = None,
) -> FinetuneResult:
    """Train the encoder and the projectors of an alignment together; the best step is kept.

    All processes are given the same arguments. A step is a function of (seed, step): two processes
    see the batch, the windows and the dropout of one.

    Args:
        alignment: Of the features that `tower` makes ("brain") and of "dna"; not changed.
        tower: The encoder; its module is tuned in place.
        dna: What the alignment was given as "dna", row-paired with the tower's people.
        labels: "train", "validation" or "test", a row; test rows are not looked at.
        config: The settings.
        run_dir: Gets config.yaml, metrics.jsonl, summary.json and model/.
        ids: Of all rows: who is a negative of whom; everybody of everybody else if omitted.
        covariates: [n, c], as the alignment was given them.
        meta: Facts to keep with the model.
        ranks: Where this process stands; one process if omitted.
        checkpoint_every: Steps between checkpoints in run_dir/checkpoints, which are left there;
            SIGTERM and SIGUSR1 then write one before they stop the run. 0: none.
        resume: Go on from the last of them, to the bit; otherwise they are removed.
        made_of: What the recordings are, as JSON values: a run of others is not gone on with.
            Encoder, alignment, DNA and settings are compared in any case.

    Raises:
        UserError: An alignment that this does not cover, too few people, or an unknown `how`.
        CheckpointError: What there is to go on with was made with another config or other data.
        NonFiniteError: A loss or a gradient that is not finite.
        Stopped: A signal came; a checkpoint was written first.
    """
    ranks = ranks or Ranks()
    check_alignment(alignment)
    rows = _splits(labels, config, ranks)
    facts = {}
    if checkpoint_every or resume:
        facts = run_facts(
            alignment, tower, dna, labels, config=config, ids=ids, covariates=covariates,
            made_of=made_of or {},
        )  # fmt: skip
    trained = choose_trained(
        tower.module, config.how, blocks=tower.blocks, after=tower.after, fixed=tower.fixed,
        patterns=config.adapt or ATTENTION, rank=config.rank, alpha=config.alpha, seed=config.seed,
    )  # fmt: skip
    say(f"{trained}.")
    if ranks.is_main:
        check_writable(run_dir)
        configs.save(run_dir / "config.yaml", config)
    towers = Towers.of(alignment, tower, dna, ids, covariates, config, ranks)
    keeping = Checkpoints(run_dir=run_dir, every=checkpoint_every, resume=resume, facts=facts)
    progress = optimise(towers, rows, keeping)
    merge_lora(tower.module)
    brain, genes = towers.both(np.arange(len(labels)))
    embeddings = {"brain": brain.cpu().numpy(), "dna": genes.cpu().numpy()}
    head = None if alignment.head is None else _head(embeddings, rows, ranks)
    summary = _summary(progress, rows, trained, config, alignment, ranks)
    tuned = Alignment(
        model=towers.model.cpu().eval(),
        conditioners=alignment.conditioners,
        head=head,
        info={
            "config": alignment.info.get("config", {}),
            "finetune": configs.to_dict(config),
            "summary": summary,
            "meta": dict(meta or {}),
        },
    )
    if ranks.is_main:
        tuned.save(run_dir / "model")
        write_json(run_dir / "summary.json", {**summary, "meta": dict(meta or {})})
        say(_sentence(summary))
    barrier()
    return FinetuneResult(
        alignment=tuned, trained=trained, summary=summary, embeddings=embeddings, run_dir=run_dir
    )


def check_alignment(alignment: Alignment) -> None:
    """Refuse an alignment that fine-tuning does not cover.

    Raises:
        UserError: It is linear, has several modalities a side, or pools genes.
    """
    if not isinstance(alignment.model, AlignmentModel):
        raise UserError(
            "this alignment has no projectors (it is linear): fine-tuning goes on from projectors; "
            "align with --method infonce."
        )
    if set(alignment.conditioners) != {"brain", "dna"}:
        names = ", ".join(alignment.conditioners)
        raise UserError(
            f"this alignment has the modalities {names}: fine-tuning takes one brain encoder and "
            "one DNA side; align one encoder, with DNA models joined as one (evo2+caduceus)."
        )
    dna = alignment.conditioners["dna"]
    if isinstance(dna, GeneConditioner) and not dna.together:
        raise UserError(
            "this alignment pools genes: fine-tuning takes the DNA side as one vector a person; "
            "align with --dna-pool concat."
        )
    if not isinstance(alignment.conditioners["brain"], Conditioner):
        raise UserError("the brain side of this alignment comes as genes: expected features.")


def _splits(labels: Sequence[str], config: FinetuneConfig, ranks: Ranks) -> dict[str, np.ndarray]:
    rows = {s: np.flatnonzero(np.asarray(labels) == s) for s in ("train", "validation", "test")}
    for split, least in (("train", 8), ("validation", 4)):
        if len(rows[split]) < least:
            raise UserError(
                f"{len(rows[split])} {split} people with both modalities: expected at least "
                f"{least}. Check that both were made from the same cohort."
            )
    size = min(config.batch_size or len(rows["train"]), len(rows["train"]))
    if size < ranks.world_size:
        raise UserError(
            f"a batch of {size} people does not give each of {ranks.world_size} processes one: "
            "use a larger batch_size, or fewer processes."
        )
    return rows


# -- results ---------------------------------------------------------------------------------------


def _head(
    embeddings: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray], ranks: Ranks
) -> DensityRatio:
    """The score of pairs, fitted anew: the same on all ranks."""
    box: list[Any] = [None]
    if ranks.is_main:
        parts = (
            {side: x[rows[split]] for side, x in embeddings.items()}
            for split in ("train", "validation")
        )
        box = [DensityRatio.fit(*parts)]
    if ranks.world_size > 1:
        dist.broadcast_object_list(box, src=0, device=ranks.device)
    return box[0]


def _summary(
    progress: Progress,
    rows: Mapping[str, np.ndarray],
    trained: Trained,
    config: FinetuneConfig,
    alignment: Alignment,
    ranks: Ranks,
) -> dict[str, Any]:
    best, least, before = progress.best, progress.least_loss, alignment.info.get("summary", {})
    settings = alignment.model.settings
    return {
        **{key: before[key] for key in ("columns", "residualised_on") if key in before},
        "modalities": ["brain", "dna"],
        **{f"n_{split}": len(people) for split, people in rows.items()},
        "loss_name": "info_nce",
        "n_steps": progress.step,
        "best_step": best["step"],
        "loss": best["loss"],
        "loss_over_log_n": best["loss_over_log_n"],
        "least_loss": least,
        "log_n": progress.log_n,
        "signal": least is not None and least < _NO_SIGNAL * progress.log_n,
        "logit_scale": best["logit_scale"],
        "logit_scale_bounds": [settings["min_scale"], settings["max_scale"]],
        **{name: value for name, value in best.items() if name.startswith("validation_")},
        "effective_rank": best["effective_rank"],
        "n_processes": ranks.world_size,
        "finetune": {
            "how": config.how,
            "n_trained": trained.n_trained,
            "n_parameters": trained.n_all,
            "frozen_validation_auc": progress.frozen,
            "seconds": round(progress.seconds, 2),
            "peak_mib": peak_mib(),
        },
    }


def _sentence(summary: Mapping[str, Any]) -> str:
    frozen = summary["finetune"]["frozen_validation_auc"]
    if not summary["best_step"]:
        return (
            f"no step of {summary['n_steps']} was better on validation people than the frozen "
            f"start (AUC {frozen:.3f}), which is kept."
        )
    return (
        f"fine-tuned on {summary['n_train']} people: best step {summary['best_step']} of "
        f"{summary['n_steps']}, validation AUC {summary['validation_auc']:.3f} (frozen start "
        f"{frozen:.3f}, chance 0.5)."
    )
