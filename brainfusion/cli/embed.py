"""`brainfusion embed`: turn recordings into features with a trained encoder.

Each recording is standardised as in training, encoded without masks and pooled; the recordings of
one person are averaged. Writes <workspace>/features/<model>.parquet (subject, vector).
"""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from brainfusion.cli.options import at_least, parse
from brainfusion.cli.workspace import Place, Workspace, ensure_pretrained
from brainfusion.data.features import write_features
from brainfusion.encoders.checkpoints import known_model, load_pretrained
from brainfusion.encoders.embed import embed
from brainfusion.runtime import threads
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import check_writable
from brainfusion.runtime.logs import say


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedOptions:
    """Options of `brainfusion embed`."""

    model: str = "brainjepa"
    """The encoder: brainjepa or brainlm."""
    checkpoint: Path | None = None
    """A pretraining run or one of its checkpoints; <workspace>/pretrain/<model> by default."""
    place: tyro.conf.OmitArgPrefixes[Place] = field(default_factory=Place)
    untrained: bool = False
    """Take the encoder as it was before training: the baseline that training has to beat."""
    pooling: str = "parcel-std"
    """parcel-std or parcel-mean: over time, a vector a parcel, joined; mean: over all tokens;
    cls: brainlm's CLS token."""
    out: Path | None = None
    """The feature file; <workspace>/features/<model>[-untrained].parquet by default."""
    batch_size: int = 16
    """Recordings at a time; features do not depend on it."""
    threads: int = 0
    """Threads; 0 uses the cores there are."""

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size")
        if self.out is not None and self.out.is_dir():
            raise UserError(f"--out {self.out} is a folder: expected the file to write.")


def main(argv: list[str]) -> int:
    """Load the checkpoint, encode every recording, write one vector a person."""
    options = parse(EmbedOptions, argv, prog="brainfusion embed", description=__doc__ or "")
    model = known_model(options.model)
    workspace = Workspace.of(options.place)
    name = f"{model}-untrained" if options.untrained else model
    out = options.out or workspace.features_path(name)
    cohort = workspace.open_cohort()
    path = options.checkpoint or ensure_pretrained(workspace, model)
    pretrained = load_pretrained(path, model, untrained=options.untrained)
    check_writable(out.parent)
    threads.use_threads(options.threads)
    subjects, vectors, provenance = embed(
        pretrained, cohort, pooling=options.pooling, batch_size=options.batch_size
    )
    write_features(out, subjects, vectors, provenance=provenance)
    say(f"{out}: {len(subjects)} people x {vectors.shape[1]} features ({options.pooling} pooling)")
    if out == workspace.features_path(name):
        flags = " ".join(["--brain", name, *workspace.options()])
        say(f"next: brainfusion align {flags} --dna evo2 (or generator, caduceus)")
    return 0
