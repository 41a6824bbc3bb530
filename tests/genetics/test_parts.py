from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from brainfusion.genetics.features import Provenance
from brainfusion.genetics.parts import Parts, hash_source, ready_blocks
from brainfusion.genetics.source import Block, Findings, Source
from brainfusion.genetics.stream import ReadyBlock, Stream
from brainfusion.runtime.errors import UserError

N, G, H = 12, 5, 3
PROVENANCE = Provenance(model="evo2", checkpoint="simulated", strands="averaged", simulated=True)


def truth():
    return np.random.default_rng(0).normal(size=(N, G, H)).astype(np.float32)


def open_stream(log: Path, fails_at: int | None = None) -> Stream:
    """A stream of one block a gene, which notes in `log` the blocks that are read."""
    vectors = truth()

    def load(start, stop):
        for gene in range(start, stop):
            with log.open("a") as handle:
                handle.write(f"{gene}\n")
            if gene == fails_at:
                raise UserError("a broken file")
            yield Block(
                rows=slice(0, N),
                columns=slice(gene, gene + 1),
                raw=vectors[:, gene : gene + 1],
                dtype="float32",
                findings=Findings(
                    covariates={"device": Counter({"H100": gene, "L40S": 1})},
                    lengths_bp={6 * gene, 600},
                    n_flagged=gene,
                ),
            )

    def convert(block):
        return ReadyBlock(
            rows=block.rows,
            columns=block.columns,
            vectors=block.raw,
            mask=np.ones(block.raw.shape[:2], dtype=bool),
            dtype=block.dtype,
            resolutions=("float32",),
            steps=("mean over chunks",),
            findings=block.findings,
        )

    source = Source(
        subjects=tuple(map(str, range(N))),
        genes=tuple(f"G{i}" for i in range(G)),
        layer=None,
        width=H,
        n_blocks=G,
        load=load,
    )
    return Stream(
        source,
        convert,
        PROVENANCE,
        width=H,
        where="test",
        findings_alarms=lambda found: [found],  # type: ignore[list-item]
        undeclared=lambda _: [],
    )


def gather(stream, open_again, **how):
    vectors = np.zeros((N, G, H), dtype=np.float32)
    for block in ready_blocks(stream, open_again, **how):
        vectors[block.rows, block.columns] = block.vectors
    return vectors


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def read_log(log):
    return [int(line) for line in log.read_text().split()]


def test_an_import_that_was_stopped_reads_only_what_is_missing(tmp_path, log):
    once = open_stream(tmp_path / "other-log")
    expected = gather(once, partial(open_stream, log))
    broken = open_stream(log, fails_at=3)
    with pytest.raises(UserError, match="a broken file"):
        gather(broken, partial(open_stream, log), parts=Parts(tmp_path / "parts", "key"))
    parts = Parts(tmp_path / "parts", "key")
    assert len(parts) == 3
    (tmp_path / "parts" / "00001.npz").unlink()
    log.unlink()
    again = open_stream(log)
    np.testing.assert_array_equal(gather(again, partial(open_stream, log), parts=parts), expected)
    np.testing.assert_array_equal(expected, truth())
    assert read_log(log) == [1, 3, 4]
    # What was learnt from the blocks is the same as without the stop.
    assert again.provenance == once.provenance
    assert again.alarms == once.alarms
    parts.remove()
    assert not (tmp_path / "parts").exists()


def test_parts_of_other_files_or_options_are_thrown_away(tmp_path, log):
    stream = open_stream(log)
    gather(stream, partial(open_stream, log), parts=Parts(tmp_path / "parts", "key"))
    assert len(Parts(tmp_path / "parts", "key")) == G
    other = Parts(tmp_path / "parts", "another key")
    assert other.discarded
    assert len(other) == 0


def test_the_key_follows_the_files_and_the_options(tmp_path):
    folder = tmp_path / "evo2"
    folder.mkdir()
    (folder / "OXT.pt").write_bytes(b"12")
    key = hash_source(folder, {"layer": "blocks.26"})
    assert hash_source(folder, {"layer": "blocks.26"}) == key
    assert hash_source(folder, {"layer": "blocks.20"}) != key
    (folder / "OXT.pt").write_bytes(b"123")
    changed = hash_source(folder, {"layer": "blocks.26"})
    (folder / "AVP.pt").write_bytes(b"1")
    assert len({key, changed, hash_source(folder, {"layer": "blocks.26"})}) == 3


def test_two_processes_give_what_one_gives_in_order(tmp_path, log):
    stream = open_stream(tmp_path / "other-log")
    got = gather(stream, partial(open_stream, log), n_workers=2)
    np.testing.assert_array_equal(got, truth())
    assert sorted(read_log(log)) == [0, 1, 2, 3, 4]
    assert not (tmp_path / "other-log").exists()  # this process read nothing
    assert stream.provenance.steps == ("mean over chunks",)


def test_an_error_in_a_process_of_its_own_is_the_users(tmp_path, log):
    stream = open_stream(log)
    with pytest.raises(UserError, match="a broken file"):
        gather(stream, partial(open_stream, log, fails_at=2), n_workers=2)
