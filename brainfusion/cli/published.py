"""What goes with an authors' checkpoint file, in every command that takes one."""

from dataclasses import dataclass, fields
from pathlib import Path

from brainfusion.data.atlas import Atlas
from brainfusion.data.cohort import Cohort
from brainfusion.encoders.checkpoints import Pretrained
from brainfusion.encoders.published import load_published
from brainfusion.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedOptions:
    """What goes with an authors' checkpoint file."""

    upstream_config: Path | None = None
    """The authors' config (JSON or YAML); brainlm: config.json beside the weights by default,
    brainjepa: a published size."""
    upstream_atlas: Path | None = None
    """An atlas.json with the parcels in the weights' order: the cohort's are matched by name."""
    gradient: Path | None = None
    """brainjepa's gradient table (.csv or .npy); the cohort's atlas's, or one made, by default."""
    standardiser: str | None = None
    """A kind of scaling in place of the published one, which is fitted on this cohort."""

    def load(self, path: Path, model: str, cohort: Cohort, *, untrained: bool) -> Pretrained:
        """The encoder of an authors' file, for a cohort (`load_published`)."""
        return load_published(
            model,
            path,
            cohort,
            config=self.upstream_config,
            gradient=self.gradient,
            standardiser=self.standardiser,
            atlas=None if self.upstream_atlas is None else Atlas.load(self.upstream_atlas),
            untrained=untrained,
        )

    def check_unused(self, path: Path) -> None:
        """Refuse what was given beside a checkpoint of ours.

        Raises:
            UserError: One of them was given.
        """
        for field in fields(self):
            if getattr(self, field.name) is not None:
                raise UserError(
                    f"--{field.name.replace('_', '-')} goes with an authors' checkpoint file, and "
                    f"{path} is none: leave it out, or give that file with --checkpoint."
                )
