"""The encoder that made a run's brain features, found again to encode a new recording."""

from pathlib import Path

from brainfusion.cli.query.options import RecordingOptions
from brainfusion.cli.query.run import QueryRun
from brainfusion.cli.workspace import ensure_pretrained
from brainfusion.encoders import ENCODERS
from brainfusion.encoders.checkpoints import Pretrained, load_pretrained
from brainfusion.encoders.person import check_maker
from brainfusion.encoders.published import is_published
from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.files import hash_file


def maker_of(asked: QueryRun, name: str, options: RecordingOptions) -> tuple[Pretrained, dict]:
    """The encoder of one of the run's brain features, and how these say they were made.

    Raises:
        UserError: The features do not say how they were made, or were not made by an encoder.
        CheckpointError: The encoder is not there, or it is another one.
    """
    made = dict(asked.alignment.made_of(name))
    own = asked.run.path / "encoder"
    tuned = own / "model.safetensors"
    if tuned.is_file():
        # Stricter than that both began with the same encoder.
        made["checkpoint_hash"] = hash_file(tuned)
        made.pop("finetuned_from", None)
    if "encoder" not in made:
        raise UserError(
            f"brain features '{name}' of this run do not say which encoder made them, so a new "
            "recording cannot become the same: ask with --query ID, or align features of "
            "'brainfusion embed'."
        )
    model = made["encoder"]
    if model not in ENCODERS:
        raise UserError(f"unknown encoder '{model}'. {nearest(model, ENCODERS)}")
    given = _checkpoints(asked, options.checkpoint).get(name)
    path = given or (own if tuned.is_file() else ensure_pretrained(asked.workspace, model))
    untrained = made.get("checkpoint_hash") == "untrained"
    pretrained = _load(asked, path, model, options, untrained=untrained)
    check_maker(pretrained, made)
    return pretrained, made


def _checkpoints(asked: QueryRun, words: tuple[str, ...]) -> dict[str, Path]:
    """Paths by the name of the brain features."""
    names, found = asked.run.brain, {}
    for word in words:
        name, mark, path = word.partition("=")
        if not mark and len(names) == 1:
            name, path = names[0], word
        if name not in names or not path or name in found:
            raise UserError(
                f"--checkpoint {word}: expected NAME=PATH, once each of this run's brain features "
                f"({', '.join(names)})."
            )
        found[name] = Path(path)
    return found


def _load(
    asked: QueryRun, path: Path, model: str, options: RecordingOptions, *, untrained: bool
) -> Pretrained:
    """Our checkpoint or the authors', told apart by their files."""
    if is_published(path):
        return options.published.load(path, model, asked.cohort, untrained=untrained)
    options.published.check_unused(path)
    return load_pretrained(path.parent if path.is_file() else path, untrained=untrained)
