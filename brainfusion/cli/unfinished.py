"""A run's folder while it is made: what a stopped process leaves there, the next goes on with.

The run is made in `.<name>-parts` beside its place, under the same name at every start, and is
renamed into place when all of it is done: an earlier run stays whole until then. Checkpoints are
renamed into that folder, too, so kill -9 at any moment leaves the last of them. A lock of the
operating system, which ends with the process however it ends, keeps a second run out.
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from brainfusion.cli.workspace import check_replaceable
from brainfusion.runtime import checkpoint
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import CheckpointError, NonFiniteError, UserError
from brainfusion.runtime.files import atomic_folder, check_writable
from brainfusion.runtime.logs import say
from brainfusion.runtime.signals import Stopped


@contextmanager
def unfinished(run_dir: Path, ranks: Ranks, *, mark: str, resume: bool) -> Iterator[Path]:
    """A folder to make a run in, which replaces `run_dir` when the block ends well.

    If the block fails, what it holds is kept for the next start where there is a checkpoint to go
    on from, unless going on would fail again. Only the main rank touches the disk.

    Args:
        run_dir: Where the run belongs.
        ranks: This process among all.
        mark: A file or folder that tells an earlier run from other things, which stay.
        resume: Go on with what is there; otherwise it is removed first.

    Raises:
        UserError: Another process is making the same run, or `run_dir` holds other things.
    """
    check_replaceable(run_dir, mark)
    parts = run_dir.parent / f".{run_dir.name}-parts"
    if not ranks.is_main:
        yield parts
        return
    check_writable(run_dir.parent)
    if not resume:
        with _locked(parts):
            shutil.rmtree(parts)
    try:
        with _locked(parts):
            yield parts
            for checkpoints in list(parts.rglob("checkpoints")):
                shutil.rmtree(checkpoints)
            _move(parts, run_dir)
    except BaseException as error:
        _keep_or_remove(parts, error)
        raise


@contextmanager
def _locked(parts: Path) -> Iterator[None]:
    """`parts`, made if need be, for this process alone."""
    parts.mkdir(parents=True, exist_ok=True)
    with (parts / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"another process is making {parts}: wait for it, or give another --out."
            ) from None
        except OSError as error:
            say(f"{parts} cannot be locked ({error.strerror}): start one run at a time.")
        yield


class BusyError(UserError):
    """Another process holds the folder."""


def _move(parts: Path, run_dir: Path) -> None:
    (parts / "lock").unlink()
    with atomic_folder(run_dir) as aside:
        aside.rmdir()
        parts.rename(aside)


def _keep_or_remove(parts: Path, error: BaseException) -> None:
    """What failed stays where there is something to go on from, and going on may help."""
    if isinstance(error, (BusyError, CheckpointError)) or not parts.exists():
        return
    if checkpoint.steps(parts) and not isinstance(error, NonFiniteError):
        if not isinstance(error, Stopped):
            say(f"the same command goes on from the checkpoints in {parts}.")
        return
    shutil.rmtree(parts, ignore_errors=True)
