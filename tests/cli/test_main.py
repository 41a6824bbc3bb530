import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import brainfusion
from brainfusion.cli import COMMANDS, main
from brainfusion.data.features import read_features
from brainfusion.runtime.files import read_json
from tests.cli.conftest import SMALL

REPOSITORY = Path(brainfusion.__file__).parents[1]


def start(*words, cwd, **env):
    """Run a command in a process of its own."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def torchrun(script, *words, cwd):
    """What `torchrun --nproc_per_node 2 scripts/...` does."""
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    return start(*two, REPOSITORY / "scripts" / script, *words, cwd=cwd)


# -- the door --------------------------------------------------------------------------------------


def test_help_lists_every_command(done, call):
    said = done("--help")
    assert [line.split()[0] for line in said.out.splitlines() if line.startswith("  ")] == list(
        COMMANDS
    )
    # Nothing asked is an error, but one that helps.
    assert call().code == 2
    assert call().out == said.out


def test_the_version_is_printed(done):
    assert done("--version").out.strip() == brainfusion.__version__


def test_help_and_version_load_no_torch(tmp_path):
    code = (
        "import sys; from brainfusion.cli import main; main(['--help']); main(['--version']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'polars', 'tyro', 'numpy')))"
    )
    assert start("-c", code, cwd=tmp_path).returncode == 0


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    script = REPOSITORY / "scripts" / "align.py"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as closed:
        said = subprocess.run(
            [sys.executable, script, "--help"], stdout=closed, stderr=subprocess.PIPE, check=False
        )
    assert (said.returncode, said.stderr) == (0, b"")


def test_a_bug_is_not_dressed_up_as_wrong_input(monkeypatch):
    from brainfusion.cli import report

    def fail(argv):
        raise RuntimeError("a bug")

    monkeypatch.setattr(report, "main", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["report"])


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "scripts").glob("*.py")), ids=lambda p: p.stem
)
def test_a_script_calls_its_command_and_holds_nothing_else(path):
    text = path.read_text()
    [command] = re.findall(r'run\("(\w+)"\)', text)
    assert command in COMMANDS
    known = {"pretrain_encoder": "pretrain", "extract_dna": "extract"}
    assert command == known.get(path.stem, path.stem)
    assert len(text.splitlines()) <= 10


# -- two processes ---------------------------------------------------------------------------------


def test_torchrun_pretrains_in_two_processes(site, tmp_path):
    small = [*SMALL, "--log-every", 1, "--cohort", site.cohort]
    place = ("--workspace", tmp_path / "two")
    said = torchrun("pretrain_encoder.py", "--model", "brainlm", *small, *place, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "2 process(es), cpu" in said.stderr
    # One process speaks.
    assert said.stderr.count("checkpoint: ") == 1
    summary = read_json(tmp_path / "two" / "pretrain" / "brainlm" / "summary.json")
    assert summary["world_size"] == 2
    assert main(["embed", "--model", "brainlm", *map(str, (*small[-2:], *place))]) == 0
    features = read_features(tmp_path / "two" / "features" / "brainlm.parquet")
    assert np.isfinite(features.vectors).all()


@pytest.mark.slow
def test_torchrun_aligns_on_the_demo_cohort_making_what_is_missing(site, tmp_path):
    # A workspace with a cohort and an encoder, but neither features nor DNA embeddings.
    root = tmp_path / "runs" / "demo"
    shutil.copytree(site.cohort, root / "cohort")
    shutil.rmtree(root / "cohort" / "genetics")
    shutil.copytree(site.workspace / "pretrain" / "brainjepa", root / "pretrain" / "brainjepa")
    pair = ("--brain", "brainjepa", "--dna", "evo2", "--max-steps", 5, "--no-control")
    said = torchrun("align.py", *pair, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "features/brainjepa.parquet is missing: embedding the demo cohort" in said.stderr
    assert "genetics/evo2 is missing: importing" in said.stderr
    run = root / "align" / "brainjepa-evo2"
    assert read_json(run / "summary.json")["n_processes"] == 2
    assert {path.name for path in run.parent.iterdir()} == {"brainjepa-evo2"}
    for tower in ("brain", "dna"):
        vectors = read_features(run / "embeddings" / f"{tower}.parquet").vectors
        assert vectors.shape == (120, 512)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    # The same features as one process makes.
    np.testing.assert_allclose(
        read_features(root / "features" / "brainjepa.parquet").vectors,
        read_features(site.workspace / "features" / "brainjepa.parquet").vectors,
        atol=1e-5,
    )
