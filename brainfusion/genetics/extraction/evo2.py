"""Evo 2 through its own package (ArcInstitute/evo2 @53f1959): bytes in, hooks on named layers.

The tokenizer is the text's bytes, so it is case sensitive: texts are upper case. No token is put
before the sequence. The package places the model itself and computes in bfloat16 (FP8 inside, for
all but the 7B).
"""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from brainfusion.genetics.extraction.models import ModelConfig, device_facts, hash_weights
from brainfusion.genetics.extraction.packages import require
from brainfusion.runtime.errors import UserError


class Evo2Positions:
    """A loaded Evo 2, read at one layer."""

    n_before = n_after = 0

    def __init__(self, package_model: Any, layer: str, facts: dict[str, Any]) -> None:
        self._evo2, self._layer = package_model, layer
        first = next(iter(package_model.model.parameters()))
        self._device = first.device
        self.facts = {**facts, **device_facts(str(first.device)), "token_dtype": _name(first.dtype)}

    def positions(self, sequences: Sequence[str]) -> Any:
        """The layer's output, a tensor [b, l, w]."""
        import torch

        ids = [[int(token) for token in self._evo2.tokenizer.tokenize(text)] for text in sequences]
        tokens = torch.tensor(ids, dtype=torch.int, device=self._device)
        _, outputs = self._evo2(tokens, return_embeddings=True, layer_names=[self._layer])
        return outputs[self._layer]


def load(config: ModelConfig) -> Evo2Positions:
    """Load a checkpoint.

    Raises:
        UserError: No package, GPU or weights; a layer that the model has not; flags that the
            package does not take.
    """
    if config.dtype != "auto" or config.device not in ("auto", "cuda"):
        raise UserError(
            "--dtype and --device have no effect on Evo 2, whose package chooses both: leave them "
            "out (CUDA_VISIBLE_DEVICES chooses the GPU)."
        )
    if config.revision is not None:
        raise UserError("--revision has no effect on Evo 2's package: leave it out.")
    package = require("evo2", purpose="Evo 2")
    where = {} if config.weights is None else {"local_path": str(config.weights)}
    try:
        with redirect_stdout(sys.stderr):  # the package prints while it loads
            model = package.Evo2(config.checkpoint, **where)
    except (OSError, RuntimeError, ValueError, ImportError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Evo 2 '{config.checkpoint}' cannot be loaded ({reason}): it needs a CUDA GPU and its "
            "weights, from the hub on first use or from a file given with --weights."
        ) from error
    try:
        model.model.get_submodule(config.layer)
    except AttributeError as error:
        raise UserError(
            f"--layer '{config.layer}' is no module of '{config.checkpoint}': blocks.0 to the last "
            "block, blocks.N.mlp.l3, blocks.N.pre_norm or norm are."
        ) from error
    hashed = hash_weights(config.weights)
    return Evo2Positions(model, config.layer, {"weights_hash": hashed} if hashed else {})


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
