"""The loss of a batch of people: the weighted mean of the contrastive losses of their modalities.

Every pair of modalities gives the loss of the people of the batch who have both; a pair that fewer
than two of them have gives none in that batch. All share one space and one logit scale.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from brainfusion.alignment.batches import Batch, embed, shared_rows
from brainfusion.alignment.config import AlignConfig
from brainfusion.alignment.losses.info_nce import contrastive_loss
from brainfusion.alignment.modalities import ModalityPair
from brainfusion.alignment.network import AlignmentModel
from brainfusion.alignment.validation import chance_level


class BatchLoss(NamedTuple):
    """The loss of a batch, and what it is held against."""

    value: Tensor
    """Of `info_nce` the loss of all processes; else this one's, whose mean over processes it is."""
    chance: float
    """The same mean of the losses at which nothing is told apart: of log N, for one pair."""
    n_pairs: int
    """Of embeddings that were contrasted, over all processes and pairs of modalities."""


class Objective:
    """Calculates the loss of batches; keeps what chance is where every batch is the same."""

    def __init__(
        self,
        training: Batch,
        pairs: Sequence[ModalityPair],
        config: AlignConfig,
        *,
        whole: bool,
    ) -> None:
        """Make the objective.

        Args:
            training: All training people.
            pairs: Of modalities, with their weights.
            config: The loss and how it is calculated.
            whole: Every batch is all training people.
        """
        self._present, self._pairs, self._whole = training.present, pairs, whole
        self._loss = contrastive_loss(
            config.loss, exchange=config.exchange, precision=config.precision
        )
        self._chances: dict[str, float] = {}

    def __call__(
        self, model: AlignmentModel, batch: Batch, rows: np.ndarray, keep: Mapping[str, Tensor]
    ) -> BatchLoss:
        """The loss of this process's share of a batch.

        Args:
            model: Maps the modalities into the shared space.
            batch: This process's people.
            rows: The training rows of all processes in the batch.
            keep: Hidden units to keep, by modality (`Batches.keep`).
        """
        embedded = embed(model, batch, keep)
        total, chance, weights, n_pairs = 0.0, 0.0, 0.0, 0
        for pair in self._pairs:
            n = int((self._present[pair.first][rows] & self._present[pair.second][rows]).sum())
            if n < 2:  # all processes see the same number
                continue
            a, b, ids = shared_rows(embedded, batch, pair.first, pair.second)
            loss = self._loss(a, b, model.logit_scale, model.logit_bias, ids)
            if pair.name not in self._chances or not self._whole:
                known = n if ids is None else len(a)
                self._chances[pair.name] = chance_level(known, ids, a.device)
            total = total + pair.weight * loss
            chance += pair.weight * self._chances[pair.name]
            weights, n_pairs = weights + pair.weight, n_pairs + n
        if not isinstance(total, Tensor):
            # No two people share two modalities: nothing to learn from in this batch.
            nothing = torch.stack([0.0 * x.sum() for x in embedded.values()]).sum()
            return BatchLoss(nothing, 0.0, 0)
        return BatchLoss(total / weights, chance / weights, n_pairs)
