"""Projectors of all modalities with one logit scale, and how a trained one is saved and opened.

Shape legend: n people, i input features of a modality, o width of the shared space.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypedDict

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from brainfusion.alignment.conditioning import Conditioner
from brainfusion.alignment.gene_conditioning import GeneArrays, GeneConditioner
from brainfusion.alignment.gene_vectors import Gene, GeneVectors
from brainfusion.alignment.genes import GeneBatch, GenePool, GeneTower, gene_shares
from brainfusion.alignment.projector import Projector
from brainfusion.runtime.checkpoint import load_weights, save_weights
from brainfusion.runtime.errors import CheckpointError, UserError, nearest
from brainfusion.runtime.files import atomic_folder, read_json, write_json

FORMAT = 1
_ROWS_AT_ONCE = 8192

Inputs = Tensor | GeneBatch
"""Conditioned features [n, i], or genes that the model pools."""


class GeneSettings(TypedDict):
    """How a modality's genes are pooled before its projector."""

    n_components: Sequence[int]
    pool: GenePool


class AlignmentModel(nn.Module):
    """One projector a modality, and the learnt scale of the cosines between them.

    A modality that comes as genes has a tower of its own before the projector, which pools them.
    """

    log_scale: Tensor
    logit_bias: Tensor | None

    def __init__(
        self,
        dims_in: Mapping[str, int],
        *,
        dim_out: int = 512,
        dim_hidden: int = 1024,
        dropout: float = 0.1,
        init_scale: float = 1 / 0.07,
        min_scale: float = 1.0,
        max_scale: float = 100.0,
        init_bias: float | None = None,
        genes: Mapping[str, GeneSettings] | None = None,
    ) -> None:
        """Make the projectors.

        Args:
            dims_in: Input features of each modality's projector, by the modality's name.
            dim_out: Width of the shared space.
            dim_hidden: Width of the projectors' hidden layer.
            dropout: Share of hidden units dropped in training.
            init_scale: Logit scale to start from.
            min_scale: Least logit scale that `clamp_scale_` leaves.
            max_scale: Greatest logit scale that `clamp_scale_` leaves.
            init_bias: Start of a learnt logit bias, which SigLIP's loss wants; none if omitted.
            genes: How modalities that come as genes are pooled, by name.
        """
        super().__init__()
        self.settings: dict[str, Any] = {
            "dims_in": dict(dims_in),
            "dim_out": dim_out,
            "dim_hidden": dim_hidden,
            "dropout": dropout,
            "init_scale": init_scale,
            "min_scale": min_scale,
            "max_scale": max_scale,
            "init_bias": init_bias,
            "genes": {name: dict(settings) for name, settings in (genes or {}).items()},
        }
        self.projectors = nn.ModuleDict(
            {name: Projector(dim, dim_out, dim_hidden, dropout) for name, dim in dims_in.items()}
        )
        self.towers = nn.ModuleDict(
            {
                name: GeneTower(how["n_components"], width=dims_in[name], pool=how["pool"])
                for name, how in (genes or {}).items()
            }
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(init_scale)))
        bias = None if init_bias is None else nn.Parameter(torch.tensor(float(init_bias)))
        self.register_parameter("logit_bias", bias)

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """The multiplier of the cosines."""
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_scale_(self) -> None:
        """Put the logit scale back between its bounds; call it after each optimizer step."""
        low, high = (math.log(self.settings[key]) for key in ("min_scale", "max_scale"))
        self.log_scale.clamp_(low, high)

    def embed(self, name: str, inputs: Inputs) -> Float[Tensor, "n o"]:
        """Conditioned features of the modality `name` to unit rows of the shared space."""
        if name not in self.projectors:
            raise UserError(f"no modality '{name}' in this model. {nearest(name, self.projectors)}")
        features = self.towers[name](*inputs) if isinstance(inputs, GeneBatch) else inputs
        return F.normalize(self.projectors[name](features), dim=-1)


def as_inputs(conditioned: np.ndarray | GeneArrays) -> Inputs:
    """What a conditioner gave, as tensors; no copy."""
    if isinstance(conditioned, GeneArrays):
        return GeneBatch(*map(torch.from_numpy, conditioned))
    return torch.from_numpy(conditioned)


def take(inputs: Inputs, rows: Any) -> Inputs:
    """Some people's inputs."""
    return inputs.take(rows) if isinstance(inputs, GeneBatch) else inputs[rows]


def n_people(inputs: Inputs) -> int:
    """How many people's inputs these are."""
    return len(inputs.x if isinstance(inputs, GeneBatch) else inputs)


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneWeights:
    """Which genes a model looks at in some people."""

    genes: tuple[Gene, ...]
    """Those that vary among training people, [g]."""
    attention: np.ndarray
    """float32 [n, g]: of each person; rows add up to 1."""
    share: np.ndarray
    """float32 [g]: of what tells these people apart behind the pool; adds up to 1."""
    mask: np.ndarray
    """bool [n, g]: who has which gene."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Alignment:
    """A trained model with the conditioners it was trained behind: raw features to embeddings."""

    model: AlignmentModel
    conditioners: dict[str, Conditioner | GeneConditioner]
    info: dict[str, Any] = field(default_factory=dict)
    """What `state.json` says: config, step, validation AUC, provenance."""

    def embed(
        self,
        name: str,
        features: Any,
        covariates: np.ndarray | None = None,
        *,
        mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """Embed people from their features.

        Args:
            name: The modality.
            features: [n, i] as made by the model that trained with: not standardised by the caller.
                Of genes: `GeneVectors`, `GeneticFeatures`, or an array [n, g, h].
            covariates: [n, c] from `design_matrix(..., names=conditioner.covariates)`; needed
                exactly where the conditioner was fitted with covariates.
            mask: Of genes, bool [s] or [n, s] in the order of `conditioners[name].genes`: false
                hides a gene. Hiding one is what leave-one-gene-out means; nothing is trained again.

        Returns:
            float32 [n, o], rows of unit norm.

        Raises:
            UserError: An unknown modality, a wrong shape, NaN, missing covariates, or a mask for a
                modality that does not come as genes.
        """
        inputs = self._inputs(name, features, covariates, mask)
        device, parts = self.model.log_scale.device, []
        with self._evaluating():
            for start in range(0, n_people(inputs), _ROWS_AT_ONCE):
                part = take(inputs, slice(start, start + _ROWS_AT_ONCE))
                parts.append(self.model.embed(name, part.to(device)).float().cpu())
        return torch.cat(parts).numpy()

    def embed_brain(self, features: np.ndarray, covariates: np.ndarray | None = None) -> np.ndarray:
        """`embed` for the modality called "brain"."""
        return self.embed("brain", features, covariates)

    def embed_dna(
        self,
        features: Any,
        covariates: np.ndarray | None = None,
        *,
        mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """`embed` for the modality called "dna"."""
        return self.embed("dna", features, covariates, mask=mask)

    def gene_weights(
        self, features: Any, covariates: np.ndarray | None = None, *, name: str = "dna"
    ) -> GeneWeights:
        """Which genes the model looks at in these people.

        Attention says what a gene may contribute, `share` what it does contribute to the
        differences between these people; only the latter is about the people. Neither is a test:
        on shuffled pairs both are there, too.

        Raises:
            UserError: As `embed`; and a model whose genes are not pooled.
        """
        inputs = self._inputs(name, features, covariates, None)
        if not isinstance(inputs, GeneBatch):
            raise UserError(
                f"the {name} side of this model has no pool of genes, so it weighs none: align "
                "with dna_pool 'attention'."
            )
        tower, conditioner = self.model.towers[name], self.conditioners[name]
        assert isinstance(tower, GeneTower)
        assert isinstance(conditioner, GeneConditioner)
        batch = inputs.to(self.model.log_scale.device)
        with self._evaluating():
            attention = [
                tower.attention(*batch.take(slice(start, start + _ROWS_AT_ONCE)))
                for start in range(0, n_people(batch), _ROWS_AT_ONCE)
            ]
            share = gene_shares(tower, batch)
        return GeneWeights(
            genes=conditioner.used,
            attention=torch.cat(attention).float().cpu().numpy(),
            share=share.cpu().numpy(),
            mask=inputs.mask.numpy(),
        )

    def _inputs(
        self, name: str, features: Any, covariates: np.ndarray | None, mask: np.ndarray | None
    ) -> Inputs:
        if name not in self.conditioners:
            raise UserError(
                f"no modality '{name}' in this model. {nearest(name, self.conditioners)}"
            )
        conditioner = self.conditioners[name]
        if isinstance(conditioner, GeneConditioner):
            vectors = GeneVectors.coerce(
                features, models=conditioner.models, genes=conditioner.genes
            )
            return as_inputs(conditioner.transform(vectors, covariates, mask=mask))
        if not isinstance(features, np.ndarray) or mask is not None:
            raise UserError(
                f"'{name}' does not come as genes in this model, so it takes neither gene vectors "
                "nor a mask: give an array [people, width], or align again from gene vectors."
            )
        return as_inputs(conditioner.transform(features, covariates))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)

    def save(self, folder: Path) -> None:
        """Write model.safetensors, conditioners.safetensors and state.json; whole or not at all."""
        from safetensors.numpy import save_file

        described = {name: c.to_dict() for name, c in self.conditioners.items()}
        arrays = {
            f"{name}.{key}": array
            for name, values in described.items()
            for key, array in values.pop("arrays").items()
        }
        state = {
            "format": FORMAT,
            "kind": "alignment",
            "model": self.model.settings,
            "conditioners": described,
            **self.info,
        }
        with atomic_folder(folder) as aside:
            save_weights(aside / "model.safetensors", self.model.state_dict())
            save_file(arrays, aside / "conditioners.safetensors")
            write_json(aside / "state.json", state)

    @classmethod
    def load(cls, folder: Path, *, device: str | torch.device = "cpu") -> Self:
        """Open what `save` wrote.

        Raises:
            CheckpointError: Nothing there, something else, or a file that is cut off.
        """
        state = _read_state(folder)
        arrays = _read_arrays(folder / "conditioners.safetensors")
        conditioners = {}
        try:
            for name, values in state.pop("conditioners").items():
                own = {
                    key.removeprefix(f"{name}."): array
                    for key, array in arrays.items()
                    if key.startswith(f"{name}.")
                }
                kind = GeneConditioner if values.pop("kind", None) == "genes" else Conditioner
                conditioners[name] = kind.from_dict({**values, "arrays": own})
            settings = state.pop("model")
            model = AlignmentModel(settings.pop("dims_in"), **settings)
            model.load_state_dict(load_weights(folder))
        except (KeyError, TypeError, RuntimeError) as error:
            text = " ".join(str(error).split())
            raise CheckpointError(
                f"{folder}: state.json and the weights beside it do not fit each other ({text}): "
                "restore the folder, or align again."
            ) from error
        info = {key: value for key, value in state.items() if key not in ("format", "kind")}
        return cls(model=model.to(device).eval(), conditioners=conditioners, info=info)


def load(path: Path | str, *, device: str | torch.device = "cpu") -> Alignment:
    """Open a trained alignment: the run's folder, or the `model` folder in it.

    Raises:
        CheckpointError: Nothing there, something else, or a file that is cut off.
    """
    folder = Path(path)
    if not (folder / "state.json").exists() and (folder / "model").is_dir():
        folder = folder / "model"
    return Alignment.load(folder, device=device)


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / "state.json"
    if not path.exists():
        raise CheckpointError(
            f"no trained alignment in {folder} (no state.json): expected the folder of an "
            "alignment run, or its 'model' folder. Make one with scripts/align.py."
        )
    state = read_json(path)
    if not isinstance(state, dict) or state.get("kind") != "alignment":
        raise CheckpointError(
            f"{folder} is a checkpoint of something else than an alignment: expected the folder "
            "of an alignment run. Make one with scripts/align.py."
        )
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has format {state.get('format')}, this version reads format {FORMAT}: "
            "align again, or use the version that wrote it."
        )
    return state


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(
            f"{path} is missing or cut off ({error}): restore it, or align again."
        ) from error
