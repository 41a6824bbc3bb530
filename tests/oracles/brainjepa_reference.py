"""Brain-JEPA as its formulas say, over the reference's own keys.

Plain functions of the state dicts of its parts, with the operations that the reference uses
(Eric-LRL/Brain-JEPA at commit b1dfa93e, its attention without flash-attn): a `conv2d` for the
patches, one qkv layer, attention as a materialised matrix, positions for all tokens on every call.
Differentiable; nothing is shared with the package.

Shape legend: b recordings, r ROIs, w time patches, n tokens (r * w), k context tokens, q target
tokens, d width, g gradient components.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


def encoder(
    state: State,
    config: dict[str, Any],
    gradient: Tensor | None,
    fmri: Tensor,
    masks: Sequence[Tensor] | None = None,
) -> Tensor:
    """Features of all tokens [b, n, d], or of those in the masks [masks * b, k, d]."""
    if fmri.ndim == 3:
        fmri = fmri.unsqueeze(1)
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = F.conv2d(fmri, weight, bias, stride=(1, config["patch_size"])).flatten(2).transpose(1, 2)
    x = x + positions(state, "pos_embed_proj.", config, gradient)
    if masks is not None:
        x = gather(x, masks)
    for i in range(config["depth"]):
        x = block(state, f"blocks.{i}.", x, config["num_heads"])
    return norm(state, "norm", x)


def predictor(
    state: State,
    config: dict[str, Any],
    gradient: Tensor | None,
    z: Tensor,
    masks_enc: Sequence[Tensor],
    masks_pred: Sequence[Tensor],
) -> Tensor:
    """Predicted features [targets * contexts * b, q, d]: by target, then context, then sample."""
    b = len(masks_enc[0])
    position = positions(state, "predictor_2dpe_proj.", config, gradient).repeat(b, 1, 1)
    x = linear(state, "predictor_embed", z) + gather(position, masks_enc)
    k = x.shape[1]
    wanted = torch.cat(
        [gather(position, [mask]) for mask in masks_pred for _ in range(len(masks_enc))]
    )
    queries = state["mask_token"].repeat(wanted.shape[0], wanted.shape[1], 1) + wanted
    x = torch.cat([x.repeat(len(masks_pred), 1, 1), queries], dim=1)
    for i in range(config["pred_depth"]):
        x = block(state, f"predictor_blocks.{i}.", x, config["num_heads"])
    return linear(state, "predictor_proj", norm(state, "predictor_norm", x)[:, k:])


@torch.no_grad()
def target(
    state: State,
    config: dict[str, Any],
    gradient: Tensor | None,
    fmri: Tensor,
    masks_pred: Sequence[Tensor],
    n_context: int,
) -> Tensor:
    """Layer-normed features of the target encoder, in the rows of `predictor`."""
    h = encoder(state, config, gradient, fmri)
    h = F.layer_norm(h, h.shape[-1:], eps=1e-5)
    return torch.cat([gather(h, [mask]) for mask in masks_pred for _ in range(n_context)])


def loss(
    states: dict[str, State],
    config: dict[str, Any],
    gradient: Tensor | None,
    fmri: Tensor,
    masks_enc: Sequence[Tensor],
    masks_pred: Sequence[Tensor],
) -> Tensor:
    """Smooth L1 of a training step, from the states of encoder, predictor and target_encoder."""
    h = target(
        states["target_encoder"], config, gradient, fmri, masks_pred, n_context=len(masks_enc)
    )
    z = encoder(states["encoder"], config, gradient, fmri, masks_enc)
    z = predictor(states["predictor"], config, gradient, z, masks_enc, masks_pred)
    return F.smooth_l1_loss(z, h)


def positions(state: State, prefix: str, config: dict[str, Any], gradient: Tensor | None) -> Tensor:
    """[1, n, d]: first half the time patch, second half the ROI."""
    time = state[f"{prefix}emb_h"]
    if config["add_w"] == "origin":
        return torch.cat([time, state[f"{prefix}emb_w"]], dim=1)[None]
    assert gradient is not None
    table = gradient.reshape(-1, gradient.shape[-1])  # [1, r, g] or [r, g]
    mapped = linear(state, f"{prefix}predictor_pos_embed_proj", table)
    # The reference writes 10 here, which is this number wherever it runs.
    mapped = mapped.repeat_interleave(config["crop_size"][1] // config["patch_size"], dim=0)
    low, high = mapped.min(), mapped.max()
    return torch.cat([time, 2 * (mapped - low) / (high - low) - 1], dim=1)[None]


def block(state: State, prefix: str, x: Tensor, n_heads: int) -> Tensor:
    """Pre-norm: attention and MLP, each on a normalised copy, added."""
    context, _ = attention(state, prefix, norm(state, f"{prefix}norm1", x), n_heads)
    x = x + linear(state, f"{prefix}attn.proj", context)
    y = linear(state, f"{prefix}mlp.fc1", norm(state, f"{prefix}norm2", x))
    return x + linear(state, f"{prefix}mlp.fc2", F.gelu(y))


def attention(state: State, prefix: str, x: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """What each token gathers [b, n, d], and the weights [b, h, n, n]."""
    b, n, d = x.shape
    qkv = linear(state, f"{prefix}attn.qkv", x).reshape(b, n, 3, n_heads, d // n_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = ((q @ k.transpose(-2, -1)) * (d // n_heads) ** -0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).reshape(b, n, d), weights


def sincos(index: Tensor, width: int) -> Tensor:
    """[n, width]: sines, then cosines, in float64 and stored in float32."""
    omega = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle = index.double()[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def gather(x: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Tokens of each mask, one mask after the other along the batch."""
    return torch.cat(
        [torch.gather(x, 1, m.long().unsqueeze(-1).repeat(1, 1, x.shape[-1])) for m in masks]
    )


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """The Linear layer `name`."""
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state: State, name: str, x: Tensor) -> Tensor:
    """The LayerNorm `name`."""
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-6)
