"""What the three models have in common: sequences in, positions out, and how they are pooled.

Shape legend: b sequences of one length, l positions (special tokens included), w output width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from brainfusion.genetics.models import (
    SIMULATED,
    Checkpoint,
    check_layer,
    find_checkpoint,
    unit_bp,
)
from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.files import hash_file, hash_json

DEFAULT_CHECKPOINTS = {
    "evo2": "evo2_7b",
    "generator": "GENERator-v2-eukaryote-1.2b-base",
    "caduceus": "caduceus-ps_seqlen-131k_d_model-256_n_layer-16",
}
POOLINGS = {
    "evo2": ("mean", "last"),
    "generator": ("mean", "separator", "last"),
    "caduceus": ("mean",),
}
"""How positions may become one vector. "separator" is the token behind the sequence."""
PACKAGES = {"evo2": "evo2", "generator": "transformers", "caduceus": "transformers"}
_DTYPES = ("float32", "bfloat16", "float16")
_CADUCEUS_LAYERS = ("last", "last_hidden_state", "backbone.norm_f")
# The official exon classifier and sparse autoencoder read block 26 of the 7B, the paper's BRCA1
# classifier block 20 of the 40B; for the 1B and 20B nobody has published a choice.
_EVO2_LAYERS = {"evo2_7b": "blocks.26", "evo2_40b": "blocks.20"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model, and how it runs."""

    model: str
    """evo2, generator or caduceus."""
    checkpoint: str
    layer: str
    pooling: str = "mean"
    weights: Path | None = None
    """A local file or folder; otherwise the package downloads from the hub."""
    revision: str | None = None
    """Commit or tag on the hub."""
    device: str = "auto"
    dtype: str = "auto"

    @property
    def spec(self) -> Checkpoint:
        """The registry's row."""
        return find_checkpoint(self.model, self.checkpoint)

    @property
    def is_equivariant(self) -> bool:
        """Whether one pass has both strands (Caduceus-PS)."""
        return self.spec.strand_class == "equivariant"

    @property
    def unit_bp(self) -> int:
        """Bases a token."""
        unit = unit_bp(self.spec.token_unit)
        assert unit is not None
        return unit


class SequenceModel(Protocol):
    """A model that is loaded."""

    n_before: int
    """Special tokens before the sequence's own positions."""
    n_after: int
    """Special tokens behind them."""
    facts: dict[str, Any]
    """What provenance should say of it: device, dtype, revision ..."""

    def positions(self, sequences: Sequence[str]) -> Any:
        """The layer's output, a tensor [b, l, w] of any float type, on any device."""
        ...


def configure(
    model: str,
    *,
    checkpoint: str | None = None,
    layer: str | None = None,
    pooling: str = "mean",
    weights: Path | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> ModelConfig:
    """A config that makes sense, with defaults filled in.

    Raises:
        UserError: An unknown name, a layer that the checkpoint has not, weights that are not there.
    """
    if model not in POOLINGS:
        raise UserError(f"unknown model '{model}' to extract with. {nearest(model, POOLINGS)}")
    checkpoint = checkpoint or DEFAULT_CHECKPOINTS[model]
    spec = find_checkpoint(model, checkpoint)
    layer = layer or _default_layer(model, checkpoint)
    check_layer(model, checkpoint, spec, layer, where="--layer")
    if model == "caduceus" and layer not in _CADUCEUS_LAYERS:
        raise UserError(
            f"--layer '{layer}' is not offered for Caduceus: inner layers give the mixers' outputs "
            "before the residual is added, which is no embedding; leave it out, or give 'last'."
        )
    if pooling not in POOLINGS[model]:
        raise UserError(
            f"--pooling '{pooling}' is not offered for {model}. {nearest(pooling, POOLINGS[model])}"
        )
    if dtype not in ("auto", *_DTYPES):
        raise UserError(f"--dtype '{dtype}'. {nearest(dtype, ('auto', *_DTYPES))}")
    if weights is not None and not weights.exists():
        raise UserError(
            f"--weights {weights} does not exist: expected the checkpoint's file or folder; "
            f"without it '{checkpoint}' is downloaded from the hub."
        )
    if checkpoint == SIMULATED and weights is None:
        raise UserError("checkpoint 'simulated' is anybody's random weights: give --weights.")
    return ModelConfig(
        model=model,
        checkpoint=checkpoint,
        layer=layer,
        pooling=pooling,
        weights=weights,
        revision=revision,
        device=device,
        dtype=dtype,
    )


def load_model(config: ModelConfig) -> SequenceModel:
    """Load the weights; this is when heavy packages are imported.

    Raises:
        UserError: A package or the weights are missing, or they are not what is declared.
    """
    from brainfusion.genetics.extraction import caduceus, evo2, generator

    loaders = {"evo2": evo2.load, "generator": generator.load, "caduceus": caduceus.load}
    return loaders[config.model](config)


def embed(
    model: SequenceModel, config: ModelConfig, sequences: Sequence[str], *, trim_left: int = 0
) -> np.ndarray:
    """One vector a sequence; sums run in float32 on the device, whatever the positions are.

    Args:
        model: Loaded.
        config: Its config.
        sequences: b of one length, so nothing is padded.
        trim_left: Tokens left out of the pool at the beginning.

    Returns:
        float32 [b, w] of raw output (both halves of Caduceus-PS); nan where the model gave nan.

    Raises:
        UserError: Another number of positions or another width than expected, no memory.
    """
    import torch

    n_tokens = len(sequences[0]) // config.unit_bp
    try:
        with torch.inference_mode():
            positions = model.positions(sequences)
            _check_shape(positions, model, config, len(sequences), n_tokens)
            inside = positions[:, model.n_before + trim_left : model.n_before + n_tokens]
            if config.pooling == "separator":
                pooled = positions[:, -1].float()
            elif config.pooling == "last":
                pooled = inside[:, -1].float()
            else:
                pooled = inside.sum(dim=1, dtype=torch.float32) / inside.shape[1]
            return pooled.cpu().numpy()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the device has too little memory for {len(sequences)} sequences of "
            f"{len(sequences[0])} bp: give a smaller --batch-size or --window-bp (all vectors of a "
            "cohort with the same)."
        ) from error


def _check_shape(
    positions: Any, model: SequenceModel, config: ModelConfig, n: int, n_tokens: int
) -> None:
    expected = (n, model.n_before + n_tokens + model.n_after, config.spec.output_width)
    if tuple(positions.shape) != expected:
        raise UserError(
            f"'{config.checkpoint}' gave positions of shape {tuple(positions.shape)} at layer "
            f"'{config.layer}', expected {expected} (sequences, {n_tokens} tokens of "
            f"{config.unit_bp} bp with {model.n_before} + {model.n_after} special ones, width): "
            "other weights than declared, or a tokenizer that cuts otherwise."
        )


# -- names and devices -----------------------------------------------------------------------------


def _default_layer(model: str, checkpoint: str) -> str:
    if model != "evo2":
        return "last"
    for prefix, layer in _EVO2_LAYERS.items():
        if checkpoint.startswith(prefix):
            return layer
    raise UserError(
        f"--layer is needed: nobody has published which layer of '{checkpoint}' to take. "
        "Intermediate ones work best (the 7B's blocks.26 of 32, the 40B's blocks.20 of 50)."
    )


def choose_device(wanted: str) -> str:
    """A device that is there; "auto" is the first GPU, or the CPU.

    Raises:
        UserError: torch does not know it, or has no GPU.
    """
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(wanted).type
    except RuntimeError as error:
        raise UserError(f"--device '{wanted}': expected auto, cpu, cuda or cuda:1.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device {wanted}: torch finds no CUDA GPU here; give --device cpu, or start on a "
            "machine with one (and a torch built for CUDA)."
        )
    return wanted


def device_facts(device: str) -> dict[str, str]:
    """The device's kind, and a GPU's name: other ones give other numbers."""
    import torch

    kind = torch.device(device).type
    return {
        "device": kind,
        **({"gpu": torch.cuda.get_device_name(device)} if kind == "cuda" else {}),
    }


def hub_name(config: ModelConfig, organisation: str) -> str:
    """What transformers loads: a local folder, or a name on the hub."""
    if config.weights is not None:
        return str(config.weights)
    name = config.checkpoint
    return name if "/" in name else f"{organisation}/{name}"


@lru_cache(maxsize=4)
def hash_weights(path: Path | None) -> str | None:
    """A hash of a local checkpoint's files."""
    if path is None:
        return None
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return hash_json({str(file.relative_to(path)): hash_file(file) for file in files})
