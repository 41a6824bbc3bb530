"""An encoder whose features keep their graph: what fine-tuning trains, and how it is saved.

The same features as `embed` makes, in torch: recordings are conditioned as the checkpoint says,
encoded and pooled by the encoder's own `encode`, and averaged over each person.

Shape legend: m people, b recordings of one length, p parcels, t TRs, f features.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from brainfusion import __version__
from brainfusion.data.cohort import Cohort
from brainfusion.data.windows import cut_window
from brainfusion.encoders.brainjepa import BrainJEPA
from brainfusion.encoders.checkpoints import Pretrained
from brainfusion.encoders.embed import centroids_mm, parcel_order, poolings, shortest_trs
from brainfusion.encoders.pooling import check_pooling
from brainfusion.runtime import checkpoint
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import atomic_folder, write_json


class Loaded(NamedTuple):
    """Conditioned recordings of some people, those of one length together."""

    bold: list[Float[Tensor, "b p t"]]
    owner: list[Int[Tensor, " b"]]
    """Whose each recording is, a position among the people."""
    n_recordings: Int[Tensor, " m"]


class RecordingTower:
    """A pretrained encoder with the recordings of a list of people."""

    def __init__(
        self,
        pretrained: Pretrained,
        cohort: Cohort,
        subjects: Sequence[str],
        *,
        pooling: str,
        windows: int = 0,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        """Find the people's recordings; nothing is read yet.

        Args:
            pretrained: Encoder with its conditioning and atlas; its module moves to `device`.
            cohort: Its parcels are matched to the encoder's by name.
            subjects: The people, row by row.
            pooling: As the features were pooled that the alignment was trained on.
            windows: Windows of a person in a training step, at random places; 0: all recordings.
            seed: Of those places.
            device: The CPU if omitted.

        Raises:
            UserError: Parcels are missing, the pooling is none of the encoder's, or somebody has no
                recording that is long enough.
        """
        check_pooling(pooling, poolings(pretrained.module))
        self._device = device or torch.device("cpu")
        self._whole: Any = pretrained.module.to(self._device).eval()
        self.module, self.blocks, self.after, self.fixed = tower_of(pretrained.module)
        self.pooling, self._windows, self._seed = pooling, windows, seed
        self._recordings, self._conditioning = cohort.recordings, pretrained.conditioning
        self._order = parcel_order(pretrained, cohort)
        self._tr_s = cohort.recordings.index["tr_s"].to_list()
        xyz = centroids_mm(pretrained, cohort, self._order)
        self._where = () if xyz is None else (torch.from_numpy(xyz).to(self._device),)
        self._rows = _rows(pretrained, cohort, subjects, pooling)

    def load(self, people: np.ndarray, step: int | None) -> Loaded:
        """Recordings of people, by row: whole (None), or of a training step."""
        groups: dict[int, tuple[list[np.ndarray], list[int]]] = {}
        counts = []
        for place, person in enumerate(people.tolist()):
            found = self._recordings_of(person, step)
            counts.append(len(found))
            for bold in found:
                arrays, owners = groups.setdefault(bold.shape[1], ([], []))
                arrays.append(bold)
                owners.append(place)
        return Loaded(
            [torch.from_numpy(np.stack(arrays)) for arrays, _ in groups.values()],
            [torch.tensor(owners) for _, owners in groups.values()],
            torch.tensor(counts),
        )

    def features(self, loaded: Loaded) -> Float[Tensor, "m f"]:
        """Each person's mean over their recordings; float32."""
        vectors = [
            self._whole.encode(bold.to(self._device), *self._where, pooling=self.pooling).float()
            for bold in loaded.bold
        ]
        rows, owner = torch.cat(vectors), torch.cat(loaded.owner).to(self._device)
        total = rows.new_zeros(len(loaded.n_recordings), rows.shape[1]).index_add(0, owner, rows)
        return total / loaded.n_recordings.to(self._device).unsqueeze(1)

    def _recordings_of(self, person: int, step: int | None) -> list[np.ndarray]:
        rows = self._rows[person]
        if step is None or not self._windows:
            return [self._prepared(row) for row in rows]
        # Of the person and not of the process: the same places however people are dealt out.
        rng = np.random.default_rng([self._seed, step, person])
        chosen = rng.choice(rows, size=self._windows)
        return [self._window(self._prepared(int(row)), rng.random()) for row in chosen]

    def _prepared(self, row: int) -> np.ndarray:
        bold = self._recordings.read(row)[self._order]
        return self._conditioning.prepare(bold, tr_s=self._tr_s[row])

    def _window(self, bold: np.ndarray, share: float) -> np.ndarray:
        n_trs = self._whole.window_trs
        return bold if bold.shape[1] <= n_trs else cut_window(bold, n_trs, share=share)


def save_tuned(folder: Path, pretrained: Pretrained, facts: dict[str, Any]) -> None:
    """Write a tuned encoder as a checkpoint folder that `load_pretrained` reads; whole or absent.

    Args:
        folder: To make, or to replace.
        pretrained: The encoder that was tuned, in place; its own state says what becomes of inputs.
        facts: What it was tuned on and how, the key `finetuned` of state.json.
    """
    config = {"run": {"seed": 0}, **pretrained.state["config"]}
    state = {
        "format": checkpoint.FORMAT,
        "step": 0,
        **pretrained.state,
        "config": config,
        "package_version": __version__,
        "finetuned": {"from": pretrained.hash, **facts},
    }
    with atomic_folder(folder) as aside:
        checkpoint.save_weights(aside / "model.safetensors", dict(pretrained.module.state_dict()))
        write_json(aside / "state.json", state)


def tower_of(module: nn.Module) -> tuple[nn.Module, str, tuple[str, ...], tuple[str, ...]]:
    """What `encode` uses, its blocks, what follows them, and what is never trained.

    Brain-JEPA's positions stay as they are: the map of its parcels' gradients belongs to the atlas
    and not to a cohort's people. Its features are the target encoder's.
    """
    if isinstance(module, BrainJEPA):
        return module.target_encoder, "blocks", ("norm.*",), ("position.*",)
    return module, "layers", ("norm.*",), ("decoder*", "mask_token")


def _rows(
    pretrained: Pretrained, cohort: Cohort, subjects: Sequence[str], pooling: str
) -> list[list[int]]:
    """Index rows of each person's recordings that the encoder can take."""
    conditioning, shortest = pretrained.conditioning, shortest_trs(pretrained.module, pooling)
    rows: dict[str, list[int]] = {subject: [] for subject in subjects}
    table = cohort.recordings.index.select("subject", "n_trs", "tr_s")
    for row, (subject, n_trs, tr_s) in enumerate(table.iter_rows()):
        if subject in rows and conditioning.length(n_trs, tr_s=tr_s) >= shortest:
            rows[subject].append(row)
    if n_without := sum(not found for found in rows.values()):
        raise UserError(
            f"{n_without} of {len(subjects)} people have no recording of at least {shortest} TRs, "
            f"which this {pretrained.model} needs: leave them out of the features, or take the "
            "encoder that these were made with."
        )
    return [rows[subject] for subject in subjects]
