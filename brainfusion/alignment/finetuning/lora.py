"""What is trained of a pretrained encoder: low-rank updates, the last blocks, or all of it.

LoRA (Hu et al. 2021, arXiv 2106.09685): the weight of a Linear is W + (alpha / r) B A with W
frozen, A [r, i] random and B [o, r] zero, so that nothing changes at the start.

The update is a parametrisation of the *weight* (torch.nn.utils.parametrize), not a second path
beside the layer: whoever reads `layer.weight`, a slice of it or hands it to a product function of
another library gets W + (alpha / r) B A, and what is merged at the end is, to the bit, what was
trained. The price is the gradient of one whole weight at a time, and r (i + o) numbers a layer in
the optimiser, as in LoRA.

Shape legend: o outputs, i inputs of a Linear, r rank.
"""

import fnmatch
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from brainfusion.runtime.errors import UserError, nearest

ATTENTION = (
    *("*attn.qkv", "*attn.proj", "*attention.qkv", "*attention.proj"),
    *("*.query", "*.key", "*.value", "*.q_proj", "*.k_proj", "*.v_proj", "*.out_proj"),
)
"""The attention projections of our encoders, and under the names that others give them."""
CHOICES = ("lora", "last-K", "all", "none")


class LowRank(nn.Module):
    """W to W + (alpha / r) B A; a parametrisation of one weight."""

    def __init__(
        self, weight: Float[Tensor, "o i"], *, rank: int, alpha: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        n_out, n_in = weight.shape
        self.scale = alpha / rank
        a = torch.empty(rank, n_in)
        # As the authors' code draws it: Kaiming-uniform with a = sqrt(5), as for a fresh Linear.
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.a = nn.Parameter(a.to(weight))
        self.b = nn.Parameter(weight.new_zeros(n_out, rank))

    def forward(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """The weight that the layer works with; in full precision under autocast, too."""
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, self.b, self.a, alpha=self.scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What of a module is trained."""

    how: str
    names: tuple[str, ...]
    """Trained parameters."""
    n_trained: int
    """Numbers in them."""
    n_all: int
    """Numbers in all parameters of the module, updates included."""

    def __str__(self) -> str:
        return (
            f"{self.how}: {self.n_trained:,} of {self.n_all:,} parameters of the encoder are "
            f"trained ({self.n_trained / max(self.n_all, 1):.2%}), in {len(self.names)} tensors"
        )


def choose_trained(
    module: nn.Module,
    how: str,
    *,
    blocks: str,
    after: Sequence[str] = (),
    fixed: Sequence[str] = (),
    patterns: Sequence[str] = ATTENTION,
    rank: int = 8,
    alpha: float = 16.0,
    seed: int = 0,
) -> Trained:
    """Freeze `module` but for what `how` names; in place.

    Args:
        module: A pretrained encoder.
        how: "lora", "last-K" (the last K blocks and what follows them), "all" or "none".
        blocks: Name of the ModuleList of its blocks.
        after: Patterns of the parameters that follow the last block (the final norm).
        fixed: Patterns of parameters that are never trained: position tables, a decoder.
        patterns: For "lora": names of the Linear layers that get an update.
        rank: Of an update.
        alpha: An update's scale, times the rank.
        seed: Of the updates' random half.

    Raises:
        UserError: An unknown choice, more blocks than there are, or no layer of those names.
    """
    check_how(how)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    if how == "lora":
        add_lora(module, patterns, rank=rank, alpha=alpha, seed=seed, fixed=fixed)
    elif how != "none":
        wanted = ["*"] if how == "all" else _last(module, how, blocks, after)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(_matches(name, wanted) and not _matches(name, fixed))
    trained = [(name, p.numel()) for name, p in module.named_parameters() if p.requires_grad]
    return Trained(
        how=how,
        names=tuple(name for name, _ in trained),
        n_trained=sum(n for _, n in trained),
        n_all=sum(p.numel() for p in module.parameters()),
    )


def check_how(how: str) -> None:
    """Refuse what is none of the choices.

    Raises:
        UserError: They are named.
    """
    if how in ("lora", "all", "none") or re.fullmatch(r"last-[1-9]\d*", how):
        return
    if how.startswith("last"):
        raise UserError(f"how='{how}': expected last-K with a number of blocks, such as last-2.")
    raise UserError(f"how='{how}' is unknown. {nearest(how, CHOICES)}")


def add_lora(
    module: nn.Module,
    patterns: Sequence[str] = ATTENTION,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    seed: int = 0,
    fixed: Sequence[str] = (),
) -> list[str]:
    """Give the Linear layers whose names match a low-rank update; outputs stay what they are.

    The layers' own weights are frozen; nothing is said of other parameters.

    Args:
        module: Changed in place.
        patterns: Names as in `named_modules`, with `*` for anything.
        rank: Of the updates, at most the smaller side of a weight.
        alpha: Scale of an update times the rank.
        seed: Of the random half of each update: the same on every process.
        fixed: Patterns of layers that get none.

    Returns:
        The names of the layers.

    Raises:
        UserError: No Linear has such a name, one has an update already, or the rank is too high.
    """
    linear = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    chosen = [n for n in linear if _matches(n, patterns) and not _matches(f"{n}.weight", fixed)]
    if not chosen:
        raise UserError(
            f"no Linear layer is called {' or '.join(patterns)}: expected names such as "
            f"{', '.join(list(linear)[:4]) or 'none, for the module has no Linear'}."
        )
    widest = min(min(linear[name].weight.shape) for name in chosen)
    if not 1 <= rank <= widest:
        raise UserError(
            f"rank={rank}: expected 1 to {widest}, the smaller side of the smallest of the "
            f"{len(chosen)} weights."
        )
    generator = torch.Generator().manual_seed(seed)
    for name in chosen:
        layer = linear[name]
        if parametrize.is_parametrized(layer, "weight"):
            raise UserError(f"the layer '{name}' has an update already: merge it first.")
        layer.weight.requires_grad_(False)
        update = LowRank(layer.weight, rank=rank, alpha=alpha, generator=generator)
        parametrize.register_parametrization(layer, "weight", update)
    return chosen


@torch.no_grad()
def merge_lora(module: nn.Module) -> int:
    """Put W + (alpha / r) B A in place of W, as plain weights under the layers' own names.

    The state dict then fits the class that the module had before `add_lora`, and outputs are the
    same to the bit.

    Returns:
        How many layers had an update.
    """
    layers = [
        m
        for m in module.modules()
        if parametrize.is_parametrized(m, "weight")
        and isinstance(m.parametrizations["weight"][0], LowRank)  # type: ignore[index]
    ]
    for layer in layers:
        merged = layer.weight.detach().clone()  # type: ignore[operator]
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        layer.weight.copy_(merged)  # type: ignore[operator]
    return len(layers)


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict that the module would have after `merge_lora`; the module is left alone."""
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        prefix, found, rest = name.partition("parametrizations.weight.")
        if not found:
            state[name] = tensor
        elif rest == "original":
            layer = module.get_submodule(prefix.rstrip("."))
            state[f"{prefix}weight"] = layer.weight.detach()  # type: ignore[operator]
    return state


def _last(module: nn.Module, how: str, blocks: str, after: Sequence[str]) -> list[str]:
    """Patterns of the parameters of the last blocks and of what follows them."""
    n_wanted = int(how.removeprefix("last-"))
    n_blocks = len(list(module.get_submodule(blocks).children()))
    if n_wanted > n_blocks:
        raise UserError(
            f"how='{how}': the encoder has {n_blocks} blocks; use last-{n_blocks} or fewer, or all."
        )
    return [*(f"{blocks}.{i}.*" for i in range(n_blocks - n_wanted, n_blocks)), *after]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
