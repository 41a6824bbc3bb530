"""Configs are frozen dataclasses; in YAML they are strict: an unknown key is an error."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.files import write_text

T = TypeVar("T")


def to_dict(config: Any) -> Any:
    """A config as plain dicts, lists and scalars, complete with its defaults."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    if isinstance(config, Path):
        return str(config)
    return config


def from_dict(cls: type[T], values: Any, *, where: str = "config") -> T:
    """Build the dataclass `cls` from plain values.

    Raises:
        UserError: An unknown key (the nearest known one is named), a missing one, or a value of
            the wrong type.
    """
    if not isinstance(values, dict):
        raise UserError(
            f"{where}: expected a mapping for {cls.__name__}, got {type(values).__name__}."
        )
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(
                f"{where}: unknown key '{key}' for {cls.__name__}. {nearest(str(key), fields)}"
            )
    hints = typing.get_type_hints(cls)
    given = {
        key: _convert(hints[key], value, where=f"{where}.{key}") for key, value in values.items()
    }
    try:
        return cls(**given)
    except TypeError as error:
        raise UserError(f"{where}: {error}.") from error


def updated(config: T, values: Any, *, where: str = "config") -> T:
    """The same config with some values replaced, as strict as `from_dict`.

    Nested configs keep the classes that they have, where a field admits several.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a mapping, got {type(values).__name__}.")
    hints = typing.get_type_hints(type(config))
    given = {}
    for key, value in values.items():
        if key not in hints:
            cls = type(config).__name__
            raise UserError(f"{where}: unknown key '{key}' for {cls}. {nearest(str(key), hints)}")
        now, path = getattr(config, key), f"{where}.{key}"
        nested = dataclasses.is_dataclass(now) and isinstance(value, dict)
        given[key] = (
            updated(now, value, where=path) if nested else _convert(hints[key], value, where=path)
        )
    return dataclasses.replace(config, **given)  # type: ignore[type-var]


def save(path: Path, config: Any) -> None:
    """Write a config as YAML, complete with its defaults."""
    write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: --config expects a YAML file, for example the config.yaml "
            "of an earlier run."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {text}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys to values.")
    return values


def _convert(hint: Any, value: Any, *, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        rest = [option for option in options if option is not type(None)]
        return _convert_any(rest, value, where=where)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where=where)
    if origin is typing.Literal:
        options = typing.get_args(hint)
        if value not in options:
            raise UserError(f"{where}={value!r}: {nearest(str(value), map(str, options))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}={value!r}: expected a list.")
        inner = typing.get_args(hint)
        if inner[1:] == (...,):
            inner = inner[:1] * len(value)
        if len(inner) != len(value):
            raise UserError(f"{where}={value!r}: expected {len(inner)} values, got {len(value)}.")
        return tuple(
            _convert(kind, item, where=f"{where}[{i}]")
            for i, (kind, item) in enumerate(zip(inner, value, strict=True))
        )
    if hint is Path:
        return Path(_convert(str, value, where=where))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-3, without a dot, as text.
        try:
            return float(value)
        except ValueError:
            pass
    if hint in (int, float, str, bool) and type(value) is not hint:
        raise UserError(f"{where}={value!r}: expected {hint.__name__}, got {type(value).__name__}.")
    return value


def _convert_any(options: Sequence[Any], value: Any, *, where: str) -> Any:
    """Convert to the first of several types that fits; a mapping must fit one config alone."""
    fits, errors = [], []
    for option in options:
        try:
            fits.append(_convert(option, value, where=where))
        except UserError as error:
            errors.append(error)
    if not fits:
        raise errors[0]
    if len(fits) > 1 and isinstance(value, dict):
        names = " and ".join(type(fit).__name__ for fit in fits)
        raise UserError(f"{where}: the keys fit {names}: give more of them.")
    return fits[0]
