"""The stored fixtures of BrainLM's reference: weights, inputs, outputs and gradients."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from brainfusion.encoders.brainlm import BrainLM
from brainfusion.encoders.brainlm_image import BrainLMImage
from brainfusion.encoders.brainlm_upstream import from_upstream_state

GOLDENS = Path(__file__).parent.parent / "goldens"


@dataclass
class Golden:
    spec: dict[str, Any]
    fixed: dict[str, Any]
    tensors: dict[str, Tensor]

    def config(self, **overrides: Any) -> dict[str, Any]:
        return {**self.fixed, **self.spec["config"], **overrides}

    def case(self, name: str) -> dict[str, Any]:
        return next(case for case in self.spec["cases"] if case["name"] == name)

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {
            key.removeprefix(prefix): tensor
            for key, tensor in self.tensors.items()
            if key.startswith(prefix)
        }

    def model(self, **overrides: Any) -> BrainLM | BrainLMImage:
        return from_upstream_state(self.part("state/"), self.config(**overrides))


def golden(name: str) -> Golden:
    text = json.loads((GOLDENS / f"{name}.json").read_text())
    return Golden(text["spec"], text["fixed"], load_file(GOLDENS / f"{name}.safetensors"))
