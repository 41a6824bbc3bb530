"""Optional packages: found when they are needed, and named when they are not there."""

from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

from brainfusion.runtime.errors import UserError

INSTALL = {
    "pysam": "pip install pysam (or the extra: pip install 'brainfusion[extract]')",
    "evo2": "pip install evo2, on a machine with a CUDA GPU (github.com/ArcInstitute/evo2 says "
    "which; all but the 7B need Transformer Engine)",
    "transformers": "pip install transformers (for Caduceus also mamba-ssm and causal-conv1d, on a "
    "machine with a CUDA GPU)",
}
"""How to get each."""
_ALSO = ("torch", "transformers", "evo2", "vtx", "mamba-ssm", "causal-conv1d", "flash-attn")


def require(name: str, *, purpose: str) -> Any:
    """Import an optional package.

    Raises:
        UserError: It is not installed, or one that it needs itself is not.
    """
    try:
        return import_module(name)
    except ImportError as error:
        missing = name if getattr(error, "name", None) in (name, None) else f"{name} ({error})"
        raise UserError(
            f"{purpose} needs the package {missing}, which is not installed: {INSTALL[name]}."
        ) from error


def check_present(name: str, *, purpose: str) -> None:
    """Fail now rather than after an hour, without loading anything.

    Raises:
        UserError: The package is not installed.
    """
    try:
        found = find_spec(name) is not None
    except ValueError:  # in sys.modules, with no spec: put there by hand
        found = True
    if not found:
        raise UserError(f"{purpose} needs the package {name}: {INSTALL[name]}.")


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, as far as it is installed."""
    found = {}
    for name in _ALSO:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
