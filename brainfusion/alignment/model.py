"""A trained alignment: raw features to embeddings and scores; how it is saved and opened.

Shape legend: n people, i input features of a modality, o width of the shared space.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from brainfusion.alignment.conditioning import Conditioner
from brainfusion.alignment.density_ratio import DensityRatio
from brainfusion.alignment.folder import FORMAT, model_folder, read_arrays, read_state
from brainfusion.alignment.genes.conditioning import GeneConditioner
from brainfusion.alignment.genes.tower import GeneBatch, GeneTower, gene_shares
from brainfusion.alignment.genes.vectors import Gene, GeneVectors
from brainfusion.alignment.modalities import modality_name, sides_of
from brainfusion.alignment.network import AlignmentModel, Inputs, as_inputs, n_people, take
from brainfusion.runtime.checkpoint import load_weights, save_weights
from brainfusion.runtime.errors import CheckpointError, UserError, nearest
from brainfusion.runtime.files import atomic_folder, write_json

if TYPE_CHECKING:
    from brainfusion.alignment.linear import LinearModel

_ROWS_AT_ONCE = 8192


def _modality(side: str, name: str, short: Mapping[str, str]) -> str:
    """The modality that an encoder or a model is, by either of its names."""
    if name in short.values():
        return name
    known = modality_name(side, name).removeprefix(f"{side}_")
    if known not in short and len(short) > 1:
        raise UserError(f"no {side} modality '{name}' in this model. {nearest(name, short)}")
    return short.get(known, next(iter(short.values())))


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

    model: "AlignmentModel | LinearModel"
    conditioners: dict[str, Conditioner | GeneConditioner]
    head: DensityRatio | None = None
    """Scores pairs of the two sides' embeddings; the cosine does where there is none."""
    info: dict[str, Any] = field(default_factory=dict)
    """What `state.json` says: config, step, validation AUC, provenance."""

    @property
    def sides(self) -> dict[str, tuple[str, ...]]:
        """The modalities of each side: {"brain": ("brain",), "dna": ("dna_evo2", ...)}."""
        return sides_of(self.conditioners)

    @property
    def covariates(self) -> tuple[str, ...]:
        """What `design_matrix` must be asked for, where features are residualised; often none."""
        return next(iter(self.conditioners.values())).covariates

    @property
    def score_name(self) -> str:
        """What the inner product of two `search_vectors` is."""
        return "cosine" if self.head is None else "density ratio, nats"

    def made_of(self, name: str) -> dict[str, Any]:
        """How the features of a brain modality were made, as their file said (docs/formats.md).

        Of a fine-tuned run that is how it began; `finetuned_from` is then the hash of the encoder
        before.

        Args:
            name: The modality, or the name of its features where there are several.

        Raises:
            UserError: An unknown modality.
        """
        names = self.sides.get("brain", ())
        short = {modality.removeprefix("brain_"): modality for modality in names}
        made = self.info.get("meta", {}).get("provenance", {}).get("brain", {})
        if len(names) > 1:
            own = _modality("brain", name, short)
            made = next((v for key, v in made.items() if modality_name("brain", key) == own), {})
        tuned = "finetune" in self.info
        return {**made, **({"finetuned_from": made.get("checkpoint_hash")} if tuned else {})}

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
        device, parts = self._device, []
        with self._evaluating():
            for start in range(0, n_people(inputs), _ROWS_AT_ONCE):
                part = take(inputs, slice(start, start + _ROWS_AT_ONCE))
                parts.append(self.model.embed(name, part.to(device)).float().cpu())
        return torch.cat(parts).numpy()

    def embed_brain(
        self,
        features: Any,
        covariates: np.ndarray | None = None,
        *,
        encoder: str | None = None,
    ) -> np.ndarray:
        """`embed` for a brain modality, or for the whole side.

        Args:
            features: [n, i]. For the whole side of a model that has several brain modalities,
                {encoder: [n, i]} of the same people, for those of its encoders that there are:
                the embedding is then their mean, of unit norm.
            covariates: As for `embed`.
            encoder: Which brain modality the features are of, where the model has several.

        Raises:
            UserError: As `embed`; and several brain modalities of which none is named.
        """
        return self._embed_side("brain", features, covariates, encoder, option="encoder")

    def embed_dna(
        self,
        features: Any,
        covariates: np.ndarray | None = None,
        *,
        model: str | None = None,
        mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """`embed` for a DNA modality, or for the whole side; as `embed_brain`.

        Args:
            features: As for `embed`, or {model: features} of the same people.
            covariates: As for `embed`.
            model: Which DNA modality the features are of, where this model has several.
            mask: Of genes, as for `embed`; of one modality only.
        """
        return self._embed_side("dna", features, covariates, model, option="model", mask=mask)

    def score_vectors(
        self,
        name: str,
        features: Any,
        covariates: np.ndarray | None = None,
        *,
        mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """Vectors whose inner product with the other side's is the score of a pair in nats.

        Args:
            name: A modality, or a side with {encoder or model: features} as for `embed_brain`.
            features: As for `embed`.
            covariates: As for `embed`.
            mask: Of genes, as for `embed`; of one modality only.

        Returns:
            float32 [n, k + 2], not to be normalised (`DensityRatio.vectors`).

        Raises:
            UserError: As `embed`; and a model without a head.
        """
        if self.head is None:
            raise UserError(
                "this alignment scores pairs by the cosine of their embeddings: it has no score "
                "vectors. Align with score 'density-ratio', or use embed()."
            )
        return self.search_vectors(name, features, covariates, mask=mask)

    def search_vectors(
        self,
        name: str,
        features: Any,
        covariates: np.ndarray | None = None,
        *,
        mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """What an index is made of, or asked with: `score_vectors`, or embeddings without a head.

        Args and errors are those of `score_vectors`, which is stricter: it wants a head.
        """
        side = next((s for s, names in self.sides.items() if name == s or name in names), name)
        if name in self.conditioners:
            embedded = self.embed(name, features, covariates, mask=mask)
        else:
            embedded = self._embed_side(side, features, covariates, None, option="name", mask=mask)
        return self.scored(side, embedded)

    def scored(self, side: str, embedded: np.ndarray) -> np.ndarray:
        """The same of embeddings [n, o] that were made before."""
        return embedded if self.head is None else self.head.vectors(side, embedded)

    def _embed_side(
        self,
        side: str,
        features: Any,
        covariates: np.ndarray | None,
        which: str | None,
        *,
        option: str,
        mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """Of one modality of a side, or the mean of several."""
        names = self.sides.get(side)
        if names is None:
            raise UserError(f"no side '{side}' in this model. {nearest(side, self.sides)}")
        short = {name.removeprefix(f"{side}_"): name for name in names}
        given = features if isinstance(features, Mapping) and which is None else None
        # With one modality a mapping is its gene sources, by model.
        if given is not None and len(names) > 1:
            if mask is not None:
                raise UserError("a mask of genes is of one modality: name it.")
            own = {_modality(side, key, short): value for key, value in given.items()}
            if not own:
                raise UserError(f"no features of the {side} side: expected {', '.join(short)}.")
            total = sum(self.embed(name, value, covariates) for name, value in own.items())
            assert isinstance(total, np.ndarray)
            norms = np.linalg.norm(total, axis=1, keepdims=True)
            return total / np.maximum(norms, 1e-12) if len(own) > 1 else total
        if which is None and len(names) > 1:
            raise UserError(
                f"the {side} side of this model has {len(names)} modalities: name one with "
                f"{option}=, or give {{name: features}}. Known: {', '.join(short)}."
            )
        name = next(iter(names)) if which is None else _modality(side, which, short)
        return self.embed(name, features, covariates, mask=mask)

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
        assert isinstance(self.model, AlignmentModel)
        tower, conditioner = self.model.towers[name], self.conditioners[name]
        assert isinstance(tower, GeneTower)
        assert isinstance(conditioner, GeneConditioner)
        batch = inputs.to(self._device)
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

    @property
    def _device(self) -> torch.device:
        return self.model.logit_scale.device

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
        """Write model.safetensors, conditioners.safetensors and state.json, whole or not at all.

        Of a head its arrays, too, as head.safetensors.
        """
        from safetensors.numpy import save_file

        described = {name: c.to_dict() for name, c in self.conditioners.items()}
        arrays = {
            f"{name}.{key}": array
            for name, values in described.items()
            for key, array in values.pop("arrays").items()
        }
        state: dict[str, Any] = {
            "format": FORMAT,
            "kind": "alignment",
            "model": self.model.settings,
            "conditioners": described,
            **self.info,
        }
        head = None if self.head is None else self.head.to_dict()
        with atomic_folder(folder) as aside:
            if head is not None:
                save_file(head.pop("arrays"), aside / "head.safetensors")
                state["head"] = head
            save_weights(aside / "model.safetensors", self.model.state_dict())
            save_file(arrays, aside / "conditioners.safetensors")
            write_json(aside / "state.json", state)

    @classmethod
    def load(cls, folder: Path, *, device: str | torch.device = "cpu") -> Self:
        """Open what `save` wrote.

        Raises:
            CheckpointError: Nothing there, something else, or a file that is cut off.
        """
        state = read_state(folder)
        arrays = read_arrays(folder / "conditioners.safetensors")
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
            model = _make(state.pop("model"))
            model.load_state_dict(load_weights(folder))
            head = None
            if described := state.pop("head", None):
                arrays = read_arrays(folder / "head.safetensors")
                head = DensityRatio.from_dict({**described, "arrays": arrays})
        except (KeyError, TypeError, RuntimeError) as error:
            text = " ".join(str(error).split())
            raise CheckpointError(
                f"{folder}: state.json and the weights beside it do not fit each other ({text}): "
                "restore the folder, or align again."
            ) from error
        info = {key: value for key, value in state.items() if key not in ("format", "kind")}
        return cls(model=model.to(device).eval(), conditioners=conditioners, head=head, info=info)


def load(path: Path | str, *, device: str | torch.device = "cpu") -> Alignment:
    """Open a trained alignment: the run's folder, or the `model` folder in it.

    Raises:
        CheckpointError: Nothing there, something else, or a file that is cut off.
    """
    return Alignment.load(model_folder(Path(path)), device=device)


def _make(settings: dict[str, Any]) -> "AlignmentModel | LinearModel":
    """A model with fresh weights, of the kind that its settings say."""
    kind = settings.pop("kind", "projectors")
    if kind == "linear":
        from brainfusion.alignment.linear import LinearModel  # which is made of this module

        return LinearModel(settings.pop("dims_in"), **settings)
    if kind != "projectors":
        raise CheckpointError(
            f"the model is of the kind '{kind}', which this version does not know: use the "
            "version that wrote it."
        )
    return AlignmentModel(settings.pop("dims_in"), **settings)
