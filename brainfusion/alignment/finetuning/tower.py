"""The brain side of an alignment while its encoder is in the graph: from people to unit rows.

Shape legend: n people, m people of a micro-batch, f features, o width of the shared space, h hidden
units of a projector.
"""

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from brainfusion.alignment.conditioning import Conditioner
from brainfusion.alignment.finetuning.affine import Affine
from brainfusion.alignment.finetuning.config import FinetuneConfig
from brainfusion.alignment.genes.vectors import GeneVectors
from brainfusion.alignment.losses.pair_ids import PairIds
from brainfusion.alignment.model import Alignment
from brainfusion.alignment.network import AlignmentModel, as_inputs
from brainfusion.data.prefetch import Prefetch
from brainfusion.runtime.distributed import Ranks, gather_rows


class Tower(Protocol):
    """A brain encoder with the recordings of the people of an alignment, row by row."""

    module: nn.Module
    """What is tuned, in evaluation mode: nothing in it is random."""
    blocks: str
    """The ModuleList of its blocks, by name."""
    after: tuple[str, ...]
    """Patterns of parameters behind the last block."""
    fixed: tuple[str, ...]
    """Patterns of parameters that are never trained."""

    def load(self, people: np.ndarray, step: int | None) -> Any:
        """What `features` takes: recordings of people, by row; None: whole, as for embedding.

        A pure function of its arguments, called from another thread.
        """
        ...

    def features(self, loaded: Any) -> Float[Tensor, "m f"]:
        """Pooled features, with a graph where gradients are on."""
        ...


@dataclass(kw_only=True, eq=False)
class Towers:
    """Everything that a step needs, on this process's device."""

    config: FinetuneConfig
    ranks: Ranks
    tower: Tower
    model: AlignmentModel
    affine: Affine
    offset: Tensor
    dna: Tensor
    ids: PairIds | None

    @classmethod
    def of(
        cls,
        alignment: Alignment,
        tower: Tower,
        dna: np.ndarray | GeneVectors,
        ids: PairIds | None,
        covariates: np.ndarray | None,
        config: FinetuneConfig,
        ranks: Ranks,
    ) -> "Towers":
        """A copy of the alignment's model behind the encoder, and everybody's DNA, conditioned."""
        brain, genes = alignment.conditioners["brain"], alignment.conditioners["dna"]
        assert isinstance(brain, Conditioner)
        assert isinstance(alignment.model, AlignmentModel)
        own = covariates if genes.covariates else None
        inputs = as_inputs(genes.transform(dna, own))  # type: ignore[arg-type]
        assert isinstance(inputs, Tensor)
        affine = Affine(brain)
        offset = affine.offset(covariates, len(inputs))
        return cls(
            config=config,
            ranks=ranks,
            tower=tower,
            model=copy.deepcopy(alignment.model).to(ranks.device),
            affine=affine.to(ranks.device),
            offset=offset.to(ranks.device),
            dna=inputs.to(ranks.device),
            ids=ids and ids.to(ranks.device),
        )

    def ids_of(self, people: np.ndarray) -> PairIds | None:
        """Who these people are to one another."""
        return self.ids and self.ids.take(torch.from_numpy(people).to(self.ranks.device))

    def brain_rows(
        self, people: np.ndarray, loaded: Any, keep: Tensor | None = None
    ) -> Float[Tensor, "m o"]:
        """Unit rows of people whose recordings were loaded."""
        device = self.ranks.device
        half = self.config.precision == "bfloat16"
        with parametrize.cached(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            features = self.tower.features(loaded)
        rows = torch.from_numpy(people).to(device)
        return self.model.embed("brain", self.affine(features, self.offset[rows]), keep=keep)

    def dna_rows(self, people: np.ndarray, keep: Tensor | None = None) -> Float[Tensor, "m o"]:
        """Unit rows of the same people's DNA."""
        rows = torch.from_numpy(people).to(self.ranks.device)
        return self.model.embed("dna", self.dna[rows], keep=keep)

    @torch.no_grad()
    def both(self, people: np.ndarray) -> tuple[Float[Tensor, "n o"], Float[Tensor, "n o"]]:
        """Unit rows of both sides, in float32 on every process, without dropout."""
        brain = self._brain(people)
        return brain, self.dna_rows(people).float()

    def _brain(self, people: np.ndarray) -> Float[Tensor, "n o"]:
        """Unit rows of whole recordings; processes share the work."""
        self.model.eval()
        n_processes = self.ranks.world_size
        filled = np.resize(people, -(-len(people) // n_processes) * n_processes)
        share = filled[self.ranks.rank :: n_processes]
        parts = parts_of(share, self.config.micro_batch)
        with Prefetch(lambda i: self.tower.load(parts[i], None), 0, len(parts)) as loaded:
            found = [self.brain_rows(part, next(loaded)) for part in parts]
        return gather_rows(torch.cat(found).float(), self.ranks)[: len(people)]


def parts_of(people: np.ndarray, size: int) -> list[np.ndarray]:
    """People in micro-batches, in their order; the last may be smaller."""
    return [people[i : i + size] for i in range(0, len(people), size)]


def batch_of(n_train: int, step: int, config: FinetuneConfig) -> np.ndarray:
    """Training people of `step` (from 1), over all processes; a pure function of seed and step."""
    size = min(config.batch_size or n_train, n_train)
    if size == n_train:
        return np.arange(n_train)
    epoch, place = divmod(step - 1, n_train // size)
    order = np.random.default_rng((config.seed, epoch)).permutation(n_train)
    return order[place * size : (place + 1) * size]


def kept_units(
    model: AlignmentModel, n: int, step: int, seed: int
) -> dict[str, Bool[Tensor, "n h"] | None]:
    """Hidden units that are kept for each row of the whole batch, whoever computes it."""
    share, width = model.settings["dropout"], model.settings["dim_hidden"]
    if not share:
        return {"brain": None, "dna": None}
    generator = torch.Generator().manual_seed(_seed(seed, step))
    return {name: torch.rand(n, width, generator=generator) >= share for name in ("brain", "dna")}


def _seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
