"""Two real gloo processes embed what one embeds, also after they were killed."""

import os
import signal
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch.multiprocessing as mp

from brainfusion.data.atlas import Atlas
from brainfusion.data.cohort import Cohort
from brainfusion.data.features import read_features
from brainfusion.encoders import embed as embedding
from brainfusion.encoders.embed import EmbedSettings, embed_to_file, parts_folder
from brainfusion.encoders.parts import Parts
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import UserError
from tests.encoders.own_cohort import fresh, written
from tests.encoders.tiny_cohort import ATLAS, XYZ_MM, bold, tiny_cohort
from tests.ranks import run_ranks

MODELS = ("brainlm", "brainjepa")
# Of three lengths, some people twice, one not at all.
SCANNED = [(i % 17, (64, 64, 80, 130)[i % 4]) for i in range(23)]
SHARD_MIB, N_WIDE, WIDE = 8, 256, 2000


def settings(batch_size: int = 3) -> EmbedSettings:
    return EmbedSettings(pooling="parcel-mean", batch_size=batch_size)


def memory(cohort: Path, folder: Path, ranks: Ranks) -> float:
    """MiB by which embedding a cohort raises the peak of this process.

    From Linux's own books: `ru_maxrss` of a spawned process starts at its parent's.
    """
    opened, encoder = Cohort.open(cohort), fresh("brainjepa")
    few = EmbedSettings(pooling="mean", batch_size=4)
    embed_to_file(folder / "warm.parquet", encoder, Cohort.open(folder / "small"), few, ranks=ranks)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = high_water_mib()
    embed_to_file(folder / "wide.parquet", encoder, opened, few, ranks=ranks)
    return high_water_mib() - before


def high_water_mib() -> float:
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) / 1024


def killed(rank: int, world_size: int, cohort: Path, folder: Path) -> None:
    """Die of SIGKILL in the third batch, as a job does that runs out of time."""
    real, count = embedding.FrozenEncoder.__call__, 0

    def dies(self, x):
        nonlocal count
        count += 1
        if count == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, x)

    ranks = Ranks(rank=rank, world_size=world_size)
    with mock.patch.object(embedding.FrozenEncoder, "__call__", dies):
        for model in MODELS:
            embedding.embed(
                fresh(model),
                Cohort.open(cohort),
                settings(batch_size=2),
                parts=parts_folder(folder / f"{model}.parquet"),
                ranks=ranks,
                save_every_s=0.0,
            )


def together(rank: int, world_size: int, cohort: Path, folder: Path) -> dict[str, object]:
    ranks = Ranks(rank=rank, world_size=world_size)
    result: dict[str, object] = {"mib": memory(folder / "wide", folder, ranks)}
    for model in MODELS:
        out = folder / "two" / f"{model}.parquet"
        written = embed_to_file(out, fresh(model), Cohort.open(cohort), settings(), ranks=ranks)
        result[model] = written is not None
    # Go on where one process was stopped, and refuse what another encoder left.
    real, counts = embedding.FrozenEncoder.__call__, [0]

    def counting(self, x):
        counts[0] += len(x)
        return real(self, x)

    encoder, opened = fresh("brainlm"), Cohort.open(cohort)
    with mock.patch.object(embedding.FrozenEncoder, "__call__", counting):
        embed_to_file(folder / "begun.parquet", encoder, opened, settings(), ranks=ranks)
    result["went on with"] = counts[0]
    with pytest.raises(UserError) as caught:
        embed_to_file(folder / "other.parquet", encoder, opened, settings(), ranks=ranks)
    result["refused"] = str(caught.value)
    return result


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    folder = tmp_path_factory.mktemp("cohort")
    return tiny_cohort(folder, n_people=18, scanned=SCANNED, missing=0.1)


@pytest.fixture(scope="module")
def one(cohort: Cohort) -> dict[str, np.ndarray]:
    """What one process makes of it in one go."""
    found = {}
    for model in MODELS:
        embedded = embedding.embed(fresh(model), cohort, settings(batch_size=16))
        assert embedded is not None
        assert len(embedded.subjects) == 17
        found[model] = embedded.vectors
    return found


def begin(model: str, cohort: Cohort, out: Path, *, n_batches: int) -> None:
    """Leave the parts of a run that was stopped."""
    batches = embedding.batches_of_one_length

    def fewer(*args):
        return batches(*args)[:n_batches]

    with (
        mock.patch.object(embedding, "batches_of_one_length", fewer),
        mock.patch.object(Parts, "means", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        embedding.embed(fresh(model), cohort, settings(), parts=parts_folder(out))


@pytest.fixture(scope="module")
def two(
    cohort: Cohort, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, object]]]:
    """The folder of the runs, and what each of the two ranks returned."""
    folder = tmp_path_factory.mktemp("ranks")
    rng = np.random.default_rng(0)
    xyz = np.concatenate([XYZ_MM, rng.normal(size=(WIDE, 3))]).astype(np.float32)
    names = (*ATLAS.parcels, *(f"more {i}" for i in range(WIDE)))
    # The encoder's parcels lie all over a recording, so that all of its pages are read.
    order = rng.permutation(len(names))
    atlas = Atlas(name="wide", parcels=tuple(names[i] for i in order), xyz_mm=xyz[order])
    more = rng.normal(size=(WIDE, 64)).astype(np.float32)

    def wide(n: int) -> list[tuple[str, np.ndarray, float | None]]:
        return [(f"s{i}", np.concatenate([bold(rng), more])[order], 2.0) for i in range(n)]

    written(folder / "small", wide(4), atlas)
    written(folder / "wide", wide(N_WIDE), atlas, shard_bytes=SHARD_MIB * 2**20)
    begin("brainlm", cohort, folder / "begun.parquet", n_batches=2)
    begin("brainjepa", cohort, folder / "other.parquet", n_batches=2)
    return folder, run_ranks(together, cohort.path, folder)


@pytest.mark.parametrize("model", MODELS)
def test_two_processes_embed_what_one_embeds(one, two, model):
    folder, results = two
    assert [result[model] for result in results] == [True, False]  # the main one writes
    found = read_features(folder / "two" / f"{model}.parquet")
    np.testing.assert_allclose(found.vectors, one[model], atol=1e-5)
    assert not parts_folder(folder / "two" / f"{model}.parquet").exists()


def test_two_processes_go_on_where_one_was_stopped(one, two):
    folder, results = two
    assert sum(result["went on with"] for result in results) == 23 - 2 * 3
    assert min(result["went on with"] for result in results) > 0
    found = read_features(folder / "begun.parquet")
    np.testing.assert_allclose(found.vectors, one["brainlm"], atol=1e-5)


def test_all_processes_refuse_the_parts_of_another_run(two):
    folder, results = two
    for result in results:
        assert "encoder brainjepa -> brainlm" in result["refused"]
    assert any(parts_folder(folder / "other.parquet").glob("part-*.npy"))


def test_memory_does_not_grow_with_the_cohort(two):
    """Each recording has 2,000 parcels that the encoder does not read."""
    folder, results = two
    n_bytes = sum(path.stat().st_size for path in (folder / "wide" / "recordings").glob("*.npy"))
    assert n_bytes > 120 * 2**20
    for result in results:
        assert result["mib"] < 3 * SHARD_MIB  # one or two shards are mapped


def test_processes_that_were_killed_lose_a_batch_each_and_one_goes_on(one, cohort, tmp_path):
    with pytest.raises(mp.ProcessExitedException) as caught:
        run_ranks(killed, cohort.path, tmp_path)
    assert caught.value.signal_name == "SIGKILL"
    out = tmp_path / "brainlm.parquet"
    assert not out.exists()
    n_done = len(Parts(parts_folder(out)).done())
    assert 2 <= n_done <= 8  # two batches of two each, or fewer where the other died first
    count, real = 0, embedding.FrozenEncoder.__call__

    def counts(self, x):
        nonlocal count
        count += len(x)
        return real(self, x)

    with mock.patch.object(embedding.FrozenEncoder, "__call__", counts):
        embed_to_file(out, fresh("brainlm"), cohort, settings(batch_size=5))
    assert count == 23 - n_done
    np.testing.assert_allclose(read_features(out).vectors, one["brainlm"], atol=1e-5)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["brainlm.parquet"]
