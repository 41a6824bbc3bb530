"""Options are frozen dataclasses: flags, help texts and YAML come from their fields."""

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import TypeVar

import tyro

from brainfusion.runtime import config
from brainfusion.runtime.errors import UserError

T = TypeVar("T")


def parse(
    cls: type[T],
    argv: list[str],
    *,
    prog: str,
    description: str,
    default: T | None = None,
    config_field: str | None = None,
) -> T:
    """Parse flags into `cls`. Flags win over `--config FILE.yaml`, which wins over defaults.

    Args:
        cls: A frozen dataclass.
        argv: The command's words.
        prog: The command, for help and errors.
        description: What it does, for its help.
        default: The defaults; `cls()` without.
        config_field: The field that a run's config.yaml fills; the whole of `cls` without.

    Raises:
        UserError: One line, for an unknown flag or key (the nearest is named) or a bad value.
        SystemExit: After `--help`.
    """
    path, argv = take_option(argv, "--config")
    default = cls() if default is None else default
    if path is not None:
        values = config.read_yaml(Path(path))
        values = {config_field: values} if config_field else values
        default = config.updated(default, values, where=path)
    heard = io.StringIO()
    try:
        with redirect_stderr(heard):
            return tyro.cli(
                tyro.conf.AvoidSubcommands[cls],  # type: ignore[misc]
                args=argv,
                prog=prog,
                description=description,
                default=default,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(heard.getvalue(), prog)) from None


def take_option(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """Take `name VALUE` or `name=VALUE` out of `argv`, before the full parser is known."""
    rest, value, words = [], None, iter(argv)
    for word in words:
        if word == name:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise UserError(f"{name} needs a value.")
        elif word.startswith(f"{name}="):
            value = word.split("=", 1)[1]
        else:
            rest.append(word)
    return value, rest


def _one_line(boxed: str, prog: str) -> str:
    """The words of a boxed, many-line message as one line.

    The borders are box-drawing characters, dashes, or absent, as the terminal's encoding allows.
    """
    words = []
    for line in boxed.splitlines():
        text = line.strip("\u2502| ")
        if text.startswith(("For full helptext", "Argument helptext")):
            break
        title = line.lstrip().startswith(("\u256d", "\u2570"))
        if not title and text.strip("-\u2500 "):
            words.append(" ".join(text.split()))
    return f"{'; '.join(words)} (see {prog} --help)."
