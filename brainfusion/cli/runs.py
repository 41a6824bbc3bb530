"""Alignment runs: which one a command is about, where it is, and what it was made of.

A run is named by its two sides, and lies in the workspace then, or by its folder (--run), which
says itself what its sides are: that is how runs of other settings or methods are looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from brainfusion.cli.modalities import brain_features, dna_models, side_name
from brainfusion.cli.workspace import Workspace, ensure_features
from brainfusion.data.cohort import Cohort
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import read_json
from brainfusion.runtime.logs import say

_BRAIN, _DNA = ("brainjepa",), ("evo2",)


@dataclass(frozen=True, kw_only=True, slots=True)
class WhichRun:
    """The options that name an alignment run."""

    brain: tuple[str, ...] = _BRAIN
    """Brain features of the alignment: one encoder or several."""
    dna: tuple[str, ...] = _DNA
    """DNA embeddings of the alignment: one model or several."""
    run: Path | None = None
    """The alignment's folder, where it is not <workspace>/align/<brain>-<dna>:
    it knows its brain features and DNA itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignmentRun:
    """An alignment on disk."""

    path: Path
    brain: tuple[str, ...]
    """Its brain modalities."""
    dna: tuple[str, ...]
    """Its DNA modalities: models, or several joined by +."""
    haplotypes: str
    """How it read the two haplotypes of its people."""

    @property
    def brain_name(self) -> str:
        """What its brain side is called."""
        return side_name(self.brain)

    @property
    def dna_name(self) -> str:
        """What its DNA side is called."""
        return side_name(self.dna)

    @classmethod
    def read(cls, path: Path) -> "AlignmentRun":
        """What a run's folder says of it.

        Raises:
            UserError: There is no finished alignment in it.
        """
        summary = path / "summary.json"
        if not summary.exists() or not (path / "embeddings" / "dna.parquet").exists():
            raise UserError(
                f"{path} holds no finished alignment (summary.json and embeddings/dna.parquet): "
                "expected the folder that 'brainfusion align' has written, such as the one that "
                "was given to it as --out."
            )
        meta = read_json(summary)["meta"]
        return cls(
            path=path,
            brain=brain_features([meta["brain"]]),
            dna=dna_models([meta["dna"]]),
            haplotypes=meta.get("provenance", {}).get("haplotypes", "mean"),
        )

    def flags(self, workspace: Workspace) -> list[str]:
        """The flags that name this run in a command."""
        if self.path == workspace.align_dir(self.brain_name, self.dna_name):
            return ["--brain", *self.brain, "--dna", *self.dna, *workspace.options()]
        return ["--run", str(self.path), *workspace.options()]


def find_run(workspace: Workspace, which: WhichRun) -> AlignmentRun:
    """The run that the options name; on the demo cohort it is made if it is not there.

    Raises:
        UserError: It is not there, or --run goes with --brain or --dna of another run.
    """
    if which.run is None:
        return AlignmentRun.read(ensure_alignment(workspace, which.brain, which.dna))
    run = AlignmentRun.read(which.run)
    for flag, given, default, own in (
        ("--brain", brain_features(which.brain), _BRAIN, run.brain),
        ("--dna", dna_models(which.dna), _DNA, run.dna),
    ):
        if given not in (default, own):
            raise UserError(
                f"{flag} {' '.join(given)} with --run {which.run}, which was made of "
                f"{' '.join(own)}: leave {flag} out."
            )
    return run


def check_cohort(run: AlignmentRun, cohort: Cohort) -> None:
    """Warn where a run was made from another cohort, or another state of this one."""
    provenance = read_json(run.path / "summary.json")["meta"].get("provenance", {})
    made_of = provenance.get("cohort_hash", cohort.hash)
    if made_of != cohort.hash:
        say(
            f"warning: {run.path} was made from another cohort or another state of it ({made_of}, "
            f"now {cohort.hash}): check --cohort and --workspace, or align again."
        )


def ensure_alignment(workspace: Workspace, brain: str | Sequence[str], dna: Sequence[str]) -> Path:
    """An alignment run; on the demo cohort it is made if it is not there."""
    from brainfusion.cli import align

    brain = brain_features([brain] if isinstance(brain, str) else brain)
    dna = dna_models(dna)
    path = workspace.align_dir(side_name(brain), side_name(dna))
    if not (path / "embeddings" / "dna.parquet").exists():
        flags = ["--brain", *brain, "--dna", *dna, *workspace.options()]
        if not workspace.demo:
            for name in brain:
                ensure_features(workspace, name)
            raise UserError(f"{path} does not exist: run 'brainfusion align {' '.join(flags)}'.")
        say(f"{path} is missing: aligning {side_name(brain)} and {side_name(dna)}")
        align.main(flags)
    return path
