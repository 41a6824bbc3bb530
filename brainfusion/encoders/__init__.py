"""Brain encoders: Brain-JEPA and BrainLM, their presets, and the checkpoints of their authors.

Importing this package is cheap; an encoder's code, and torch, load when it is first used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brainfusion.runtime.errors import UserError, nearest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """What the registry knows of an encoder. Its families share an interface and a name."""

    families: tuple[tuple[str, str, str], ...]
    """(module in this package, config class, module class); the first is the default family."""
    upstream: str
    """Module in this package that reads and writes the authors' checkpoints."""
    atlas: str
    """Parcellation of the published weights."""
    paper: str
    """Authors and year."""

    @property
    def config_class(self) -> type[Any]:
        """Config of the default family."""
        return self._classes()[0][0]

    @property
    def module_class(self) -> "type[nn.Module]":
        """Module of the default family."""
        return self._classes()[0][1]

    @property
    def presets(self) -> dict[str, Any]:
        """Configs of all families by the name of their size."""
        modules = [import_module(f"{__name__}.{file}") for file, _, _ in self.families]
        return {name: config for module in modules for name, config in module.PRESETS.items()}

    def module_class_for(self, config: Any) -> "type[nn.Module]":
        """The module class of the family that `config` belongs to."""
        for config_class, module_class in self._classes():
            if isinstance(config, config_class):
                return module_class
        names = ", ".join(config_class.__name__ for config_class, _ in self._classes())
        raise UserError(f"a config of type {type(config).__name__} was given, expected {names}.")

    def _classes(self) -> "list[tuple[type[Any], type[nn.Module]]]":
        found = []
        for file, config_name, module_name in self.families:
            module = import_module(f"{__name__}.{file}")
            found.append((getattr(module, config_name), getattr(module, module_name)))
        return found


ENCODERS: dict[str, EncoderSpec] = {
    "brainjepa": EncoderSpec(
        families=(("brainjepa", "BrainJEPAConfig", "BrainJEPA"),),
        upstream="brainjepa_upstream",
        atlas="Tian50+Schaefer400",
        paper="Dong et al. 2024",
    ),
    "brainlm": EncoderSpec(
        families=(
            ("brainlm", "BrainLMConfig", "BrainLM"),
            ("brainlm_image", "BrainLMImageConfig", "BrainLMImage"),
        ),
        upstream="brainlm_upstream",
        atlas="A424",
        paper="Ortega Caro et al. 2024",
    ),
}


def create(
    name: str,
    preset: str = "tiny",
    *,
    gradient: "np.ndarray | Tensor | None" = None,
    **overrides: Any,
) -> "nn.Module":
    """A fresh encoder with random weights.

    Args:
        name: A key of `ENCODERS`.
        preset: A size that the encoder knows.
        gradient: Brain-JEPA's gradient table [p, g]; needed before its first forward pass unless
            positions='origin' or a checkpoint is loaded.
        overrides: Fields of the config that differ from the preset.

    Raises:
        UserError: The name, the preset or an override is not known (the nearest is named).
    """
    from brainfusion.runtime import config as configs

    spec = _spec(name)
    presets = spec.presets
    if preset not in presets:
        raise UserError(f"{name} has no preset '{preset}'. {nearest(preset, presets)}")
    base = presets[preset]
    values = {**configs.to_dict(base), **overrides}
    return build(name, configs.from_dict(type(base), values, where=name), gradient=gradient)


def build(name: str, config: Any, *, gradient: "np.ndarray | Tensor | None" = None) -> "nn.Module":
    """The encoder `name` of a whole config, with random weights."""
    module_class = _spec(name).module_class_for(config)
    if name == "brainjepa":
        return module_class(config, gradient)
    if gradient is not None:
        raise UserError(f"{name} takes no gradient table: only brainjepa maps gradients.")
    return module_class(config)


def from_upstream(
    name: str,
    checkpoint: "str | Path | Mapping[str, Any]",
    config: Any = None,
    gradient: "np.ndarray | Tensor | str | Path | None" = None,
) -> "nn.Module":
    """An encoder with the weights of its authors' checkpoint.

    Args:
        name: A key of `ENCODERS`.
        checkpoint: The file, or its state dict(s) in the reference's own key layout.
        config: The reference's own config as a dict. BrainLM also takes a config.json, or None
            where it lies beside the file; Brain-JEPA takes None for a published size.
        gradient: Brain-JEPA's gradient table, an array [p, g] or [1, p, g], or a file.

    Returns:
        The module in evaluation mode, float32, on the CPU.

    Raises:
        UserError: Anything that does not fit: keys, shapes, the table's rows.
    """
    spec = _spec(name)
    upstream = import_module(f"{__name__}.{spec.upstream}")
    path = Path(checkpoint) if isinstance(checkpoint, (str, Path)) else None
    if path is None and not isinstance(checkpoint, Mapping):
        raise UserError(
            f"from_upstream('{name}') got a {type(checkpoint).__name__}, expected the path of a "
            "checkpoint or its state dict."
        )
    state = checkpoint if path is None else upstream.read_checkpoint(path)
    if name == "brainjepa":
        return upstream.from_upstream_state(state, config, gradient)
    if gradient is not None:
        raise UserError(f"{name} takes no gradient table: only brainjepa maps gradients.")
    if config is None and path is None:
        raise UserError(f"from_upstream('{name}') needs config=: the reference's own config dict.")
    if config is None or isinstance(config, (str, Path)):
        config = upstream.read_config(Path(config) if config else path)
    if not isinstance(config, Mapping):
        raise UserError(
            f"config is a {type(config).__name__}, expected the reference's own config as a dict "
            "or the path of its config.json."
        )
    return upstream.from_upstream_state(state, config)


def to_upstream(module: "nn.Module", grad: bool = False) -> "dict[str, Tensor]":
    """The module's weights, or with `grad` their gradients, in the reference's own keys.

    Brain-JEPA's keys have `encoder/`, `predictor/` or `target_encoder/` in front.
    """
    for spec in ENCODERS.values():
        if isinstance(module, tuple(module_class for _, module_class in spec._classes())):
            return import_module(f"{__name__}.{spec.upstream}").to_upstream_state(module, grad)
    raise UserError(
        f"to_upstream got a {type(module).__name__}, expected an encoder made by create() or "
        "from_upstream()."
    )


def _spec(name: str) -> EncoderSpec:
    if name not in ENCODERS:
        raise UserError(f"there is no encoder '{name}'. {nearest(name, ENCODERS)}")
    return ENCODERS[name]
