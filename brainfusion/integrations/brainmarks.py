"""Both encoders as models of brainmarks, MedARC's evaluation suite for fMRI encoders.

brainmarks (0.1.1) asks of a model a pair: a transform from one sample of a data set to the model's
input, and a wrapper that names the parcellation it wants (`__space__`) and turns a batch into
(CLS, registers, patches). Its own wrappers of BrainLM and Brain-JEPA need packages that are not
published; these need only ours. Importing this module registers `MODELS` where brainmarks is
installed, and does nothing more where it is not. From the command line, weights never being
downloaded:

    export BRAINFUSION_BRAINLM_13M=old_13M/pytorch_model.bin
    export BRAINFUSION_A424_COORDINATES=A424_Coordinates.dat
    python -m brainmarks.main_logistic brainfusion_brainlm_13m patch aabc_sex

    export BRAINFUSION_BRAINJEPA=jepa-ep300.pth.tar
    export BRAINFUSION_BRAINJEPA_GRADIENT=gradient_mapping_450.csv
    python -m brainmarks.main_logistic brainfusion_brainjepa patch aabc_sex

or `--overrides model_kwargs.ckpt_path=...`. `brainfusion_checkpoint` takes a run of `brainfusion
pretrain`. Samples carry no parcel names: a space's order is trusted (A424's; Tian S3, then Schaefer
400 of 17 networks), only its size is checked.

What differs from brainmarks' own wrappers is in docs/upstream.md.

Shape legend: b samples, w windows, p parcels, t TRs, n tokens, d width.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from os import environ
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from brainfusion.data.atlas import Atlas
from brainfusion.data.conditioning import PUBLISHED, PublishedInput
from brainfusion.data.standardise import check_kind
from brainfusion.encoders import ENCODERS, from_upstream
from brainfusion.encoders.brainjepa import BrainJEPA
from brainfusion.encoders.brainlm import BrainLM
from brainfusion.encoders.brainlm_image import BrainLMImage
from brainfusion.encoders.checkpoints import load_pretrained
from brainfusion.integrations.brainmarks_transform import EncoderTransform, space_of
from brainfusion.runtime.errors import UserError, nearest

WINDOWS = ("average", "stack")

Windows = Literal["average", "stack"]


class Embeddings(NamedTuple):
    """What brainmarks expects of a forward pass, in this order."""

    cls_embeds: Tensor | None
    """[b, 1, d], the mean over windows; None where the encoder has no CLS token."""
    reg_embeds: Tensor | None
    """Registers: neither encoder has any."""
    patch_embeds: Tensor | None
    """[b, n, d] in the encoder's token order, or [b, w * n, d] window by window."""


class EncoderWrapper(nn.Module):
    """An encoder as brainmarks calls it: frozen, nothing hidden, tokens in a fixed order.

    Args:
        encoder: BrainLM of either family, or Brain-JEPA, of which only the target encoder is kept.
        xyz: Centroids [p, 3] in mm for BrainLM's recording model.
        windows: "average" the tokens of a sample's windows, or "stack" them one after the other;
            their mean is the same.
    """

    __space__: str = ""
    xyz: Tensor | None

    def __init__(
        self, encoder: nn.Module, *, xyz: np.ndarray | None = None, windows: Windows = "average"
    ) -> None:
        super().__init__()
        if windows not in WINDOWS:
            raise UserError(f"windows='{windows}' is not known. {nearest(str(windows), WINDOWS)}")
        self.__space__ = space_of(cast(int, encoder.n_parcels))
        self.encoder = encoder.target_encoder if isinstance(encoder, BrainJEPA) else encoder
        self.windows = windows
        table = None if xyz is None else torch.as_tensor(xyz, dtype=torch.float32)
        self.register_buffer("xyz", table, persistent=False)
        self.eval().requires_grad_(False)

    def extra_repr(self) -> str:
        """What `print` adds."""
        return f"'{self.__space__}', windows='{self.windows}'"

    def forward(self, batch: Mapping[str, Tensor]) -> Embeddings:
        """Encode a batch of samples that went through the transform: `bold` [b, w, p, t]."""
        bold = batch["bold"]
        if bold.ndim != 4:
            raise UserError(
                f"bold has shape {list(bold.shape)}, expected [samples, windows, parcels, TRs]: "
                "apply the transform that came with this model first."
            )
        cls, tokens = self._encoded(bold.flatten(0, 1))
        tokens = tokens.unflatten(0, bold.shape[:2])  # (b, w, n, d)
        tokens = tokens.mean(1) if self.windows == "average" else tokens.flatten(1, 2)
        if cls is not None:
            cls = cls.unflatten(0, bold.shape[:2]).mean(1, keepdim=True)
        return Embeddings(cls, None, tokens)

    def _encoded(
        self, bold: Float[Tensor, "b p t"]
    ) -> tuple[Float[Tensor, "b d"] | None, Float[Tensor, "b n d"]]:
        """CLS and tokens after the final LayerNorm: those that `encode` pools."""
        encoder = self.encoder
        if isinstance(encoder, BrainLM):
            assert self.xyz is not None
            xyz = encoder._check_xyz(self.xyz, len(bold))
            hidden = encoder._hidden(bold, xyz, None, alone=True)
        elif isinstance(encoder, BrainLMImage):
            hidden = encoder._hidden(bold, None)
        else:
            return None, encoder(bold)
        return hidden[:, 0], hidden[:, 1:]


Model = tuple[EncoderTransform, EncoderWrapper]


def brainlm(
    *,
    ckpt_path: str | Path | None = None,
    coordinates: str | Path | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    preset: str | None = None,
    scaling: str | None = None,
    n_windows: int | None = None,
    windows: Windows = "average",
) -> Model:
    """BrainLM with published weights, of either family.

    Args:
        ckpt_path: pytorch_model.bin or .safetensors; by default what the environment variable
            BRAINFUSION_BRAINLM, or BRAINFUSION_BRAINLM_13M and so on, names.
        coordinates: The parcels' centroids: A424_Coordinates.dat of BrainLM's toolkit, or an
            atlas.json; by default BRAINFUSION_A424_COORDINATES.
        config: Upstream's config; by default the config.json beside the weights.
        preset: The size that is expected.
        scaling: In place of "brainlm-robust", another kind of
            `brainfusion.data.standardise.KINDS`, such as "brainlm-code".
        n_windows: Windows a sample, see `EncoderTransform`.
        windows: See `EncoderWrapper`.

    Raises:
        UserError: A file is not named or does not fit.
    """
    suffix = f"_{preset.upper()}" if preset else ""
    weights = _path(ckpt_path, "ckpt_path", f"BRAINFUSION_BRAINLM{suffix}", "BrainLM's weights")
    module: Any = from_upstream("brainlm", weights, config=config)
    _check_size("brainlm", module, preset, weights)
    where = _path(
        coordinates, "coordinates", "BRAINFUSION_A424_COORDINATES", "the centroids of A424"
    )
    xyz = read_coordinates(where, module.n_parcels)
    is_image = isinstance(module, BrainLMImage)
    published = _published("brainlm-image" if is_image else "brainlm", scaling)
    transform = EncoderTransform(
        n_parcels=module.n_parcels,
        window_trs=module.window_trs,
        published=published,
        n_windows=n_windows,
        row_order=_by_y(xyz) if is_image else None,
    )
    return transform, EncoderWrapper(module, xyz=None if is_image else xyz, windows=windows)


def brainjepa(
    *,
    ckpt_path: str | Path | None = None,
    gradient: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    scaling: str | None = None,
    n_windows: int | None = 1,
    windows: Windows = "average",
) -> Model:
    """Brain-JEPA with published weights: the target encoder over the first 160 frames of 2 s.

    Args:
        ckpt_path: jepa-ep300.pth.tar; by default what BRAINFUSION_BRAINJEPA names.
        gradient: gradient_mapping_450.csv of its repository, or your own table [p, 30] as .csv or
            .npy; by default BRAINFUSION_BRAINJEPA_GRADIENT.
        config: Upstream's config; by default the published size of that width.
        scaling: In place of "recording-zscore", another kind of
            `brainfusion.data.standardise.KINDS`.
        n_windows: Windows a sample; the authors, and brainmarks, take the first alone.
        windows: See `EncoderWrapper`.

    Raises:
        UserError: A file is not named or does not fit.
    """
    weights = _path(ckpt_path, "ckpt_path", "BRAINFUSION_BRAINJEPA", "Brain-JEPA's weights")
    table = None
    if config is None or config.get("add_w") != "origin":
        variable = "BRAINFUSION_BRAINJEPA_GRADIENT"
        table = _path(gradient, "gradient", variable, "Brain-JEPA's gradient table")
    module: Any = from_upstream("brainjepa", weights, config=config, gradient=table)
    published = _published("brainjepa", scaling)
    transform = EncoderTransform(
        n_parcels=module.n_parcels,
        window_trs=module.window_trs,
        published=published,
        n_windows=n_windows,
    )
    return transform, EncoderWrapper(module, windows=windows)


def checkpoint(
    *,
    ckpt_path: str | Path | None = None,
    n_windows: int | None = None,
    windows: Windows = "average",
) -> Model:
    """An encoder that `brainfusion pretrain` trained, with its own conditioning.

    Args:
        ckpt_path: The run's folder, or one of its checkpoints; by default what
            BRAINFUSION_CHECKPOINT names. Its parcels must be those of a space of brainmarks, in
            that order.
        n_windows: Windows a sample, see `EncoderTransform`.
        windows: See `EncoderWrapper`.

    Raises:
        UserError: The folder is not named or holds no encoder, or no space has its parcels.
    """
    folder = _path(ckpt_path, "ckpt_path", "BRAINFUSION_CHECKPOINT", "a run's folder")
    pretrained = load_pretrained(folder)
    module: Any = pretrained.module
    xyz = pretrained.atlas.xyz_mm
    if xyz is None and not isinstance(module, BrainJEPA):
        raise UserError(
            f"{folder} was trained on atlas '{pretrained.atlas.name}', which has no coordinates, "
            "and BrainLM reads them: pretrain on a cohort whose atlas.json has 'xyz_mm'."
        )
    is_image = isinstance(module, BrainLMImage)
    transform = EncoderTransform(
        n_parcels=module.n_parcels,
        window_trs=module.window_trs,
        conditioning=pretrained.conditioning,
        n_windows=n_windows,
        row_order=_by_y(xyz) if is_image and xyz is not None else None,
    )
    return transform, EncoderWrapper(module, xyz=None if is_image else xyz, windows=windows)


MODELS: dict[str, Callable[..., Model]] = {
    "brainfusion_brainlm_5m": partial(brainlm, preset="5m"),
    "brainfusion_brainlm_13m": partial(brainlm, preset="13m"),
    "brainfusion_brainlm_111m": partial(brainlm, preset="111m"),
    "brainfusion_brainlm_650m": partial(brainlm, preset="650m"),
    "brainfusion_brainjepa": brainjepa,
    "brainfusion_checkpoint": checkpoint,
}
"""Names in brainmarks' registry; `model_kwargs` of its commands become the arguments."""


def register() -> list[str]:
    """Enter `MODELS` into brainmarks' registry; returns the names, none where it is not installed.

    Calling it again changes nothing.
    """
    try:
        # An installed brainfusion puts a module into this namespace package, so the package alone
        # does not say that brainmarks is there.
        if find_spec("brainmarks.models.registry") is None:
            return []
    except ModuleNotFoundError:
        return []
    registry = import_module("brainmarks.models.registry")
    known = set(registry.list_models())
    for name, model in MODELS.items():
        if name not in known:
            registry.register_model(name)(model)
    return list(MODELS)


def read_coordinates(path: Path, n_parcels: int) -> Float[np.ndarray, "p 3"]:
    """Centroids in mm from an atlas.json, or a table of x y z or index x y z (spaces or commas).

    Raises:
        UserError: The file is absent, not such a table, or of another number of parcels.
    """
    expected = f"expected {n_parcels} rows of x y z, or of index x y z from 1 on, or an atlas.json"
    if path.suffix == ".json":
        table = Atlas.load(path).xyz_mm
        if table is None:
            raise UserError(f"{path} has no coordinates ('xyz_mm'): {expected}.")
    else:
        if not path.is_file():
            raise UserError(f"{path} does not exist: {expected}.")
        try:
            lines = path.read_text().replace(",", " ").splitlines()
            table = np.loadtxt(lines, dtype=np.float32, ndmin=2)
        except ValueError as error:
            raise UserError(f"{path} is not a table of numbers ({error}): {expected}.") from error
        if table.shape[1] == 4 and (table[:, 0] == np.arange(1, len(table) + 1)).all():
            table = table[:, 1:]
    if table.shape != (n_parcels, 3) or not np.isfinite(table).all():
        raise UserError(f"{path} has a table of {list(table.shape)}: {expected}.")
    return np.ascontiguousarray(table, dtype=np.float32)


def _published(family: str, scaling: str | None) -> PublishedInput:
    """The published conditioning of a family, with another standardiser if one is named."""
    published = PUBLISHED[family]
    if scaling is None:
        return published
    check_kind(scaling)
    return replace(published, standardiser=scaling)


def _by_y(xyz: Float[np.ndarray, "p 3"]) -> np.ndarray:
    """The image family's rows: ascending Y, ties in the given order, as `BrainLMImage` sorts."""
    return np.argsort(xyz[:, 1], kind="stable")


def _check_size(model: str, module: Any, preset: str | None, path: Path) -> None:
    """Refuse weights of another size than a model's name says."""
    if preset is None:
        return
    presets = ENCODERS[model].presets
    own, wanted = module.config, presets[preset]
    if type(own) is not type(wanted) or (own.width, own.depth) != (wanted.width, wanted.depth):
        raise UserError(
            f"{path} holds a {type(own).__name__[:-6]} of width {own.width} and depth {own.depth}, "
            f"but {model} {preset} has width {wanted.width} and depth {wanted.depth}: use the "
            "model of that size, or its weights."
        )


def _path(given: str | Path | None, argument: str, variable: str, what: str) -> Path:
    """The file that was given or that the environment names; nothing is downloaded."""
    if given is None and not (given := environ.get(variable)):
        raise UserError(
            f"{what}: expected model_kwargs.{argument} or the environment variable {variable} to "
            "name the file; nothing is downloaded."
        )
    path = Path(given)
    if not path.exists():
        raise UserError(f"{path} does not exist: expected {what} ({argument} or {variable}).")
    return path


register()
