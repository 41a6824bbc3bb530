"""Signals that ask a run to stop."""

import os
import signal
import threading

import pytest

from brainfusion.runtime.signals import SIGNALS, StopSignals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_handlers_come_back(number):
    before = [signal.getsignal(one) for one in SIGNALS]
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == number.name
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_a_second_signal_acts_as_it_did_before():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append("own"))
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert (signals.received, heard) == ("SIGUSR1", [])
            os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == ["own"]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_thread_that_may_not_handle_signals_trains_without():
    seen = []

    def run() -> None:
        with StopSignals() as signals:
            seen.append(signals.received)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [None]
