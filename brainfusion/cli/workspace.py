"""Where a cohort's runs live, and making what is missing on the demo cohort.

On the demo cohort a missing piece is made and announced; on a user's own cohort it is an error that
names the command which makes it.
"""

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from brainfusion.data.cohort import Cohort
from brainfusion.runtime.distributed import Ranks, main_first
from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.logs import say

DEMO = Path("runs/demo")
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Which cohort, and where its results go."""

    cohort: Path | None = None
    """The cohort's folder; without it the demo cohort, simulated on first use."""
    workspace: Path | None = None
    """Where runs, features and results go; runs/<cohort's folder name> by default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workspace:
    """The folder of one cohort's results; docs/formats.md gives its layout."""

    root: Path
    cohort_path: Path
    demo: bool

    @classmethod
    def of(cls, place: Place) -> "Workspace":
        """The workspace that the options name."""
        if place.cohort is None:
            root = place.workspace or DEMO
            return cls(root=root, cohort_path=root / "cohort", demo=True)
        demo = place.workspace is not None and place.cohort == place.workspace / "cohort"
        root = place.workspace or Path("runs") / place.cohort.resolve().name
        return cls(root=root, cohort_path=place.cohort, demo=demo)

    def pretrain_dir(self, model: str) -> Path:
        """The pretraining run of an encoder."""
        return self.root / "pretrain" / model

    def features_path(self, name: str) -> Path:
        """A feature file."""
        return self.root / "features" / f"{name}.parquet"

    def align_dir(self, brain: str, dna: str) -> Path:
        """An alignment run."""
        return self.root / "align" / f"{brain}-{dna}"

    def genetics_path(self, model: str) -> Path:
        """The DNA store of a model."""
        return self.cohort_path / "genetics" / model

    def open_cohort(self) -> Cohort:
        """Open the cohort; the demo cohort is simulated if it is not there."""
        if self.demo and not (self.cohort_path / "cohort.json").exists():
            from brainfusion.data.simulate import PRESETS, simulate

            say(f"no --cohort given: simulating the demo cohort in {self.cohort_path}")
            simulate(self.cohort_path, PRESETS["demo"])
        return Cohort.open(self.cohort_path)

    def options(self) -> list[str]:
        """The flags that name this workspace in a command."""
        flags = [] if self.demo else ["--cohort", str(self.cohort_path)]
        return flags if self.root == DEMO else [*flags, "--workspace", str(self.root)]


def open_cohort(workspace: Workspace, ranks: Ranks) -> Cohort:
    """Open the cohort on every rank; the main rank makes what is missing first."""
    with main_first(ranks):
        return workspace.open_cohort()


def known_dna(model: str) -> str:
    """`model`, if there is an adapter for it."""
    from brainfusion.genetics import ADAPTERS

    if model not in ADAPTERS:
        raise UserError(f"unknown DNA model '{model}'. {nearest(model, ADAPTERS)}")
    return model


def ensure_genetics(workspace: Workspace, model: str) -> Path:
    """The DNA store of a model, made from the cohort's `sources/` where they are."""
    from brainfusion.cli.import_dna import import_dna

    path, source = (
        workspace.genetics_path(known_dna(model)),
        workspace.cohort_path / "sources" / model,
    )
    if not (path / "meta.json").exists():
        if not source.exists():
            raise UserError(
                f"the cohort has no {model} embeddings ({path} is not there): add them with "
                f"'brainfusion import --dna {model} PATH --cohort {workspace.cohort_path}'."
            )
        say(f"{path} is missing: importing {source}")
        import_dna(model, source, workspace.cohort_path)
    return path


def ensure_pretrained(workspace: Workspace, model: str) -> Path:
    """An encoder of this cohort; on the demo cohort a tiny one is trained if there is none."""
    path = workspace.pretrain_dir(model)
    if not (path / "summary.json").exists():
        if not workspace.demo:
            raise UserError(
                f"there is no trained {model} in {path}: run 'brainfusion pretrain --model {model} "
                f"{' '.join(workspace.options())}', or give --checkpoint."
            )
        say(f"{path} is missing: pretraining a tiny {model}")
        _make("pretrain", ["--model", model, *workspace.options()])
    return path


def ensure_features(workspace: Workspace, name: str) -> Path:
    """A feature file; on the demo cohort it is made if it is not there."""
    from brainfusion.encoders import ENCODERS

    path = workspace.features_path(name)
    model, untrained = name.removesuffix("-untrained"), name.endswith("-untrained")
    if not path.exists():
        flags = ["--model", model, *(["--untrained"] if untrained else []), *workspace.options()]
        if model not in ENCODERS:
            raise UserError(
                f"{path} does not exist and '{name}' is no encoder. {nearest(name, ENCODERS)} Or "
                "put a Parquet file with the columns 'subject' and 'vector' there."
            )
        if not workspace.demo:
            command = f"brainfusion embed {' '.join(flags)}"
            raise UserError(f"{path} does not exist: run '{command}', or put your own file there.")
        say(f"{path} is missing: embedding the demo cohort")
        _make("embed", flags)
    return path


def _make(command: str, flags: list[str]) -> None:
    """Run a command that makes what is missing.

    Under torchrun only the main rank is here, and the others wait: the command gets a process of
    its own, which knows nothing of them.
    """
    if "WORLD_SIZE" not in os.environ:
        import_module(f"brainfusion.cli.{command}").main(flags)
        return
    env = {key: value for key, value in os.environ.items() if key not in _TORCHRUN}
    words = [sys.executable, "-m", "brainfusion.cli", command, *flags]
    if subprocess.run(words, env=env, check=False).returncode:
        raise UserError(f"'brainfusion {command}' failed; its own message is above.")


def check_replaceable(folder: Path, mark: str) -> None:
    """Refuse to delete a folder that no earlier run of this kind has made.

    Raises:
        UserError: It is a file, or holds other things and no `mark`.
    """
    if folder.is_dir() and (not any(folder.iterdir()) or (folder / mark).exists()):
        return
    if folder.exists():
        raise UserError(
            f"{folder} holds other things than an earlier run (it has no {mark}), so it is not "
            "replaced: give another --out."
        )


def hash_ids(subjects: list[str]) -> str:
    """A hash of an ordered list of ids, so that runs can tell whether they saw the same people."""
    return hashlib.sha256("\n".join(subjects).encode()).hexdigest()[:16]
