"""`brainfusion finetune`: train a brain encoder further, in the graph of an alignment.

Starts from a pretrained encoder and the alignment of its features ('brainfusion align'), and trains
encoder and projectors together on the training people's recordings: exact InfoNCE over the whole
batch, micro-batches through gradient caching. The weights that are best on validation people are
kept, the frozen start among them. Under torchrun each process takes its share of every batch.
Called again after it was stopped, it goes on from the last checkpoint, to the bit; SIGTERM and
SIGUSR1 make it save and leave with exit code 75.

Results are those of features of another name, <brain>-<how> by default: the run in
<workspace>/align/<name>-<dna> with the tuned encoder in it (encoder/, which 'brainfusion embed
--checkpoint' reads), and <workspace>/features/<name>.parquet, so that 'brainfusion retrieve --brain
<name>' and the others find them. The control does the same with shuffled pairs.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from brainfusion.alignment.conditioning import design_matrix
from brainfusion.alignment.finetuning.config import FinetuneConfig
from brainfusion.alignment.finetuning.finetune import FinetuneResult, check_alignment, finetune
from brainfusion.alignment.model import Alignment, load
from brainfusion.cli.align import shuffled, shuffled_order
from brainfusion.cli.embed import LONGEST_WAIT_S
from brainfusion.cli.modalities import Modalities, dna_models, load_modalities, load_tables
from brainfusion.cli.negatives import pair_ids
from brainfusion.cli.options import at_least, parse
from brainfusion.cli.published import PublishedOptions
from brainfusion.cli.runs import AlignmentRun, ensure_alignment
from brainfusion.cli.unfinished import unfinished
from brainfusion.cli.workspace import (
    Place,
    Workspace,
    ensure_pretrained,
    hash_ids,
    open_cohort,
)
from brainfusion.data.cohort import Cohort
from brainfusion.data.features import write_features
from brainfusion.encoders import ENCODERS
from brainfusion.encoders.checkpoints import Pretrained, known_model, load_pretrained
from brainfusion.encoders.embed import EmbedSettings, embed_to_file
from brainfusion.encoders.published import is_published
from brainfusion.encoders.trainable import RecordingTower, save_tuned
from brainfusion.runtime import distributed, threads
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import atomic_file, check_writable, read_json, write_json
from brainfusion.runtime.logs import say
from brainfusion.runtime.signals import STOPPED, Stopped


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneOptions:
    """Options of `brainfusion finetune`."""

    brain: str = "brainjepa"
    """The encoder, by the name of its features: brainjepa or brainlm,
    with -untrained behind it for its random start, which shows what pretraining is worth."""
    dna: tuple[str, ...] = ("evo2",)
    """The DNA side of the alignment: one model, or several joined by +."""
    checkpoint: Path | None = None
    """The checkpoint that the features were made with, of ours or an authors' file;
    <workspace>/pretrain/<brain> by default."""
    published: tyro.conf.OmitArgPrefixes[PublishedOptions] = field(default_factory=PublishedOptions)
    alignment: Path | None = None
    """The alignment run to start from; <workspace>/align/<brain>-<dna> by default."""
    place: tyro.conf.OmitArgPrefixes[Place] = field(default_factory=Place)
    tune: tyro.conf.OmitArgPrefixes[FinetuneConfig] = field(default_factory=FinetuneConfig)
    name: str | None = None
    """What the results are called; <brain>-<how> by default."""
    control: bool = True
    """Do it a second time on shuffled pairs, from the alignment's own control:
    it must come out at chance."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on with a run that was stopped. never: forget it and start anew."""
    checkpoint_every: int = 4
    """Steps between checkpoints; 0 for none."""
    device: str = "auto"
    """auto, cpu or cuda."""
    threads: int = 0
    """Threads a process; 0 shares the cores there are."""

    def __post_init__(self) -> None:
        at_least(self, 0, "checkpoint_every")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Start:
    """What a run starts from."""

    options: FinetuneOptions
    workspace: Workspace
    cohort: Cohort
    people: Modalities
    run_dir: Path
    """Of the alignment."""
    checkpoint: Path
    ranks: Ranks


def main(argv: list[str]) -> int:
    """Fine-tune, then the same with shuffled pairs; write the run and the tuned features."""
    options = parse(
        FinetuneOptions,
        argv,
        prog="brainfusion finetune",
        description=__doc__ or "",
        config_field="tune",
    )
    workspace, dna = Workspace.of(options.place), dna_models(options.dna)
    name, model = _name(options), known_model(options.brain.removesuffix("-untrained"))
    with distributed.session(options.device, timeout_s=LONGEST_WAIT_S) as ranks:
        threads.use_threads(options.threads, n_processes=ranks.world_size)
        cohort = open_cohort(workspace, ranks)
        with distributed.main_first(ranks):
            run_dir = options.alignment or ensure_alignment(workspace, options.brain, dna)
            check_alignment(load(run_dir))
            tables = load_tables(
                workspace, cohort, brain=(options.brain,), dna=dna,
                haplotypes=AlignmentRun.read(run_dir).haplotypes,
            )  # fmt: skip
            checkpoint = options.checkpoint or ensure_pretrained(workspace, model)
        start = _Start(
            options=options, workspace=workspace, cohort=cohort, run_dir=run_dir, ranks=ranks,
            people=load_modalities(tables, cohort), checkpoint=checkpoint,
        )  # fmt: skip
        out = workspace.align_dir(name, ",".join(dna))
        check_writable(workspace.features_path(name).parent)
        resume = options.resume == "auto"
        try:
            with unfinished(out, ranks, mark="embeddings", resume=resume) as folder:
                pooling = _run(start, folder)
                if options.control:
                    _run_control(start, folder / "control")
                _embed(start, folder, name, pooling)
        except Stopped as stop:
            say(f"asked to stop: saved {stop}; the same command goes on from there.")
            return STOPPED
    if ranks.is_main:
        flags = " ".join(workspace.options())
        say(f"next: brainfusion retrieve --brain {name} --dna {' '.join(dna)} {flags}".rstrip())
    return 0


def _name(options: FinetuneOptions) -> str:
    name = options.name or f"{options.brain}-{options.tune.how}"
    if name == options.brain or name in ENCODERS or set(name) & set("/\\,+ "):
        raise UserError(
            f"--name {name}: expected a name of its own, of letters, digits and -, so that the "
            f"frozen features stay; for example {options.brain}-{options.tune.how}."
        )
    return name


def _run(start: _Start, folder: Path) -> str:
    """Fine-tune on the pairs; returns the pooling of the features."""
    alignment = load(start.run_dir)
    pretrained = _pretrained(start)
    _check_same(alignment, pretrained, start)
    result, tower = _finetuned(start, alignment, pretrained, start.people, folder)
    if start.ranks.is_main:
        facts = {
            "how": start.options.tune.how,
            "best_step": result.summary["best_step"],
            "n_people": result.summary["n_train"],
            "dna": ",".join(dna_models(start.options.dna)),
            "cohort": start.cohort.name,
            "cohort_hash": start.cohort.hash,
            "splits_hash": start.cohort.splits().hash,
        }
        save_tuned(folder / "encoder", pretrained, facts)
        summary = read_json(folder / "summary.json")
        write_json(folder / "summary.json", {**summary, "flow": start.people.flow})
    return tower.pooling


def _run_control(start: _Start, folder: Path) -> None:
    """The same with shuffled pairs, from the alignment that was trained on them."""
    before = start.run_dir / "control"
    if not before.exists():
        say(f"no control: {start.run_dir} has none to start from; align with --control.")
        return
    say("control: the same with shuffled pairs")
    alignment = load(before)
    config = alignment.info["config"]
    order = shuffled_order(start.people, config.get("seed", 0), within_site=_rule(alignment))
    people = shuffled(start.people, order)
    _finetuned(start, alignment, _pretrained(start), people, folder, order=order)


def _finetuned(
    start: _Start,
    alignment: Alignment,
    pretrained: Pretrained,
    people: Modalities,
    folder: Path,
    *,
    order: np.ndarray | None = None,
) -> tuple[FinetuneResult, RecordingTower]:
    """Tune the encoder in place, and write the run's files but for the encoder's."""
    tune, meta = start.options.tune, alignment.info["meta"]
    names = alignment.conditioners["brain"].covariates
    columns = alignment.info["config"].get("residualise", ())
    covariates = design_matrix(people.people, columns, names=names)[0] if names else None
    tower = RecordingTower(
        pretrained,
        start.cohort,
        people.subjects,
        pooling=meta["provenance"]["brain"]["pooling"],
        windows=tune.windows,
        seed=tune.seed,
        device=start.ranks.device,
    )
    provenance = {**people.provenance, "checkpoint_hash": pretrained.hash}
    result = finetune(
        alignment,
        tower,
        people.dna["dna"],
        people.labels,
        config=tune,
        run_dir=folder,
        ids=pair_ids(_rule(alignment), people.people, people.dna, people.present, order=order),
        covariates=covariates,
        checkpoint_every=start.options.checkpoint_every,
        resume=start.options.resume == "auto",
        made_of={
            "cohort": start.cohort.hash,
            "people": hash_ids(people.subjects),
            "pooling": tower.pooling,
        },
        meta={**meta, "brain": _name(start.options), "provenance": provenance},
        ranks=start.ranks,
    )
    if start.ranks.is_main:
        _write_embeddings(result, people, folder)
    return result, tower


def _write_embeddings(result: FinetuneResult, people: Modalities, folder: Path) -> None:
    """Embeddings and score vectors of all pairs, as 'brainfusion align' writes them."""
    files: dict[str, tuple[str, np.ndarray]] = {}
    for side, rows in result.embeddings.items():
        files[f"embeddings/{side}"] = "embeddings", rows
        if result.alignment.head is not None:
            files[f"scores/{side}"] = "score vectors", result.alignment.head.vectors(side, rows)
    for name, (kind, rows) in files.items():
        about = {"kind": kind, "tower": Path(name).name, **people.provenance}
        write_features(
            folder / f"{name}.parquet", people.subjects, rows, provenance=about,
            extra={"split": people.labels},
        )  # fmt: skip


def _embed(start: _Start, folder: Path, name: str, pooling: str) -> None:
    """Features of everybody in the cohort from the tuned encoder, on all ranks.

    Their parts are among those of the run, and a run that was stopped goes on with them.
    """
    tune, made = start.options.tune, folder / "features.parquet"
    distributed.barrier()
    settings = EmbedSettings(pooling=pooling, batch_size=tune.micro_batch, precision=tune.precision)
    embedded = embed_to_file(
        made, load_pretrained(folder / "encoder"), start.cohort, settings, ranks=start.ranks
    )
    if embedded is not None:
        out = start.workspace.features_path(name)
        with atomic_file(out) as aside:
            shutil.copyfile(made, aside)
        made.unlink()
        say(f"{out}: {len(embedded.subjects)} people, from the tuned encoder.")


def _pretrained(start: _Start) -> Pretrained:
    """The encoder as it was before, read anew: tuning changes it in place."""
    options, path = start.options, start.checkpoint
    model = options.brain.removesuffix("-untrained")
    untrained = options.brain != model
    if not is_published(path):
        folder = path.parent if path.is_file() else path
        return load_pretrained(folder, model, untrained=untrained)
    return options.published.load(path, model, start.cohort, untrained=untrained)


def _rule(alignment: Alignment) -> Any:
    """Who is a negative of whom, as the alignment had it."""
    return alignment.info["meta"].get("negatives", "all")


def _check_same(alignment: Alignment, pretrained: Pretrained, start: _Start) -> None:
    """Check that the alignment is of these people and of features that this encoder makes.

    Raises:
        UserError: It is not; what differs is named.
    """
    meta, again = alignment.info.get("meta", {}), "align again, then fine-tune"
    provenance = meta.get("provenance", {})
    made = provenance.get("brain", {})
    if absent := [key for key in ("encoder", "checkpoint_hash", "pooling") if key not in made]:
        raise UserError(
            f"{start.run_dir} is an alignment of features that do not say how they were made "
            f"({absent[0]}): expected features of 'brainfusion embed'."
        )
    if (made["encoder"], made["checkpoint_hash"]) != (pretrained.model, pretrained.hash):
        raise UserError(
            f"{start.run_dir} is an alignment of features of {made['encoder']} with the hash "
            f"{made['checkpoint_hash']}, and {start.checkpoint} is {pretrained.model} with "
            f"{pretrained.hash}: give the checkpoint that these features were made with, or embed "
            f"with this one and {again}."
        )
    if meta.get("subjects_hash") != hash_ids(start.people.subjects):
        raise UserError(
            f"{start.run_dir} is an alignment of other people than those who have features and "
            f"DNA now: {again}."
        )
    if provenance.get("splits_hash") != start.cohort.splits().hash:
        raise UserError(f"{start.run_dir} was trained on another split of these people: {again}.")
    if made.get("precision", "float32") != start.options.tune.precision:
        say(
            f"warning: the features of the alignment were made in {made.get('precision')}, and "
            f"fine-tuning starts in {start.options.tune.precision}: --precision takes the other."
        )
    if (loss := alignment.info["config"].get("loss", "info_nce")) != "info_nce":
        say(f"warning: the alignment was trained with {loss}; fine-tuning uses info_nce.")
