"""Caduceus through transformers (kuleshov-group/caduceus @0060a6d): one base a token, both ways.

There is no attention mask and padding is read as sequence, so texts of a batch have one length; no
`[SEP]` is appended, since it breaks the symmetry of the strands. Only the last layer is offered:
what `output_hidden_states` gives are the mixers' outputs before the residual is added.

Whether the fused kernels run (`fused_add_norm`) changes the function, and is kept in provenance.
"""

from collections.abc import Sequence
from typing import Any

from brainfusion.genetics.extraction.hub import load_pretrained
from brainfusion.genetics.extraction.models import ModelConfig
from brainfusion.runtime.errors import UserError


class CaduceusPositions:
    """A loaded Caduceus, read at its last layer."""

    n_before = n_after = 0

    def __init__(self, tokenizer: Any, model: Any, device: str, facts: dict[str, Any]) -> None:
        self._tokenizer, self._model, self._device, self.facts = tokenizer, model, device, facts

    def positions(self, sequences: Sequence[str]) -> Any:
        """The last layer's output, a tensor [b, l, w]; w is 2d for PS."""
        import torch

        ids = [
            list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) for text in sequences
        ]
        return self._model(
            input_ids=torch.tensor(ids, device=self._device), return_dict=True
        ).last_hidden_state


def load(config: ModelConfig) -> CaduceusPositions:
    """Load a checkpoint.

    Raises:
        UserError: A package or the weights are missing, or a PS checkpoint whose weights are Ph
            (or the other way round).
    """
    tokenizer, model, device, facts = load_pretrained(
        config, organisation="kuleshov-group", model_class="AutoModel"
    )
    is_ps = getattr(model.config, "rcps", None)
    if is_ps is not None and bool(is_ps) != config.is_equivariant:
        raise UserError(
            f"'{config.checkpoint}' is a {'PS' if config.is_equivariant else 'Ph'} checkpoint, but "
            f"the weights' config says rcps={is_ps}: give the checkpoint that they are."
        )
    fused = getattr(model.config, "fused_add_norm", None)
    facts = facts if fused is None else {**facts, "fused_add_norm": bool(fused)}
    return CaduceusPositions(tokenizer, model, device, facts)
