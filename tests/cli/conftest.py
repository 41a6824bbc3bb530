from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from brainfusion.cli import main

SMALL = ("--n-trs", 64, "--patch-trs", 16, "--width", 16, "--steps", 4, "--batch-size", 8)
"""Options of an encoder that trains in a second."""
BRIEF = ("--permutations", 19, "--bootstrap", 20)
"""Inference that is fast and coarse."""


@dataclass(frozen=True)
class Said:
    """What a command left: its exit code and its two streams."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a refused input; progress may stand before it, nothing after it."""
        lines = self.err.splitlines()
        errors = [line for line in lines if "error" in line.split(":")[0]]
        assert self.code == 2, (self.code, self.err)
        assert errors == lines[-1:], self.err
        assert errors[0].startswith("error: ")
        assert "Traceback" not in self.err
        assert len(errors[0]) < 700
        return errors[0]


@dataclass(frozen=True)
class Site:
    """A small cohort with all stages run on it; tests read it and write elsewhere."""

    cohort: Path
    workspace: Path

    @property
    def place(self) -> tuple[str, Path, str, Path]:
        return "--cohort", self.cohort, "--workspace", self.workspace

    def checkpoint(self, model: str) -> Path:
        """The last checkpoint of an encoder."""
        [path] = (self.workspace / "pretrain" / model / "checkpoints").iterdir()
        return path


@pytest.fixture
def call(capsys) -> Callable[..., Said]:
    """Run a command in this process."""

    def run(*words: object) -> Said:
        capsys.readouterr()
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


@pytest.fixture
def done(call) -> Callable[..., Said]:
    """Run a command that must end well."""

    def run(*words: object) -> Said:
        said = call(*words)
        assert said.code == 0, said.err
        return said

    return run


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Site:
    """Simulate, pretrain both encoders, embed, align and score, as a user would type it."""
    root = tmp_path_factory.mktemp("site")
    site = Site(root / "cohort", root / "work")

    def run(*words: object) -> None:
        assert main([str(word) for word in words]) == 0

    run("simulate", "--n-people", 120, "--n-parcels", 20, "--n-trs", 64, "--out", site.cohort)
    for model in ("brainjepa", "brainlm"):
        run("pretrain", "--model", model, *SMALL, *site.place)
        run("embed", "--model", model, *site.place)
    run("align", "--brain", "brainjepa", "--dna", "evo2", "--max-steps", 10, *site.place)
    run("retrieve", *BRIEF, *site.place)
    run("probe", "--targets", "age", "mdd", *BRIEF, *site.place)
    run("report", *site.place)
    return site
