"""`brainfusion embed`: turn recordings into features with a trained encoder.

Each recording is conditioned as in training, encoded without masks and pooled; the recordings of
one person are averaged. Writes <workspace>/features/<model>.parquet (subject, vector). Under
torchrun each process takes its share of the recordings; a run that was stopped goes on from where
it was.

--checkpoint also takes the authors' files: BrainLM's pytorch_model.bin or .safetensors with its
config.json, Brain-JEPA's .pth.tar with --gradient.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from brainfusion.cli.options import parse
from brainfusion.cli.published import PublishedOptions
from brainfusion.cli.workspace import (
    Place,
    Workspace,
    check_replaceable,
    ensure_pretrained,
    open_cohort,
)
from brainfusion.data.cohort import Cohort
from brainfusion.encoders.checkpoints import Pretrained, known_model, load_pretrained
from brainfusion.encoders.embed import EmbedSettings, embed_to_file, parts_folder
from brainfusion.encoders.published import is_published
from brainfusion.runtime import distributed, threads
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import check_writable
from brainfusion.runtime.logs import say

LONGEST_WAIT_S = 7 * 24 * 3600.0
"""How long processes wait for the slowest; one that fails takes the others with it at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedOptions:
    """Options of `brainfusion embed`."""

    model: str = "brainjepa"
    """The encoder: brainjepa or brainlm."""
    checkpoint: Path | None = None
    """A pretraining run, one of its checkpoints, or an authors' file;
    <workspace>/pretrain/<model> by default."""
    published: tyro.conf.OmitArgPrefixes[PublishedOptions] = field(default_factory=PublishedOptions)
    place: tyro.conf.OmitArgPrefixes[Place] = field(default_factory=Place)
    untrained: bool = False
    """Take the encoder as it was before training: the baseline that training has to beat."""
    settings: tyro.conf.OmitArgPrefixes[EmbedSettings] = field(default_factory=EmbedSettings)
    out: Path | None = None
    """The feature file; <workspace>/features/<model>[-untrained].parquet by default."""
    restart: bool = False
    """Forget the parts of an earlier run that was stopped."""
    device: str = "auto"
    """auto, cpu or cuda."""
    threads: int = 0
    """Threads a process; 0 shares the cores there are."""

    def __post_init__(self) -> None:
        if self.out is not None and self.out.is_dir():
            raise UserError(f"--out {self.out} is a folder: expected the file to write.")


def main(argv: list[str]) -> int:
    """Load the checkpoint, encode every recording, write one vector a person."""
    options = parse(EmbedOptions, argv, prog="brainfusion embed", description=__doc__ or "")
    model = known_model(options.model)
    workspace = Workspace.of(options.place)
    name = f"{model}-untrained" if options.untrained else model
    out = options.out or workspace.features_path(name)
    with distributed.session(options.device, timeout_s=LONGEST_WAIT_S) as ranks:
        threads.use_threads(options.threads, n_processes=ranks.world_size)
        cohort = open_cohort(workspace, ranks)
        with distributed.main_first(ranks):
            path = options.checkpoint or ensure_pretrained(workspace, model)
        pretrained = _load(path, model, cohort, options)
        check_writable(out.parent)
        if options.restart:
            _forget(parts_folder(out), is_main=ranks.is_main)
        embedded = embed_to_file(out, pretrained, cohort, options.settings, ranks=ranks)
    if embedded is not None:
        n_people, width = embedded.vectors.shape
        pooling = embedded.provenance["pooling"]
        say(f"{out}: {n_people} people x {width} features ({pooling} pooling)")
        if out == workspace.features_path(name):
            flags = " ".join(["--brain", name, *workspace.options()])
            say(f"next: brainfusion align {flags} --dna evo2 (or generator, caduceus)")
    return 0


def _load(path: Path, model: str, cohort: Cohort, options: EmbedOptions) -> Pretrained:
    """Our checkpoint or the authors', told apart by their files."""
    if is_published(path):
        return options.published.load(path, model, cohort, untrained=options.untrained)
    options.published.check_unused(path)
    # A file of one of our checkpoints stands for its folder.
    return load_pretrained(
        path.parent if path.is_file() else path, model, untrained=options.untrained
    )


def _forget(folder: Path, *, is_main: bool) -> None:
    """Remove the parts of an earlier run, and of nothing else."""
    check_replaceable(folder, "key.json")
    distributed.barrier()
    if is_main:
        shutil.rmtree(folder, ignore_errors=True)
    distributed.barrier()
