"""Brain-JEPA: features of masked parcels and times predicted from visible ones, in feature space.

Dong et al. 2024, "Brain-JEPA: Brain Dynamics Foundation Model with Gradient Positioning and
Spatiotemporal Masking" (arXiv:2409.19407). Own code for the architecture of the authors'
repository (src/models/vision_transformer.py, commit b1dfa93e); `brainjepa_upstream` reads their
checkpoints.

Shape legend: b recordings, p parcels, t TRs, w time patches, s TRs a patch, n = p w tokens (token =
parcel * w + patch), k context tokens, q target tokens, d width, g gradient components.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from brainfusion.data.windows import window_starts
from brainfusion.encoders.layers import Block, at_least_float32, run_blocks, sincos_table
from brainfusion.encoders.pooling import check_pooling, pool
from brainfusion.encoders.products import Linear
from brainfusion.runtime.errors import UserError, nearest

LAYER_NORM_EPS = 1e-6
TARGET_NORM_EPS = 1e-5
MLP_RATIO = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class BrainJEPAConfig:
    """Architecture of Brain-JEPA; `PRESETS` holds the published sizes."""

    n_parcels: int = 450
    """Parcels a recording, in the order of the gradient table."""
    n_trs: int = 160
    """Time points a window."""
    patch_trs: int = 16
    """Time points of one parcel folded into one token."""
    width: int = 768
    """Width of the encoder, a multiple of 4 and of `n_heads`."""
    depth: int = 12
    """Blocks of the encoder."""
    n_heads: int = 12
    """Attention heads, of the encoder and of the predictor alike."""
    predictor_width: int = 384
    """Width of the predictor, a multiple of 4 and of `n_heads`."""
    predictor_depth: int = 6
    """Blocks of the predictor."""
    positions: Literal["mapping", "origin"] = "mapping"
    """Of parcels: 'mapping', a learnt map of their connectivity gradients,
    or 'origin', sines of their index."""
    gradient_dim: int = 30
    """Columns of the gradient table; of no meaning with 'origin'."""

    def __post_init__(self) -> None:
        for name in ("n_parcels", "patch_trs", "depth", "n_heads", "predictor_depth"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected 1 or more.")
        if self.n_trs < self.patch_trs:
            raise UserError(
                f"n_trs={self.n_trs} is shorter than one patch of patch_trs={self.patch_trs}: "
                "use a longer window or a shorter patch."
            )
        if extra := self.n_trs % self.patch_trs:
            raise UserError(
                f"n_trs={self.n_trs} is not a multiple of patch_trs={self.patch_trs}: the last "
                f"{extra} TRs of each window would never be seen. Use n_trs={self.n_trs - extra}."
            )
        for name in ("width", "predictor_width"):
            value = getattr(self, name)
            if value < 4 or value % 4 or value % self.n_heads:
                raise UserError(
                    f"{name}={value}: expected a multiple of 4 (two halves of sines and cosines) "
                    f"and of n_heads={self.n_heads}."
                )
        if self.positions not in ("mapping", "origin"):
            hint = nearest(self.positions, ("mapping", "origin"))
            raise UserError(f"positions='{self.positions}' is not known. {hint}")
        if self.positions == "mapping" and self.gradient_dim < 1:
            raise UserError(f"gradient_dim={self.gradient_dim}: expected 1 or more.")

    @property
    def n_patches(self) -> int:
        """Time patches a window."""
        return self.n_trs // self.patch_trs

    @property
    def n_tokens(self) -> int:
        """Tokens a window."""
        return self.n_parcels * self.n_patches


PRESETS: dict[str, BrainJEPAConfig] = {
    "tiny": BrainJEPAConfig(
        n_parcels=100, width=64, depth=3, n_heads=2, predictor_width=32, predictor_depth=2
    ),
    "small": BrainJEPAConfig(width=384, depth=12, n_heads=6),
    "base": BrainJEPAConfig(width=768, depth=12, n_heads=12),
    "large": BrainJEPAConfig(width=1024, depth=24, n_heads=16),
}


class GridPosition(nn.Module):
    """Position of each token: half for its time patch, half for its parcel.

    The tables are parameters without gradient, as upstream, so that counts and keys agree. The
    gradient table is a buffer *in* the state dict, which upstream leaves out: a checkpoint of
    ours is complete. Positions are float32 under autocast too.

    In evaluation mode without gradients, mapped positions are kept from call to call. They are
    taken only if what they were made from equals what it is now, value by value, so that no way of
    changing a weight leaves them stale.
    """

    gradient: Tensor

    def __init__(self, config: BrainJEPAConfig, width: int) -> None:
        super().__init__()
        self.n_patches = config.n_patches
        self._mapped: tuple[tuple[Tensor, ...], Tensor] | None = None
        half = width // 2
        parcel, patch = np.divmod(np.arange(config.n_tokens), config.n_patches)
        self.time_table = nn.Parameter(sincos_table(patch, half), requires_grad=False)
        if config.positions == "origin":
            self.parcel_table = nn.Parameter(sincos_table(parcel, half), requires_grad=False)
            self.mapping = None
        else:
            self.mapping = nn.Linear(config.gradient_dim, half)
            self.register_buffer(
                "gradient", torch.full((config.n_parcels, config.gradient_dim), torch.nan)
            )
            self.has_gradient = False
            self.register_load_state_dict_post_hook(_notice_gradient)

    def forward(self) -> Float[Tensor, "n d"]:
        """The whole table, for all parcels of the atlas: the scaling depends on all of them."""
        if self.mapping is None:
            return torch.cat([self.time_table, self.parcel_table], dim=1)
        if not self.has_gradient:
            raise UserError(
                "Brain-JEPA maps connectivity gradients to positions but was given no gradient "
                "table: pass gradient=... (gradients.gradient_table makes one), load a "
                "checkpoint, or use positions='origin'."
            )
        return torch.cat([self.time_table, self._parcels(self.mapping)], dim=1)

    def _parcels(self, mapping: nn.Linear) -> Float[Tensor, "n d/2"]:
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._mapped = None
            return self._map(mapping)
        made_from = (mapping.weight, mapping.bias, self.gradient)
        if self._mapped is None or not _same(self._mapped[0], made_from):
            self._mapped = (tuple(x.detach().clone() for x in made_from), self._map(mapping))
        return self._mapped[1]

    def _map(self, mapping: nn.Linear) -> Float[Tensor, "n d/2"]:
        with torch.autocast(self.gradient.device.type, enabled=False):
            mapped = mapping(self.gradient)  # (p, d / 2)
        low, high = mapped.min(), mapped.max()
        # Differs from upstream: guarded, because a constant map would divide by zero.
        span = (high - low).clamp_min(torch.finfo(mapped.dtype).tiny)
        mapped = 2.0 * (mapped - low) / span - 1.0
        # Differs from upstream: repeated by the grid's own number of patches instead of by 10.
        return mapped.repeat_interleave(self.n_patches, 0)

    def set_gradient(self, gradient: Float[Tensor, "p g"]) -> None:
        """Fill in the gradient table; 'origin' positions have none and ignore it."""
        if self.mapping is not None:
            with torch.no_grad():
                self.gradient.copy_(gradient)
            self.has_gradient = True


def _same(before: tuple[Tensor, ...], now: tuple[Tensor, ...]) -> bool:
    return all(
        a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(before, now, strict=True)
    )


def _notice_gradient(position: GridPosition, _: object) -> None:
    """After weights were loaded: whether a gradient table came with them."""
    if not position.gradient.is_meta:
        position.has_gradient = bool(position.gradient.isfinite().all())


class BrainJEPAEncoder(nn.Module):
    """A transformer over the (parcel, time patch) grid; it may be shown a part of the tokens."""

    def __init__(self, config: BrainJEPAConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.patch = Linear(config.patch_trs, config.width)
        self.position = GridPosition(config, config.width)
        self.blocks = _blocks(config.width, config.depth, config.n_heads)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.apply(_initialise)

    def forward(
        self,
        fmri: Float[Tensor, "b p t"] | Float[Tensor, "b 1 p t"],
        masks: Sequence[Int[Tensor, "b k"]] | None = None,
        *,
        wanted: Int[Tensor, "b q"] | None = None,
    ) -> Float[Tensor, "b_m k d"]:
        """Encode the tokens that the masks name, or all of them.

        Args:
            fmri: Standardised BOLD of one window, parcels in the order of the gradient table.
            masks: Token indices that the encoder may see; each mask makes its own rows.
            wanted: Without masks, the tokens whose features are returned [b, q, d], at less cost
                than all. All tokens are seen.

        Returns:
            Normalised token features; with masks, mask-major: row = mask * b + recording.
        """
        x = self._embed(fmri, masks)
        pick, checkpointing = None, self.checkpointing and self.training
        if wanted is not None:
            pick = partial(_gather, mask=wanted)
        if wanted is None or wanted.shape[1] < x.shape[1]:
            x = run_blocks(self.blocks, x, checkpointing=checkpointing, wanted=pick)
        else:
            x = _gather(run_blocks(self.blocks, x, checkpointing=checkpointing), wanted)
        return self.norm(x)

    @torch.no_grad()
    def attention_maps(
        self,
        fmri: Float[Tensor, "b p t"] | Float[Tensor, "b 1 p t"],
        masks: Sequence[Int[Tensor, "b k"]] | None = None,
        *,
        block: int = -1,
    ) -> Float[Tensor, "b_m h k k"]:
        """Attention weights of one block, each row summing to one; memory grows as k squared."""
        depth = len(self.blocks)
        if not -depth <= block < depth:
            raise UserError(f"block={block}: this encoder has blocks 0 to {depth - 1}.")
        x = self._embed(fmri, masks)
        chosen = self.blocks[block]
        assert isinstance(chosen, Block)
        for before in list(self.blocks)[: block % depth]:
            x = before(x)
        return chosen.attn.weights(chosen.norm1(x))

    def _embed(self, fmri: Tensor, masks: Sequence[Tensor] | None) -> Tensor:
        patches = self._patches(fmri)
        position = self.position()
        if masks is None:
            return self.patch(patches) + position
        # The patches are gathered before they are embedded: what is hidden costs nothing.
        visible = torch.cat([_gather(patches, mask) for mask in masks])
        return self.patch(visible) + F.embedding(_joined(masks), position)

    def _patches(self, fmri: Tensor) -> Float[Tensor, "b n s"]:
        config = self.config
        if fmri.ndim == 4 and fmri.shape[1] == 1:
            fmri = fmri.squeeze(1)
        if fmri.ndim != 3 or fmri.shape[1:] != (config.n_parcels, config.n_trs):
            raise UserError(
                f"Brain-JEPA got BOLD of shape {tuple(fmri.shape)}, expected [recordings, "
                f"{config.n_parcels} parcels, {config.n_trs} TRs]: match the parcels to its atlas, "
                "and use encode() for recordings longer than a window."
            )
        return fmri.reshape(len(fmri), config.n_tokens, config.patch_trs)


class BrainJEPAPredictor(nn.Module):
    """A narrow transformer that fills in target tokens from context features."""

    def __init__(self, config: BrainJEPAConfig) -> None:
        super().__init__()
        width = config.predictor_width
        self.checkpointing = False
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.embed = Linear(config.width, width)
        self.position = GridPosition(config, width)
        self.blocks = _blocks(width, config.predictor_depth, config.n_heads)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.project = Linear(width, config.width)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self,
        z: Float[Tensor, "b_m k d"],
        masks_enc: Sequence[Int[Tensor, "b k"]],
        masks_pred: Sequence[Int[Tensor, "b q"]],
    ) -> Float[Tensor, "b_mm q d"]:
        """Predict the features of the target tokens.

        Args:
            z: Context features, mask-major, as the encoder gives them for `masks_enc`.
            masks_enc: Tokens that the context saw.
            masks_pred: Tokens to predict.

        Returns:
            Rows by target mask, then context mask, then recording.
        """
        position = self.position()
        n_enc, n_pred = len(masks_enc), len(masks_pred)
        context = self.embed(z) + F.embedding(_joined(masks_enc), position)
        wanted = self.mask_token + F.embedding(_joined(masks_pred), position)
        # Each target mask beside each context mask: repeated by the copy that joins them.
        context = context.unflatten(0, (1, n_enc, -1)).expand(n_pred, -1, -1, -1, -1)
        wanted = wanted.unflatten(0, (n_pred, 1, -1)).expand(-1, n_enc, -1, -1, -1)
        x = torch.cat([context, wanted], dim=3).flatten(0, 2)
        n_seen = z.shape[1]
        x = run_blocks(
            self.blocks,
            x,
            checkpointing=self.checkpointing and self.training,
            wanted=lambda tokens: tokens[:, n_seen:],
        )
        return self.project(self.norm(x))


class BrainJEPA(nn.Module):
    """Context encoder, predictor, and the target encoder that follows the first as its average.

    Args:
        config: The architecture.
        gradient: Gradient coordinates of each parcel [p, g], needed for 'mapping' positions
            before the first forward pass (or loaded with a checkpoint); ignored by 'origin'.
    """

    def __init__(
        self, config: BrainJEPAConfig, gradient: np.ndarray | Tensor | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = BrainJEPAEncoder(config)
        self.predictor = BrainJEPAPredictor(config)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        if gradient is not None:
            self.set_gradient(gradient)

    @property
    def window_trs(self) -> int:
        """TRs that the encoder sees at once."""
        return self.config.n_trs

    @property
    def n_parcels(self) -> int:
        """Parcels a recording."""
        return self.config.n_parcels

    @property
    def n_tokens(self) -> int:
        """Tokens a window."""
        return self.config.n_tokens

    def set_gradient(self, gradient: np.ndarray | Tensor) -> None:
        """Give all three parts their gradient table, [p, g] or [1, p, g].

        Raises:
            UserError: It has the wrong shape or values that are not finite.
        """
        if self.config.positions == "origin":
            return
        table = torch.as_tensor(gradient, dtype=torch.float32)
        if table.ndim == 3 and len(table) == 1:
            table = table[0]
        expected = (self.config.n_parcels, self.config.gradient_dim)
        if tuple(table.shape) != expected:
            raise UserError(
                f"the gradient table has shape {tuple(table.shape)} but this Brain-JEPA expects "
                f"{expected}: one row a parcel in the order of its atlas, one column a component."
            )
        if not table.isfinite().all():
            raise UserError(
                "the gradient table has values that are not finite: give every parcel coordinates, "
                "for example with gradients.gradient_table."
            )
        for part in (self.encoder, self.predictor, self.target_encoder):
            part.position.set_gradient(table)

    def forward(
        self,
        fmri: Float[Tensor, "b p t"] | Float[Tensor, "b 1 p t"],
        masks_enc: Sequence[Int[Tensor, "b k"]],
        masks_pred: Sequence[Int[Tensor, "b q"]],
    ) -> Float[Tensor, ""]:
        """The training loss; the same as `loss`, so that wrappers such as DDP can call it."""
        wanted = self._targets(fmri, masks_pred).unsqueeze(1)  # (target masks, 1, b, q, d)
        predicted = self.predictor(self.encoder(fmri, masks_enc), masks_enc, masks_pred)
        predicted = predicted.unflatten(0, (len(masks_pred), len(masks_enc), -1))
        with torch.autocast(fmri.device.type, enabled=False):
            predicted, wanted = at_least_float32(predicted), at_least_float32(wanted)
            return F.smooth_l1_loss(predicted, wanted.expand_as(predicted))

    def loss(
        self,
        fmri: Float[Tensor, "b p t"] | Float[Tensor, "b 1 p t"],
        masks_enc: Sequence[Int[Tensor, "b k"]],
        masks_pred: Sequence[Int[Tensor, "b q"]],
    ) -> Float[Tensor, ""]:
        """Smooth L1 (beta 1) between predicted and target features, the mean over all entries."""
        return self.forward(fmri, masks_enc, masks_pred)

    @torch.no_grad()
    def target(
        self,
        fmri: Float[Tensor, "b p t"] | Float[Tensor, "b 1 p t"],
        masks_pred: Sequence[Int[Tensor, "b q"]],
        n_context: int = 1,
    ) -> Float[Tensor, "b_mm q d"]:
        """Layer-normed target features, in the predictor's row order; without gradient."""
        wanted = self._targets(fmri, masks_pred).unsqueeze(1)
        return wanted.expand(-1, n_context, -1, -1, -1).flatten(0, 2)

    @torch.no_grad()
    def _targets(
        self, fmri: Tensor, masks_pred: Sequence[Tensor]
    ) -> Float[Tensor, "target_masks b q d"]:
        features = self.target_encoder(fmri, wanted=torch.cat(list(masks_pred), dim=1))
        features = F.layer_norm(features, (self.config.width,), eps=TARGET_NORM_EPS)
        return features.unflatten(1, (len(masks_pred), -1)).transpose(0, 1)

    def set_activation_checkpointing(self, on: bool) -> None:
        """Whether training keeps the input of each block alone and computes its inside again."""
        for part in (self.encoder, self.predictor, self.target_encoder):
            part.checkpointing = on

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """Move the target encoder: target = momentum * target + (1 - momentum) * encoder."""
        pairs = zip(self.target_encoder.parameters(), self.encoder.parameters(), strict=True)
        for target, online in pairs:
            if online.requires_grad:  # not the fixed tables, which are equal
                target.lerp_(online, 1.0 - momentum)

    def encode(
        self,
        bold: Float[Tensor, "b p t"],
        *,
        pooling: str = "mean",
        part: Literal["target", "context"] = "target",
    ) -> Float[Tensor, "b f"]:
        """Features of whole recordings: nothing masked, the same on every call.

        Args:
            bold: Standardised BOLD of at least one patch. Longer than a window: the windows that
                cover it, the last one flush with its end, are averaged. Shorter: the encoder sees
                the whole patches that there are, as the first of a window, and no others; what is
                left after the last whole patch is not seen.
            pooling: "mean" over all tokens (f = d), or "parcel-mean" and "parcel-std": over the
                time patches of each parcel, joined (f = p d, parcel-major). Of a recording that is
                shorter than a window, over the patches that it has.
            part: Which encoder; downstream tasks use the target encoder.

        Raises:
            UserError: Wrong shapes, NaN, fewer TRs than a patch, or an unknown pooling or part.
        """
        check_pooling(pooling, ("mean", "parcel-mean", "parcel-std"))
        if part not in ("target", "context"):
            hint = nearest(part, ("target", "context"))
            raise UserError(f"part='{part}' is not known. {hint}")
        self._check_recordings(bold)
        encoder = self.target_encoder if part == "target" else self.encoder
        n_trs, size = bold.shape[2], self.window_trs
        if n_trs < size:
            tokens = encoder(*self._short(bold))
            return pool(tokens, pooling, n_parcels=self.n_parcels)
        total = torch.zeros(())
        starts = window_starts(n_trs, size).tolist()
        for begin in starts:
            tokens = encoder(bold[:, :, begin : begin + size])
            total = total + pool(tokens, pooling, n_parcels=self.n_parcels)
        return total / len(starts)

    def _check_recordings(self, bold: Tensor) -> None:
        if bold.ndim != 3 or bold.shape[1] != self.n_parcels:
            raise UserError(
                f"encode got BOLD of shape {tuple(bold.shape)}, expected [recordings, "
                f"{self.n_parcels} parcels, TRs]: match the parcels to the encoder's atlas by name."
            )
        if not bool(bold.isfinite().all()):
            raise UserError(
                "bold has values that are not finite: standardise it first (a missing parcel "
                "becomes 0)."
            )
        if bold.shape[2] < self.config.patch_trs:
            raise UserError(
                f"the recording has {bold.shape[2]} TRs, fewer than one patch "
                f"({self.config.patch_trs} TRs): leave it out, or use an encoder with shorter "
                "patches."
            )

    def _short(self, bold: Tensor) -> tuple[Tensor, list[Tensor]]:
        """A window that is filled up with zeros, and a mask of the patches that it really has."""
        n_seen = bold.shape[2] // self.config.patch_trs
        token = torch.arange(self.n_tokens, device=bold.device).view(self.n_parcels, -1)
        seen = token[:, :n_seen].flatten().expand(len(bold), -1)
        return F.pad(bold, (0, self.window_trs - bold.shape[2])), [seen]


def _blocks(width: int, depth: int, n_heads: int) -> nn.ModuleList:
    return nn.ModuleList(
        Block(width, n_heads, dim_hidden=MLP_RATIO * width, eps=LAYER_NORM_EPS)
        for _ in range(depth)
    )


def _initialise(module: nn.Module) -> None:
    # Upstream rescales proj and fc2 by depth and then undoes it by a second initialisation of all
    # linear layers; what its models start from is this.
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _gather(x: Float[Tensor, "b n d"], mask: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    return x.gather(1, mask.long().unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _joined(masks: Sequence[Int[Tensor, "b k"]]) -> Int[Tensor, "b_m k"]:
    return torch.cat([mask.long() for mask in masks])
