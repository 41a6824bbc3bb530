import ast
import dataclasses
import importlib
import inspect
import textwrap
import typing
from dataclasses import dataclass, field

import pytest
import tyro

from brainfusion.cli import COMMANDS, main
from brainfusion.cli.options import at_least, parse, take_option
from brainfusion.encoders import ENCODERS
from brainfusion.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    """A part that refuses what it cannot use."""

    steps: int = 3
    """Steps."""
    rate: float = 0.5
    """Rate."""

    def __post_init__(self) -> None:
        if self.rate > 1:
            raise UserError(f"rate={self.rate}: expected at most 1, which is as fast as it goes.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of a command."""

    name: str | None = None
    """A name."""
    inner: tyro.conf.OmitArgPrefixes[Inner] = field(default_factory=Inner)


def read(*argv, **how):
    return parse(Options, list(argv), prog="prog", description="What it does.", **how)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 7\nrate: 0.25\n")
    options = read("--config", str(path), "--steps", "9", config_field="inner")
    assert options == Options(inner=Inner(steps=9, rate=0.25))
    assert read(f"--config={path}", config_field="inner").inner.steps == 7
    path.write_text("name: A\ninner:\n  steps: 7\n")
    assert read("--config", str(path)) == Options(name="A", inner=Inner(steps=7))


def test_a_refused_value_keeps_the_words_of_the_config_that_refuses_it(tmp_path):
    said = "rate=2.0: expected at most 1, which is as fast as it goes."
    with pytest.raises(UserError) as flag:
        read("--rate", "2")
    assert str(flag.value) == said
    path = tmp_path / "run.yaml"
    path.write_text("rate: 2.0\n")
    with pytest.raises(UserError) as file:
        read("--config", str(path), config_field="inner")
    assert str(file.value) == f"{path}: {said}"


@pytest.mark.parametrize("columns", ["30", "80", "300"])
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--stesp", "4"], "unknown options or words: --stesp, 4. Did you mean --steps?"),
        (["--zzz"], "unknown options or words: --zzz. 'prog --help' lists the options."),
        (["--steps", "4.5"], "--steps: expected a whole number, got '4.5'. 'prog --help'"),
        (["--rate", "fast"], "--rate: expected a number, got 'fast'. 'prog --help'"),
        (["--steps"], "Missing value for argument '--steps'"),
    ],
)
def test_an_error_of_the_parser_is_one_line_at_any_width(argv, says, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(UserError) as error:
        read(*argv)
    # A narrow box may break a word: only spaces are compared.
    assert says.replace(" ", "") in str(error.value).replace(" ", "")
    assert "\n" not in str(error.value)
    assert not set("\u2502\u256d\u256e\u2570\u256f\u2500") & set(str(error.value))


def test_the_word_none_is_a_name_like_any_other():
    assert read("--name", "None").name == "None"
    assert read().name is None


def test_help_goes_to_standard_output_and_ends_well(capsys):
    with pytest.raises(SystemExit) as stop:
        read("--help")
    assert stop.value.code == 0
    said = capsys.readouterr()
    assert "What it does." in said.out
    assert "--config FILE.yaml" in said.out
    assert said.err == ""


def test_an_option_is_taken_out_of_the_words():
    assert take_option(["--a", "1", "--b=2"], "--a") == ("1", ["--b=2"])
    assert take_option(["--a", "1", "--b=2"], "--b") == ("2", ["--a", "1"])
    assert take_option(["--ab", "1"], "--a") == (None, ["--ab", "1"])
    for argv in (["--a"], ["--a", "--b"]):
        with pytest.raises(UserError, match="--a needs a value"):
            take_option(argv, "--a")


def test_a_number_below_the_least_is_named_by_its_flag():
    @dataclass
    class Numbers:
        n_folds: int = 2

    at_least(Numbers(), 2, "n_folds")
    with pytest.raises(UserError, match="--n-folds 2: expected 3 or more"):
        at_least(Numbers(), 3, "n_folds")


# -- help texts ------------------------------------------------------------------------------------


def option_classes():
    """Every dataclass that a command's flags come from, with those inside it."""
    found = []
    for command in COMMANDS:
        files = [f"{command}_", "import_dna"] if command == "import" else [command]
        for file in files:
            module = importlib.import_module(f"brainfusion.cli.{file}")
            found += [
                value
                for name, value in vars(module).items()
                if name.endswith("Options") and value.__module__ == module.__name__
            ]
    assert len(found) > len(COMMANDS)
    found += [type(preset) for spec in ENCODERS.values() for preset in spec.presets.values()]
    for cls in found:
        for hint in typing.get_type_hints(cls).values():
            if dataclasses.is_dataclass(hint) and hint not in found:
                found.append(hint)
    return sorted(set(found), key=lambda cls: cls.__name__)


def field_texts(cls):
    """The docstring under each field, wherever in the line of ancestors it stands."""
    texts = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for statement, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                value = getattr(getattr(after, "value", None), "value", None)
                texts[statement.target.id] = value if isinstance(value, str) else ""
    return texts


@pytest.mark.parametrize("cls", option_classes(), ids=lambda cls: cls.__name__)
def test_every_option_says_what_it_is(cls):
    texts = field_texts(cls)
    hints = typing.get_type_hints(cls)
    for one in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(hints[one.name]):
            assert texts[one.name].strip().endswith("."), f"{cls.__name__}.{one.name}"
        # Help keeps the line breaks of a text, so each must stand where a reader can pause.
        for line in texts[one.name].splitlines()[:-1]:
            assert line.rstrip().endswith((".", ",", ":", ";")), f"{cls.__name__}.{one.name}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_defaults(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: brainfusion {command}" in said
    assert "(default: " in said
    assert "{None}" not in said
    assert "MISSING" not in said
    # Every flag is followed by a text of its own, not by its default alone.
    for line in said.splitlines():
        words = line.strip("\u2502| ").split(maxsplit=2)
        if len(words) == 3 and words[0].startswith("--"):
            assert not words[2].startswith("(default"), line
