"""What a widely read knowledge base says of these models, held against what their sources say.

One test or case each, numbered as in docs/upstream.md, named by what the source says. Four of the
22 are no matter for code and are only told there: 5 and 7 (what Caduceus is made of), 15 (what
Evo 2 needs to run) and 19 (how high an AUC can be).
"""

import inspect
import json

import numpy as np
import polars as pl
import pytest
import torch

from brainfusion import genetics
from brainfusion.genetics.models import check_layer, check_tokens, check_width, find_checkpoint
from brainfusion.genetics.strands import both_strands, fold_ps
from brainfusion.runtime.errors import UserError

GENERATOR = "GENERator-eukaryote-1.2b-base"
CADUCEUS_PS = "caduceus-ps_seqlen-131k_d_model-256_n_layer-16"
CADUCEUS_PH = "caduceus-ph_seqlen-131k_d_model-256_n_layer-16"
N, GENES = 8, ("AVP", "OXT", "PDYN")
SUBJECTS = [f"{i:03d}" for i in range(N)]


def tokens_of(model: str, name: str, **changes) -> None:
    values = {"token_unit": None, "length_bp": None, "n_tokens": None, "chunked": False}
    spec = find_checkpoint(model, name)
    check_tokens(model, name, spec, where="provenance.json", **{**values, **changes})


def write(folder, vectors, **provenance) -> None:
    ids = {"subjects": np.array(SUBJECTS), "genes": np.array(GENES)}
    np.savez(folder / "all.npz", embeddings=vectors, **ids)
    values = {"pooling": "mean", "strands": "fwd_only", **provenance}
    (folder / "provenance.json").write_text(json.dumps(values))


def random_vectors(width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, len(GENES), width)).astype(np.float32)


def test_01_generator_1_2b_is_2048_wide_and_not_1536(tmp_path):
    spec = find_checkpoint("generator", GENERATOR)
    check_width(2048, name=GENERATOR, spec=spec, strands="fwd_only", where="x")
    write(tmp_path, random_vectors(1536), model="generator", checkpoint=GENERATOR)
    with pytest.raises(UserError, match=r"width 1536, but .* gives 2048"):
        genetics.read("generator", tmp_path)


@pytest.mark.parametrize("unit", ["6-mer overlapping", "BPE", "6-mer BPE"])
def test_02_generator_reads_6_mers_that_do_not_overlap(unit):
    with pytest.raises(UserError, match="reads 6-mer tokens"):
        tokens_of("generator", GENERATOR, token_unit=unit)
    with pytest.raises(UserError, match="1000 6-mer tokens"):  # overlapping ones would be 5,995
        tokens_of("generator", GENERATOR, length_bp=6000, n_tokens=5995)
    tokens_of("generator", GENERATOR, token_unit="6-mer", length_bp=6000, n_tokens=1002)


def test_03_generator_reads_98_304_bp_and_not_a_million():
    tokens_of("generator", GENERATOR, length_bp=98_304)
    with pytest.raises(UserError, match="longer than the 98304 bp"):
        tokens_of("generator", GENERATOR, length_bp=999_996)
    tokens_of("generator", GENERATOR, length_bp=999_996, chunked=True)


def test_04_generator_lengths_are_cut_by_whoever_extracts_on_a_side_that_is_named():
    # Nothing pads to a multiple of six any more; the collator cuts right, the scripts left.
    with pytest.raises(UserError, match="appended <oov>"):
        tokens_of("generator", GENERATOR, length_bp=6001)
    assert both_strands("AACCGGT", unit_bp=6, trim="left")[0] == "ACCGGT"
    assert both_strands("AACCGGT", unit_bp=6, trim="right")[0] == "AACCGG"


@pytest.mark.parametrize("name", [CADUCEUS_PS, CADUCEUS_PH])
def test_06_caduceus_runs_in_float32(name):
    assert find_checkpoint("caduceus", name).dtype == "float32"


@pytest.mark.parametrize("unit", ["4-mer", "6-mer"])
def test_08_caduceus_reads_one_base_a_token(unit):
    with pytest.raises(UserError, match="reads bp tokens"):
        tokens_of("caduceus", CADUCEUS_PS, token_unit=unit)
    tokens_of("caduceus", CADUCEUS_PS, token_unit="bp", length_bp=131_072, n_tokens=131_072)


def test_09_equivariant_output_has_to_be_folded_to_be_invariant(tmp_path):
    raw = random_vectors(512)
    write(tmp_path, raw, model="caduceus", checkpoint=CADUCEUS_PS, strands="ps_raw")
    features = genetics.read("caduceus", tmp_path)
    assert features.width == 256
    # The other strand's output is this one's, reversed in channels once it is pooled.
    write(tmp_path, raw[..., ::-1], model="caduceus", checkpoint=CADUCEUS_PS, strands="ps_raw")
    np.testing.assert_array_equal(genetics.read("caduceus", tmp_path).vectors, features.vectors)
    write(tmp_path, raw, model="caduceus", checkpoint=CADUCEUS_PS, strands="averaged")
    with pytest.raises(UserError, match=r"two strands .* side by side"):
        genetics.read("caduceus", tmp_path)


def test_10_raw_output_of_a_sequence_is_not_that_of_its_reverse_complement():
    raw = random_vectors(512)
    other = raw[..., ::-1]
    change = np.linalg.norm(raw - other) / np.linalg.norm(raw)
    assert change > 0.3  # "embed(seq) == embed(RC(seq))" would call correct output broken
    np.testing.assert_array_equal(fold_ps(raw), fold_ps(other))


def test_11_variant_files_are_rows_of_two_alleles_without_another_axis(tmp_path):
    forward = torch.randn(5, 512)
    torch.save({"concat_avg_ws": forward, "rc_concat_avg_ws": forward}, tmp_path / "v.pt")
    assert genetics.read_variants(tmp_path / "v.pt").reference.shape == (5, 256)
    torch.save({"concat_avg_ws": torch.randn(5, 7, 512)}, tmp_path / "v.pt")
    with pytest.raises(UserError, match=r"expected \[variants, 2 x width\]"):
        genetics.read_variants(tmp_path / "v.pt")


def test_12_halves_side_by_side_are_no_vector_of_caduceus(tmp_path):
    write(tmp_path, random_vectors(512), model="caduceus", checkpoint=CADUCEUS_PS, strands="concat")
    with pytest.raises(UserError, match="strands 'concat' is nothing that caduceus gives"):
        genetics.read("caduceus", tmp_path)


@pytest.mark.parametrize("unit", ["2-mer", "4-mer", "6-mer"])
def test_13_evo2_reads_bytes(unit):
    with pytest.raises(UserError, match="reads bp tokens"):
        tokens_of("evo2", "evo2_7b", token_unit=unit)
    with pytest.raises(UserError, match="do not cover"):
        tokens_of("evo2", "evo2_7b", length_bp=8192, n_tokens=4096)


def test_14_evo2_comes_in_20b_too():
    spec = find_checkpoint("evo2", "evo2_20b")
    assert (spec.width, spec.n_layers) == (8192, 24)


def test_16_block_28_exists_in_the_7b_and_the_40b_only():
    for name, exists in (
        ("evo2_7b", True),
        ("evo2_40b", True),
        ("evo2_1b_base", False),
        ("evo2_20b", False),
    ):
        spec = find_checkpoint("evo2", name)
        if exists:
            check_layer("evo2", name, spec, "blocks.28.mlp.l3", where="x")
        else:
            with pytest.raises(UserError, match="does not exist"):
                check_layer("evo2", name, spec, "blocks.28.mlp.l3", where="x")


def test_17_the_reference_genome_alone_tells_nothing_of_people(tmp_path):
    same = np.repeat(random_vectors(2048)[:1], N, axis=0)
    write(tmp_path, same, model="generator", checkpoint=GENERATOR)
    with pytest.raises(UserError, match="reference-only extraction"):
        genetics.read("generator", tmp_path)
    write(
        tmp_path, random_vectors(2048), model="generator", checkpoint=GENERATOR,
        sequence="reference",
    )  # fmt: skip
    with pytest.raises(UserError, match="same in everyone"):
        genetics.read("generator", tmp_path)


def test_18_positions_are_pooled_and_genes_are_left_apart(tmp_path):
    tokens = np.random.default_rng(1).normal(size=(N, 3, 20, 2048)).astype(np.float32)
    declared = {"level": "token", "special_tokens": [0, 0], "length_bp": 120}
    write(tmp_path, tokens, model="generator", checkpoint=GENERATOR, **declared)
    features = genetics.read("generator", tmp_path)
    assert features.vectors.shape == (N, 3, 2048)  # how genes become one vector is another choice
    mean = tokens.astype(np.float64).mean(axis=2)
    np.testing.assert_allclose(features.vectors, mean, rtol=1e-5, atol=1e-6)
    declared["pooling"] = "max"
    write(tmp_path, tokens, model="generator", checkpoint=GENERATOR, **declared)
    np.testing.assert_array_equal(genetics.read("generator", tmp_path).vectors, tokens.max(axis=2))


@pytest.mark.parametrize("subject", ["eid", "subject", "subject_id", "participant_id"])
@pytest.mark.parametrize("gene", ["gene", "gene_id"])
@pytest.mark.parametrize(
    ("vector", "model"), [("vector", "source_model"), ("embedding", "model_name")]
)
def test_20_three_schemas_of_one_table_are_all_read(tmp_path, subject, gene, vector, model):
    vectors = random_vectors(256)
    columns = {
        subject: np.repeat(SUBJECTS, 3).tolist(),
        gene: list(GENES) * N,
        vector: pl.Series(vectors.reshape(-1, 256).tolist(), dtype=pl.List(pl.Float32)),
        model: [CADUCEUS_PH] * N * 3,
        "layer": ["last"] * N * 3,
        "reference_version": ["GRCh38"] * N * 3,
    }
    pl.DataFrame(columns).write_parquet(tmp_path / "genetics_embeddings.parquet")
    features = genetics.read(
        "caduceus", tmp_path, checkpoint=f"kuleshov-group/{CADUCEUS_PH}", strands="averaged"
    )
    np.testing.assert_array_equal(features.vectors, vectors)


def test_20_the_third_schema_is_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")
    vectors = random_vectors(256)[:, 0]
    with h5py.File(tmp_path / "embeddings.h5", "w") as file:
        file["eid"], file["vector"] = SUBJECTS, vectors
        file["model"], file["layer"] = [CADUCEUS_PH] * N, ["last"] * N
    features = genetics.read(
        "caduceus", tmp_path, checkpoint=CADUCEUS_PH, strands="averaged",
        declare={"level": "subject"},
    )  # fmt: skip
    np.testing.assert_array_equal(features.vectors[:, 0], vectors)


def test_21_hyenadna_checkpoints_are_256_wide():
    for name, n_layers in (
        ("hyenadna-small-32k-seqlen", 4),
        ("hyenadna-medium-160k-seqlen", 8),
        ("LongSafari/hyenadna-large-1m-seqlen", 8),
    ):
        spec = find_checkpoint("hyenadna", name)
        assert (spec.width, spec.n_layers, spec.token_unit) == (256, n_layers, "bp")


def test_22_the_misspelt_default_of_a_script_is_refused_with_the_name_on_the_hub():
    with pytest.raises(UserError, match=r"Did you mean 'GENERator-v2-eukaryote-1\.2b-base'"):
        find_checkpoint("generator", "GenerTeam/GENERator-eukaryote-v2-1.2b-base")


def test_each_contradiction_has_a_test_or_is_told_in_the_docs():
    import sys

    tested = {
        int(name.split("_")[1])
        for name, item in inspect.getmembers(sys.modules[__name__], inspect.isfunction)
        if name.startswith("test_") and name.split("_")[1].isdigit()
    }
    assert tested | {5, 7, 15, 19} == set(range(1, 23))
