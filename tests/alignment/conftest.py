import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from brainfusion.runtime.logs import MetricsLog
from tests.alignment.power_cut import PowerCutError


@pytest.fixture
def cut(monkeypatch) -> Callable[..., None]:
    """Make the run stop when it logs a step: by an exception, or by a signal that it may heed."""

    def at(step: int, number: signal.Signals | None = None, *, member: int | None = None) -> None:
        real = MetricsLog.write

        def write(self: MetricsLog, **row: Any) -> None:
            real(self, **row)
            if row["step"] != step or member not in (None, row.get("member")):
                return
            monkeypatch.setattr(MetricsLog, "write", real)
            if number is None:
                raise PowerCutError
            os.kill(os.getpid(), number)

        monkeypatch.setattr(MetricsLog, "write", write)

    return at
