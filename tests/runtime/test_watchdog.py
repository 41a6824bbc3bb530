"""The watchdog: with two real processes of which one sleeps, it says who waits where."""

import time
from pathlib import Path

import torch
import torch.distributed as dist

from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.logs import log_file
from brainfusion.runtime.watchdog import Watchdog, clear
from tests.ranks import run_ranks


def sleep_on_the_second(rank: int, world_size: int, folder: Path) -> None:
    ranks = Ranks(rank=rank, world_size=world_size)
    with log_file(folder / "run.log"), Watchdog(folder / "ranks", ranks, limit_s=0.5) as place:
        for step in (16, 17):
            place.at(f"reading the batch of step {step}")
            if rank == 1 and step == 17:
                time.sleep(1.7)
            place.at(f"the all_reduce of step {step}", waits=True)
            dist.all_reduce(torch.ones(1))
        place.at("working alone")
        time.sleep(0.7)


def test_the_rank_that_waits_and_the_one_that_is_late_are_named(tmp_path):
    run_ranks(sleep_on_the_second, tmp_path)
    lines = (tmp_path / "run.log").read_text().splitlines()
    # At 0.5 s and again when that has doubled; nobody complains of work, or of step 16.
    assert 1 <= len(lines) <= 2
    for line in lines:
        assert "rank 0 has waited" in line
        assert (
            "s in the all_reduce of step 17; rank 1 was last seen in reading the batch of" in line
        )
    assert not (tmp_path / "ranks").exists()


def test_a_rank_that_died_is_told_from_one_that_is_slow(tmp_path):
    ranks = Ranks(rank=0, world_size=3)
    dog = Watchdog(tmp_path, ranks, limit_s=60)
    other = Watchdog(tmp_path, Ranks(rank=1, world_size=3), limit_s=60)
    other.at("the end", waits=True)
    other._write(other._place)
    assert dog._others("the end") == "rank 2 has given no sign of life"
    dog._limit_s = 0.01
    time.sleep(0.05)
    assert "rank 1 was last seen in the end, for 0 s, and has been silent" in dog._others("the end")
    clear(tmp_path)
    assert not tmp_path.exists()


def test_one_process_alone_is_not_watched(tmp_path):
    with Watchdog(tmp_path / "ranks", Ranks(), limit_s=0.1) as place:
        place.at("anything", waits=True)
    assert not (tmp_path / "ranks").exists()
