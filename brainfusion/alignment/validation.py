"""What is measured on validation people while an alignment trains.

Alignment and uniformity: Wang & Isola 2020, arXiv 2005.10242, equations 1 and 2 with alpha = 2 and
t = 2. The bound on mutual information: van den Oord 2018, arXiv 1807.03748, equation 9.

Shape legend: n people, o width of the shared space.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from brainfusion.alignment.batches import Batch, embed, shared_rows
from brainfusion.alignment.losses.info_nce import info_nce
from brainfusion.alignment.modalities import LEAST_VALIDATION, ModalityPair
from brainfusion.alignment.network import AlignmentModel
from brainfusion.runtime.distributed import Ranks

if TYPE_CHECKING:
    from brainfusion.alignment.losses.pair_ids import PairIds

METRICS = {"auc": "validation_auc", "information": "validation_information"}
"""Of `AlignConfig.early_stopping`; of both, more is better."""


class Validation:
    """Measures a model on the validation people: means over the pairs of different sides."""

    def __init__(self, people: Batch, pairs: Sequence[ModalityPair], ranks: Ranks) -> None:
        self._people, self._ranks = people, ranks
        self.pairs = [
            pair for pair in pairs if pair.across and self.n_people(pair) >= LEAST_VALIDATION
        ]
        """Those that enough validation people have both of; the others are not measured."""

    def n_people(self, pair: ModalityPair) -> int:
        """Validation people who have both modalities."""
        return int((self._people.present[pair.first] & self._people.present[pair.second]).sum())

    @torch.no_grad()
    def __call__(self, model: AlignmentModel) -> dict[str, float]:
        """Metrics as rank 0 finds them: all ranks must stop together."""
        model.eval()
        names = ["validation_auc", "validation_information", "validation_alignment"]
        several = [f"validation_auc_{p.first}_{p.second}" for p in self.pairs]
        names += ["validation_uniformity", "effective_rank"]
        names += several if len(several) > 1 else []
        values = torch.zeros(len(names), dtype=torch.float64, device=self._ranks.device)
        if self._ranks.is_main:
            values[:] = torch.tensor(self._measured(model)[: len(names)], dtype=torch.float64)
        if self._ranks.world_size > 1:
            dist.broadcast(values, src=0)
        return dict(zip(names, values.tolist(), strict=True))

    def _measured(self, model: AlignmentModel) -> list[float]:
        embedded = {name: x.float() for name, x in embed(model, self._people).items()}
        scale = float(model.logit_scale)
        aucs, bounds, distances = [], [], []
        for pair in self.pairs:
            a, b, ids = shared_rows(embedded, self._people, pair.first, pair.second)
            aucs.append(pair_auc(a, b, ids=ids))
            loss = float(info_nce(a, b, scale, **_with(ids), local=True))
            bounds.append(chance_level(len(a), ids, a.device, local=True) - loss)
            distances.append(float((a - b).square().sum(1).mean()))
        towers = {name for pair in self.pairs for name in (pair.first, pair.second)}
        rows = [embedded[name] for name in sorted(towers)]
        return [
            float(np.mean(aucs)),
            float(np.mean(bounds)),
            float(np.mean(distances)),
            float(np.mean([uniformity(x) for x in rows])),
            float(np.mean([effective_rank(x) for x in rows])),
            *aucs,
        ]


def chance_level(
    n_pairs: int, ids: "PairIds | None", device: torch.device, *, local: bool = False
) -> float:
    """The loss where nothing is told apart: log N, or with ids the mean of each row's own log N.

    Args:
        n_pairs: Of all processes; with ids, of this one.
        ids: Who is a negative of whom.
        device: Of the ids.
        local: This process alone.
    """
    if ids is None:
        return math.log(n_pairs)
    alike = torch.zeros(n_pairs, 1, device=device)
    return float(info_nce(alike, alike, 0.0, ids=ids, local=local))


def _with(ids: "PairIds | None") -> dict:
    return {} if ids is None else {"ids": ids}


# -- measures ------------------------------------------------------------------------------------


def pair_auc(a: Tensor, b: Tensor, *, tile: int = 1024, ids: "PairIds | None" = None) -> float:
    """The chance that a pair is more alike than a non-pair, over both directions; ties are half.

    Args:
        a: [n, o], unit rows.
        b: [n, o], unit rows, row-paired.
        tile: Rows of similarities held at once.
        ids: Who is a non-pair of whom: its negatives. Everybody of everybody else if omitted.

    Returns:
        From 0 to 1; 0.5 where nobody has a non-pair.
    """
    won, n_others = 0.0, 0
    n = len(a)
    for x, y in ((a, b), (b, a)):
        for i in range(0, n, tile):
            similarities = x[i : i + tile] @ y.T
            rows = torch.arange(i, i + len(similarities), device=a.device)
            others = _negatives(rows, n, ids)
            pairs = similarities.diagonal(i)[:, None]
            won += float(((similarities < pairs) & others).sum())
            won += 0.5 * float(((similarities == pairs) & others).sum())
            n_others += int(others.sum())
    return won / n_others if n_others else 0.5


def _negatives(rows: Tensor, n: int, ids: "PairIds | None") -> Tensor:
    """Whose non-pairs are whom, bool [r, n] of some rows."""
    others = rows[:, None] != torch.arange(n, device=rows.device)
    if ids is None:
        return others
    if ids.person is not None:
        others &= ids.person[rows, None] != ids.person
    if ids.within is not None:
        others &= ids.within[rows, None] == ids.within
    if ids.excluded is not None:
        for column in ids.excluded.T:
            others &= (column[rows, None] != column) | (column[rows, None] < 0)
    return others


def uniformity(rows: Tensor, *, tile: int = 1024) -> float:
    """Log of the mean of exp(-2 d^2) over pairs of unit rows [n, o]: 0 is a collapse."""
    n, total = len(rows), 0.0
    for block in _blocks(rows, tile):
        # |x - y|^2 = 2 - 2 x.y of unit rows
        total += float((4.0 * (block @ rows.T) - 4.0).exp().double().sum())
    return math.log(max((total - n) / (n * (n - 1)), 1e-300))


def _blocks(rows: Tensor, tile: int) -> Iterator[Tensor]:
    for i in range(0, len(rows), tile):
        yield rows[i : i + tile]


def effective_rank(rows: Tensor) -> float:
    """Exponential of the entropy of the variance over principal axes; 1 is a collapse.

    At most the width and the number of rows less one. Roy & Vetterli 2007, on variances.
    """
    variances = torch.linalg.svdvals((rows - rows.mean(0)).double()).square()
    if float(variances.sum()) == 0.0:
        return 1.0
    shares = variances / variances.sum()
    return float(torch.special.entr(shares).sum().exp())
