"""Alarms end to end: files in, alarms out, and errors where strict."""

import json

import numpy as np
import polars as pl
import pytest
import torch

from brainfusion import genetics
from brainfusion.runtime.errors import UserError

N, WIDTH = 24, 64
SUBJECTS = [f"{i:04d}" for i in range(N)]
GENES = ["AVP", "OXT"]
DECLARED = {
    "evo2": {"pooling": "mean", "strands": "averaged", "layer": "blocks.26"},
    "generator": {"pooling": "separator", "strands": "fwd_only"},
    "caduceus": {"pooling": "mean", "strands": "averaged"},
}


def declare(folder, model="generator", **changes):
    values = {"model": model, "checkpoint": "simulated", "simulated": True, **DECLARED[model]}
    (folder / "provenance.json").write_text(json.dumps({**values, **changes}))


def table(**columns) -> pl.DataFrame:
    vectors = np.random.default_rng(0).normal(size=(N * 2, WIDTH)).astype(np.float32)
    return pl.DataFrame(
        {
            "eid": np.repeat(SUBJECTS, 2).tolist(),
            "gene_id": GENES * N,
            "vector": pl.Series(vectors.tolist(), dtype=pl.List(pl.Float32)),
            **columns,
        }
    )


def alarms(model, path) -> dict:
    return {alarm.name: alarm for alarm in genetics.read(model, path).alarms}


@pytest.mark.parametrize(
    "column", ["device", "package_version", "case", "window", "reference_version", "block_size"]
)
def test_a_table_of_several_makings_is_an_alarm_and_strictly_an_error(tmp_path, column):
    declare(tmp_path)
    values = ["a"] * (N + N // 2) + ["b"] * (N // 2)
    table(**{column: values}).write_parquet(tmp_path / "t.parquet")
    found = alarms("generator", tmp_path)
    assert found[f"mixed {column}"].figure == pytest.approx(0.25)
    assert str(found[f"mixed {column}"]).count(";") == 1  # finding; cure
    with pytest.raises(UserError, match=f"mixed {column}: 2 values"):
        genetics.read("generator", tmp_path, strict=True)
    table(**{column: ["a"] * 2 * N}).write_parquet(tmp_path / "t.parquet")
    assert alarms("generator", tmp_path) == {}


def test_gene_files_that_name_different_devices_are_an_alarm(tmp_path):
    from safetensors.torch import save_file

    declare(tmp_path, "evo2")
    (tmp_path / "subjects.txt").write_text("\n".join(SUBJECTS))
    for gene, device in zip(GENES, ["H100", "L40S"], strict=True):
        tensor = {"blocks.26": torch.randn(N, WIDTH)}
        save_file(tensor, tmp_path / f"{gene}.safetensors", metadata={"device": device})
    assert alarms("evo2", tmp_path)["mixed device"].figure == 0.5


def test_files_of_several_types_are_an_alarm(tmp_path):
    declare(tmp_path, "evo2")
    (tmp_path / "genes.txt").write_text("\n".join(GENES))
    for i, subject in enumerate(SUBJECTS):
        tensor = torch.randn(2, WIDTH)
        torch.save(tensor.bfloat16() if i < 6 else tensor, tmp_path / f"{subject}.pt")
    found = alarms("evo2", tmp_path)
    assert found["mixed dtype"].figure == pytest.approx(0.25)


def test_carriers_of_indels_are_an_alarm_for_generator_and_not_for_evo2(tmp_path):
    flags = [1] * 6 + [0] * (2 * N - 6)
    table(has_indel=flags).write_parquet(tmp_path / "t.parquet")
    declare(tmp_path)
    assert alarms("generator", tmp_path)["indel carriers"].figure == pytest.approx(6 / 48)
    with pytest.raises(UserError, match=r"indel carriers: 12\.5% of the vectors"):
        genetics.read("generator", tmp_path, strict=True)
    declare(tmp_path, "evo2")
    assert alarms("evo2", tmp_path) == {}


def test_indels_that_were_applied_to_nobody_knows_whom_are_an_alarm(tmp_path):
    table().write_parquet(tmp_path / "t.parquet")
    declare(tmp_path, indels="included")
    assert "indel carriers" in alarms("generator", tmp_path)
    declare(tmp_path, indels="none")
    assert alarms("generator", tmp_path) == {}


def test_padded_batches_are_an_alarm_for_caduceus_and_not_for_evo2(tmp_path):
    tokens = np.random.default_rng(0).normal(size=(N, 2, 20, WIDTH)).astype(np.float32)
    lengths = np.full((N, 2), 20)
    lengths[:3] = 12
    np.savez(
        tmp_path / "t.npz",
        embeddings=tokens,
        lengths=lengths,
        subjects=np.array(SUBJECTS),
        genes=np.array(GENES),
    )
    for model, rings in (("caduceus", True), ("evo2", False)):
        declare(tmp_path, model, level="token", special_tokens=[0, 0], layer="norm")
        found = alarms(model, tmp_path)
        assert ("padded batches" in found) == rings
    declare(tmp_path, "caduceus", level="token", special_tokens=[0, 0])
    assert alarms("caduceus", tmp_path)["padded batches"].figure == pytest.approx(3 / 24)


def test_people_for_whom_the_reference_was_used_are_found(tmp_path):
    rows = table()["vector"].to_list()
    reference = rows[:2]
    for i in range(10):
        rows[2 * i : 2 * i + 2] = reference
    vector = pl.Series(rows, dtype=pl.List(pl.Float32))
    table().with_columns(vector=vector).write_parquet(tmp_path / "t.parquet")
    declare(tmp_path)
    found = alarms("generator", tmp_path)["repeated people"]
    assert found.figure == pytest.approx(10 / N)
    assert "extract these people again" in found.cure


def test_lengths_in_a_table_are_held_against_the_tokenizer(tmp_path):
    lengths = [6000] * (2 * N - 1) + [6001]
    table(length_bp=lengths).write_parquet(tmp_path / "t.parquet")
    declare(tmp_path)
    with pytest.raises(UserError, match="length_bp=6001 is not a multiple of 6"):
        genetics.read("generator", tmp_path)
    declare(tmp_path, "evo2")
    assert genetics.read("evo2", tmp_path).mask.all()


@pytest.mark.parametrize(
    ("dtype", "pooling", "rings"),
    [
        (torch.bfloat16, "mean", False),  # averaged in float32 by us: all is kept
        (torch.bfloat16, "max", True),
        (torch.bfloat16, "last", True),
        (torch.float32, "max", False),
    ],
)
def test_tokens_in_bfloat16_cost_nothing_if_they_are_averaged_here(tmp_path, dtype, pooling, rings):
    rng = np.random.default_rng(0)
    base = rng.normal(size=(1, 200, WIDTH))
    alleles = rng.binomial(2, 0.3, size=(N, 1, 1))
    tokens = np.repeat(base, N, axis=0)
    tokens[:, 50:60] += 0.01 * alleles * rng.normal(size=(1, 10, WIDTH))
    tokens *= 1 + 2e-4 * rng.normal(size=(N, 1, 1))
    (tmp_path / "subjects.txt").write_text("\n".join(SUBJECTS))
    torch.save({"blocks.26": torch.from_numpy(tokens).to(dtype)}, tmp_path / "OXT.pt")
    declare(tmp_path, "evo2", level="token", special_tokens=[0, 0], length_bp=200, pooling=pooling)
    features = genetics.read("evo2", tmp_path)
    assert ("precision" in {alarm.name for alarm in features.alarms}) == rings
    assert features.provenance.dtype == ("bfloat16" if rings else "float32")


def test_6_mer_models_ask_whether_indels_were_applied(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(N, 2, 2048)).astype(np.float32)
    ids = {"subjects": np.array(SUBJECTS), "genes": np.array(GENES)}
    np.savez(tmp_path / "t.npz", embeddings=vectors, **ids)
    given = {"checkpoint": "GENERator-eukaryote-1.2b-base", "strands": "fwd_only"}
    said = {"pooling": "mean", "sequence": "personal", "reference": "GRCh38"}
    (alarm,) = genetics.read("generator", tmp_path, **given, declare=said).alarms
    assert alarm.finding == "provenance does not say indels"
    said["indels"] = "none"
    assert genetics.read("generator", tmp_path, **given, declare=said, strict=True).alarms == ()
