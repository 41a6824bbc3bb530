"""Options are frozen dataclasses: flags, help texts and YAML come from their fields."""

import dataclasses
import io
import re
from contextlib import redirect_stderr
from pathlib import Path
from typing import TypeVar

import tyro

from brainfusion.runtime import config
from brainfusion.runtime.errors import UserError

T = TypeVar("T")

_CONFIG = "Options may stand in a YAML file, too: --config FILE.yaml; flags win over it."
_WORDS = {
    "Error parsing ": "",
    "Unrecognized options": "unknown options or words",
    "invalid literal for int() with base 10:": "expected a whole number, got",
    "could not convert string to float:": "expected a number, got",
    " (required)": "",
}


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
        default = _with_file(default, path, config_field)
    heard = io.StringIO()
    try:
        with redirect_stderr(heard):
            return tyro.cli(
                tyro.conf.DisallowNone[tyro.conf.AvoidSubcommands[cls]],  # type: ignore[misc]
                args=argv,
                prog=prog,
                description=f"{description.strip()}\n\n{_CONFIG}",
                default=default,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_user_error(stop) or _one_line(heard.getvalue(), prog)) from None


def _with_file(default: T, path: str, field: str | None) -> T:
    """The defaults, or the config that is their `field`, with the values of a YAML file."""
    values = config.read_yaml(Path(path))
    try:
        if field is None:
            return config.updated(default, values, where=path)
        changed = config.updated(getattr(default, field), values, where=path)
    except UserError as error:
        raise UserError(str(error) if path in str(error) else f"{path}: {error}") from error
    return dataclasses.replace(default, **{field: changed})  # type: ignore[type-var]


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


def at_least(options: object, lowest: int, *names: str) -> None:
    """Refuse numbers below `lowest`, by the name of their flag."""
    for name in names:
        if (value := getattr(options, name)) < lowest:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected {lowest} or more.")


def _user_error(stop: BaseException) -> str | None:
    """The message of the config that refused its values, if that is why the parser stopped."""
    error: BaseException | None = stop
    while error is not None and not isinstance(error, UserError):
        error = error.__context__
    return None if error is None else str(error)


def _one_line(boxed: str, prog: str) -> str:
    """The words of a boxed, many-line message as one line.

    The borders are box-drawing characters, dashes, or absent, as the terminal's encoding allows;
    the first row is the box's title.
    """
    rows = [" ".join(line.strip("\u2502| ").split()) for line in boxed.splitlines()]
    rows = [row for row in rows if row.strip("-\u2500\u256d\u256e\u2570\u256f ")]
    text, _, hints = " ".join(rows[1:]).partition("Perhaps you meant:")
    text = re.split("Argument helptext:|For full helptext", text)[0].strip()
    text = text.replace(f"Missing from {prog}:", "missing:")
    for theirs, ours in _WORDS.items():
        text = text.replace(theirs, ours)
    close = re.search(r"--[a-z0-9-]+", hints)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"{text.rstrip('.')}.{hint} '{prog} --help' lists the options."
