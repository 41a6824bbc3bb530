"""What is hidden from an alignment, one unit after another: genes, networks, single parcels.

A gene is hidden from the DNA modality that it is in. A network or parcel is made flat in the
recordings, which every encoder of the run embeds again: it is hidden from all of them at once.
Features that no encoder here has made stay as they are, which is said.

Shape legend: t test people, m of them who have a modality.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from brainfusion.alignment.genes.leave_out import without_each_gene
from brainfusion.alignment.genes.vectors import GeneVectors
from brainfusion.cli.attribution.attributed import Attributed
from brainfusion.cli.published import PublishedOptions
from brainfusion.data.cohort import Cohort
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import hash_file, read_json
from brainfusion.runtime.logs import Progress, say

if TYPE_CHECKING:
    import torch

    from brainfusion.encoders.checkpoints import Pretrained

Hidden = Iterator[tuple[str, np.ndarray, np.ndarray]]
"""Of each unit its name and the vectors [t, k] of both sides with it hidden."""


def genes(asked: Attributed) -> Hidden:
    """Each gene that varies, hidden from the trained model.

    Who has no other gene in that modality keeps it there, and a modality in which one gene alone
    varies is left whole; both are said.
    """
    brain, step = asked.vectors("brain"), progress("hiding genes", len(asked.genes))
    for name, vectors in asked.people.dna.items():
        if len(asked.conditioner(name).used) < 2 and len(asked.people.dna) > 1:
            say(f"{name}: only one gene varies, so it is not left out.")
            continue
        own = asked.owners(name)
        several = _n_genes(asked, name, vectors.take(own)) > 1
        if n_bare := int((~several).sum()):
            say(f"{name}: {n_bare} of {len(own)} test people have one gene only, and keep it.")
        kept = own[several]
        covariates = None if asked.covariates is None else asked.covariates[kept]
        less = without_each_gene(asked.alignment, vectors.take(kept), covariates, name=name)
        for gene, rows in less:
            changed = asked.embedded[name].copy()
            changed[several] = rows
            yield asked.unit(gene), brain, asked.vectors("dna", {name: changed})
            step()


def _n_genes(asked: Attributed, name: str, vectors: GeneVectors) -> np.ndarray:
    """How many of the genes that vary each person has, int64 [m]."""
    used = set(asked.conditioner(name).used)
    return vectors.mask[:, [gene in used for gene in vectors.genes]].sum(axis=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class BrainUnits:
    """Networks and parcels, hidden from all encoders of a run."""

    asked: Attributed
    device: "torch.device"
    checkpoints: Sequence[Path] = ()
    """Where else the encoders may be."""
    published: PublishedOptions
    """What goes with an authors' file among them."""

    @cached_property
    def encoders(self) -> "dict[str, Pretrained]":
        """Of each brain modality that has one, the encoder that made its features.

        Raises:
            UserError: None has, or an encoder's weights are not to be found.
        """
        from brainfusion.encoders import ENCODERS

        found, left = {}, []
        for name, features in self.names.items():
            model = self.made(name).get("encoder")
            if model in ENCODERS:
                found[name] = self._find(model, features, self.made(name))
            else:
                left.append(features)
        if not found:
            raise UserError(
                f"brain features '{left[0]}' were not made by an encoder that is here, so no "
                "parcel can be hidden from it: ask for --what genes."
            )
        if left:
            say(
                f"brain features {', '.join(left)} were not made by an encoder that is here: they "
                f"stay as they are while parcels are hidden from {', '.join(self.hidden_from)}."
            )
        return found

    @property
    def names(self) -> dict[str, str]:
        """Of each brain modality the features that it is made of."""
        return {name: self.asked.names[name] for name in self.asked.people.brain}

    @property
    def hidden_from(self) -> list[str]:
        """The features from which parcels are hidden."""
        from brainfusion.encoders import ENCODERS

        return [x for name, x in self.names.items() if self.made(name).get("encoder") in ENCODERS]

    def made(self, name: str) -> dict[str, Any]:
        """What a brain modality's feature file says of how it was made."""
        made = self.asked.people.provenance["brain"]
        return made if len(self.names) == 1 else made[self.names[name]]

    def networks(self) -> Hidden:
        """Each network of the atlas."""
        groups: dict[str, dict[str, np.ndarray]] = {}
        for name, pretrained in self.encoders.items():
            atlas = pretrained.atlas
            networks = atlas.networks or _named_networks(self.asked.cohort, atlas.parcels)
            if networks is None:
                raise UserError(
                    f"the atlas '{atlas.name}' does not say which network a parcel belongs to: add "
                    "'networks' to its atlas.json, or ask for --what genes parcels."
                )
            for unit in sorted(set(networks)):
                rows = np.flatnonzero(np.asarray(networks) == unit)
                groups.setdefault(unit, {})[name] = rows
        return self._hidden(groups)

    def parcels(self) -> Hidden:
        """Each parcel of the atlas."""
        groups: dict[str, dict[str, np.ndarray]] = {}
        for name, pretrained in self.encoders.items():
            for i, unit in enumerate(pretrained.atlas.parcels):
                groups.setdefault(unit, {})[name] = np.array([i])
        return self._hidden(groups)

    def _hidden(self, groups: Mapping[str, Mapping[str, np.ndarray]]) -> Hidden:
        """Groups of parcels, each with its rows in the atlas of every encoder that has some."""
        from brainfusion.encoders.embed import EmbedSettings
        from brainfusion.encoders.occlusion import features_without

        asked, people = self.asked, self.asked.people
        streams = {}
        for name, pretrained in self.encoders.items():
            made, own = self.made(name), asked.owners(name)
            if not len(own):
                continue
            streams[name] = features_without(
                pretrained,
                asked.cohort,
                [people.subjects[row] for row in own],
                {unit: rows[name] for unit, rows in groups.items() if name in rows},
                EmbedSettings(pooling=made["pooling"], precision=made["precision"]),
                device=self.device,
            )
        dna, step = asked.vectors("dna"), progress("hiding parcels", len(groups))
        for unit, rows in groups.items():
            changed = {}
            for name in streams:
                if name in rows:
                    changed[name] = asked.embed(name, next(streams[name])[1])
            yield unit, asked.vectors("brain", changed), dna
            step()

    def _find(self, model: str, features: str, made: Mapping[str, Any]) -> "Pretrained":
        """The encoder with the weights that made some features."""
        asked, wanted = self.asked, made.get("checkpoint_hash")
        untrained = wanted == "untrained"
        places = [
            *self.checkpoints,
            asked.run.path / "encoder",
            asked.workspace.pretrain_dir(model),
            *sorted(asked.workspace.align_dir(features, "x").parent.glob(f"{features}-*/encoder")),
        ]
        for place in places:
            found = self._opened(place, model, str(wanted), untrained=untrained)
            if found is not None:
                return found
        raise UserError(
            f"features '{features}' were made by another checkpoint of {model} than those in "
            f"{', '.join(str(place) for place in places[:3])}: name it with --checkpoint, or embed "
            f"again with 'brainfusion embed --model {model}' and align again."
        )

    def _opened(
        self, place: Path, model: str, wanted: str, *, untrained: bool
    ) -> "Pretrained | None":
        """The encoder at a place, if it is the model and has the weights."""
        from brainfusion.encoders.checkpoints import load_pretrained
        from brainfusion.encoders.published import is_published
        from brainfusion.runtime import checkpoint

        if not place.exists():
            if place in self.checkpoints:
                raise UserError(f"--checkpoint {place} does not exist.")
            return None
        if is_published(place):
            if not untrained and hash_file(place) != wanted:
                return None
            return self.published.load(place, model, self.asked.cohort, untrained=untrained)
        folder = place.parent if place.is_file() else place
        if not (folder / "state.json").exists() and not checkpoint.steps(folder):
            return None
        newest = checkpoint.newest(folder)
        if read_json(newest / "state.json").get("model") != model:
            return None
        if not untrained and hash_file(newest / "model.safetensors") != wanted:
            return None
        return load_pretrained(newest, model, untrained=untrained)


def _named_networks(cohort: Cohort, parcels: Sequence[str]) -> list[str] | None:
    """The networks of the encoder's parcels as the cohort's atlas has them, by name."""
    if cohort.atlas.networks is None:
        return None
    known = dict(zip(cohort.atlas.parcels, cohort.atlas.networks, strict=True))
    return [known.get(parcel, "unknown") for parcel in parcels]


def progress(what: str, total: int) -> Callable[[], None]:
    """A line of progress that moves on by one at each call."""
    line, done = Progress(what, total), [0]

    def step() -> None:
        done[0] += 1
        line.update(done[0])

    return step
