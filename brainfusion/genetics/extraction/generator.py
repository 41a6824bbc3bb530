"""GENERator through transformers (GenerTeam/GENERator @96242a4): 6-mers that do not overlap.

A text is `"<s>" + sequence + "<s>"`, as in training, tokenized without further special tokens; its
length is a multiple of 6, otherwise the tokenizer appends `<oov>` in silence. "mean" leaves both
separators out, "separator" is the second one: what the published classifiers read.

Weights are computed with in float32 unless --dtype says otherwise: the hub holds float32, and what
differs between people is about a thousandth of a vector.
"""

import re
from collections.abc import Sequence
from typing import Any

from brainfusion.genetics.extraction.hub import load_pretrained
from brainfusion.genetics.extraction.models import ModelConfig
from brainfusion.runtime.errors import UserError


class GeneratorPositions:
    """A loaded GENERator, read at one layer."""

    n_before = n_after = 1

    def __init__(
        self, tokenizer: Any, model: Any, device: str, layer: str, facts: dict[str, Any]
    ) -> None:
        self._tokenizer, self._device, self.facts = tokenizer, device, facts
        # Without the head: nobody needs the logits of all positions.
        self._body = getattr(model, "base_model", model)
        self._layer = layer
        self._separator = tokenizer.bos_token or "<s>"
        self._hidden, self._hook = _hidden_number(layer), None
        if layer not in ("last", "last_hidden_state", "model.norm") and self._hidden is None:
            self._hook = _module(self._body, layer)

    def positions(self, sequences: Sequence[str]) -> Any:
        """The layer's output, a tensor [b, l, w]."""
        import torch

        tokens = torch.tensor([self._tokens(text) for text in sequences], device=self._device)
        seen: list[Any] = []
        handle = None
        if self._hook is not None:
            handle = self._hook.register_forward_hook(lambda _module, _in, out: seen.append(out))
        try:
            output = self._body(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                output_hidden_states=self._hidden is not None,
                use_cache=False,
            )
        finally:
            if handle is not None:
                handle.remove()
        if self._hook is not None:
            return seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        if self._hidden is None:
            return output.last_hidden_state
        if not -len(output.hidden_states) <= self._hidden < len(output.hidden_states):
            raise UserError(
                f"--layer '{self._layer}': the model has hidden states 0 to "
                f"{len(output.hidden_states) - 1}."
            )
        return output.hidden_states[self._hidden]

    def _tokens(self, text: str) -> list[int]:
        framed = f"{self._separator}{text}{self._separator}"
        ids = list(self._tokenizer(framed, add_special_tokens=False)["input_ids"])
        separator = self._tokenizer.convert_tokens_to_ids(self._separator)
        if len(ids) != len(text) // 6 + 2 or ids[0] != separator or ids[-1] != separator:
            raise UserError(
                f"the tokenizer makes {len(ids)} tokens of {len(text)} bp between two separators, "
                f"expected {len(text) // 6 + 2}: it is not GENERator's 6-mer tokenizer."
            )
        return ids


def load(config: ModelConfig) -> GeneratorPositions:
    """Load a checkpoint.

    Raises:
        UserError: transformers or the weights are missing, or the model has no such layer.
    """
    tokenizer, model, device, facts = load_pretrained(
        config, organisation="GenerTeam", model_class="AutoModelForCausalLM"
    )
    return GeneratorPositions(tokenizer, model, device, config.layer, facts)


def _hidden_number(layer: str) -> int | None:
    found = re.fullmatch(r"(?:hidden_states\.)?(-?\d+)", layer)
    return int(found[1]) if found else None


def _module(body: Any, layer: str) -> Any:
    try:
        return body.get_submodule(layer.removeprefix("model."))
    except AttributeError as error:
        raise UserError(
            f"--layer '{layer}' is no module of the model: give 'last', hidden_states.N, "
            "model.layers.N or model.norm."
        ) from error
