"""Imports that are stopped, and go on; imports on several processes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from brainfusion.data.cohort import Cohort
from brainfusion.data.importers import ImportConfig, import_cohort, journal
from brainfusion.runtime.errors import UserError
from tests.data.cohorts import noise, small_atlas

N = 24


@pytest.fixture
def given(tmp_path, monkeypatch):
    """24 recordings of two lengths, one in the middle of too low coverage."""
    monkeypatch.setattr(journal, "KEEP_FROM", 4)
    monkeypatch.setattr("brainfusion.data.importers.pipeline.KEEP_FROM", 4)
    small_atlas().save(tmp_path / "atlas.json")
    (tmp_path / "source").mkdir()
    rng = np.random.default_rng(0)
    for i in range(N):
        bold = noise(rng, 4, 12 + 3 * (i % 2))
        bold[:2] = np.nan if i == 5 else bold[:2]
        np.save(tmp_path / "source" / f"{i:03d}_rest.npy", bold)
    return ImportConfig(
        source=tmp_path / "source",
        out=tmp_path / "cohort",
        atlas=tmp_path / "atlas.json",
        tr_s=0.72,
        low_coverage="skip",
    )


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("import.json", "cohort.json")
    }


def same(one, other):
    assert contents(one) == contents(other)
    told = [json.loads((path / "import.json").read_text()) for path in (one, other)]
    assert told[0] == told[1]


def stopped(given, *, at):
    """Import until recording `at`, whose file is broken; it is whole again afterwards."""
    path = sorted(given.source.iterdir())[at]
    whole, state = path.read_bytes(), path.stat()
    path.write_bytes(whole[:-4])
    with pytest.raises(UserError, match=r"is not a whole .npy array"):
        import_cohort(given)
    path.write_bytes(whole)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    return given.out.parent / f".{given.out.name}-parts"


def reads(monkeypatch):
    """Names of the recordings that are read from now on."""
    from brainfusion.data.importers import reading

    seen, to_atlas = [], reading.to_atlas

    def spy(config, kind, layout, item):
        seen.append(item.recording)
        return to_atlas(config, kind, layout, item)

    monkeypatch.setattr(reading, "to_atlas", spy)
    return seen


def test_a_stopped_import_goes_on_and_ends_as_one_that_was_not(given, monkeypatch, capsys):
    import_cohort(replace(given, out=given.out.parent / "whole", name="cohort"))
    parts = stopped(given, at=17)
    assert parts.is_dir()
    assert not given.out.exists()
    seen = reads(monkeypatch)
    import_cohort(replace(given, name="cohort"))
    assert seen == [f"{i:03d}_rest" for i in range(17, N)]
    assert "17 of 24 recordings were read before: going on from there." in capsys.readouterr().err
    same(given.out, given.out.parent / "whole")
    assert not parts.exists()


@pytest.mark.parametrize(
    ("change", "n_kept"),
    [
        ("nothing", 17),
        ("an earlier file", 9),
        ("a file before", 3),
        ("an option", 0),
        ("the atlas", 0),
        ("low coverage refused", 5),
        ("a line cut off", 16),
        ("bytes behind the journal", 17),
    ],
)
def test_only_what_still_holds_is_taken_up(given, monkeypatch, change, n_kept):
    parts = stopped(given, at=17)
    files = sorted(given.source.iterdir())
    if change == "an earlier file":
        np.save(files[9], noise(np.random.default_rng(9), 4, 12))
    elif change == "a file before":
        np.save(given.source / "002_zest.npy", noise(np.random.default_rng(9), 4, 12))
    elif change == "an option":
        given = replace(given, constant_as_missing=False)
    elif change == "the atlas":
        small = small_atlas()
        type(small)(name="small", parcels=small.parcels[::-1]).save(given.atlas)
    elif change == "low coverage refused":
        given = replace(given, low_coverage="refuse", min_coverage=0.8)
    elif change == "a line cut off":
        log = parts / "journal.jsonl"
        log.write_bytes(log.read_bytes()[:-9])
    elif change == "bytes behind the journal":
        with (parts / "recordings" / "shard-00001.npy").open("ab") as file:
            file.write(b"half a recording")
        (parts / "recordings" / "shard-00002.npy").write_bytes(b"x")
    seen = reads(monkeypatch)
    if change == "low coverage refused":
        with pytest.raises(UserError, match=r"has data in 50\.0% of the parcels"):
            import_cohort(given)
        assert len(seen) == 1
        return
    import_cohort(given)
    n_files = len(list(given.source.iterdir()))
    assert len(seen) == n_files - n_kept
    fresh = replace(given, out=given.out.parent / "whole", name="cohort")
    import_cohort(fresh)
    assert contents(given.out).keys() == contents(fresh.out).keys()
    one, other = (Cohort.open(path).recordings for path in (given.out, fresh.out))
    assert one.index.equals(other.index)
    for i in range(len(one)):
        np.testing.assert_array_equal(one.read(i), other.read(i))


def test_low_coverage_that_stopped_an_import_can_be_skipped_on_the_next_call(given, monkeypatch):
    with pytest.raises(UserError, match=r"has data in 50\.0%"):
        import_cohort(replace(given, low_coverage="refuse"))
    seen = reads(monkeypatch)
    assert import_cohort(given).n_skipped_coverage == 1
    assert len(seen) == N - 5


def test_nothing_is_kept_when_asked_or_of_a_few_recordings(given):
    assert not stopped(replace(given, keep_parts=False), at=17).exists()
    assert not stopped(given, at=3).exists()


def test_workers_change_nothing_and_errors_come_in_order(given):
    import_cohort(replace(given, out=given.out.parent / "one", name="c"))
    import_cohort(replace(given, out=given.out.parent / "two", name="c", workers=2))
    same(given.out.parent / "one", given.out.parent / "two")
    parts = stopped(replace(given, workers=2), at=11)
    assert len((parts / "journal.jsonl").read_text().splitlines()) == 11


def test_two_imports_into_one_cohort_are_refused(given):
    stopped(given, at=17)
    from brainfusion.data.importers.config import ImportReport
    from brainfusion.data.importers.matching import make_layout
    from brainfusion.data.importers.sources import find_items

    report = ImportReport(source="", kind="npy")
    kind, items = find_items(given, report)
    first = journal.Journal(given, kind, make_layout(given, kind, items[0], report))
    first.open(items)
    with pytest.raises(UserError, match=r"another import is writing .*: wait for it, or give"):
        import_cohort(given)
    first.close(keep=True)
    import_cohort(given)


def test_an_import_that_is_killed_goes_on(given):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from brainfusion import cli\n"
        "from brainfusion.data.importers import reading\n"
        "slow = reading.to_atlas\n"
        "reading.to_atlas = lambda *a: (time.sleep(0.05), slow(*a))[1]\n"
        "cli.main(sys.argv[1:])"
    )
    words = ["import", given.source, "--out", given.out, "--atlas", given.atlas, "--tr-s", "0.72"]
    words += ["--low-coverage", "skip"]
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, words)])
    log = given.out.parent / ".cohort-parts" / "journal.jsonl"
    for _ in range(400):
        if log.is_file() and log.read_bytes().count(b"\n") >= 6:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    n_done = log.read_bytes().count(b"\n")
    assert 6 <= n_done < N
    import_cohort(given)
    import_cohort(replace(given, out=given.out.parent / "whole", name="cohort"))
    same(given.out, given.out.parent / "whole")
