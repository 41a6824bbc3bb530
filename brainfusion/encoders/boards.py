"""Metrics for TensorBoard, which is not a dependency: it is loaded when it is asked for."""

from pathlib import Path
from typing import Any

from brainfusion.runtime.errors import UserError


class Board:
    """Writes rows of metrics as scalars; without `active` it does nothing."""

    def __init__(self, folder: Path, *, active: bool) -> None:
        self._writer = _writer(folder) if active else None

    def write(self, *, step: int, **values: Any) -> None:
        """One row."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush what there is."""
        if self._writer is not None:
            self._writer.close()


def check_installed() -> None:
    """Fail before anything is trained.

    Raises:
        UserError: TensorBoard is not there.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--tensorboard needs the package tensorboard, which is not installed: pip install "
            "tensorboard, or leave the flag out; metrics.jsonl has the same numbers."
        ) from error


def _writer(folder: Path) -> Any:
    check_installed()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(log_dir=str(folder))
