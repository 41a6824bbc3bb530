import subprocess
import sys
import threading
import time
from collections import namedtuple

import numpy as np
import pytest

from brainfusion.data import prefetch
from brainfusion.data.prefetch import Prefetch
from brainfusion.runtime.errors import UserError


def n_threads():
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("depth", [1, 3])
def test_batches_come_in_order_whatever_finishes_first(depth, workers):
    def make(step):
        time.sleep(0.003 * (step % 3 == 0))  # every third is late
        return step * step

    with Prefetch(make, 5, 25, depth=depth, workers=workers) as batches:
        assert list(batches) == [step * step for step in range(5, 25)]
    assert n_threads() == 0


def test_results_do_not_depend_on_threads():
    def make(step):
        return np.random.default_rng([7, step]).normal(size=8)

    one = np.stack(list(Prefetch(make, 0, 30)))
    np.testing.assert_array_equal(np.stack(list(Prefetch(make, 0, 30, depth=8, workers=4))), one)
    np.testing.assert_array_equal(np.stack([make(step) for step in range(30)]), one)


def test_an_error_is_raised_where_its_batch_would_have_been():
    def make(step):
        if step == 3:
            raise UserError("recording 3 is gone: restore it.")
        return step

    batches, seen = Prefetch(make, 0, 10, depth=4, workers=3), []
    with pytest.raises(UserError, match="recording 3 is gone") as error:
        seen.extend(batches)
    assert seen == [0, 1, 2]
    assert any(entry.name == "make" for entry in error.traceback)
    assert n_threads() == 0


def test_no_more_than_depth_batches_are_begun_ahead():
    begun = []
    with Prefetch(lambda step: begun.append(step) or step, 0, 100, depth=3, workers=2) as batches:
        for step in batches:
            time.sleep(0.002)
            # The consumer has `step`: those after it are ahead.
            assert max(begun) <= step + 3
            if step == 20:
                break
    assert max(begun) <= 23
    assert n_threads() == 0


def test_a_loop_that_is_left_early_leaves_no_thread_and_begins_nothing():
    running, begun = threading.Event(), []

    def make(step):
        begun.append(step)
        running.set()
        time.sleep(0.02)
        return step

    with Prefetch(make, 0, 1000, depth=50, workers=2) as batches:
        running.wait()
    after = len(begun)
    assert after <= 4
    assert n_threads() == 0
    assert list(batches) == []
    assert len(begun) == after


def test_waiting_is_counted_where_the_consumer_waits():
    with Prefetch(lambda step: time.sleep(0.03), 0, 5) as slow:
        list(slow)
    assert 0.12 < slow.waited_s < 1.0
    with Prefetch(lambda step: step, 0, 5, depth=5) as fast:
        time.sleep(0.05)
        list(fast)
    assert fast.waited_s < 0.1


def test_making_and_using_overlap():
    with Prefetch(lambda step: time.sleep(0.02), 0, 10) as batches:
        for _ in batches:
            time.sleep(0.02)
    assert batches.waited_s < 0.12  # 0.2 s if each were made when it is asked for


def test_tensors_are_pinned_in_all_containers_where_cuda_is(monkeypatch):
    class Tensor:
        def __init__(self, pinned=False):
            self.pinned = pinned

        def pin_memory(self):
            return Tensor(pinned=True)

    pair = namedtuple("pair", "signal mask")

    def make(step):
        return {"a": pair(Tensor(), [Tensor()]), "b": (Tensor(), np.ones(2), step)}

    monkeypatch.setattr(prefetch, "_has_cuda", lambda: True)
    (batch,) = Prefetch(make, 4, 5, pin=True)
    assert isinstance(batch["a"], pair)
    assert all(x.pinned for x in (batch["a"].signal, batch["a"].mask[0], batch["b"][0]))
    assert batch["b"][2] == 4
    assert isinstance(batch["b"][1], np.ndarray)
    (batch,) = Prefetch(make, 4, 5)
    assert not batch["b"][0].pinned


def test_no_steps_and_bad_numbers():
    assert list(Prefetch(str, 3, 3)) == []
    with pytest.raises(ValueError, match="depth=0, workers=1: expected at least one"):
        Prefetch(str, 0, 3, depth=0)


def test_importing_prefetch_loads_no_torch():
    code = "import brainfusion.data.prefetch, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
