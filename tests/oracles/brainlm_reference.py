"""BrainLM's recording model as its formulas say, over the reference's own keys.

Plain functions of a state dict, with the operations that the reference uses (vandijklab/BrainLM at
commit b591d88d on transformers 4.28's Nystromformer layers): separate query, key and value layers,
attention as a materialised matrix, the convolution as a grouped `conv2d`. Positions are those of
the state dict. Differentiable; nothing is shared with the package.

Shape legend: b recordings, p parcels, m patches of a parcel, k TRs of a patch, n tokens (p * m),
v visible tokens, s sequence (CLS and tokens), h heads, e width of a head, d width, l landmarks.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


def forward(
    state: State,
    config: dict[str, Any],
    signal: Tensor,
    xyz: Tensor,
    noise: Tensor,
    *,
    decode: bool = True,
) -> SimpleNamespace:
    """loss, logits [b, p, m, k], last_hidden_state, mask [b, n], ids_restore [b, n].

    `loss` is None where nothing is hidden (the reference: NaN). With `decode=False`, the encoder
    alone: loss and logits are None.
    """
    patches = signal.reshape(*signal.shape[:2], -1, config["timepoint_patching_size"])
    hidden, mask, restore = encoder(state, config, patches, xyz, noise)
    out = SimpleNamespace(
        loss=None, logits=None, last_hidden_state=hidden, mask=mask, ids_restore=restore
    )
    if not decode:
        return out
    out.logits = decoder(state, config, hidden, xyz, restore, patches.shape)
    if mask.sum() > 0:
        hide = mask.reshape(patches.shape[:3]).unsqueeze(-1).repeat(1, 1, 1, patches.shape[3])
        error = (out.logits - patches) * hide
        error = error**2 if config["loss_fn"] == "mse" else error.abs()
        out.loss = error.sum() / hide.sum()
    return out


def encoder(
    state: State, config: dict[str, Any], patches: Tensor, xyz: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(last hidden state [b, 1 + v, d], mask [b, n], ids_restore [b, n])."""
    own = part(state, "vit.")
    x = linear(own, "embeddings.signal_embedding_projection", patches)  # (b, p, m, d)
    x = x + linear(own, "embeddings.xyz_embedding_projection", xyz).unsqueeze(2)
    x = x + own["embeddings.pos_embedding.pe"][: x.shape[2]]
    x = x.flatten(1, 2)  # (b, n, d)

    n = x.shape[1]
    n_visible = int(n * (1 - config["mask_ratio"]))
    order = torch.argsort(noise, dim=1)
    restore = torch.argsort(order, dim=1)
    kept = order[:, :n_visible]
    x = torch.gather(x, 1, kept.unsqueeze(-1).repeat(1, 1, x.shape[2]))
    mask = torch.ones(x.shape[0], n, dtype=x.dtype, device=x.device)
    mask[:, :n_visible] = 0
    mask = torch.gather(mask, 1, restore)

    x = torch.cat([own["embeddings.cls_token"].expand(x.shape[0], -1, -1), x], dim=1)
    for i in range(config["num_hidden_layers"]):
        layer_state = part(own, f"encoder.layer.{i}.")
        x = layer(layer_state, config, x, config["num_attention_heads"])
    return norm(own, config, "layernorm", x), mask, restore


def decoder(
    state: State,
    config: dict[str, Any],
    hidden: Tensor,
    xyz: Tensor,
    restore: Tensor,
    grid: torch.Size,
) -> Tensor:
    """Reconstructions [b, p, m, k] of all tokens; `grid` is their shape."""
    own = part(state, "decoder.")
    b, p, m, k = grid
    x = linear(own, "decoder_embed", hidden)
    cls, x = x[:, :1], x[:, 1:]
    x = torch.cat([x, own["mask_token"].repeat(b, p * m - x.shape[1], 1)], dim=1)
    x = torch.gather(x, 1, restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
    x = x.reshape(b, p, m, -1)
    x = x + linear(own, "decoder_xyz_projection", xyz).unsqueeze(2)
    x = x + own["pos_embedding.pe"][:m]
    x = torch.cat([cls, x.flatten(1, 2)], dim=1)
    for i in range(config["decoder_num_hidden_layers"]):
        layer_state = part(own, f"decoder_layers.{i}.")
        x = layer(layer_state, config, x, config["decoder_num_attention_heads"])
    x = norm(own, config, "decoder_norm", x)
    x = linear(own, "decoder_pred2", F.leaky_relu(linear(own, "decoder_pred1", x), 0.1))
    if config["use_tanh_decoder"]:
        x = torch.tanh(x)
    return x[:, 1:].reshape(b, p, m, k)


def layer(state: State, config: dict[str, Any], x: Tensor, n_heads: int) -> Tensor:
    """Post-norm: a LayerNorm after each sum of a branch and its input."""
    context = attention(part(state, "attention.self."), config, x, n_heads)
    x = linear(state, "attention.output.dense", context) + x
    x = norm(state, config, "attention.output.LayerNorm", x)
    y = linear(state, "output.dense", F.gelu(linear(state, "intermediate.dense", x)))
    return norm(state, config, "output.LayerNorm", y + x)


def attention(state: State, config: dict[str, Any], x: Tensor, n_heads: int) -> Tensor:
    """Softmax attention, or Nystrom's, plus the convolution of the values along the sequence."""
    b, s, d = x.shape
    q, k, v = (
        linear(state, name, x).view(b, s, n_heads, d // n_heads).permute(0, 2, 1, 3)
        for name in ("query", "key", "value")
    )
    scale = math.sqrt(math.sqrt(d // n_heads))
    q, k = q / scale, k / scale
    n_landmarks, length = config["num_landmarks"], config["segment_means_seq_len"]
    if n_landmarks == length:
        context = torch.matmul(F.softmax(torch.matmul(q, k.transpose(-1, -2)), dim=-1), v)
    else:
        runs = (b, n_heads, n_landmarks, length // n_landmarks, d // n_heads)
        q_marks, k_marks = q.reshape(runs).mean(dim=-2), k.reshape(runs).mean(dim=-2)
        kernel_1 = F.softmax(torch.matmul(q, k_marks.transpose(-1, -2)), dim=-1)
        kernel_2 = F.softmax(torch.matmul(q_marks, k_marks.transpose(-1, -2)), dim=-1)
        kernel_3 = F.softmax(torch.matmul(q_marks, k.transpose(-1, -2)), dim=-1)
        context = torch.matmul(kernel_1, pseudo_inverse(kernel_2))
        context = torch.matmul(context, torch.matmul(kernel_3, v))
    if config["conv_kernel_size"] is not None:
        half = config["conv_kernel_size"] // 2
        context = context + F.conv2d(v, state["conv.weight"], padding=(half, 0), groups=n_heads)
    return context.permute(0, 2, 1, 3).reshape(b, s, d)


def pseudo_inverse(kernel: Tensor) -> Tensor:
    """Six steps from the transpose over the largest column sum of the whole batch."""
    eye = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    z = kernel.transpose(-1, -2) / kernel.sum(dim=-2).max()
    for _ in range(6):
        a = torch.matmul(kernel, z)
        inner = 15 * eye - torch.matmul(a, 7 * eye - a)
        z = torch.matmul(0.25 * z, 13 * eye - torch.matmul(a, inner))
    return z


def position_table(width: int) -> Tensor:
    """[5000, d] as the reference stores it: sines in even and cosines in odd columns, float32."""
    rate = torch.exp(torch.arange(0, width, 2).float() * (-math.log(10000.0) / width))
    table = torch.zeros(5000, width)
    table[:, 0::2] = torch.sin(torch.arange(5000).float()[:, None] * rate)
    table[:, 1::2] = torch.cos(torch.arange(5000).float()[:, None] * rate)
    return table


def part(state: State, prefix: str) -> State:
    """The entries whose key starts with `prefix`, without it."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """The Linear layer `name`."""
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state: State, config: dict[str, Any], name: str, x: Tensor) -> Tensor:
    """The LayerNorm `name`."""
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps=config["layer_norm_eps"])
