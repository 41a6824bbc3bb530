"""BrainLM's image-shaped model as its formulas say, over the reference's own keys.

Plain functions of a state dict, with the operations that the reference uses (vandijklab/BrainLM at
commit b591d88d, transformers 4.28's ViT-MAE with padding): three equal channels through a `conv2d`,
separate query, key and value layers, attention as a materialised matrix. Positions are those of
the state dict. Differentiable; nothing is shared with the package.

Shape legend: b recordings, g patches along a side, n tokens (g * g), v visible tokens, s sequence
(CLS and tokens), a side of a patch, c channels, d width.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


def forward(state: State, config: dict[str, Any], signal: Tensor, noise: Tensor) -> SimpleNamespace:
    """loss, logits [b, 424, 200], last_hidden_state, mask [b, n], ids_restore [b, n].

    `loss` is None where nothing is hidden (the reference: NaN).
    """
    size, side = square(config["image_size"]), square(config["patch_size"])
    channels = config["num_channels"]
    rows, columns = signal.shape[1:]
    top, left = (size - rows) // 2, (size - columns) // 2
    image = signal.unsqueeze(1).repeat(1, channels, 1, 1)
    padding = (left, size - columns - left, top, size - rows - top)
    image = F.pad(image, padding, value=-1.0)

    # -- encoder -------------------------------------------------------------------------------
    weight = state["vit.embeddings.patch_embeddings.projection.weight"]
    bias = state["vit.embeddings.patch_embeddings.projection.bias"]
    x = F.conv2d(image, weight, bias, stride=side).flatten(2).transpose(1, 2)
    positions = state["vit.embeddings.position_embeddings"]
    x = x + positions[:, 1:]
    b, n, d = x.shape
    n_visible = int(n * (1 - config["mask_ratio"]))
    order = torch.argsort(noise, dim=1)
    restore = torch.argsort(order, dim=1)
    x = torch.gather(x, 1, order[:, :n_visible].unsqueeze(-1).repeat(1, 1, d))
    mask = torch.ones(b, n, dtype=x.dtype, device=x.device)
    mask[:, :n_visible] = 0
    mask = torch.gather(mask, 1, restore)
    cls = state["vit.embeddings.cls_token"] + positions[:, :1]
    x = torch.cat([cls.expand(b, -1, -1), x], dim=1)
    for i in range(config["num_hidden_layers"]):
        x = layer(state, config, f"vit.encoder.layer.{i}.", x, config["num_attention_heads"])
    hidden = norm(state, config, "vit.layernorm", x)

    # -- decoder -------------------------------------------------------------------------------
    x = linear(state, "decoder.decoder_embed", hidden)
    fill = state["decoder.mask_token"].repeat(b, n + 1 - x.shape[1], 1)
    tokens = torch.cat([x[:, 1:], fill], dim=1)
    tokens = torch.gather(tokens, 1, restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
    x = torch.cat([x[:, :1], tokens], dim=1) + state["decoder.decoder_pos_embed"]
    n_heads = config["decoder_num_attention_heads"]
    for i in range(config["decoder_num_hidden_layers"]):
        x = layer(state, config, f"decoder.decoder_layers.{i}.", x, n_heads)
    x = norm(state, config, "decoder.decoder_norm", x)
    x = linear(state, "decoder.decoder_pred", x)[:, 1:]  # (b, n, a a c)

    # -- back to the recording, loss over its hidden pixels ------------------------------------
    def recording(pixels: Tensor) -> Tensor:
        g = size // side
        pixels = pixels.reshape(b, g, g, side, side, channels)
        pixels = torch.einsum("brcxyk->bkrxcy", pixels).reshape(b, channels, size, size)
        return pixels[:, :, top : top + rows, left : left + columns].mean(dim=1)

    logits, loss = recording(x), None
    if mask.sum() > 0:
        hide = recording(mask.unsqueeze(-1).repeat(1, 1, side * side * channels))
        loss = ((logits - signal) ** 2 * hide).sum() / hide.sum()
    return SimpleNamespace(
        loss=loss, logits=logits, last_hidden_state=hidden, mask=mask, ids_restore=restore
    )


def layer(state: State, config: dict[str, Any], prefix: str, x: Tensor, n_heads: int) -> Tensor:
    """Pre-norm: attention and MLP, each on a normalised copy, added."""
    b, s, d = x.shape
    y = norm(state, config, f"{prefix}layernorm_before", x)
    q, k, v = (
        linear(state, f"{prefix}attention.attention.{name}", y)
        .view(b, s, n_heads, d // n_heads)
        .permute(0, 2, 1, 3)
        for name in ("query", "key", "value")
    )
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(d // n_heads)
    context = torch.matmul(F.softmax(scores, dim=-1), v).permute(0, 2, 1, 3).reshape(b, s, d)
    x = linear(state, f"{prefix}attention.output.dense", context) + x
    y = norm(state, config, f"{prefix}layernorm_after", x)
    y = F.gelu(linear(state, f"{prefix}intermediate.dense", y))
    return linear(state, f"{prefix}output.dense", y) + x


def position_table(grid: int, width: int) -> Tensor:
    """[1, 1 + n, d] as the reference stores it: zeros for CLS, then the column and the row."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    row, column = torch.arange(grid).double(), torch.arange(grid).double()
    axis = torch.cat([torch.sin(row[:, None] * omega), torch.cos(row[:, None] * omega)], dim=1)
    table = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(len(column), 0)], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table])[None].float()


def square(size: int | list[int] | tuple[int, int]) -> int:
    """The side of a square given as one number or as two."""
    return size if isinstance(size, int) else size[0]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """The Linear layer `name`, with or without a bias."""
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state: State, config: dict[str, Any], name: str, x: Tensor) -> Tensor:
    """The LayerNorm `name`."""
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps=config["layer_norm_eps"])
