"""What is measured on validation people while an encoder trains, and the alarm on collapse.

Windows and masks are fixed for the whole run, so that one row of the log compares with another.

Shape legend: b windows, p parcels, t TRs, f features.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from brainfusion.encoders.objectives import BrainLMObjective, Objective
from brainfusion.encoders.pretrain_config import PretrainConfig
from brainfusion.encoders.pretrain_inputs import PretrainInputs
from brainfusion.runtime.distributed import Ranks, gather_rows, mean_over_ranks
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import atomic_file

CHUNK = 16
COLLAPSED_SPREAD = 0.02
"""Spread of features, as a share of the untrained encoder's, below which they are collapsed."""
COLLAPSED_RANK = 1.5
"""Effective rank below which features vary along one line alone."""


class Validation:
    """The loss on fixed windows and fixed masks of validation people, shared over the ranks."""

    def __init__(
        self,
        settings: PretrainConfig,
        inputs: PretrainInputs,
        objective: Objective,
        ranks: Ranks,
    ) -> None:
        self._objective, self._ranks = objective, ranks
        rows, n_wanted = inputs.validation_rows, settings.watch.n_validation
        n_rows = min(len(rows), n_wanted)
        n_rows -= n_rows % ranks.world_size
        if not n_rows:
            raise UserError(
                f"{len(rows)} validation recordings (at most {n_wanted} are used) "
                f"do not go round {ranks.world_size} processes: use fewer processes, or a larger "
                "--n-validation."
            )
        draws = objective.draw(n_rows, seed=settings.run.seed, step=2**31)
        mine = slice(ranks.rank, None, ranks.world_size)
        windows = [inputs.first_window(row) for row in rows[:n_rows][mine]]
        self._bold = torch.from_numpy(np.stack(windows))
        self._draws: list[Tensor] = [draw[mine] for draw in draws]

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """The mean over chunks and ranks, and the spread of features over all windows."""
        self._objective.eval()
        rows, pooled = len(self._bold), []
        totals: dict[str, float] = {}
        for part in zip(*(x.split(CHUNK) for x in (self._bold, *self._draws)), strict=True):
            batch, *draws = (x.to(self._ranks.device) for x in part)
            for name, value in self._objective.diagnose(batch, draws).items():
                totals[name] = totals.get(name, 0.0) + value * len(batch) / rows
            pooled.append(self._objective.pooled(batch))
        self._objective.train()
        means = mean_over_ranks(torch.tensor(list(totals.values()), device=self._ranks.device))
        features = gather_rows(torch.cat(pooled).double(), self._ranks)
        return dict(zip(totals, means.tolist(), strict=True)) | spread_of(features)

    @torch.no_grad()
    def save_reconstruction(self, path: Path) -> None:
        """Write one window of this rank as BrainLM rebuilds it; nothing for other encoders.

        Arrays `signal`, `reconstruction` and `hidden` (bool), each [p, t].
        """
        if not isinstance(self._objective, BrainLMObjective):
            return
        bold, draws = self._bold[:1].to(self._ranks.device), [d[:1] for d in self._draws]
        self._objective.eval()
        made = self._objective.reconstruct(bold, [d.to(self._ranks.device) for d in draws])
        self._objective.train()
        if made is None or not self._ranks.is_main:
            return
        signal, rebuilt, hidden = (value[0].cpu().numpy() for value in (bold, *made))
        with atomic_file(path) as aside:
            np.savez_compressed(aside, signal=signal, reconstruction=rebuilt, hidden=hidden)


def spread_of(features: Float[Tensor, "b f"]) -> dict[str, float]:
    """How features differ between windows; one window alone has no spread.

    `feature_std`: their standard deviation, the mean over features. `effective_rank`: the
    exponential of the entropy of their singular values after centring (Roy and Vetterli 2007;
    RankMe, arXiv:2210.02885): 1 where all lie on one line.
    """
    if len(features) < 2:
        return {}
    centred = features - features.mean(0)
    share = torch.linalg.svdvals(centred)
    total = share.sum()
    if not float(total) > 0.0:
        return {"feature_std": 0.0, "effective_rank": 0.0}
    share = share / total
    entropy = -(share * share.clamp_min(1e-300).log()).sum()
    return {
        "feature_std": float(centred.square().mean(0).sqrt().mean()),
        "effective_rank": float(entropy.exp()),
    }


def collapse_alarm(first: dict[str, float], now: dict[str, float]) -> str | None:
    """One sentence if features have collapsed since the `first` validation, else None."""
    if "feature_std" not in now or "feature_std" not in first:
        return None
    spread, before, rank = now["feature_std"], first["feature_std"], now["effective_rank"]
    few = spread <= COLLAPSED_SPREAD * before
    thin = rank < COLLAPSED_RANK <= first["effective_rank"]
    if not few and not thin:
        return None
    return (
        f"the features have collapsed: between validation recordings they spread by {spread:.2g} "
        f"(untrained {before:.2g}) over {rank:.1f} effective dimensions (untrained "
        f"{first['effective_rank']:.1f}), however low the loss is; lower --lr, raise --momentum, "
        "or check how recordings are scaled."
    )
