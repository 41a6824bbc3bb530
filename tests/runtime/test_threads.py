"""Thread counts are chosen on purpose."""

import os

import numpy as np
import psutil
import pytest
import torch
from threadpoolctl import threadpool_info

from brainfusion.runtime import threads
from brainfusion.runtime.memory import peak_mib


@pytest.fixture(autouse=True)
def _restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_waiting_threads_sleep_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("KMP_BLOCKTIME", "7")
    threads.set_environment()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ["KMP_BLOCKTIME"] == "7"


def test_cores_are_those_of_the_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert threads.available_cores() == 3


@pytest.mark.parametrize(
    ("cores", "asked", "n_processes", "variable", "expected"),
    [
        (8, 0, 1, None, 8),
        (8, 0, 2, None, 4),
        (8, 0, 3, None, 2),
        (2, 0, 8, None, 1),
        (8, 3, 1, "1", 3),
        (8, 0, 1, "5", 5),
        (8, 0, 2, "1", 4),
    ],
)
def test_threads_are_what_was_asked_or_a_fair_share(
    monkeypatch, cores, asked, n_processes, variable, expected
):
    monkeypatch.setattr(threads, "available_cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert threads.use_threads(asked, n_processes=n_processes) == expected
    assert torch.get_num_threads() == expected


def test_one_thread_inside_the_block_and_as_before_outside():
    np.ones((8, 8)) @ np.ones((8, 8))
    before = [pool["num_threads"] for pool in threadpool_info()]
    assert before
    with threads.one_thread():
        assert {pool["num_threads"] for pool in threadpool_info()} == {1}
    assert [pool["num_threads"] for pool in threadpool_info()] == before


def test_peak_memory_is_in_mebibytes_and_no_less_than_what_is_used_now():
    used = psutil.Process().memory_info().rss / 2**20
    # The kernel updates its high-water mark in steps of some pages a thread.
    assert used - 2 < peak_mib() < 100 * used
