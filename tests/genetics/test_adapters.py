"""Each file form is written by its own writer (torch, numpy, safetensors, polars, pyarrow)."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from brainfusion import genetics
from brainfusion.genetics import generator
from brainfusion.runtime.errors import UserError

SUBJECTS = tuple(f"{i:04d}" for i in range(12))  # leading zeros
GENES = ("AVP", "OXT", "PDYN")
WIDTH = 64
SIMULATED = {
    "evo2": {"pooling": "mean", "strands": "averaged", "layer": "blocks.26"},
    "generator": {"pooling": "separator", "strands": "fwd_only", "token_unit": "6-mer"},
    "caduceus": {"pooling": "mean", "strands": "averaged"},
}


@pytest.fixture
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(len(SUBJECTS), len(GENES), WIDTH)).astype(np.float32)


def declare(folder: Path, adapter: str, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    values = {"model": adapter, "checkpoint": "simulated", "simulated": True, **SIMULATED[adapter]}
    values = {k: v for k, v in {**values, **changes}.items() if v is not None}
    (folder / "provenance.json").write_text(json.dumps(values))
    return folder


def write_ids(folder: Path, *, genes: bool = True) -> None:
    (folder / "subjects.txt").write_text("\n".join(SUBJECTS) + "\n")
    if genes:
        (folder / "genes.txt").write_text("\n".join(GENES) + "\n")


# -- every container, for every model --------------------------------------------------------------


def _pt_per_gene(folder, vectors):
    write_ids(folder, genes=False)
    for column, gene in enumerate(GENES):
        torch.save({"blocks.26": torch.from_numpy(vectors[:, column])}, folder / f"{gene}.pt")


def _pt_stacked(folder, vectors):
    torch.save(
        {
            "blocks.26": torch.from_numpy(vectors),
            "subjects": list(SUBJECTS),
            "genes": list(GENES),
        },
        folder / "all.pt",
    )


def _npy_with_ids(folder, vectors):
    np.save(folder / "embeddings.npy", vectors)
    write_ids(folder)


def _npz(folder, vectors):
    np.savez(
        folder / "embeddings.npz",
        embeddings=vectors,
        subjects=np.array(SUBJECTS),
        genes=np.array(GENES),
    )


def _safetensors(folder, vectors):
    from safetensors.numpy import save_file

    metadata = {"subjects": json.dumps(SUBJECTS), "genes": json.dumps(GENES)}
    save_file({"embeddings": vectors}, folder / "dna.safetensors", metadata=metadata)


def _long(vectors: np.ndarray) -> dict:
    n, g, width = vectors.shape
    return {
        "subject": np.repeat(SUBJECTS, g).tolist(),
        "gene": list(GENES) * n,
        "vector": vectors.reshape(n * g, width).tolist(),
    }


def _parquet_polars(folder, vectors):
    long = _long(vectors)
    long["vector"] = pl.Series(long["vector"], dtype=pl.List(pl.Float32))
    pl.DataFrame(long).write_parquet(folder / "embeddings.parquet")


def _parquet_arrow(folder, vectors):
    import pyarrow as pa
    import pyarrow.parquet as pq

    n, g, width = vectors.shape
    flat = pa.array(vectors.ravel())
    table = pa.table(
        {
            "eid": pa.array(_long(vectors)["subject"]),
            "gene_id": pa.array(list(GENES) * n),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, width),
        }
    )
    pq.write_table(table.slice(0, g * 5), folder / "part-0.parquet")
    pq.write_table(table.slice(g * 5), folder / "part-1.parquet")


FORMS = [
    _pt_per_gene,
    _pt_stacked,
    _npy_with_ids,
    _npz,
    _safetensors,
    _parquet_polars,
    _parquet_arrow,
]


@pytest.mark.parametrize("write", FORMS)
@pytest.mark.parametrize("model", SIMULATED)
def test_every_adapter_reads_every_container_exactly(tmp_path, vectors, model, write):
    folder = declare(tmp_path / model, model, layer="blocks.26")
    write(folder, vectors)
    features = genetics.read(model, folder, strict=True)
    assert (features.subjects, features.genes) == (SUBJECTS, GENES)
    np.testing.assert_array_equal(features.vectors, vectors)
    assert features.mask.all()
    assert features.vectors.dtype == np.float32
    assert features.vectors.flags.c_contiguous
    assert (features.provenance.model, features.provenance.layer) == (model, "blocks.26")


def test_a_file_is_read_as_its_folder_is(tmp_path, vectors):
    folder = declare(tmp_path / "g", "generator")
    _npz(folder, vectors)
    features = genetics.read("generator", folder / "embeddings.npz")
    np.testing.assert_array_equal(features.vectors, vectors)


def test_arguments_stand_in_for_a_missing_provenance_and_the_gaps_are_said(
    tmp_path, vectors, capsys
):
    _npz(tmp_path, np.repeat(vectors, 32, axis=2))
    features = genetics.read(
        "generator", tmp_path, checkpoint="GENERator-eukaryote-1.2b-base", strands="fwd_only"
    )
    assert features.width == 2048
    assert "does not say pooling, sequence, reference" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"undeclared: .*pooling"):
        genetics.read(
            "generator",
            tmp_path,
            checkpoint="GENERator-eukaryote-1.2b-base",
            strands="fwd_only",
            strict=True,
        )


# -- Evo 2 -----------------------------------------------------------------------------------------


def test_evo2_must_be_told_which_of_several_layers(tmp_path, vectors):
    folder = declare(tmp_path / "evo2", "evo2", layer=None)
    write_ids(folder, genes=False)
    for column, gene in enumerate(GENES):
        tensor = torch.from_numpy(vectors[:, column])
        layers = {"blocks.20": tensor, "blocks.26": -tensor, "blocks.3.mlp.l1": tensor}
        torch.save(layers, folder / f"{gene}.pt")
    with pytest.raises(UserError, match=r"3 layers \(blocks.20, blocks.26, blocks.3.mlp.l1\)"):
        genetics.read("evo2", folder)
    features = genetics.read("evo2", folder, layer="blocks.26")
    np.testing.assert_array_equal(features.vectors, -vectors)
    with pytest.raises(UserError, match="no embedding"):
        genetics.read("evo2", folder, layer="blocks.3.mlp.l1")
    with pytest.raises(UserError, match=r"Did you mean 'blocks\.20'"):
        genetics.read("evo2", folder, layer="block.20")


def test_evo2_layer_must_exist_in_the_declared_checkpoint(tmp_path):
    folder = declare(tmp_path / "evo2", "evo2", checkpoint="evo2_1b_base", layer=None)
    write_ids(folder, genes=False)
    torch.save({"blocks.28.mlp.l3": torch.randn(len(SUBJECTS), 1920)}, folder / "OXT.pt")
    with pytest.raises(UserError, match=r"l3' does not exist in 'evo2_1b_base': it has 25 layers"):
        genetics.read("evo2", folder)


def test_evo2_bfloat16_is_upcast_and_its_lost_precision_is_an_alarm(tmp_path, capsys):
    rng = np.random.default_rng(1)
    mean = rng.normal(size=(1, WIDTH))
    vectors = (mean * (1 + 3e-4 * rng.normal(size=(len(SUBJECTS), WIDTH)))).astype(np.float32)
    for name, dtype in (("fine", torch.float32), ("coarse", torch.bfloat16)):
        folder = declare(tmp_path / name, "evo2")
        write_ids(folder, genes=False)
        torch.save({"blocks.26": torch.from_numpy(vectors).to(dtype)}, folder / "OXT.pt")
    fine = genetics.read("evo2", tmp_path / "fine", strict=True)
    assert fine.provenance.dtype == "float32"
    coarse = genetics.read("evo2", tmp_path / "coarse")
    assert coarse.provenance.dtype == "bfloat16"
    assert coarse.vectors.dtype == np.float32
    assert "precision: median sd/|mean|" in capsys.readouterr().err
    with pytest.raises(UserError, match="store float32"):
        genetics.read("evo2", tmp_path / "coarse", strict=True)
    # The same numbers written as float32 do not hide where they have been.
    hidden = torch.from_numpy(vectors).bfloat16().float()
    torch.save({"blocks.26": hidden}, tmp_path / "fine" / "OXT.pt")
    assert genetics.read("evo2", tmp_path / "fine").provenance.dtype == "bfloat16"


def test_evo2_two_strands_side_by_side_are_kept_when_declared(tmp_path, vectors):
    both = np.concatenate([vectors, vectors[..., ::-1]], axis=2)
    folder = declare(tmp_path / "evo2", "evo2", strands="concat")
    _npy_with_ids(folder, both)
    np.testing.assert_array_equal(genetics.read("evo2", folder).vectors, both)


def test_token_level_output_is_refused(tmp_path):
    folder = declare(tmp_path / "evo2", "evo2")
    write_ids(folder, genes=False)
    torch.save({"blocks.26": torch.randn(len(SUBJECTS), 30, WIDTH)}, folder / "OXT.pt")
    with pytest.raises(UserError, match=r"pool token-level output"):
        genetics.read("evo2", folder)


# -- GENERator -------------------------------------------------------------------------------------


def chunk_stack(vectors: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Chunks padded with zeros to the longest, and the mean over those that are there."""
    n_chunks = rng.integers(1, 5, size=vectors.shape[:2])
    stack = np.zeros((*vectors.shape[:2], 4, WIDTH), dtype=np.float32)
    expected = np.zeros_like(vectors)
    for i, j in np.ndindex(*n_chunks.shape):
        stack[i, j, : n_chunks[i, j]] = rng.normal(size=(n_chunks[i, j], WIDTH))
        expected[i, j] = stack[i, j, : n_chunks[i, j]].mean(axis=0)
    return stack, expected


def test_generator_chunks_are_averaged_over_those_that_are_not_padding(tmp_path, vectors):
    stack, expected = chunk_stack(vectors, np.random.default_rng(2))
    folder = declare(tmp_path / "g", "generator")
    _npz(folder, stack)
    features = genetics.read("generator", folder)
    np.testing.assert_allclose(features.vectors, expected, atol=1e-6)  # order of float32 sums
    assert features.provenance.steps == ("mean over chunks that are not padding",)
    assert not np.allclose(features.vectors, stack.mean(axis=2), atol=0.1)


def test_generator_flattened_chunks_are_unfolded_by_their_declared_number(tmp_path, vectors):
    stack, expected = chunk_stack(vectors, np.random.default_rng(3))
    folder = declare(tmp_path / "g", "generator", n_chunks=4)
    _npz(folder, stack.reshape(*vectors.shape[:2], 4 * WIDTH))
    np.testing.assert_allclose(genetics.read("generator", folder).vectors, expected, atol=1e-6)
    declare(folder, "generator")
    with pytest.raises(UserError, match="width 256"):
        genetics.read("generator", folder)


def test_a_broken_chunk_masks_its_person_and_no_chunk_is_no_vector():
    stack = np.ones((3, 2, 4), dtype=np.float32)
    stack[1, 1, 2] = np.nan
    stack[2] = 0.0
    result = generator.mean_over_chunks(stack)
    np.testing.assert_array_equal(result[0], 1.0)
    assert np.isnan(result[1, 2])
    np.testing.assert_array_equal(result[2], 0.0)


def test_generator_lengths_and_token_units_are_checked(tmp_path, vectors):
    folder = declare(tmp_path / "g", "generator", length_bp=1001)
    _npz(folder, vectors)
    with pytest.raises(UserError, match="not a multiple of 6"):
        genetics.read("generator", folder)
    declare(folder, "generator", token_unit="bp")
    with pytest.raises(UserError, match="reads 6-mer tokens"):
        genetics.read("generator", folder)
    declare(folder, "generator", pooling="seperator")
    with pytest.raises(UserError, match="Did you mean 'separator'"):
        genetics.read("generator", folder)


# -- Caduceus --------------------------------------------------------------------------------------


def test_caduceus_raw_strands_are_folded_with_the_channel_flip(tmp_path):
    rng = np.random.default_rng(4)
    raw = rng.normal(size=(len(SUBJECTS), len(GENES), 2 * WIDTH)).astype(np.float32)
    folder = declare(tmp_path / "c", "caduceus", strands="ps_raw")
    long = _long(raw)
    table = pl.DataFrame(
        {
            "eid": long["subject"],
            "gene_id": long["gene"],
            "embedding": pl.Series(long["vector"], dtype=pl.List(pl.Float32)),
            "source_model": "caduceus",
            "layer": "last",
        }
    )
    table.write_parquet(folder / "embeddings.parquet")
    features = genetics.read("caduceus", folder)
    reverse = torch.from_numpy(raw[..., WIDTH:]).flip(-1).numpy()
    np.testing.assert_array_equal(features.vectors, 0.5 * (raw[..., :WIDTH] + reverse))
    assert features.provenance.strands == "ps_folded"
    # The same person on the other strand: raw output flipped in channels, vectors unchanged.
    flipped = table.with_columns(embedding=pl.col("embedding").list.reverse())
    flipped.write_parquet(folder / "embeddings.parquet")
    np.testing.assert_array_equal(genetics.read("caduceus", folder).vectors, features.vectors)


def test_caduceus_odd_raw_width_and_ph_folds_are_refused(tmp_path):
    folder = declare(tmp_path / "c", "caduceus", strands="ps_raw")
    _npy_with_ids(folder, np.ones((len(SUBJECTS), len(GENES), 127), dtype=np.float32))
    with pytest.raises(UserError, match="width 127 is odd"):
        genetics.read("caduceus", folder)
    name = "caduceus-ph_seqlen-131k_d_model-256_n_layer-16"
    declare(folder, "caduceus", strands="ps_raw", checkpoint=name)
    with pytest.raises(UserError, match="is a Ph model"):
        genetics.read("caduceus", folder)


def test_caduceus_raw_output_declared_as_averaged_is_caught_by_its_width(tmp_path):
    folder = declare(tmp_path / "c", "caduceus", strands="averaged")
    _npy_with_ids(folder, np.ones((len(SUBJECTS), len(GENES), 128), dtype=np.float32))
    with pytest.raises(UserError, match="two strands of 'simulated' side by side"):
        genetics.read("caduceus", folder)


def test_variant_effect_dicts_are_refused_with_the_reason(tmp_path):
    folder = declare(tmp_path / "c", "caduceus")
    write_ids(folder)
    contents = {
        "concat_avg_ws": torch.randn(12, 512),
        "rc_concat_avg_ws": torch.randn(12, 512),
        "chromosome": torch.zeros(12),
        "labels": torch.zeros(12),
    }
    torch.save(contents, folder / "train_embeds_combined.pt")
    with pytest.raises(UserError, match=r"without row ids"):
        genetics.read("caduceus", folder)


# -- tables ----------------------------------------------------------------------------------------


def test_rows_absent_from_a_table_are_masked(tmp_path, vectors):
    folder = declare(tmp_path / "c", "caduceus")
    long = _long(vectors)
    long["vector"][7] = None
    table = pl.DataFrame(long, schema_overrides={"vector": pl.List(pl.Float32)})
    keep = np.arange(len(table)) != 4
    shuffled = table.filter(pl.Series(keep)).sample(fraction=1.0, shuffle=True, seed=1)
    shuffled.write_parquet(folder / "embeddings.parquet")
    features = genetics.read("caduceus", folder)
    picked = features.select(SUBJECTS, GENES)
    expected_mask = np.ones((len(SUBJECTS), len(GENES)), dtype=bool)
    expected_mask[1, 1] = expected_mask[2, 1] = False
    np.testing.assert_array_equal(picked.mask, expected_mask)
    np.testing.assert_array_equal(picked.vectors[expected_mask], vectors[expected_mask])
    assert not picked.vectors[~expected_mask].any()
    assert picked.n_missing == 2


def test_rows_of_other_models_are_left_out_and_said(tmp_path, vectors, capsys):
    folder = declare(tmp_path / "c", "caduceus")
    long = _long(vectors)
    ours = pl.DataFrame(long).with_columns(model_name=pl.lit("caduceus"))
    others = ours.with_columns(model_name=pl.lit("evo2_7b"))
    pl.concat([others, ours]).write_parquet(folder / "embeddings.parquet")
    np.testing.assert_array_equal(genetics.read("caduceus", folder).vectors, vectors)
    assert "left out 36 rows of other models" in capsys.readouterr().err
    others.write_parquet(folder / "embeddings.parquet")
    with pytest.raises(UserError, match="no rows of 'simulated' by column source_model"):
        genetics.read("caduceus", folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: pl.concat([t, t[:2]]), "2 rows repeat a person and gene"),
        (lambda t: t.with_columns(subject=pl.col("subject").cast(pl.Float64)), "Float64"),
        (lambda t: t.with_columns(subject=pl.col("subject") + ".0"), "end in '.0'"),
        (lambda t: t.drop("gene"), "no gene column"),
        (lambda t: t.rename({"vector": "x"}), "no vector column; expected vector or embedding"),
        (lambda t: t.with_columns(eid=pl.col("subject")), "mean the same"),
        (lambda t: t.with_columns(vector=pl.lit(1.0)), "expected a list of floats"),
        (
            lambda t: t.with_columns(
                vector=pl.when(pl.col("gene") == "OXT")
                .then(pl.col("vector").list.head(3))
                .otherwise("vector")
            ),
            "several widths",
        ),
    ],
)
def test_tables_that_would_mislead_are_refused(tmp_path, vectors, change, message):
    folder = declare(tmp_path / "c", "caduceus")
    change(pl.DataFrame(_long(vectors))).write_parquet(folder / "embeddings.parquet")
    with pytest.raises(UserError, match=message):
        genetics.read("caduceus", folder)


def test_a_vector_a_person_is_one_gene_called_all(tmp_path, vectors):
    folder = declare(tmp_path / "c", "caduceus", level="subject")
    table = pl.DataFrame({"eid": SUBJECTS, "vector": vectors[:, 0].tolist()})
    table.write_parquet(folder / "embeddings.parquet")
    features = genetics.read("caduceus", folder)
    assert features.genes == ("all",)
    np.testing.assert_array_equal(features.vectors[:, 0], vectors[:, 0])


# -- bad input -------------------------------------------------------------------------------------


def test_unknown_model_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'evo2'"):
        genetics.read("evo", tmp_path)


def test_a_missing_path_says_what_was_expected(tmp_path):
    with pytest.raises(UserError, match="does not exist: expected evo2's embeddings"):
        genetics.read("evo2", tmp_path / "nowhere")


def test_missing_provenance_says_which_keys_and_shows_a_minimal_one(tmp_path, vectors):
    _npz(tmp_path, vectors)
    with pytest.raises(UserError, match=r'"checkpoint": "evo2_7b".*checkpoint and strands') as info:
        genetics.read("generator", tmp_path)
    assert "\n" not in str(info.value)
    declare(tmp_path, "generator", pooling=None, strands=None)
    with pytest.raises(UserError, match="pooling, strands missing"):
        genetics.read("generator", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "evo2"}, "says model 'evo2', but 'generator' is asked for"),
        ({"stands": "averaged"}, "unknown key 'stands'. Did you mean 'strands'"),
        ({"strands": "both"}, "nothing that generator gives"),
        ({"level": "variant"}, "cannot be joined to people"),
        ({"simulated": False}, 'needs "simulated": true'),
        ({"simulated": "yes"}, "expected true or false"),
        ({"length_bp": "long"}, "positive whole number"),
        ({"sequence": "reference"}, "numerical noise"),
        ({"checkpoint": "GENERator-eukaryote-3b"}, "Did you mean 'GENERator-eukaryote-3b-base'"),
        ({"checkpoint": "GENERator-eukaryote-3b-base"}, "width 64.*gives 3072"),
    ],
)
def test_provenance_that_contradicts_the_files_is_refused(tmp_path, vectors, changes, message):
    folder = declare(tmp_path / "g", "generator", **changes)
    _npz(folder, vectors)
    with pytest.raises(UserError, match=message):
        genetics.read("generator", folder)


def test_arguments_that_contradict_provenance_are_refused(tmp_path, vectors):
    folder = declare(tmp_path / "g", "generator")
    _npz(folder, vectors)
    with pytest.raises(UserError, match="says strands 'fwd_only', but 'averaged' is asked for"):
        genetics.read("generator", folder, strands="averaged")
    declare(folder, "generator", trim_left=3)
    with pytest.raises(UserError, match="says trim_left '3', but '15' is asked for"):
        genetics.read("generator", folder, declare={"trim_left": 15})


def test_unknown_provenance_keys_are_kept(tmp_path, vectors):
    folder = declare(tmp_path / "g", "generator", device="H100", package_versions={"torch": "2"})
    _npz(folder, vectors)
    provenance = genetics.read("generator", folder).provenance
    assert provenance.extra == {"device": "H100", "package_versions": {"torch": "2"}}


def test_reference_only_extraction_is_always_an_error(tmp_path, vectors):
    folder = declare(tmp_path / "g", "generator")
    _npz(folder, np.repeat(vectors[:1], len(SUBJECTS), axis=0))
    with pytest.raises(UserError, match="reference-only extraction"):
        genetics.read("generator", folder)


def test_rows_without_ids_or_with_too_few_are_refused(tmp_path, vectors):
    folder = declare(tmp_path / "e", "evo2")
    torch.save({"blocks.26": torch.from_numpy(vectors[:, 0])}, folder / "OXT.pt")
    with pytest.raises(UserError, match=r"rows without ids.*subjects\.txt"):
        genetics.read("evo2", folder)
    (folder / "subjects.txt").write_text("\n".join(SUBJECTS[:-1]))
    with pytest.raises(UserError, match=r"12 rows .* for 11 subject ids"):
        genetics.read("evo2", folder)
    (folder / "subjects.txt").write_text("\n".join((*SUBJECTS[:-1], SUBJECTS[0])))
    with pytest.raises(UserError, match=r"1 duplicate subject ids \(row 12\)"):
        genetics.read("evo2", folder)


def test_a_gene_file_of_other_people_or_another_layer_is_refused(tmp_path, vectors):
    folder = declare(tmp_path / "e", "evo2")
    _pt_per_gene(folder, vectors)
    torch.save({"blocks.20": torch.from_numpy(vectors[:, 2])}, folder / "PDYN.pt")
    with pytest.raises(UserError, match=r"PDYN.pt: no layer 'blocks.26'.*has blocks.20"):
        genetics.read("evo2", folder)


def test_an_array_without_gene_names_is_refused(tmp_path, vectors):
    folder = declare(tmp_path / "g", "generator")
    np.save(folder / "embeddings.npy", vectors)
    write_ids(folder, genes=False)
    with pytest.raises(UserError, match="which genes"):
        genetics.read("generator", folder)


def test_folders_of_nothing_or_of_several_kinds_are_refused(tmp_path, vectors):
    folder = declare(tmp_path / "g", "generator")
    with pytest.raises(UserError, match="no embeddings; expected files of"):
        genetics.read("generator", folder)
    _npz(folder, vectors)
    _npy_with_ids(folder, vectors)
    with pytest.raises(UserError, match=r"several kinds \(\.npy, \.npz\)"):
        genetics.read("generator", folder)


class Payload:
    """Something that a pickle could run."""


@pytest.mark.parametrize("name", ["OXT.pt", "OXT.npy", "OXT.npz", "x.safetensors", "x.parquet"])
def test_truncated_files_are_one_clear_line(tmp_path, vectors, name):
    folder = declare(tmp_path / "e", "evo2")
    writer = {
        ".pt": _pt_per_gene,
        ".npy": lambda folder, v: np.save(folder / name, v[:, 0]),
        ".npz": lambda folder, v: np.savez(folder / name, embeddings=v[:, 0]),
        ".safetensors": _safetensors,
        ".parquet": _parquet_polars,
    }[Path(name).suffix]
    writer(folder, vectors)
    write_ids(folder, genes=False)
    for file in folder.glob(f"*{Path(name).suffix}"):
        file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError, match="cannot be read") as info:
        genetics.read("evo2", folder)
    assert "\n" not in str(info.value)


def test_pickled_objects_are_never_loaded(tmp_path):
    folder = declare(tmp_path / "e", "evo2")
    write_ids(folder, genes=False)
    torch.save({"blocks.26": Payload()}, folder / "OXT.pt")
    with pytest.raises(UserError, match="never loaded"):
        genetics.read("evo2", folder)
    (folder / "OXT.pt").unlink()
    np.save(folder / "OXT.npy", np.array([Payload()] * 12), allow_pickle=True)
    with pytest.raises(UserError, match="never unpickled"):
        genetics.read("evo2", folder)


def test_importing_genetics_loads_no_model_and_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, brainfusion.genetics; "
        "print([m for m in ('torch', 'polars', 'transformers', 'evo2', 'mamba_ssm') "
        "if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
