"""BrainLM's image-shaped models, 111M and 650M: a ViT-MAE over a recording drawn as a square image.

Re-implements the ViT-MAE of Ortega Caro et al. 2024 (BrainLM; upstream file
`brainlm_mae/modeling_vit_mae_with_padding.py` at commit b591d88d), itself transformers' ViTMAE (He
et al. 2022, arXiv 2111.06377), from its formulas. The image is [parcels, TRs] padded with -1; its
rows are the parcels **in ascending order of their Y coordinate**; upstream divides the signal by
5.6430855 first.

Upstream repeats the image to three equal channels and averages three reconstructed ones. Both are
linear, so the weights of the channels are summed, or averaged, before they are used: the same
numbers and the same gradients for a third of the work. Upstream also reconstructs the padding and
cuts it off: here the decoder's last layer and its head see to the patches of the recording alone.

Shape legend: b recordings, p parcels, t TRs, g patches along a side, n tokens (g * g), v visible
tokens, s sequence (CLS and tokens), c channels, d width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from brainfusion.encoders.layers import Block, run_blocks, sincos_table
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
from brainfusion.encoders.products import Linear, linear
from brainfusion.runtime.errors import UserError

PAD_VALUE = -1.0
"""What surrounds the recording in the image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BrainLMImageConfig:
    """Architecture of the image-shaped BrainLM; `PRESETS` holds the published sizes."""

    n_parcels: int = 424
    """Rows of the recording."""
    n_trs: int = 200
    """TRs of a window, the columns."""
    image_size: int = 432
    """Side of the square that the recording is padded to."""
    patch_size: int = 16
    """Side of a patch: parcels and TRs folded into one token."""
    n_channels: int = 3
    """Equal copies of the image that the published weights are made for."""
    mask_ratio: float = 0.75
    """Share of the tokens hidden from the encoder in pretraining; 0 hides none."""
    width: int = 768
    """Width of the encoder."""
    depth: int = 12
    """Layers of the encoder."""
    n_heads: int = 12
    """Attention heads of the encoder."""
    dim_hidden: int = 3072
    """Hidden width of the encoder's MLPs."""
    decoder_width: int = 512
    """Width of the decoder."""
    decoder_depth: int = 8
    """Layers of the decoder."""
    decoder_n_heads: int = 16
    """Attention heads of the decoder."""
    decoder_dim_hidden: int = 2048
    """Hidden width of the decoder's MLPs."""
    qkv_bias: bool = True
    """Whether queries, keys and values have biases."""
    layer_norm_eps: float = 1e-12
    """Added to the variance in each LayerNorm."""
    init_std: float = 0.02
    """Standard deviation of fresh weights."""

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise UserError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}: "
                "published models use 432 with 16 and 434 with 14."
            )
        if max(self.n_parcels, self.n_trs) > self.image_size:
            raise UserError(
                f"a recording of {self.n_parcels} parcels by {self.n_trs} TRs does not fit into an "
                f"image of {self.image_size} x {self.image_size}: use a larger image_size."
            )
        for width, heads in (
            (self.width, self.n_heads),
            (self.decoder_width, self.decoder_n_heads),
        ):
            if width % heads or width % 4:
                raise UserError(
                    f"a width of {width} must be a multiple of 4 (two-dimensional positions) and "
                    f"of its {heads} heads."
                )
        check_mask_ratio(self.mask_ratio)

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size


PRESETS: dict[str, BrainLMImageConfig] = {
    "111m": BrainLMImageConfig(),
    "650m": BrainLMImageConfig(
        image_size=434, patch_size=14, width=1280, depth=32, n_heads=16, dim_hidden=5120
    ),
}


class BrainLMImage(nn.Module):
    """The image-shaped BrainLM: encoder and reconstructing decoder.

    Initialised as upstream: weights and tokens normal (std `init_std`), biases 0.
    """

    position: Tensor
    decoder_position: Tensor
    real: Tensor

    def __init__(self, config: BrainLMImageConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        d, e, eps = config.width, config.decoder_width, config.layer_norm_eps
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        # Holds the weight in upstream's shape [d, c, patch, patch]; applied as a matrix product.
        self.patch_projection = nn.Conv2d(config.n_channels, d, config.patch_size)
        self.register_buffer("position", image_positions(config.grid, d), persistent=False)
        self.layers = nn.ModuleList(
            Block(
                d, config.n_heads, dim_hidden=config.dim_hidden, eps=eps, qkv_bias=config.qkv_bias
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(d, eps=eps)
        self.decoder_embed = Linear(d, e)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, e))
        self.register_buffer("decoder_position", image_positions(config.grid, e), persistent=False)
        self.decoder_layers = nn.ModuleList(
            Block(
                e,
                config.decoder_n_heads,
                dim_hidden=config.decoder_dim_hidden,
                eps=eps,
                qkv_bias=config.qkv_bias,
            )
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(e, eps=eps)
        self.decoder_head = nn.Linear(e, config.patch_size**2 * config.n_channels)
        self.register_buffer("real", self._real_patches(), persistent=False)
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
        return self.config.grid**2

    def forward(
        self,
        signal: Float[Tensor, "b p t"],
        xyz: Float[Tensor, "*r p 3"] | None = None,
        noise: Float[Tensor, "b n"] | None = None,
        mask_ratio: float | None = None,
    ) -> MaskedOutput:
        """Hide patches, encode the others, rebuild all.

        Differs from upstream: `noise` is obeyed (theirs draws its own whatever is given).

        Args:
            signal: Standardised BOLD; rows by ascending Y unless `xyz` is given.
            xyz: Parcel centroids in mm: rows are sorted by Y for the image and the reconstruction
                is put back into the order given.
            noise: The tokens with the smallest noise stay visible, in its order. Drawn from torch's
                global generator if omitted; at mask ratio 0 the natural order is taken then.
            mask_ratio: In place of the config's.

        Returns:
            `logits` are [b, p, t]; `mask` is over tokens (row * g + column of the image).

        Raises:
            UserError: Shapes that do not fit the config, or a mask ratio that leaves no token.
        """
        expected = (self.n_parcels, self.window_trs)
        if signal.ndim != 3 or tuple(signal.shape[1:]) != expected:
            raise UserError(
                f"signal has shape {list(signal.shape)} but this BrainLM expects [b, "
                f"{expected[0]}, {expected[1]}] (recordings, parcels, TRs): cut windows of "
                f"{expected[1]} TRs of the atlas it was made for."
            )
        rows = self._rows(xyz, len(signal))
        if rows is not None:
            signal = take(signal, rows)
        ratio = self.config.mask_ratio if mask_ratio is None else mask_ratio
        masking = random_masking(signal, self.n_tokens, ratio, noise)
        hidden = self._hidden(signal, masking.visible)
        logits = self._decode(hidden, masking.restore)
        loss = None
        if masking.n_visible < self.n_tokens:
            pixels = masking.mask[:, self.real, None].expand(-1, -1, self.config.patch_size**2)
            loss = masked_loss(logits, signal, self._from_patches(pixels), "mse")
        if rows is not None:
            logits = take(logits, rows.argsort(dim=1))
        return MaskedOutput(loss, logits, hidden, masking.mask, masking.restore)

    def encode(
        self,
        bold: Float[Tensor, "b p t"],
        xyz: Float[Tensor, "*r p 3"] | None = None,
        *,
        pooling: Pooling = "mean",
    ) -> Float[Tensor, "b f"]:
        """Features of whole recordings: nothing hidden, nothing random.

        Args:
            bold: Standardised BOLD of any length from one patch up; rows by ascending Y unless
                `xyz` is given. Longer than a window: the windows that cover it, the last one flush
                with its end, are averaged. Shorter: the tail is filled with each parcel's mean.
            xyz: Parcel centroids in mm, to sort the rows by Y.
            pooling: "mean" over all tokens but CLS (those of the padding too), or "cls".

        Raises:
            UserError: Wrong shapes, NaN, too few TRs, or a pooling that this family has not.
        """
        check_pooling(pooling, ("mean", "cls"))
        rows = self._rows(xyz, len(bold))

        def features(window: Tensor) -> Tensor:
            window = window if rows is None else take(window, rows)
            hidden = self._hidden(window, None)
            return pool(hidden[:, 1:], pooling, n_parcels=self.n_parcels, cls=hidden[:, 0])

        with no_dropout(self):
            return mean_over_windows(
                features, bold, self.n_parcels, self.window_trs, self.config.patch_size
            )

    def set_activation_checkpointing(self, on: bool) -> None:
        """Whether training keeps the input of each layer alone and computes its inside again."""
        self.checkpointing = on

    def _rows(self, xyz: Tensor | None, batch_size: int) -> Int[Tensor, "b p"] | None:
        if xyz is None:
            return None
        if xyz.ndim == 2:
            xyz = xyz.expand(batch_size, -1, -1)
        if tuple(xyz.shape) != (batch_size, self.n_parcels, 3):
            raise UserError(
                f"xyz has shape {list(xyz.shape)} but this BrainLM expects [{self.n_parcels}, 3] "
                f"or [{batch_size}, {self.n_parcels}, 3]: give one MNI centroid in mm for each "
                "parcel."
            )
        return xyz[..., 1].argsort(dim=1, stable=True)

    def _hidden(self, signal: Tensor, visible: Tensor | None) -> Float[Tensor, "b s d"]:
        patches, position = self._to_patches(signal), self.position[1:]
        if visible is None:
            tokens = self._embed(patches) + position
        else:
            tokens = self._embed(take(patches, visible)) + position[visible]
        # CLS has a position too: zeros.
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return self.norm(
            run_blocks(self.layers, x, checkpointing=self.checkpointing and self.training)
        )

    def _embed(self, patches: Float[Tensor, "b v q"]) -> Float[Tensor, "b v d"]:
        projection = self.patch_projection
        return linear(patches, projection.weight.sum(1).flatten(1), projection.bias)

    def _decode(
        self, hidden: Float[Tensor, "b s d"], restore: Int[Tensor, "b n"]
    ) -> Float[Tensor, "b p t"]:
        x = self.decoder_embed(hidden)
        tokens = fill_hidden(x[:, 1:], self.mask_token, restore)
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_position
        x = run_blocks(
            self.decoder_layers,
            x,
            checkpointing=self.checkpointing and self.training,
            wanted=lambda tokens: tokens[:, 1 + self.real],
        )
        channels = (-1, self.config.n_channels)  # the fastest of (row, column, channel)
        weight = self.decoder_head.weight.unflatten(0, channels).mean(1)
        bias = self.decoder_head.bias.unflatten(0, channels).mean(1)
        return self._from_patches(linear(self.decoder_norm(x), weight, bias))

    def _margins(self) -> tuple[int, int]:
        size = self.config.image_size
        return (size - self.n_parcels) // 2, (size - self.window_trs) // 2

    def _to_patches(self, signal: Float[Tensor, "b p t"]) -> Float[Tensor, "b n q"]:
        size, side = self.config.image_size, self.config.patch_size
        top, left = self._margins()
        right, bottom = size - self.window_trs - left, size - self.n_parcels - top
        image = F.pad(signal, (left, right, top, bottom), value=PAD_VALUE)
        image = image.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (b, g, row, g, column)
        return image.transpose(2, 3).flatten(3).flatten(1, 2)

    def _real_span(self) -> tuple[range, range]:
        """Rows and columns of the patches that hold a part of the recording, not padding alone."""
        side, (top, left) = self.config.patch_size, self._margins()
        return (
            range(top // side, -(-(top + self.n_parcels) // side)),
            range(left // side, -(-(left + self.window_trs) // side)),
        )

    def _real_patches(self) -> Int[Tensor, " r"]:
        rows, columns = self._real_span()
        grid = torch.arange(self.config.grid**2).unflatten(0, (self.config.grid, -1))
        return grid[rows.start : rows.stop, columns.start : columns.stop].flatten()

    def _from_patches(self, patches: Float[Tensor, "b r q"]) -> Float[Tensor, "b p t"]:
        """The recording out of its patches, those of `real`."""
        side, (rows, columns) = self.config.patch_size, self._real_span()
        image = patches.unflatten(2, (side, side)).unflatten(1, (len(rows), len(columns)))
        image = image.transpose(2, 3).flatten(3).flatten(1, 2)
        top, left = self._margins()
        top, left = top - rows.start * side, left - columns.start * side
        return image[:, top : top + self.n_parcels, left : left + self.window_trs]

    def _initialise(self) -> None:
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls_token, std=std)
        nn.init.normal_(self.mask_token, std=std)


def image_positions(grid: int, width: int) -> Float[Tensor, "s d"]:
    """Fixed two-dimensional sine-cosine positions; first zeros for CLS, then row * grid + column.

    The first half of the width encodes the column, the second half the row.
    """
    row, column = np.divmod(np.arange(grid * grid), grid)
    table = torch.cat([sincos_table(column, width // 2), sincos_table(row, width // 2)], dim=1)
    return F.pad(table, (0, 0, 1, 0))
