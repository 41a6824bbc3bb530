"""The stored fixtures of BrainLM's reference: weights, inputs, outputs and gradients."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

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


def grouped_gradient_is_wrong() -> bool:
    """Whether this machine's kernels have the error that the stored gradients of brainlm_a have."""
    generator = torch.Generator().manual_seed(0)
    v, probe = torch.randn(2, 1, 4, 97, 8, generator=generator).unbind(0)
    weight = torch.randn(4, 1, 65, 1, generator=generator)

    def gradient(dtype: torch.dtype) -> Tensor:
        leaf = weight.to(dtype).requires_grad_()
        out = F.conv2d(v.to(dtype), leaf, padding=(32, 0), groups=4)
        return torch.autograd.grad((out * probe.to(dtype)).sum(), leaf)[0].double()

    exact = gradient(torch.float64)
    return bool((gradient(torch.float32) - exact).abs().max() > 1e-3 * exact.abs().max())
