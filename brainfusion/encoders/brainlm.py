"""BrainLM's recording model: a masked autoencoder over parcel time series.

Re-implements Ortega Caro et al. 2024 (BrainLM, ICLR), upstream file
`brainlm_mae/modeling_brainlm.py` at commit b591d88d, from its formulas. The image-shaped 111M and
650M models of the same project are in `brainlm_image.py`; checkpoints are converted in
`brainlm_upstream.py`.

A token is one patch of `patch_trs` TRs of one parcel; token = parcel * n_patches + patch. Layers
are post-norm (BERT-like). Attention is softmax attention plus a depthwise convolution of the values
along the sequence, so **the output depends on the order of the tokens**. Pretraining shuffles them
(the kept tokens stay in the order of the masking noise); `encode` always takes them in their
natural order.

Shape legend: b recordings, p parcels, t TRs of a window, k TRs of a patch, m patches of a parcel,
n tokens (p * m), v visible tokens, s sequence (CLS and tokens), d width.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from brainfusion.encoders.brainlm_layers import ConvAttention, Layer
from brainfusion.encoders.layers import in_float32, run_blocks
from brainfusion.encoders.mae import (
    MaskedOutput,
    check_mask_ratio,
    fill_hidden,
    masked_loss,
    mean_over_windows,
    no_dropout,
    random_masking,
    take,
)
from brainfusion.encoders.pooling import Pooling, check_pooling, pool
from brainfusion.encoders.products import Linear
from brainfusion.runtime.errors import UserError

MAX_PATCHES = 5000
"""Rows of upstream's table of patch positions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BrainLMConfig:
    """Architecture of BrainLM's recording model; `PRESETS` holds the published sizes."""

    n_parcels: int = 424
    """Parcels a recording, in the atlas order that the weights were trained on (A424)."""
    n_trs: int = 200
    """TRs of a window."""
    patch_trs: int = 20
    """TRs folded into one token."""
    mask_ratio: float = 0.2
    """Share of the tokens hidden from the encoder in pretraining; 0 hides none."""
    width: int = 256
    """Width of the encoder and of the decoder."""
    depth: int = 4
    """Layers of the encoder."""
    n_heads: int = 4
    """Attention heads of the encoder."""
    dim_hidden: int = 1024
    """Hidden width of the encoder's MLPs."""
    decoder_depth: int = 2
    """Layers of the decoder."""
    decoder_n_heads: int = 4
    """Attention heads of the decoder."""
    decoder_dim_hidden: int = 1024
    """Hidden width of the decoder's MLPs."""
    attention: Literal["full", "nystrom"] = "full"
    """All published checkpoints run full attention, whatever their papers and configs suggest."""
    n_landmarks: int = 64
    """Landmarks of Nystrom attention; without effect in full attention."""
    xyz_unit_mm: float = 1.0
    """Centroids are divided by this. 1 is upstream's raw millimetres: they drown the signal,
    until long training has weighed them down; fresh small models learn sooner with about 50."""
    conv_kernel_size: int | None = 65
    """Taps of the depthwise convolution along the tokens (odd); null in a YAML leaves it out."""
    convolution: Literal["blocks", "grouped"] = "blocks"
    """How the convolution is computed where gradients are, with the same outputs to rounding.
    "grouped" is upstream's operation, whose gradient oneDNN gets wrong on some CPUs."""
    loss_fn: Literal["mse", "mae"] = "mse"
    """Error of the reconstruction of hidden tokens: squared or absolute."""
    tanh_decoder: bool = False
    """Whether reconstructions pass through tanh."""
    qkv_bias: bool = True
    """Whether queries, keys and values have biases."""
    position_dropout: float = 0.1
    """Dropout on the sum of signal, centroid and position, in encoder and decoder."""
    dropout: float = 0.0
    """Dropout on the two branches of a layer."""
    layer_norm_eps: float = 1e-12
    """Added to the variance in each LayerNorm."""
    init_std: float = 0.02
    """Standard deviation of fresh weights."""

    def __post_init__(self) -> None:
        if min(self.n_parcels, self.n_trs, self.patch_trs, self.depth, self.decoder_depth) < 1:
            raise UserError(
                "n_parcels, n_trs, patch_trs, depth and decoder_depth are counts of at least 1, "
                f"got {self.n_parcels}, {self.n_trs}, {self.patch_trs}, {self.depth}, "
                f"{self.decoder_depth}."
            )
        if extra := self.n_trs % self.patch_trs:
            hint = self.n_trs - extra or self.patch_trs
            raise UserError(
                f"n_trs={self.n_trs} is not a multiple of patch_trs={self.patch_trs}: the last "
                f"{extra} TRs of each window would never be seen. Use n_trs={hint}."
            )
        if self.n_patches > MAX_PATCHES:
            raise UserError(
                f"n_trs={self.n_trs} makes {self.n_patches} patches of a parcel, the table of "
                f"positions has {MAX_PATCHES}: use longer patches or a shorter window."
            )
        for heads in (self.n_heads, self.decoder_n_heads):
            if self.width % heads or self.width % 2:
                raise UserError(
                    f"width={self.width} must be even and a multiple of the number of heads "
                    f"({heads}): use width={2 * heads * max(1, self.width // (2 * heads))}."
                )
        check_mask_ratio(self.mask_ratio)
        if self.xyz_unit_mm <= 0:
            raise UserError(f"xyz_unit_mm={self.xyz_unit_mm}: expected a length above 0 mm.")
        if self.conv_kernel_size is not None and self.conv_kernel_size % 2 == 0:
            raise UserError(
                f"conv_kernel_size={self.conv_kernel_size} is even, which would shift the tokens "
                f"by half a step: use {self.conv_kernel_size + 1}, or null for no convolution."
            )

    @property
    def n_patches(self) -> int:
        """Patches of one parcel in a window."""
        return self.n_trs // self.patch_trs


PRESETS: dict[str, BrainLMConfig] = {
    # A hidden patch is mixed from those of other parcels by heads of 16 values: at equal cost,
    # patches of 8 frames are rebuilt far better after a minute than patches of 32.
    "tiny": BrainLMConfig(
        n_trs=40,
        patch_trs=8,
        position_dropout=0.0,
        xyz_unit_mm=50.0,
        init_std=0.06,
        width=64,
        depth=2,
        dim_hidden=128,
        decoder_depth=1,
        decoder_dim_hidden=128,
    ),
    # The checkpoint in upstream's repository.
    "5m": BrainLMConfig(),
    # The hub's old_13M: its width is derived from its parameter count.
    "13m": BrainLMConfig(width=512),
}


class BrainLM(nn.Module):
    """BrainLM: encoder and reconstructing decoder.

    Initialised as upstream is, by its two rules: Linear layers and convolutions of the encoder are
    normal (std `init_std`); Linear layers of the decoder are Xavier-uniform and its convolutions
    are uniform in +-1/sqrt(conv_kernel_size). Biases are 0; the two tokens are normal.
    """

    position: Tensor

    def __init__(self, config: BrainLMConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        d = config.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        self.signal_projection = Linear(config.patch_trs, d)
        self.xyz_projection = nn.Linear(3, d)
        self.position_dropout = nn.Dropout(config.position_dropout)
        self.register_buffer("position", position_table(config.n_patches, d), persistent=False)
        self.layers = nn.ModuleList(
            _layer(config, n_heads=config.n_heads, dim_hidden=config.dim_hidden)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.decoder = Decoder(config)
        self._initialise()

    @property
    def n_parcels(self) -> int:
        """Parcels a recording must have."""
        return self.config.n_parcels

    @property
    def window_trs(self) -> int:
        """TRs of a window."""
        return self.config.n_trs

    @property
    def n_tokens(self) -> int:
        """Tokens of a window, without CLS: the length of the masking noise."""
        return self.config.n_parcels * self.config.n_patches

    def forward(
        self,
        signal: Float[Tensor, "b p t"],
        xyz: Float[Tensor, "*r p 3"],
        noise: Float[Tensor, "b n"] | None = None,
        mask_ratio: float | None = None,
    ) -> MaskedOutput:
        """Hide tokens, encode the others, rebuild all.

        Args:
            signal: Standardised BOLD, parcels in atlas order.
            xyz: Parcel centroids in raw MNI millimetres.
            noise: The tokens with the smallest noise stay visible, in its order. Drawn from torch's
                global generator if omitted; at mask ratio 0 the natural order is taken then.
            mask_ratio: In place of the config's.

        Returns:
            `logits` are [b, p, m, k].

        Raises:
            UserError: Shapes that do not fit the config, or a mask ratio that leaves no token.
        """
        self._check_window(signal)
        xyz = self._check_xyz(xyz, len(signal))
        ratio = self.config.mask_ratio if mask_ratio is None else mask_ratio
        masking = random_masking(signal, self.n_tokens, ratio, noise)
        hidden = self._hidden(signal, xyz, masking.visible)
        logits = self.decoder(hidden, xyz, masking.restore)
        loss = None
        if masking.n_visible < self.n_tokens:
            target = signal.unflatten(-1, (-1, self.config.patch_trs))
            weight = masking.mask.view(target.shape[:-1]).unsqueeze(-1)
            loss = masked_loss(logits, target, weight, self.config.loss_fn)
        return MaskedOutput(loss, logits, hidden, masking.mask, masking.restore)

    def encode(
        self,
        bold: Float[Tensor, "b p t"],
        xyz: Float[Tensor, "*r p 3"] | None = None,
        *,
        pooling: Pooling = "mean",
    ) -> Float[Tensor, "b f"]:
        """Features of whole recordings: nothing hidden, nothing random, no dropout.

        Tokens are taken in their natural order (parcel-major), which the convolution sees: upstream
        takes a random order, and gives other features on each call. Nystrom attention starts its
        pseudo-inverse from each recording alone, as upstream does at batch size 1, so that features
        do not depend on what else is in the batch.

        Args:
            bold: Standardised BOLD of any length from one patch up. Longer than a window: the
                windows that cover it, the last one flush with its end, are averaged. Shorter: the
                tail is filled with each parcel's mean.
            xyz: Parcel centroids in raw MNI millimetres.
            pooling: "mean" over all tokens but CLS, "cls", or "parcel-mean" and "parcel-std":
                over the time patches of each parcel, joined to [b, p * d].

        Raises:
            UserError: Wrong shapes, NaN, no centroids, too few TRs, or an unknown pooling.
        """
        check_pooling(pooling)
        if xyz is None:
            raise UserError(
                "BrainLM needs the centroid of each parcel and got none: give xyz [p, 3] in MNI "
                "millimetres (the atlas's xyz_mm)."
            )
        xyz = self._check_xyz(xyz, len(bold))

        def features(window: Tensor) -> Tensor:
            hidden = self._hidden(window, xyz, None, alone=True)
            return pool(hidden[:, 1:], pooling, n_parcels=self.n_parcels, cls=hidden[:, 0])

        with no_dropout(self):
            return mean_over_windows(
                features, bold, self.n_parcels, self.window_trs, self.config.patch_trs
            )

    def set_activation_checkpointing(self, on: bool) -> None:
        """Whether training keeps the input of each layer alone and computes its inside again."""
        self.checkpointing = self.decoder.checkpointing = on

    def _hidden(
        self, signal: Tensor, xyz: Tensor, visible: Tensor | None, *, alone: bool = False
    ) -> Float[Tensor, "b s d"]:
        patches = signal.unflatten(-1, (-1, self.config.patch_trs))  # (b, p, m, k)
        place = in_float32(self.xyz_projection, xyz).unsqueeze(2)
        tokens = self.signal_projection(patches) + place
        tokens = self.position_dropout(tokens + self.position).flatten(1, 2)
        if visible is not None:
            tokens = take(tokens, visible)
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        checkpointing = self.checkpointing and self.training
        return self.norm(run_blocks(self.layers, x, checkpointing=checkpointing, alone=alone))

    def _check_window(self, signal: Tensor) -> None:
        expected = (self.n_parcels, self.window_trs)
        if signal.ndim != 3 or tuple(signal.shape[1:]) != expected:
            raise UserError(
                f"signal has shape {list(signal.shape)} but this BrainLM expects [b, "
                f"{expected[0]}, {expected[1]}] (recordings, parcels, TRs): cut windows of "
                f"{expected[1]} TRs of the atlas it was made for."
            )

    def _check_xyz(self, xyz: Tensor, batch_size: int) -> Tensor:
        if xyz.ndim == 2:
            xyz = xyz.expand(batch_size, -1, -1)
        if tuple(xyz.shape) != (batch_size, self.n_parcels, 3):
            raise UserError(
                f"xyz has shape {list(xyz.shape)} but this BrainLM expects [{self.n_parcels}, 3] "
                f"or [{batch_size}, {self.n_parcels}, 3]: give one MNI centroid in mm for each "
                "parcel."
            )
        return xyz / self.config.xyz_unit_mm

    def _initialise(self) -> None:
        std = self.config.init_std
        for name, module in self.named_modules():
            in_decoder = name.startswith("decoder.")
            if isinstance(module, nn.Linear):
                parts = module.weight.chunk(3) if name.endswith("qkv") else (module.weight,)
                for part in parts:
                    if in_decoder:
                        nn.init.xavier_uniform_(part.detach())
                    else:
                        nn.init.normal_(part.detach(), std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ConvAttention) and module.conv_weight is not None:
                if in_decoder:
                    bound = module.conv_weight.shape[2] ** -0.5
                    nn.init.uniform_(module.conv_weight, -bound, bound)
                else:
                    nn.init.normal_(module.conv_weight, std=std)
        nn.init.normal_(self.cls_token, std=std)
        nn.init.normal_(self.decoder.mask_token, std=std)


class Decoder(nn.Module):
    """Rebuilds the signal of every token; centroids and positions are added to all but CLS."""

    position: Tensor

    def __init__(self, config: BrainLMConfig) -> None:
        super().__init__()
        d = config.width
        self.config = config
        self.checkpointing = False
        self.embed = Linear(d, d)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, d))
        self.xyz_projection = nn.Linear(3, d)
        self.position_dropout = nn.Dropout(config.position_dropout)
        self.register_buffer("position", position_table(config.n_patches, d), persistent=False)
        self.layers = nn.ModuleList(
            _layer(config, n_heads=config.decoder_n_heads, dim_hidden=config.decoder_dim_hidden)
            for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.head1 = Linear(d, d // 2)
        self.head2 = Linear(d // 2, config.patch_trs)

    def forward(
        self,
        hidden: Float[Tensor, "b s d"],
        xyz: Float[Tensor, "b p 3"],
        restore: Int[Tensor, "b n"],
    ) -> Float[Tensor, "b p m k"]:
        """Put the tokens back in natural order, mask tokens where they were hidden, and rebuild."""
        x = self.embed(hidden)
        tokens = fill_hidden(x[:, 1:], self.mask_token, restore)
        tokens = tokens.unflatten(1, (-1, self.config.n_patches))
        place = in_float32(self.xyz_projection, xyz).unsqueeze(2)
        tokens = tokens + place + self.position
        tokens = self.position_dropout(tokens).flatten(1, 2)
        x = torch.cat([x[:, :1], tokens], dim=1)
        x = run_blocks(self.layers, x, checkpointing=self.checkpointing and self.training)
        x = F.leaky_relu(self.head1(self.norm(x)[:, 1:]), negative_slope=0.1)
        x = self.head2(x)
        if self.config.tanh_decoder:
            x = x.tanh()
        return x.unflatten(1, (-1, self.config.n_patches))


def _layer(config: BrainLMConfig, *, n_heads: int, dim_hidden: int) -> Layer:
    return Layer(
        config.width,
        n_heads,
        dim_hidden=dim_hidden,
        n_landmarks=config.n_landmarks if config.attention == "nystrom" else None,
        conv_kernel_size=config.conv_kernel_size,
        convolution=config.convolution,
        qkv_bias=config.qkv_bias,
        dropout=config.dropout,
        eps=config.layer_norm_eps,
    )


def position_table(n_patches: int, width: int) -> Float[Tensor, "m d"]:
    """Sines (even columns) and cosines (odd columns) of the patch index, in float32 as upstream."""
    rate = torch.exp(torch.arange(0, width, 2).float() * (-math.log(10000.0) / width))
    angle = torch.arange(n_patches).float().unsqueeze(1) * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
