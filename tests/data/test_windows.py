import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainfusion.data.recordings import Recordings, RecordingWriter
from brainfusion.data.windows import cut_window, training_windows, window_starts
from brainfusion.runtime.errors import UserError


@given(n_trs=st.integers(1, 300), window=st.integers(1, 300), stride=st.integers(1, 300))
def test_windows_cover_every_tr_and_end_flush(n_trs, window, stride):
    if n_trs < window or stride > window:
        with pytest.raises(UserError):
            window_starts(n_trs, window, stride=stride)
        return
    starts = window_starts(n_trs, window, stride=stride)
    seen = {tr for start in starts for tr in range(start, start + window)}
    assert seen == set(range(n_trs))
    assert starts[0] == 0
    assert starts[-1] == n_trs - window
    assert (np.diff(starts) > 0).all()
    assert (np.diff(starts) <= stride).all()


def test_the_default_stride_is_the_window():
    assert window_starts(1200, 160).tolist() == [0, 160, 320, 480, 640, 800, 960, 1040]
    assert window_starts(320, 160).tolist() == [0, 160]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Seven recordings; the value names recording and TR: 1000 * recording + TR."""
    folder = tmp_path_factory.mktemp("recordings")
    with RecordingWriter(folder, n_parcels=2) as writer:
        for i in range(7):
            bold = np.tile(1000.0 * i + np.arange(20 + i % 2), (2, 1))
            writer.add(bold, recording=f"r{i}", subject=f"s{i}", tr_s=2.0)
    return Recordings.open(folder)


def draw(recordings, step, *, batch_size=4, seed=0, rows=range(7), **options):
    return training_windows(
        recordings, list(rows), window_trs=8, batch_size=batch_size, seed=seed, step=step, **options
    )


def test_windows_are_contiguous_crops(recordings):
    batch = draw(recordings, 0, batch_size=50)
    assert batch.shape == (50, 2, 8)
    assert batch.dtype == np.float32
    assert (np.diff(batch, axis=2) == 1).all()
    np.testing.assert_array_equal(batch[:, 0], batch[:, 1])


def test_a_batch_is_a_pure_function_of_seed_and_step(recordings):
    draw(recordings, 3)
    np.testing.assert_array_equal(draw(recordings, 7), draw(recordings, 7))
    assert (draw(recordings, 7) != draw(recordings, 8)).any()
    assert (draw(recordings, 7) != draw(recordings, 7, seed=1)).any()


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_what_one_process_sees(recordings, world_size):
    whole = draw(recordings, 5, batch_size=4 * world_size)
    for rank in range(world_size):
        part = draw(recordings, 5, rank=rank, world_size=world_size)
        np.testing.assert_array_equal(part, whole[rank::world_size])


def test_every_recording_is_seen_once_a_pass(recordings):
    seen = np.concatenate([draw(recordings, step)[:, 0, 0] for step in range(7)]) // 1000
    for first in range(0, 28, 7):
        assert sorted(seen[first : first + 7]) == list(range(7))
    assert seen[:7].tolist() != seen[7:14].tolist()


def test_starts_are_uniform_with_the_last_window_included(recordings):
    batches = [draw(recordings, step, batch_size=64, rows=[0]) for step in range(40)]
    starts = np.concatenate(batches)[:, 0, 0]
    counts = np.bincount(starts.astype(int), minlength=13)
    assert len(counts) == 13  # starts 0 to 20 - 8
    # 2,560 draws over 13 starts: 197 each, standard deviation 13.5
    assert np.abs(counts - 2560 / 13).max() < 5 * 13.5


def test_the_whole_recording_is_transformed_before_it_is_cropped(recordings):
    plain = draw(recordings, 3)
    moved = draw(recordings, 3, transform=lambda bold, row: bold - bold[:, -1:])
    last = np.stack([recordings.read(int(row))[:, -1:] for row in plain[:, 0, 0] // 1000])
    np.testing.assert_array_equal(moved, plain - last)


def test_the_transform_is_told_the_row_and_may_change_the_length(recordings):
    def halved(bold, row):
        assert (bold[:, 0] // 1000 == row).all()
        return bold[:, ::2]

    batch = draw(recordings, 3, transform=halved)
    assert batch.shape == (4, 2, 8)
    assert (np.diff(batch, axis=2) == 2).all()
    with pytest.raises(UserError, match="a recording has 7 TRs but a window takes 8"):
        draw(recordings, 0, transform=lambda bold, row: bold[:, ::3])


def brainjepa_frames(n_trs, n_frames, share):
    """The reference's rule, written out."""
    start = share * (n_trs - 3 * n_frames)
    step = (3 * n_frames - 1) / (n_frames - 1)
    return [min(int(start + i * step), n_trs - 1) for i in range(n_frames)]


def test_brainjepas_frames_are_spread_over_three_times_as_many():
    bold = np.arange(50.0)[None]
    for share in (0.0, 0.3, 0.99):
        got = cut_window(bold, 16, share=share, frames="brainjepa")
        assert got[0].tolist() == brainjepa_frames(50, 16, share)
    assert cut_window(bold, 16, share=0.0, frames="brainjepa")[0, -1] == 47
    with pytest.raises(UserError, match="a recording has 50 TRs but a window takes 51"):
        cut_window(bold, 17, share=0.0, frames="brainjepa")


def test_batches_of_brainjepas_frames_are_drawn_over_the_whole_recording(recordings):
    options = {"window_trs": 6, "batch_size": 200, "seed": 0, "frames": "brainjepa"}
    batch = training_windows(recordings, [0], step=0, **options)
    assert batch.shape == (200, 2, 6)
    assert set(batch[:, 0, 0]) == {0.0, 1.0}  # 20 TRs, 18 spanned: starts up to just under 2
    assert batch.max() == 19 - 1
    np.testing.assert_array_equal(batch, training_windows(recordings, [0], step=0, **options))
    with pytest.raises(UserError, match="shorter than a window of 21 TRs"):
        training_windows(recordings, [0], step=0, **{**options, "window_trs": 7})


def test_recordings_that_are_too_short_are_counted(recordings):
    with pytest.raises(UserError, match=r"4 of 7 recordings are shorter than a window of 21 TRs"):
        training_windows(recordings, list(range(7)), window_trs=21, batch_size=1, seed=0, step=0)
    with pytest.raises(UserError, match="there is no recording to take windows from"):
        draw(recordings, 0, rows=[])


@pytest.mark.parametrize("frames", ["consecutive", "brainjepa"])
def test_cropping_makes_the_windows_that_transforming_the_whole_makes(tmp_path, frames):
    rng = np.random.default_rng(0)
    with RecordingWriter(tmp_path, n_parcels=3) as writer:
        for i in range(5):
            bold = rng.normal(size=(3, 40 + i)).astype(np.float32)
            writer.add(bold, recording=f"r{i}", subject="a", tr_s=1.0)
    recordings, made = Recordings.open(tmp_path), []

    def whole(bold, row):
        return bold - bold.mean(axis=1, keepdims=True) + row

    def crop(bold, row, part):
        made.append(bold[:, part].shape[1])
        return bold[:, part] - bold.mean(axis=1, keepdims=True) + row

    options = {"window_trs": 10, "batch_size": 4, "seed": 1, "frames": frames}
    for step in range(3):
        one = training_windows(recordings, range(5), step=step, transform=whole, **options)
        other = training_windows(recordings, range(5), step=step, crop=crop, **options)
        np.testing.assert_array_equal(one, other)
    assert made == [10] * 12
