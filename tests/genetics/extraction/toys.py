"""Small models with random weights that have the interfaces of Evo 2, GENERator and Caduceus.

Each is a convolutional language model with the symmetry, or lack of it, that its original has.
"""

from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from torch import nn

BASES = "ACGTN"
WIDTH = 64


class ConvModel(nn.Module):
    """Tokens [b, l] to [b, l, width]: three convolutions with GELU; causal or centred."""

    def __init__(
        self, n_tokens: int, width: int = WIDTH, *, causal: bool, seed: int = 0, kernel: int = 9
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator))

        self.embedding = random(n_tokens, width)
        scale = (1.5 / (width * kernel)) ** 0.5
        self.weights = nn.ParameterList(
            [nn.Parameter(random(width, width, kernel) * scale) for _ in range(3)]
        )
        self.pad = (kernel - 1, 0) if causal else (kernel // 2, kernel // 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding[tokens].transpose(1, 2)
        for weight in self.weights:
            x = nn.functional.gelu(nn.functional.conv1d(nn.functional.pad(x, self.pad), weight))
        return x.transpose(1, 2)


def letters(sequences: list[str] | tuple[str, ...]) -> torch.Tensor:
    """Bases as 0 to 4."""
    return torch.tensor([[BASES.index(base) for base in text] for text in sequences])


def complement(tokens: torch.Tensor) -> torch.Tensor:
    """The other strand, read in its own direction."""
    return torch.tensor([3, 2, 1, 0, 4])[tokens].flip(1)


class Evo2Like:
    """`positions` of a causal model, one base a token."""

    n_before = n_after = 0
    unit_bp = 1

    def __init__(
        self, *, width: int = WIDTH, dtype: torch.dtype = torch.float32, **options
    ) -> None:
        self.net = ConvModel(5, width, causal=True, **options)
        self.dtype = dtype
        self.facts = {"device": "cpu"}
        self.read: list[tuple[str, ...]] = []

    def positions(self, sequences):
        self.read.append(tuple(sequences))
        return self.net(letters(sequences)).to(self.dtype)


class PhLike(Evo2Like):
    """Reads both ways, and promises nothing about strands (Caduceus-Ph)."""

    def __init__(self, *, width: int = WIDTH) -> None:
        super().__init__(width=width)
        self.net = ConvModel(5, width, causal=False)


class PsLike(PhLike):
    """Equivariant: its reverse half is the forward half of the other strand, flipped both ways."""

    def positions(self, sequences):
        self.read.append(tuple(sequences))
        tokens = letters(sequences)
        return torch.cat([self.net(tokens), self.net(complement(tokens)).flip(1, 2)], dim=-1)


class GeneratorLike(Evo2Like):
    """6-mers that do not overlap, a separator before and behind."""

    n_before = n_after = 1
    unit_bp = 6

    def __init__(self) -> None:
        super().__init__()
        self.net = ConvModel(4098, causal=True, kernel=3)

    def positions(self, sequences):
        self.read.append(tuple(sequences))
        return self.net(torch.tensor([six_mers(text) for text in sequences]))


def six_mers(text: str) -> list[int]:
    """Token numbers with separators; 4097 is `<oov>`, as for a rest that is no 6-mer."""
    pieces = [text[start : start + 6] for start in range(0, len(text), 6)]
    numbers = []
    for piece in pieces:
        known = len(piece) == 6 and "N" not in piece
        numbers.append(sum(BASES.index(b) * 4**k for k, b in enumerate(piece)) if known else 4097)
    return [4096, *numbers, 4096]


# -- packages of the same interfaces ---------------------------------------------------------------


def evo2_package() -> ModuleType:
    """A module with `Evo2(name, local_path)`, as the package evo2 has."""

    class Block(nn.Module):
        def __init__(self, net: ConvModel) -> None:
            super().__init__()
            self.net = net

        def forward(self, tokens):
            return self.net(tokens), None  # real blocks give tuples

    class Striped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                [Block(ConvModel(512, causal=True, seed=s)) for s in (0, 1)]
            )

        def forward(self, tokens):
            return [block(tokens.long())[0] for block in self.blocks][-1]

    class Evo2:
        def __init__(self, model_name: str, local_path: str | None = None) -> None:
            print(f"Loading {model_name}")  # the real one prints, too
            self.model = Striped()
            self.tokenizer = SimpleNamespace(
                tokenize=lambda text: np.frombuffer(text.encode(), dtype=np.uint8)
            )

        def __call__(self, tokens, return_embeddings=False, layer_names=None):
            assert tokens.dtype == torch.int
            outputs = {}
            handles = [
                self.model.get_submodule(name).register_forward_hook(
                    lambda _m, _i, out, name=name: outputs.__setitem__(name, out[0])
                )
                for name in layer_names
            ]
            logits = self.model(tokens)
            for handle in handles:
                handle.remove()
            return logits, outputs

    module = ModuleType("evo2")
    module.Evo2 = Evo2
    return module


class _Pretrained:
    """`from_pretrained` of a folder that exists, as the hub's classes have it."""

    def __init__(self, make) -> None:
        self._make = make

    def from_pretrained(self, name: str, **options):
        from pathlib import Path

        assert options["trust_remote_code"] is True
        if not Path(name).is_dir():
            raise OSError(f"{name} is not a local folder and is not a valid model identifier")
        return self._make()


class _Tokenizer:
    bos_token = "<s>"

    def __init__(self, unit_bp: int) -> None:
        self._unit_bp = unit_bp

    def __call__(self, text: str, *, add_special_tokens: bool):
        assert not add_special_tokens
        if self._unit_bp == 1:
            return {"input_ids": [BASES.index(base) for base in text]}
        assert text.startswith("<s>")
        assert text.endswith("<s>")
        return {"input_ids": six_mers(text[3:-3])}

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"<s>": 4096}[token]


class _HubModel(nn.Module):
    def __init__(self, net: nn.Module, **config) -> None:
        super().__init__()
        self.net, self.config = net, SimpleNamespace(**config)

    def forward(self, input_ids, output_hidden_states=False, **_):
        hidden = self.net(input_ids)
        states = (hidden * 0.5, hidden) if output_hidden_states else None
        return SimpleNamespace(last_hidden_state=hidden, hidden_states=states)


class _Equivariant(ConvModel):
    def forward(self, tokens):
        other = super().forward(complement(tokens)).flip(1, 2)
        return torch.cat([super().forward(tokens), other], dim=-1)


def transformers_package(model: str, **config) -> ModuleType:
    """A module with the Auto classes that are used, for "generator" or "caduceus"."""
    module = ModuleType("transformers")
    if model == "generator":
        made = lambda: _HubModel(ConvModel(4098, causal=True, kernel=3), **config)  # noqa: E731
        module.AutoModelForCausalLM = _Pretrained(made)
        module.AutoTokenizer = _Pretrained(lambda: _Tokenizer(6))
    else:
        made = lambda: _HubModel(_Equivariant(5, causal=False), **config)  # noqa: E731
        module.AutoModel = _Pretrained(made)
        module.AutoTokenizer = _Pretrained(lambda: _Tokenizer(1))
    return module
