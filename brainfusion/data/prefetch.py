"""Batches made ahead of time in threads, handed out in order.

Batches are pure functions of the step, so nothing in a result depends on how many threads make
them or how far they are ahead. Threads and not processes: reading memory maps and numpy's loops
release the interpreter's lock, and nothing has to be copied from one process to another.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class Prefetch(Iterator[T]):
    """`make(step)` for each step from `start` to before `stop`, in order.

    An error in `make` is raised where its batch would have been handed out. Use it as a context
    manager, or call `close`: a loop that is left early then waits for the calls that are running,
    and no more are begun.

    Args:
        make: Makes the batch of a step; is called from several threads at once if `workers` > 1.
        start: The first step.
        stop: The step after the last.
        depth: Batches begun ahead of the one that the consumer has: memory holds one more.
        workers: Threads. More than `depth` have nothing to do.
        pin: Copy batches into pinned memory where CUDA is there: tensors, also inside tuples,
            lists and dicts. Arrays of numpy stay as they are. Without CUDA nothing changes.
    """

    def __init__(
        self,
        make: Callable[[int], T],
        start: int,
        stop: int,
        *,
        depth: int = 2,
        workers: int = 1,
        pin: bool = False,
    ) -> None:
        if depth < 1 or workers < 1:
            raise ValueError(
                f"depth={depth}, workers={workers}: expected at least one batch ahead and one "
                "thread."
            )
        self._make, self._steps, self._depth, self._pin = make, iter(range(start, stop)), depth, pin
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
        self._ahead: deque[Future[T]] = deque()
        self.waited_s = 0.0
        """Seconds that the consumer has waited for batches in all, the first one included."""

    def __iter__(self) -> "Prefetch[T]":
        return self

    def __next__(self) -> T:
        self._fill()
        if not self._ahead:
            self.close()
            raise StopIteration
        begin = time.perf_counter()
        try:
            batch = self._ahead[0].result()
        except BaseException:
            self.close()
            raise
        finally:
            self.waited_s += time.perf_counter() - begin
        self._ahead.popleft()
        self._fill()
        return batch

    def __enter__(self) -> "Prefetch[T]":
        self._fill()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Begin no further batch, and wait for the threads to end."""
        self._steps = iter(range(0))
        self._ahead.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _fill(self) -> None:
        while len(self._ahead) < self._depth and (step := next(self._steps, None)) is not None:
            self._ahead.append(self._pool.submit(self._made, step))

    def _made(self, step: int) -> T:
        batch = self._make(step)
        return _pinned(batch) if self._pin and _has_cuda() else batch


def _has_cuda() -> bool:
    # A batch of tensors can only come from a process that has torch.
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available()


def _pinned(batch: Any) -> Any:
    match batch:
        case dict():
            return {key: _pinned(value) for key, value in batch.items()}
        case list():
            return [_pinned(value) for value in batch]
        case tuple():
            parts = [_pinned(value) for value in batch]
            return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
        case _:
            return batch.pin_memory() if hasattr(batch, "pin_memory") else batch
