"""`brainfusion finetune` on a small site: what it leaves, and what it refuses in one line."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brainfusion.alignment import load
from brainfusion.cli import finetune
from brainfusion.data.features import read_features
from brainfusion.encoders.checkpoints import load_pretrained
from brainfusion.runtime.checkpoint import load_weights, save_weights
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import read_json
from brainfusion.runtime.logs import MetricsLog, read_metrics
from brainfusion.runtime.signals import STOPPED

BRIEF = ("--max-steps", 4, "--eval-every", 1, "--micro-batch", 50, "--threads", 1)
HOW = ("--how", "last-1", "--lr", 0.02, "--encoder-lr-scale", 1, *BRIEF)


def tune(*words: object) -> None:
    assert finetune.main([str(word) for word in words]) == 0


def refused(*words: object) -> str:
    with pytest.raises(UserError) as error:
        tune(*words)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 700
    return text


@pytest.fixture(scope="module")
def place(site, tmp_path_factory):
    """A copy of the workspace, with Brain-JEPA's last block tuned."""
    work = tmp_path_factory.mktemp("tuned") / "work"
    shutil.copytree(site.workspace, work)
    place = ("--cohort", site.cohort, "--workspace", work)
    tune(*HOW, *place)
    return place


def run_dir(place, name: str = "brainjepa-last-1-evo2") -> Path:
    return place[3] / "align" / name


def test_a_run_leaves_the_files_of_an_alignment_and_the_tuned_encoder(place):
    files = {
        path.relative_to(run_dir(place)).as_posix()
        for path in run_dir(place).rglob("*")
        if path.is_file()
    }
    pair = {"embeddings/brain.parquet", "embeddings/dna.parquet", "config.yaml", "summary.json"}
    pair |= {"metrics.jsonl", "model/state.json", "model/model.safetensors"}
    assert pair | {f"control/{name}" for name in pair} <= files
    assert {"encoder/model.safetensors", "encoder/state.json"} <= files
    assert not any(name.startswith("control/encoder") for name in files)
    rows = read_metrics(run_dir(place) / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    summary = read_json(run_dir(place) / "summary.json")
    best = max(row["validation_auc"] for row in rows)
    assert summary["validation_auc"] == best >= rows[0]["validation_auc"]
    assert summary["meta"]["brain"] == "brainjepa-last-1"
    assert summary["flow"]


def test_step_0_is_the_alignment_of_the_frozen_features(place):
    before = read_json(place[3] / "align" / "brainjepa-evo2" / "summary.json")
    frozen = read_metrics(run_dir(place) / "metrics.jsonl")[0]
    # Float32 features in other batches; 12 validation people, so the AUC moves in steps of 1/264.
    assert frozen["validation_auc"] == pytest.approx(before["validation_auc"], abs=1 / 132)
    assert frozen["validation_information"] == pytest.approx(
        before["validation_information"], abs=1e-3
    )


def test_the_tuned_features_and_the_model_give_the_embeddings_of_the_run(place):
    features = read_features(place[3] / "features" / "brainjepa-last-1.parquet")
    found = read_features(run_dir(place) / "embeddings" / "brain.parquet")
    again = load(run_dir(place)).embed_brain(features.select(found.subjects))
    np.testing.assert_allclose(again, found.vectors, atol=1e-4)
    encoder = load_pretrained(run_dir(place) / "encoder")
    assert features.provenance["checkpoint_hash"] == encoder.hash
    assert encoder.state["finetuned"]["how"] == "last-1"


def test_embed_reads_the_tuned_encoder_as_any_checkpoint(place, done, tmp_path):
    out = tmp_path / "again.parquet"
    words = ("--pooling", "parcel-std", "--out", out, *place)
    done("embed", "--model", "brainjepa", "--checkpoint", run_dir(place) / "encoder", *words)
    again, first = (
        read_features(path) for path in (out, place[3] / "features" / "brainjepa-last-1.parquet")
    )
    assert again.subjects == first.subjects
    np.testing.assert_allclose(again.vectors, first.vectors, rtol=1e-4, atol=1e-5)


def test_brain_jepa_keeps_its_positions_and_what_was_not_tuned(site, place):
    before = load_weights(site.checkpoint("brainjepa"))
    after = load_weights(run_dir(place) / "encoder")
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert all(key.startswith(("target_encoder.blocks.", "target_encoder.norm.")) for key in moved)
    if read_json(run_dir(place) / "summary.json")["best_step"]:
        assert moved
    assert "target_encoder.position.gradient" in after


def test_retrieval_is_scored_by_the_name_of_the_tuned_features(place, done):
    words = ("--permutations", 19, "--bootstrap", 20)
    said = done("retrieve", "--brain", "brainjepa-last-1", "--dna", "evo2", *words, *place)
    assert "brain to DNA" in said.out
    assert "shuffled pairs (control)" in said.out


def test_lora_on_brainlm_with_random_windows(place, site):
    from brainfusion.cli import main

    pair = ("--brain", "brainlm", "--dna", "evo2")
    assert main([str(w) for w in ("align", *pair, "--max-steps", 5, "--no-control", *place)]) == 0
    tune(*pair, "--windows", 1, "--name", "mine", "--no-control", "--rank", 2, *BRIEF, *place)
    after = load_weights(run_dir(place, "mine-evo2") / "encoder")
    before = load_weights(site.checkpoint("brainlm"))
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert all(key.startswith("layers.") and "attention" in key for key in moved)
    assert not (run_dir(place, "mine-evo2") / "control").exists()


def test_what_does_not_fit_is_refused_in_one_line(place, site, tmp_path):
    work = place[3]
    said = refused("--checkpoint", work / "pretrain" / "brainlm", *BRIEF, *place)
    assert "holds a brainlm encoder, expected brainjepa" in said
    other = shutil.copytree(run_dir(place) / "encoder", tmp_path / "other")
    weights = load_weights(other)
    weights["target_encoder.norm.bias"] += 1.0
    save_weights(other / "model.safetensors", weights)
    said = refused("--checkpoint", other, *BRIEF, *place)
    assert "is an alignment of features of brainjepa with the hash" in said
    assert "give the checkpoint that these features were made with" in said
    assert "expected a name of its own" in refused("--name", "brainjepa", *BRIEF, *place)
    assert "how='lorra' is unknown. Did you mean 'lora'?" in refused("--how", "lorra", *place)
    assert "unknown model 'brainjpa'" in refused("--brain", "brainjpa", *place)
    assert "no trained alignment in" in refused("--alignment", tmp_path, *BRIEF, *place)
    said = refused("--checkpoint-every", "-1", *place)
    assert "--checkpoint-every -1: expected 0 or more" in said
    assert "the encoder has 3 blocks; use last-3" in refused("--how", "last-7", *BRIEF, *place)
    # A run that was refused leaves nothing behind.
    assert not list((work / "align").glob(".*"))


# -- stopped, and gone on with ---------------------------------------------------------------------


@pytest.fixture
def scratch(site, tmp_path):
    """A workspace in which nothing was tuned."""
    work = tmp_path / "work"
    for part in ("pretrain", "features", "align"):
        shutil.copytree(site.workspace / part, work / part)
    return ("--cohort", site.cohort, "--workspace", work)


def assert_same(a, b) -> None:
    """Two workspaces with the same tuned run, control and features, to the bit."""
    one, other = run_dir(a), run_dir(b)
    for run in ("", "control"):
        for file in ("embeddings/brain.parquet", "scores/dna.parquet"):
            first, second = (read_features(x / run / file) for x in (one, other))
            np.testing.assert_array_equal(first.vectors, second.vectors)
        rows = [
            [{k: v for k, v in row.items() if k not in ("seconds", "peak_mib")} for row in found]
            for found in (read_metrics(x / run / "metrics.jsonl") for x in (one, other))
        ]
        assert rows[0] == rows[1]
        assert not (other / run / "checkpoints").exists()
    before, after = (load_weights(x / "encoder") for x in (one, other))
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    first, second = (read_features(x[3] / "features" / "brainjepa-last-1.parquet") for x in (a, b))
    np.testing.assert_array_equal(first.vectors, second.vectors)
    assert not list((b[3] / "align").glob(".*"))
    assert not (other / "features.parquet").exists()


def test_a_run_that_is_stopped_twice_goes_on_to_the_bit(place, scratch, monkeypatch, capsys):
    real, seen = MetricsLog.write, [0]

    def write(self: MetricsLog, **row: Any) -> None:
        real(self, **row)
        seen[0] += 1
        if seen[0] in (3, 8):  # step 2 of the run, and then of the control
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "write", write)
    words = [str(word) for word in (*HOW, *scratch)]
    for _ in range(2):
        assert finetune.main(words) == STOPPED
        assert "asked to stop: saved at step 2" in capsys.readouterr().err
        assert not run_dir(scratch).exists()
        said = refused(*HOW, "--seed", 3, *scratch)
        assert "holds a stopped run that was made otherwise (seed: 0 -> 3)" in said
        assert "--resume never" in said
    assert finetune.main(words) == 0
    said = capsys.readouterr().err
    assert said.count("going on with the fine-tuning that was stopped") == 2
    assert_same(place, scratch)


@pytest.mark.slow
def test_a_stopped_run_is_forgotten_on_request(scratch, monkeypatch):
    real = MetricsLog.write

    def write(self: MetricsLog, **row: Any) -> None:
        real(self, **row)
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "write", write)
    assert finetune.main([str(word) for word in (*HOW, *scratch)]) == STOPPED
    monkeypatch.setattr(MetricsLog, "write", real)
    tune(*HOW, "--seed", 3, "--no-control", "--resume", "never", *scratch)
    assert run_dir(scratch).exists()


KILL = """
import os, signal, sys
from brainfusion.cli import main
from brainfusion.runtime.logs import MetricsLog
real, seen = MetricsLog.write, [0]
def write(self, **row):
    real(self, **row)
    seen[0] += 1
    if seen[0] == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
MetricsLog.write = write
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_kill_9_at_any_time_loses_nothing_but_time(place, scratch):
    words = [str(x) for x in ("finetune", *HOW, "--checkpoint-every", 1, *scratch)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for row in (4, 3, 5):  # at step 3 of the run; at steps 0 and 4 of the control
        done = subprocess.run([sys.executable, "-c", KILL, str(row), *words], env=env, check=False)
        assert done.returncode == -signal.SIGKILL
        assert not run_dir(scratch).exists()
    assert (
        subprocess.run([sys.executable, "-m", "brainfusion.cli", *words], env=env).returncode == 0
    )
    assert_same(place, scratch)
