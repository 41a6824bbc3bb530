"""Folders and files as people have them, each written by that form's own writer."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from brainfusion import genetics
from brainfusion.genetics import source as source_module
from brainfusion.genetics.store_writer import StoreWriter
from brainfusion.runtime.errors import UserError

SUBJECTS = tuple(f"{i:04d}" for i in range(12))  # leading zeros
GENES = ("AVP", "OXT", "PDYN")
WIDTH = 64
N, G = len(SUBJECTS), len(GENES)


def declare(folder: Path, model: str = "evo2", **changes) -> Path:
    folder.mkdir(exist_ok=True)
    values = {
        "model": model,
        "checkpoint": "simulated",
        "simulated": True,
        "pooling": "mean",
        "strands": "averaged",
    }
    values = {k: v for k, v in {**values, **changes}.items() if v is not None}
    (folder / "provenance.json").write_text(json.dumps(values))
    return folder


def write_list(file: Path, names) -> None:
    file.write_text("".join(f"{name}\n" for name in names))


@pytest.fixture
def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, G, WIDTH)).astype(np.float32)


@pytest.fixture
def haplotypes() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(N, G, 2, WIDTH)).astype(np.float32)


def long_table(vectors: np.ndarray, **columns) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "eid": np.repeat(SUBJECTS, G).tolist(),
            "gene_id": list(GENES) * N,
            "embedding": pl.Series(vectors.reshape(N * G, -1).tolist(), dtype=pl.List(pl.Float32)),
            **columns,
        }
    )


# -- each form, written by its own writer ----------------------------------------------------------


def _pt_per_subject(folder, v):
    write_list(folder / "genes.txt", GENES)
    for subject, rows in zip(SUBJECTS, v, strict=True):
        torch.save({"blocks.26": torch.from_numpy(rows)}, folder / f"{subject}.pt")


def _npy_per_subject(folder, v):
    write_list(folder / "genes.txt", GENES)
    for subject, rows in zip(SUBJECTS, v, strict=True):
        np.save(folder / f"{subject}.npy", rows)


def _npz_per_subject_with_genes_in_another_order(folder, v):
    for i, subject in enumerate(SUBJECTS):
        order = [0, 1, 2] if i == 0 else np.random.default_rng(i).permutation(G)
        np.savez(folder / subject, embedding=v[i, order], genes=np.array(GENES)[order])


def _pt_per_subject_and_gene(folder, v):
    write_list(folder / "genes.txt", GENES)
    for i, subject in enumerate(SUBJECTS):
        (folder / subject).mkdir()
        for j, gene in enumerate(GENES):  # as evo2 gives one pooled sequence: [1, H]
            torch.save({"norm": torch.from_numpy(v[i, j : j + 1])}, folder / subject / f"{gene}.pt")


def _safetensors_per_gene_and_subject(folder, v):
    from safetensors.torch import save_file

    write_list(folder / "subjects.txt", SUBJECTS[::-1])
    for j, gene in enumerate(GENES):
        (folder / gene).mkdir()
        for i, subject in enumerate(SUBJECTS):
            save_file(
                {"vector": torch.from_numpy(v[i, j])}, folder / gene / f"{subject}.safetensors"
            )


def _npz_compressed(folder, v):
    np.savez_compressed(
        folder / "all.npz", vectors=v, eid=np.array(SUBJECTS), genes=np.array(GENES)
    )


def _safetensors_stacked(folder, v):
    from safetensors.numpy import save_file

    ids = {"subjects": json.dumps(SUBJECTS), "genes": json.dumps(GENES)}
    save_file({"embeddings": v}, folder / "all.safetensors", metadata=ids)


def _hdf5_rows(folder, v):
    h5py = pytest.importorskip("h5py")
    table = long_table(v)
    with h5py.File(folder / "embeddings.h5", "w") as file:
        file["eid"] = table["eid"].to_list()
        file["gene_id"] = table["gene_id"].to_list()
        file["model"] = ["simulated"] * len(table)
        file["layer"] = ["last"] * len(table)
        file.create_dataset("vector", data=v.reshape(-1, WIDTH), chunks=(5, WIDTH), compression=1)


def _hdf5_compound(folder, v):
    h5py = pytest.importorskip("h5py")
    table = long_table(v)
    kind = np.dtype(
        [
            ("eid", "S8"),
            ("gene_id", "S8"),
            ("model", "S9"),
            ("layer", "S4"),
            ("vector", "f4", WIDTH),
        ]
    )
    rows = np.zeros(len(table), dtype=kind)
    rows["eid"], rows["gene_id"] = table["eid"].to_list(), table["gene_id"].to_list()
    rows["model"], rows["layer"], rows["vector"] = "simulated", "last", v.reshape(-1, WIDTH)
    with h5py.File(folder / "embeddings.h5", "w") as file:
        file["embeddings/table"] = rows


def _hdf5_array(folder, v):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "embeddings.hdf5", "w") as file:
        file["subjects"], file["genes"] = list(SUBJECTS), list(GENES)
        file["embeddings"] = v
    # the names of arrays, not of a table
    with h5py.File(folder / "embeddings.hdf5", "r+") as file:
        file.move("subjects", "eid")
        file.move("genes", "gene_id")


def _parquet_gene_major(folder, v):
    long_table(v).sort("gene_id", "eid").write_parquet(folder / "t.parquet", row_group_size=7)


def _parquet_large_list(folder, v):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = long_table(v).rename({"eid": "participant_id", "gene_id": "gene_symbol"}).to_arrow()
    assert pa.types.is_large_list(table.schema.field("embedding").type)
    pq.write_table(table, folder / "t.parquet", row_group_size=10)


def _parquet_parts_by_worker(folder, v):
    table = long_table(v)
    for part, people in enumerate((SUBJECTS[:5], SUBJECTS[5:])):
        rows = table.filter(pl.col("eid").is_in(people)).sort("gene_id", "eid")
        rows.write_parquet(folder / f"part-{part}.parquet")


def _parquet_shuffled(folder, v):
    long_table(v).sample(fraction=1.0, shuffle=True, seed=1).write_parquet(folder / "t.parquet")


FORMS = [form for name, form in list(globals().items()) if name.startswith("_") and callable(form)]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_same_numbers_whole_and_in_small_blocks(
    tmp_path, vectors, form, monkeypatch
):
    folder = declare(tmp_path / "f", files=None)
    form(folder, vectors)
    for block_bytes in (source_module.BLOCK_BYTES, 5 * WIDTH * 4):
        monkeypatch.setattr(source_module, "BLOCK_BYTES", block_bytes)
        stream = genetics.open_stream("evo2", folder)
        features = stream.gathered().select(SUBJECTS, GENES)
        np.testing.assert_array_equal(features.vectors, vectors)
        assert features.mask.all()
        assert {alarm.name for alarm in stream.alarms} <= {"undeclared"}
    if "shuffled" not in form.__name__:
        assert stream.n_blocks > 1


@pytest.mark.parametrize("form", FORMS)
def test_blocks_cover_each_person_and_gene_once(tmp_path, vectors, form, monkeypatch):
    folder = declare(tmp_path / "f")
    form(folder, vectors)
    monkeypatch.setattr(source_module, "BLOCK_BYTES", 5 * WIDTH * 4)
    stream = genetics.open_stream("evo2", folder)
    seen = np.zeros((N, G), dtype=int)
    for block in stream.blocks():
        seen[block.rows, block.columns] += 1
        assert block.vectors.dtype == np.float32
        assert block.vectors.shape == (*block.mask.shape, WIDTH)
    assert (seen == 1).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("storage", ["float32", "dictionary"])
def test_each_form_comes_back_from_a_store_as_it_was_written(tmp_path, vectors, form, storage):
    folder = declare(tmp_path / "f")
    form(folder, vectors)
    stream = genetics.open_stream("evo2", folder)
    with StoreWriter(
        tmp_path / "store",
        subjects=stream.subjects,
        genes=stream.genes,
        width=stream.width,
        storage=storage,
    ) as writer:
        for block in stream:
            writer.add(block.rows, block.columns, block.vectors, block.mask)
        writer.finish(stream.provenance, stream.alarms)
    opened = genetics.open_store(tmp_path / "store").select(SUBJECTS, GENES)
    np.testing.assert_array_equal(np.asarray(opened.vectors), vectors)
    assert opened.mask.all()


# -- haplotypes and strands ------------------------------------------------------------------------


def _hap_npz(folder, h):
    np.savez(folder / "all.npz", embeddings=h, subjects=np.array(SUBJECTS), genes=np.array(GENES))


def _hap_files(folder, h):
    for i, j, k in np.ndindex(N, G, 2):
        torch.save(torch.from_numpy(h[i, j, k]), folder / f"{SUBJECTS[i]}_{GENES[j]}_hap{k + 1}.pt")


def _hap_files_per_gene(folder, h):
    write_list(folder / "subjects.txt", SUBJECTS)
    for j, k in np.ndindex(G, 2):
        np.save(folder / f"{GENES[j]}.h{k}.npy", h[:, j, k])


def _hap_parquet(folder, h):
    tables = [long_table(h[:, :, k], haplotype=f"h{k}") for k in (0, 1)]
    pl.concat(tables).sort("eid", maintain_order=True).write_parquet(folder / "t.parquet")


@pytest.mark.parametrize(
    ("form", "files"),
    [
        (_hap_npz, None),
        (_hap_files, "{subject}_{gene}_{haplotype}"),
        (_hap_files_per_gene, "{gene}.{haplotype}"),
        (_hap_parquet, None),
    ],
)
def test_haplotypes_are_kept_apart_and_read_as_their_mean(
    tmp_path, haplotypes, form, files, monkeypatch
):
    monkeypatch.setattr(source_module, "BLOCK_BYTES", 7 * WIDTH * 4)
    folder = declare(tmp_path / "f", files=files, haplotypes=2)
    form(folder, haplotypes)
    stream = genetics.open_stream("evo2", folder)
    assert stream.has_haplotypes
    found = np.zeros_like(haplotypes)
    for block in stream:
        found[block.rows, block.columns] = block.vectors
    rows = [stream.subjects.index(subject) for subject in SUBJECTS]
    columns = [stream.genes.index(gene) for gene in GENES]
    np.testing.assert_array_equal(found[rows][:, columns], haplotypes)
    features = genetics.read("evo2", folder).select(SUBJECTS, GENES)
    np.testing.assert_allclose(
        np.asarray(features.vectors), haplotypes.mean(axis=2), rtol=1e-6, atol=1e-7
    )


def test_a_haplotype_that_is_missing_masks_its_person(tmp_path, haplotypes):
    haplotypes[3, 1, 0] = np.nan
    folder = declare(tmp_path / "f", haplotypes=2)
    _hap_npz(folder, haplotypes)
    features = genetics.read("evo2", folder)
    assert list(zip(*np.nonzero(~features.mask), strict=True)) == [(3, 1)]


@pytest.mark.parametrize("form", ["axis", "files", "column"])
def test_two_strands_are_averaged_in_float32(tmp_path, haplotypes, form):
    files = "{subject}_{gene}_{strand}" if form == "files" else None
    folder = declare(tmp_path / "f", strands="pair", files=files)
    if form == "axis":
        _hap_npz(folder, haplotypes)
    elif form == "files":
        for i, j, k in np.ndindex(N, G, 2):
            name = f"{SUBJECTS[i]}_{GENES[j]}_{('fwd', 'rc')[k]}"
            torch.save(torch.from_numpy(haplotypes[i, j, k]), folder / f"{name}.pt")
    else:
        tables = [long_table(haplotypes[:, :, k], strand="+-"[k]) for k in (0, 1)]
        pl.concat(tables).write_parquet(folder / "t.parquet")
    features = genetics.read("evo2", folder)
    expected = np.float32(0.5) * (haplotypes[:, :, 0] + haplotypes[:, :, 1])
    np.testing.assert_array_equal(features.select(SUBJECTS, GENES).vectors, expected)
    assert features.provenance.strands == "averaged"
    assert features.provenance.steps == ("mean of forward and reverse complement",)


# -- token level -----------------------------------------------------------------------------------


def test_evo2_dicts_of_one_sequence_each_are_pooled_without_edge_and_special_tokens(tmp_path):
    rng = np.random.default_rng(2)
    folder = declare(
        tmp_path / "e", level="token", special_tokens=[1, 0], trim_left=15, files="{gene}/{subject}"
    )
    expected = np.zeros((N, G, WIDTH))
    for i, j in np.ndindex(N, G):
        tokens = torch.from_numpy(rng.normal(size=(1, 60 + 5 * i + j, WIDTH))).bfloat16()
        expected[i, j] = tokens[0, 16:].double().mean(dim=0).numpy()
        (folder / GENES[j]).mkdir(exist_ok=True)
        torch.save(
            {"blocks.26": tokens, "blocks.3": 9 * tokens}, folder / GENES[j] / f"{SUBJECTS[i]}.pt"
        )
    features = genetics.read("evo2", folder, layer="blocks.26")
    np.testing.assert_allclose(features.vectors, expected, rtol=1e-6, atol=1e-7)
    assert features.provenance.steps == (
        "mean over tokens in float32, 1 + 0 special and 15 + 0 edge tokens left out",
    )
    assert features.provenance.dtype == "float32"  # the mean was never rounded
    assert features.provenance.level == "gene"


@pytest.mark.parametrize("with_mask", [True, False])
def test_stacked_tokens_are_pooled_over_their_true_lengths(tmp_path, with_mask):
    rng = np.random.default_rng(3)
    lengths = rng.integers(20, 40, size=(N, G))
    tokens = rng.normal(size=(N, G, 40, WIDTH)).astype(np.float32)
    sides = {"lengths": lengths}
    if with_mask:
        sides = {"attention_mask": (np.arange(40) < lengths[..., None]).astype(np.int64)}
    folder = declare(tmp_path / "e", level="token", special_tokens=[0, 0], pooling="max")
    np.savez(
        folder / "all.npz",
        embeddings=tokens,
        subjects=np.array(SUBJECTS),
        genes=np.array(GENES),
        **sides,
    )
    features = genetics.read("evo2", folder)
    for i, j in np.ndindex(N, G):
        expected = tokens[i, j, : lengths[i, j]].max(axis=0)
        np.testing.assert_array_equal(features.vectors[i, j], expected)


def test_token_level_hdf5_is_read_a_block_of_people_at_a_time(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    monkeypatch.setattr(source_module, "BLOCK_BYTES", 3 * G * 20 * WIDTH * 4)
    tokens = np.random.default_rng(4).normal(size=(N, G, 20, WIDTH)).astype(np.float16)
    folder = declare(tmp_path / "e", level="token", special_tokens=[0, 0], length_bp=20)
    with h5py.File(folder / "tokens.h5", "w") as file:
        file["eid"], file["gene"], file["embedding"] = list(SUBJECTS), list(GENES), tokens
    stream = genetics.open_stream("evo2", folder)
    assert stream.n_blocks == 4
    expected = tokens.astype(np.float64).mean(axis=2)
    np.testing.assert_allclose(stream.gathered().vectors, expected, rtol=1e-6, atol=1e-7)


# -- dosages and scores ----------------------------------------------------------------------------


def test_dosages_are_one_wide_vector_a_person_and_zeros_are_numbers(tmp_path):
    dosages = np.random.default_rng(5).binomial(2, 0.3, size=(N, 40)).astype(np.float32)
    dosages[4] = 0  # carries none of the alternative alleles
    table = {"eid": list(SUBJECTS), **{f"rs{k}": dosages[:, k].astype(int) for k in range(40)}}
    pl.DataFrame(table).write_csv(tmp_path / "dosages.csv")
    features = genetics.read("dosage", tmp_path / "dosages.csv")
    assert (features.subjects, features.genes) == (SUBJECTS, ("all",))
    np.testing.assert_array_equal(features.vectors[:, 0], dosages)
    assert features.mask.all()
    assert features.alarms == ()
    assert features.provenance.model == "dosage"


def test_plink_tables_are_read_without_what_is_no_number_of_theirs(tmp_path, capsys):
    rng = np.random.default_rng(6)
    dosages = rng.binomial(2, 0.3, size=(N, 5))
    header = "FID IID PAT MAT SEX PHENOTYPE " + " ".join(f"rs{k}_A" for k in range(5))
    rows = [
        f"{s} {s} 0 0 1 -9 " + " ".join(map(str, d)) for s, d in zip(SUBJECTS, dosages, strict=True)
    ]
    rows[7] = rows[7].rsplit(" ", 1)[0] + " NA"
    (tmp_path / "chr20.raw").write_text("\n".join([header, *rows]) + "\n")
    features = genetics.read("dosage", tmp_path / "chr20.raw")
    np.testing.assert_array_equal(
        features.vectors[features.mask[:, 0], 0], np.delete(dosages, 7, 0)
    )
    assert not features.mask[7, 0]
    said = capsys.readouterr().err
    assert "left out the columns FID, PAT, MAT, SEX, PHENOTYPE" in said
    assert "in 1 of 12 people, who are masked" in said
    scores = rng.normal(size=N).round(4)
    lines = ["#FID\tIID\tALLELE_CT\tSCORE1_AVG"]
    lines += [f"{s}\t{s}\t100\t{x}" for s, x in zip(SUBJECTS, scores, strict=True)]
    (tmp_path / "height.sscore").write_text("\n".join(lines) + "\n")
    features = genetics.read("pgs", tmp_path / "height.sscore")
    np.testing.assert_array_equal(features.vectors[:, 0, 0], scores.astype(np.float32))
    assert features.subjects == SUBJECTS


def test_scores_in_parquet_need_no_provenance(tmp_path):
    scores = np.random.default_rng(7).normal(size=(N, 3)).astype(np.float32)
    names = ("height", "mdd", "bmi")
    table = pl.DataFrame({"eid": SUBJECTS, **dict(zip(names, scores.T, strict=True))})
    table.write_parquet(tmp_path / "scores.parquet")
    features = genetics.read("pgs", tmp_path / "scores.parquet", strict=True)
    np.testing.assert_array_equal(features.vectors[:, 0], scores)


@pytest.mark.parametrize(
    ("model", "checkpoint", "width"),
    [
        ("dnabert2", "zhihan1996/DNABERT-2-117M", 768),
        ("hyenadna", "hyenadna-medium-160k-seqlen", 256),
        ("nucleotide-transformer", "nucleotide-transformer-v2-500m-multi-species", 1024),
        ("generic", "my-own-model", 33),
    ],
)
def test_other_models_are_read_through_the_registry_alone(tmp_path, model, checkpoint, width):
    vectors = np.random.default_rng(8).normal(size=(N, G, width)).astype(np.float32)
    np.savez(
        tmp_path / "all.npz", embeddings=vectors, subjects=np.array(SUBJECTS), genes=np.array(GENES)
    )
    features = genetics.read(model, tmp_path, checkpoint=checkpoint, strands="fwd_only")
    np.testing.assert_array_equal(features.vectors, vectors)


# -- what is refused -------------------------------------------------------------------------------


def test_people_of_subjects_txt_without_a_file_are_masked_and_counted(tmp_path, vectors, capsys):
    folder = declare(tmp_path / "f")
    _pt_per_subject(folder, vectors)
    write_list(folder / "subjects.txt", SUBJECTS)
    (folder / f"{SUBJECTS[3]}.pt").unlink()
    features = genetics.read("evo2", folder)
    assert features.subjects == SUBJECTS
    assert list(np.flatnonzero(~features.mask.any(axis=1))) == [3]
    assert "1 files are absent" in capsys.readouterr().err
    (folder / "stranger.pt").write_bytes((folder / f"{SUBJECTS[4]}.pt").read_bytes())
    with pytest.raises(
        UserError, match=r"1 of 12 subjects in the files' names are not in subjects\.txt"
    ):
        genetics.read("evo2", folder)


@pytest.mark.parametrize("what", ["layer", "truncated", "rows"])
@pytest.mark.parametrize("person", [0, 4])
def test_errors_about_a_persons_file_number_it_and_do_not_name_the_person(
    tmp_path, vectors, what, person
):
    folder = declare(tmp_path / "f", layer=None)
    _pt_per_subject(folder, vectors)
    file = folder / f"{SUBJECTS[person]}.pt"
    if what == "layer":
        torch.save({"norm": torch.ones(G, WIDTH)}, file)
    elif what == "rows":
        torch.save({"blocks.26": torch.ones(G + 1, WIDTH)}, file)
    else:
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError) as info:
        genetics.read("evo2", folder)
    assert "of 12 people by name>.pt" in str(info.value)
    assert not any(subject in str(info.value) for subject in SUBJECTS)


def test_folders_that_could_be_of_people_or_of_genes_are_asked_about(tmp_path, vectors):
    folder = declare(tmp_path / "f")
    _pt_per_subject_and_gene(folder, vectors)
    (folder / "genes.txt").unlink()
    with pytest.raises(UserError, match="folders of people or of genes"):
        genetics.read("evo2", folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": "{person}"}, "'{person}'.*Known: subject, gene"),
        ({"files": "all"}, "expected names such as"),
        ({"files": "{gene}/{subject}_{haplotype}"}, "12 of 12 files are not named"),
        ({"haplotypes": 2}, "an axis of two for haplotypes"),
        ({"haplotypes": 3}, "haplotypes=3"),
        ({"strands": "pair"}, "an axis of two for strands"),
        ({"level": "token"}, "special_tokens.*got None"),
        ({"level": "token", "special_tokens": [0, 0]}, "token level is declared"),
        ({"level": "token", "special_tokens": [0, 0], "pooling": "median"}, "not known for evo2"),
        ({"trim_lef": 3, "level": "token"}, "Did you mean 'trim_left'"),
        ({"indels": "some"}, "indels='some'.*none, included"),
    ],
)
def test_declarations_that_do_not_fit_the_files_are_refused(tmp_path, vectors, changes, message):
    folder = declare(tmp_path / "f", **changes)
    _pt_per_subject(folder, vectors)
    with pytest.raises(UserError, match=message) as info:
        genetics.read("evo2", folder)
    assert "\n" not in str(info.value)


def test_positions_without_lengths_are_refused(tmp_path):
    folder = declare(tmp_path / "e", level="token", special_tokens=[0, 0])
    write_list(folder / "subjects.txt", SUBJECTS)
    torch.save({"blocks.26": torch.randn(N, 30, WIDTH)}, folder / "OXT.pt")
    with pytest.raises(UserError, match="padding cannot be told from sequence"):
        genetics.read("evo2", folder)
    declare(folder, level="token", special_tokens=[0, 0], length_bp=31)
    with pytest.raises(UserError, match=r"12 of 12 sequences have another number.*30, expected 31"):
        genetics.read("evo2", folder)
    declare(folder, level="token", special_tokens=[0, 0], length_bp=30)
    assert genetics.read("evo2", folder).mask.all()


def test_large_tables_in_no_order_are_refused_with_the_command_that_sorts(
    tmp_path, vectors, monkeypatch
):
    from brainfusion.genetics import long

    folder = declare(tmp_path / "f")
    _parquet_shuffled(folder, vectors)
    for module in (source_module, long):
        monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(long, "MAX_BLOCK_BYTES", 1000)
    with pytest.raises(UserError, match=r'sort them first, such as polars.*sort\("eid"\)'):
        genetics.open_stream("evo2", folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eid,rs1\n01,1\n01,2\n", "1 duplicate subject ids"),
        ("eid,rs1\n01,1\n02,A\n", "1 of 1 columns are no numbers"),
        ("rs1,rs2\n1,2\n", "no column of ids"),
        ("eid,IID,rs1\n1,1,2\n", "mean the same"),
        ("eid,rs1\n01,1,5\n02,1\n", "cannot be read as a table"),
        ("eid\n01\n02\n", "no column of numbers"),
        ("eid,rs1\n1000234.0,1\n1000235.0,2\n", "end in '.0'"),
        ("eid,rs1\n1e+06,1\n2e+06,2\n", "lost digits"),
    ],
)
def test_tables_of_numbers_that_would_mislead_are_refused(tmp_path, text, message):
    (tmp_path / "dosages.csv").write_text(text)
    with pytest.raises(UserError, match=message) as info:
        genetics.read("dosage", tmp_path / "dosages.csv")
    assert "\n" not in str(info.value)


def test_hdf5_without_h5py_says_what_to_install(tmp_path, vectors, monkeypatch):
    import sys

    folder = declare(tmp_path / "f")
    _hdf5_rows(folder, vectors)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match="pip install h5py"):
        genetics.read("evo2", folder)


def test_a_truncated_hdf5_file_is_one_clear_line(tmp_path, vectors):
    folder = declare(tmp_path / "f")
    _hdf5_rows(folder, vectors)
    file = folder / "embeddings.h5"
    file.write_bytes(file.read_bytes()[:600])
    with pytest.raises(UserError, match="cannot be read as HDF5"):
        genetics.read("evo2", folder)


def test_subfolders_of_different_making_are_not_put_into_one_table(tmp_path, vectors):
    folder = declare(tmp_path / "f")
    _pt_per_subject_and_gene(folder, vectors)
    declare(folder / SUBJECTS[2], strands="fwd_only")
    with pytest.raises(UserError, match=r"subfolder's .* strands 'fwd_only'.*import them apart"):
        genetics.read("evo2", folder)
    for i, subject in enumerate(SUBJECTS):
        declare(folder / subject, device="H100" if i < 9 else "L40S")
    features = genetics.read("evo2", folder)
    (alarm,) = [a for a in features.alarms if a.name == "mixed device"]
    assert alarm.figure == pytest.approx(0.25)
    assert "keep device as a covariate" in alarm.cure
