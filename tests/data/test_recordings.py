import math
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainfusion.data.cohort import Cohort, write_cohort_tables
from brainfusion.data.recordings import INDEX_SCHEMA, Recordings, RecordingWriter
from brainfusion.data.windows import training_windows
from brainfusion.runtime.errors import UserError
from tests.data.cohorts import noise, small_atlas


def write(folder, arrays, **options):
    with RecordingWriter(folder, n_parcels=len(arrays[0]), **options) as writer:
        for i, bold in enumerate(arrays):
            writer.add(bold, recording=f"r{i}", subject=f"00{i // 2}", tr_s=0.72)
    return Recordings.open(folder)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=12), n_rows=st.integers(0, 3))
def test_what_is_read_is_what_was_written(tmp_path_factory, lengths, n_rows):
    rng = np.random.default_rng(0)
    arrays = [noise(rng, 3, n_trs) for n_trs in lengths]
    folder = tmp_path_factory.mktemp("recordings")
    recordings = write(folder, arrays, shard_bytes=4 * 3 * 6 * n_rows)
    assert len(recordings) == len(arrays)
    assert recordings.index["recording"].to_list() == [f"r{i}" for i in range(len(arrays))]
    for i, bold in enumerate(arrays):
        np.testing.assert_array_equal(recordings.read(i), bold)
    np.testing.assert_array_equal(recordings.n_trs, lengths)
    for shard in recordings.index["shard"].unique():
        assert np.load(folder / shard).shape[2] in lengths  # any .npy reader opens a shard


def test_shards_stay_under_their_size(tmp_path):
    rng = np.random.default_rng(0)
    recordings = write(tmp_path, [noise(rng, 4, 25) for _ in range(7)], shard_bytes=1000)
    sizes = [np.load(path).nbytes for path in sorted(tmp_path.glob("*.npy"))]
    assert sizes == [800, 800, 800, 400]
    assert recordings.index["row"].to_list() == [0, 1, 0, 1, 0, 1, 0]


def test_a_recording_is_a_read_only_view_of_the_file(tmp_path):
    recordings = write(tmp_path, [noise(np.random.default_rng(0))])
    bold = recordings.read(0)
    assert isinstance(bold, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        bold[0, 0] = 1.0


def test_a_pickled_store_carries_no_data(tmp_path):
    recordings = write(tmp_path, [noise(np.random.default_rng(0), 4, 10_000)])
    recordings.read(0)
    pickled = pickle.dumps(recordings)
    assert len(pickled) < 20_000
    np.testing.assert_array_equal(pickle.loads(pickled).read(0), recordings.read(0))


def test_a_missing_parcel_is_kept_as_nan_and_counted(tmp_path):
    bold = noise(np.random.default_rng(0))
    bold[1] = np.nan
    recordings = write(tmp_path, [bold])
    np.testing.assert_array_equal(recordings.read(0), bold)
    assert recordings.index["coverage"].to_list() == [0.75]


def test_rows_finds_people_in_the_order_of_the_index(tmp_path):
    rng = np.random.default_rng(0)
    recordings = write(tmp_path, [noise(rng) for _ in range(6)])
    assert recordings.rows(["002", "000", "999"]).tolist() == [0, 1, 4, 5]
    assert recordings.rows([]).tolist() == []


def spoiled(kind):
    bold = noise(np.random.default_rng(0)).astype(np.float64)
    if kind == "nan":
        bold[1, 3] = bold[2, 5] = bold[2, 6] = np.nan
    elif kind == "inf":
        bold[0, 0] = np.inf
    elif kind == "too large":
        bold[0, 0] = 1e300
    elif kind == "all nan":
        bold[:] = np.nan
    elif kind == "parcels":
        bold = bold[:3]
    elif kind == "flat":
        bold = bold[0]
    return bold


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", "recording 'r0' has 3 single NaN values in 2 parcels: expected numbers"),
        ("inf", "recording 'r0' has 1 infinite values"),
        ("too large", "recording 'r0' has 1 infinite values"),
        ("all nan", "recording 'r0' is NaN in all 4 parcels"),
        ("parcels", "has 3 parcels but the atlas has 4. Parcel order carries meaning"),
        ("flat", r"has shape \[20\], expected \[parcels, TRs\]"),
    ],
)
def test_a_bad_recording_is_refused_and_leaves_no_index(tmp_path, kind, message):
    with (
        pytest.raises(UserError, match=message) as error,
        RecordingWriter(tmp_path, n_parcels=4) as writer,
    ):
        writer.add(spoiled(kind), recording="r0", subject="a", tr_s=2.0)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"index.parquet does not exist"):
        Recordings.open(tmp_path)


def test_a_repeated_recording_name_and_a_bad_tr_are_refused(tmp_path):
    bold = noise(np.random.default_rng(0))
    with RecordingWriter(tmp_path, n_parcels=4) as writer:
        writer.add(bold, recording="r0", subject="a", tr_s=None)
        with pytest.raises(UserError, match="'r0' was added twice"):
            writer.add(bold, recording="r0", subject="b", tr_s=None)
        with pytest.raises(UserError, match="must be seconds above zero"):
            writer.add(bold, recording="r1", subject="b", tr_s=0.0)
    assert len(Recordings.open(tmp_path)) == 1


def test_a_folder_with_recordings_is_not_written_over(tmp_path):
    recordings = write(tmp_path, [noise(np.random.default_rng(0))])
    with (
        pytest.raises(UserError, match="is not empty: recordings are written into a new folder"),
        RecordingWriter(tmp_path, n_parcels=4),
    ):
        pass
    assert len(recordings) == 1


def test_a_truncated_shard_is_refused_when_it_is_opened(tmp_path):
    write(tmp_path, [noise(np.random.default_rng(0)) for _ in range(3)])
    shard = tmp_path / "shard-00000.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4])
    with pytest.raises(UserError, match=r"is truncated: 1084 bytes of 1088 for \[3, 4, 20\]"):
        Recordings.open(tmp_path)
    shard.write_bytes(whole[:40])
    with pytest.raises(UserError, match=r"is not a whole .npy file"):
        Recordings.open(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00000.npy does not exist but index.parquet lists"):
        Recordings.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop("row"), "has no column 'row'"),
        (lambda t: t.clear(), "lists no recording"),
        (lambda t: t.with_columns(pl.lit("x").alias("recording")), "1 recording names repeat"),
        (lambda t: t.with_columns(pl.col("row") + 1), "belong to different imports"),
        (lambda t: t.with_columns(pl.col("n_trs") + 1), "belong to different imports"),
        (lambda t: t.with_columns(pl.lit(1).alias("subject")), "must be text"),
        (lambda t: t.with_columns(pl.lit(None).alias("session")), "has empty cells"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, change, message):
    write(tmp_path, [noise(np.random.default_rng(0)) for _ in range(2)])
    path = tmp_path / "index.parquet"
    change(pl.read_parquet(path)).write_parquet(path)
    with pytest.raises(UserError, match=message):
        Recordings.open(tmp_path)


def test_shards_with_other_parcels_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    write(tmp_path, [noise(rng, 4, 20), noise(rng, 4, 21)])
    np.save(tmp_path / "shard-00001.npy", np.zeros((1, 5, 21), dtype=np.float32))
    with pytest.raises(UserError, match="has 5 parcels but the shards before it 4"):
        Recordings.open(tmp_path)


# -- resuming -------------------------------------------------------------------------------


@pytest.mark.parametrize("n_kept", [1, 4, 6, 9])
def test_a_writer_that_is_resumed_writes_the_same_bytes(tmp_path, n_kept):
    rng = np.random.default_rng(0)
    arrays = [noise(rng, 3, 5 + i % 3) for i in range(9)]

    def add(writer, start, stop):
        return [
            writer.add(arrays[i], recording=f"r{i}", subject="a", tr_s=1.0)
            for i in range(start, stop)
        ]

    options = {"n_parcels": 3, "shard_bytes": 4 * 3 * 7 * 2}
    with RecordingWriter(tmp_path / "whole", **options) as writer:
        add(writer, 0, 9)
    stopped = RecordingWriter(tmp_path / "stopped", **options)
    stopped.__enter__()
    rows = add(stopped, 0, n_kept)
    add(stopped, n_kept, 9)  # written, but in nobody's books
    with RecordingWriter(tmp_path / "stopped", **options, resume=rows) as writer:
        add(writer, n_kept, 9)
    whole, resumed = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("whole", "stopped")
    )
    assert whole == resumed
    shard = tmp_path / "stopped" / rows[0][3]
    shard.write_bytes(shard.read_bytes()[:130])
    with pytest.raises(UserError, match="is shorter than what was written to it: remove"):
        RecordingWriter(tmp_path / "stopped", **options, resume=rows).__enter__()


# -- a large cohort -------------------------------------------------------------------------

N_LARGE, LARGE = 40_000, (424, 490)


def mapped_kib() -> int:
    """Resident pages of mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile"):
            return int(line.split()[1])
    return 0


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """40,000 recordings of 424 x 490, 31 GiB of which none is on the disk."""
    path = tmp_path_factory.mktemp("large")
    n_parcels, n_trs = LARGE
    ids = [f"{1_000_000 + i}" for i in range(N_LARGE)]
    subjects = pl.DataFrame({"subject": ids})
    atlas = small_atlas(n_parcels)
    write_cohort_tables(path, name="large", origin="imported", subjects=subjects, atlas=atlas)
    folder, n_rows = path / "recordings", 300
    folder.mkdir()
    rows = [
        (f"{s}_2", s, "2", f"shard-{i // n_rows:05d}.npy", i % n_rows, n_trs, 0.735, 1.0)
        for i, s in enumerate(ids)
    ]
    pl.DataFrame(rows, schema=INDEX_SCHEMA, orient="row").write_parquet(folder / "index.parquet")
    for k in range(math.ceil(N_LARGE / n_rows)):
        shape = (min(n_rows, N_LARGE - k * n_rows), n_parcels, n_trs)
        with (folder / f"shard-{k:05d}.npy").open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + 4 * math.prod(shape))
    return path


def test_a_cohort_of_40000_opens_in_under_a_second(large):
    import time

    begin = time.process_time()
    cohort = Cohort.open(large)
    assert time.process_time() - begin < 1.0  # 0.05 s measured
    assert len(cohort.recordings) == N_LARGE


@pytest.mark.slow
def test_reading_a_large_cohort_keeps_no_page_of_what_was_read(large):
    recordings = Cohort.open(large).recordings
    recordings.read(0).sum()
    before = mapped_kib()
    for row in range(0, N_LARGE, 200):  # 200 recordings of all 134 shards: 158 MiB
        recordings.read(row).sum()
    assert mapped_kib() - before < 8 * 1024
    windows = training_windows(
        recordings, np.arange(N_LARGE), window_trs=200, batch_size=16, seed=0, step=3
    )
    assert windows.shape == (16, 424, 200)
    assert mapped_kib() - before < 8 * 1024


def test_threads_may_read_at_once(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [noise(rng, 4, 25) for _ in range(40)]
    recordings = write(tmp_path, arrays, shard_bytes=500)
    recordings = Recordings(recordings.folder, recordings.index, 4)  # headers are read on the way
    gate = threading.Barrier(4)

    def read(start):
        gate.wait()
        return [recordings.read(i % 40).copy() for i in range(start, start + 80)]

    with ThreadPoolExecutor(4) as pool:
        for start, found in zip(range(4), pool.map(read, range(4)), strict=True):
            for i, bold in enumerate(found, start=start):
                np.testing.assert_array_equal(bold, arrays[i % 40])
