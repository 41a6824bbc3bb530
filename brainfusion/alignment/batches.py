"""Batches of people: who is in one, what they have, and which hidden units they keep.

All are functions of the seed and the step, for the batch of all processes together, of which each
takes its rows: two processes train what one would, dropout included, and a run that goes on after a
stop has nothing to restore.

Shape legend: n people of a batch, t training people, h hidden units.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from brainfusion.alignment.config import AlignConfig
from brainfusion.alignment.network import AlignmentModel, Inputs, take
from brainfusion.runtime.distributed import Ranks

if TYPE_CHECKING:
    from brainfusion.alignment.losses.pair_ids import PairIds


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Some people: their conditioned features, what each of them has, who is related to whom."""

    inputs: dict[str, Inputs]
    """Of each modality; what stands where a person lacks it is not looked at."""
    present: dict[str, np.ndarray]
    """bool [n] a modality: who has it."""
    ids: "PairIds | None" = None
    """Who is a negative of whom; everybody of everybody else if omitted."""

    def __len__(self) -> int:
        return len(next(iter(self.present.values())))

    def take(self, rows: np.ndarray | slice) -> "Batch":
        """Some of these people; a slice copies no features."""
        ids = self.ids
        if ids is not None:
            where = np.arange(len(self))[rows]
            ids = ids.take(torch.from_numpy(where).to(device_of(self.inputs)))
        return Batch(
            inputs={name: take(x, rows) for name, x in self.inputs.items()},
            present={name: has[rows] for name, has in self.present.items()},
            ids=ids,
        )


def device_of(inputs: Mapping[str, Inputs]) -> torch.device:
    """Where conditioned features are."""
    first = next(iter(inputs.values()))
    return first.device if isinstance(first, Tensor) else first.mask.device


def batch_rows(n_train: int, step: int, config: AlignConfig, world_size: int = 1) -> np.ndarray:
    """Training rows of the batch at `step` (from 1), of all processes; rank r takes r, r + W, ...

    A batch smaller than the cohort walks through a new order in each epoch; what is left over at
    its end is not seen in that epoch. open_clip's losses want as many pairs on each rank: up to
    `world_size - 1` people, others at each step, are left out for them.
    """
    size = min(config.batch_size or n_train, n_train)
    whole = size == n_train
    if config.loss != "info_nce" and size % world_size:
        size, whole = size - size % world_size, False
    if whole:
        return np.arange(n_train)
    epoch, place = divmod(step - 1, n_train // size)
    order = np.random.default_rng((config.seed, epoch)).permutation(n_train)
    return order[place * size : (place + 1) * size]


class Batches:
    """The batches of a run, as this process sees them."""

    def __init__(self, training: Batch, config: AlignConfig, ranks: Ranks) -> None:
        self._training, self._config, self._ranks = training, config, ranks
        self._own = slice(ranks.rank, None, ranks.world_size)
        self.whole = len(batch_rows(len(training), 1, config, ranks.world_size)) == len(training)
        """Every batch is all training people, in one order."""
        self._all = training if ranks.world_size == 1 else training.take(self._own)

    def at(self, step: int) -> tuple[np.ndarray, Batch]:
        """The training rows of all processes at `step`, and this process's share of the batch."""
        rows = batch_rows(len(self._training), step, self._config, self._ranks.world_size)
        return rows, self._all if self.whole else self._training.take(rows[self._own])

    def keep(self, model: AlignmentModel, step: int, n_people: int) -> dict[str, Tensor]:
        """The hidden units, bool [n, h] a modality, that this process's people keep at `step`.

        Empty without dropout. Drawn for the whole batch, so that a person's draw depends on no
        process.
        """
        settings, device = model.settings, self._ranks.device
        if settings["dropout"] == 0.0:
            return {}
        found = {}
        for number, name in enumerate(settings["dims_in"]):
            seed = np.random.SeedSequence([self._config.seed, step, number]).generate_state(1)
            generator = torch.Generator(device).manual_seed(int(seed[0]))
            drawn = torch.empty(n_people, settings["dim_hidden"], dtype=torch.bool, device=device)
            drawn.bernoulli_(1.0 - settings["dropout"], generator=generator)
            found[name] = drawn[self._own]
        return found


def embed(
    model: AlignmentModel, batch: Batch, keep: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Unit rows of each modality, of the people who have it, in their order."""
    found = {}
    for name, inputs in batch.inputs.items():
        has, kept = batch.present[name], (keep or {}).get(name)
        if not has.all():
            rows = np.flatnonzero(has)
            inputs, kept = take(inputs, rows), None if kept is None else kept[rows]
        found[name] = model.embed(name, inputs, keep=kept)
    return found


def shared_rows(
    embedded: Mapping[str, Tensor], batch: Batch, first: str, second: str
) -> tuple[Tensor, Tensor, "PairIds | None"]:
    """The rows of two modalities of the people who have both, and who these are to one another."""
    both = batch.present[first] & batch.present[second]
    a, b = (
        x if both.sum() == len(x) else x[np.flatnonzero(both[batch.present[name]])]
        for name, x in ((first, embedded[first]), (second, embedded[second]))
    )
    ids = batch.ids
    if ids is not None and not both.all():
        ids = ids.take(torch.from_numpy(np.flatnonzero(both)).to(a.device))
    return a, b, ids
