"""Rates of a loop, with a clock of our own."""

import pytest

from brainfusion.runtime import meter


def test_pauses_do_not_count_and_each_reading_starts_anew(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(meter.time, "monotonic", lambda: now[0])
    clock = meter.Meter()
    now[0] = 4.0
    clock.pause()
    now[0] = 14.0
    clock.go_on()
    now[0] = 18.0
    assert clock.read(16, 2.0) == {"windows_per_s": pytest.approx(2.0), "wait_share": 0.25}
    now[0] = 20.0
    assert clock.read(10, 2.5) == {"windows_per_s": pytest.approx(5.0), "wait_share": 0.25}
