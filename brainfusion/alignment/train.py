"""Training of the alignment: one loop, on one process or many, with early stopping.

The start is found once; each member of a run (`members`), most often one alone, is trained from it.

Shape legend: n people, t training people, d features of a modality.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from brainfusion.alignment import resume as resuming
from brainfusion.alignment.batches import Batch, Batches
from brainfusion.alignment.config import AlignConfig
from brainfusion.alignment.genes.vectors import GeneVectors
from brainfusion.alignment.member import Member
from brainfusion.alignment.members import Members, check_start
from brainfusion.alignment.modalities import modality_pairs
from brainfusion.alignment.model import Alignment
from brainfusion.alignment.objective import Objective
from brainfusion.alignment.outcome import describe, sentences, settle
from brainfusion.alignment.prepare import (
    check,
    conditioned,
    everyone,
    fit_conditioners,
    make_model,
    peak_lr,
    start,
)
from brainfusion.alignment.validation import Validation
from brainfusion.alignment.validation import effective_rank as effective_rank
from brainfusion.alignment.validation import pair_auc as pair_auc
from brainfusion.runtime import config as configs
from brainfusion.runtime import logs
from brainfusion.runtime.distributed import Ranks, barrier
from brainfusion.runtime.files import check_writable, write_json
from brainfusion.runtime.signals import Stopped, StopSignals

if TYPE_CHECKING:
    from brainfusion.alignment.losses.pair_ids import PairIds


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainResult:
    """What a training run found; `summary` is what `summary.json` holds."""

    alignment: Alignment
    summary: dict[str, Any]
    run_dir: Path


def train(
    features: Mapping[str, np.ndarray | GeneVectors],
    labels: Sequence[str],
    *,
    config: AlignConfig,
    run_dir: Path,
    present: Mapping[str, np.ndarray] | None = None,
    ids: "PairIds | None" = None,
    covariates: np.ndarray | None = None,
    covariate_names: Sequence[str] = (),
    meta: Mapping[str, Any] | None = None,
    ranks: Ranks | None = None,
    checkpoint_every: int = 0,
    resume: bool = False,
) -> TrainResult:
    """Align modalities of the same people, and keep the weights best on validation people.

    All processes are given the same arguments; rank r takes people r, r + W, ... of each batch, and
    the loss is that of the whole batch. Nothing is fitted on validation or test people.

    Args:
        features: [n, d] or gene vectors a modality, row-paired: "brain" and "dna", or several of a
            side, such as "brain_brainjepa", "brain_brainlm" and "dna" (`modalities`).
        labels: "train", "validation" or "test", a row; test rows are not looked at.
        config: The settings.
        run_dir: Gets config.yaml, metrics.jsonl, summary.json and model/.
        present: bool [n] a modality: who has it; everybody, for a modality that is not named. What
            stands in the rows of the others is not looked at.
        ids: Of all n rows: who is a positive or a negative of whom; each person is a negative of
            everybody else if omitted.
        covariates: [n, c] from `design_matrix(subjects, config.residualise)`.
        covariate_names: Their names, kept with the model.
        meta: Facts to keep with the model: provenance, hashes. JSON values.
        ranks: Where this process stands; one process if omitted.
        checkpoint_every: Steps between checkpoints in run_dir/checkpoints, which are left there;
            SIGTERM and SIGUSR1 then write one before they stop the run. 0: none.
        resume: Go on from the last of them, to the bit; otherwise they are removed.

    Returns:
        The trained alignment on the CPU, and its summary.

    Raises:
        UserError: Rows that are not paired, NaN, too few people, or covariates that do not fit
            `config.residualise`.
        CheckpointError: What there is to go on with was made with another config or other data.
        NonFiniteError: A loss that is not finite.
        Stopped: A signal came; a checkpoint was written first.
    """
    ranks = ranks or Ranks()
    rows = check(features, labels, config, covariates, present)
    has = everyone(features, len(labels)) | dict(present or {})
    pairs = modality_pairs({n: x[rows["train"]] for n, x in has.items()}, config.pair_weights)
    facts: dict[str, Any] = {}
    if checkpoint_every or resume:
        facts = resuming.facts_of(
            features, labels, config=config, present=has, ids=ids, covariates=covariates
        )
    stopped = resuming.find(run_dir, facts, config, ranks) if resume else None
    if ranks.is_main:
        check_writable(run_dir)
        configs.save(run_dir / "config.yaml", config)
        if not resume:
            resuming.forget(run_dir)
    with torch.random.fork_rng(devices=[]):
        # -- data ----------------------------------------------------------------------------
        conditioners = fit_conditioners(
            features, rows["train"], config, covariates, covariate_names, ranks, has
        )
        training, validation = (
            Batch(
                inputs={
                    name: conditioned(c, features[name], people, covariates, has[name]).to(
                        ranks.device
                    )
                    for name, c in conditioners.items()
                },
                present={name: x[people] for name, x in has.items()},
                ids=ids and ids.take(torch.from_numpy(people)).to(ranks.device),
            )
            for people in (rows["train"], rows["validation"])
        )
        # -- the start: found once, the same for all members ----------------------------------
        torch.manual_seed(config.seed)
        model = make_model(config, conditioners).to(ranks.device)
        training, begun = start(model, training, config, ranks, fresh=True)
        check_start(config, begun)
        origin = copy.deepcopy(model.state_dict())
        peak = peak_lr(config, closed_form=bool(begun))
        look = Validation(validation, pairs, ranks)
        whole = Batches(training, config, ranks).whole
        objective = Objective(training, pairs, config, whole=whole)

        # -- the loop, for each member -------------------------------------------------------
        members = Members(config) if stopped is None else stopped.members
        log = resuming.open_log(run_dir, stopped, ranks)
        signals = StopSignals()
        with signals if checkpoint_every else nullcontext():
            while (own := members.next()) is not None:
                number = len(members.finished)
                model = make_model(own, conditioners).to(ranks.device)
                model.load_state_dict(origin)
                batches = Batches(training, own, ranks)
                member = Member(own, model, batches, objective, look, peak_lr=peak, ranks=ranks)
                if stopped is not None:
                    stopped.restore(member)
                    stopped = None
                elif begun:
                    log.write(member=number, **member.start())
                line = logs.Progress(
                    members.where("align"), config.max_steps, start=member.progress.step,
                    active=ranks.is_main,
                )  # fmt: skip
                while not member.is_done:
                    row, stopping = member.take_step(stop=signals.received is not None)
                    log.write(member=number, **row)
                    step, last = row["step"], row["step"] == config.max_steps
                    auc = member.progress.best.get("validation_auc", 0.0)
                    line.update(step, f"loss {row['loss']:.3f}, validation AUC {auc:.3f}")
                    if checkpoint_every and (step % checkpoint_every == 0 or last or stopping):
                        if ranks.is_main:
                            resuming.save(
                                run_dir, members, member, facts=facts, world_size=ranks.world_size
                            )
                        barrier()
                    if stopping and not (last and members.is_last):
                        raise Stopped(members.where(f"at step {step}"))
                members.add(own, member.progress)
        log.close()
        model = make_model(members.kept, conditioners).to(ranks.device)
        outcome, head = settle(
            members.outcome(model, look), model, origin, training, validation, config, ranks
        )

    # -- what was found --------------------------------------------------------------------------
    summary = describe(
        outcome, pairs, look, rows=rows, present=has, conditioners=conditioners, config=config,
        ranks=ranks, begun=begun,
    )  # fmt: skip
    alignment = Alignment(
        model=model.cpu().eval(),
        conditioners=conditioners,
        head=head,
        info={"config": configs.to_dict(config), "summary": summary, "meta": dict(meta or {})},
    )
    if ranks.is_main:
        alignment.save(run_dir / "model")
        write_json(run_dir / "summary.json", {**summary, "meta": dict(meta or {})})
        for text in sentences(summary):
            logs.say(text)
    barrier()
    return TrainResult(alignment=alignment, summary=summary, run_dir=run_dir)
