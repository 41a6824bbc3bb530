"""What a run writes and says."""

import io
import json
import sys

import pytest

from brainfusion.runtime import logs
from brainfusion.runtime.logs import MetricsLog, Progress, read_metrics


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(step=0, loss=1.5)
    assert read_metrics(path) == [{"step": 0, "loss": 1.5}]
    log.close()
    log.close()
    log.write(step=1)
    assert len(read_metrics(path)) == 1


def test_a_new_run_starts_an_empty_log_and_a_resumed_one_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (0, 10, 20, 30):
        log.write(step=step)
    log.close()
    with path.open("a") as handle:
        handle.write('{"step": 40, "lo')  # cut off by a crash
    log = MetricsLog(path, resume_step=20)
    log.write(step=30, again=True)
    log.close()
    kept = [{"step": 0}, {"step": 10}, {"step": 20}]
    assert read_metrics(path) == [*kept, {"step": 30, "again": True}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == read_metrics(path)
    MetricsLog(path).close()
    assert path.read_text() == ""


def test_a_resumed_run_whose_log_is_gone_starts_one(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", resume_step=20)
    log.write(step=30)
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 30}]


def test_ranks_other_than_the_first_write_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    log = MetricsLog(tmp_path / "metrics.jsonl", active=False)
    log.write(step=1)
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0}]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(logs.time, "monotonic", clock.monotonic)
    return clock


def test_progress_in_a_log_is_a_line_every_ten_seconds_and_at_the_end(clock, capsys):
    progress = Progress("training", 100, start=20)
    for step in range(21, 101):
        clock.now += 1.0
        progress.update(step, "loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training: 30/100, 70 s left, loss 0.5"
    assert lines[-1] == "training: 100/100, 80 s, loss 0.5"
    assert len(lines) == 8


def test_progress_on_a_terminal_is_one_line_that_is_rewritten(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    progress = Progress("training", 3)
    for step in (1, 2, 3):
        clock.now += 0.15
        progress.update(step)
    text = terminal.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("training: 3/3, 0 s\n")
    assert text.count("\r") == 2  # the first update came too soon to be shown


def test_ranks_other_than_the_first_show_nothing(clock, capsys):
    Progress("training", 3, active=False).update(3)
    assert capsys.readouterr().err == ""


def test_words_go_to_standard_error_and_leave_standard_output_to_results(capsys):
    logs.say("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_what_is_said_goes_to_the_log_file_too_with_its_time(tmp_path, capsys, monkeypatch):
    path = tmp_path / "run.log"
    with logs.log_file(path):
        logs.say("one")
        logs.warn("two")
        monkeypatch.setenv("RANK", "1")
        logs.say("of another rank")
        Progress("brainlm", 5).update(5, "loss 1")
    logs.say("afterwards")
    lines = path.read_text().splitlines()
    assert [line[20:] for line in lines] == ["one", "two", "brainlm: 5/5, 0 s, loss 1"]
    for line in lines:
        logs.time.strptime(line[:19], "%Y-%m-%d %H:%M:%S")
    assert "of another rank" not in capsys.readouterr().err
