"""What a user gets for wrong input: one line, exit code 2, and nothing half-written."""

import errno
import json
import resource
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from brainfusion.data.features import read_features, write_features
from tests.cli.conftest import SMALL


def tree(folder):
    """Every file below `folder` with its size; what a refused command must leave as it was."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def copy(site, tmp_path):
    """A copy of the cohort that a test may spoil."""
    return Path(shutil.copytree(site.cohort, tmp_path / "spoilt"))


@pytest.fixture
def source(tmp_path):
    """Recordings of six people as tables with named parcels, [TR, parcel]."""
    folder = tmp_path / "tables"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        bold = rng.normal(size=(40, 5))
        pl.DataFrame(bold, schema=list("ABCDE")).write_csv(folder / f"p{i}.tsv", separator="\t")
    return folder


def respell(path, change):
    """Change one recording's table."""
    change(pl.read_csv(path, separator="\t")).write_csv(path, separator="\t")


# -- words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("simualte --out x", "unknown command 'simualte'. Did you mean 'simulate'?"),
        ("simulate", "missing: --out PATH"),
        ("simulate --out x --preset nul", "unknown preset 'nul'. Did you mean 'null'?"),
        ("simulate --out x --n-peple 30", "--n-peple, 30. Did you mean --n-people?"),
        ("simulate --out x --n-people many", "--n-people: expected a whole number, got 'many'"),
        ("simulate --out x --n-people 10", "n_people=10: expected 20 or more"),
        ("simulate --out x --h2 2", "h2=2.0: expected a share from 0 to 1"),
        ("pretrain", "missing: --model"),
        ("pretrain --model brainlmm", "unknown model 'brainlmm'. Did you mean 'brainlm'?"),
        ("pretrain --model brainlm --preset 13M", "unknown preset '13M' for brainlm"),
        ("pretrain --model brainlm --n-trs 65", "Use n_trs=64"),
        ("pretrain --model brainlm --predictor-width 8", "--predictor-width, 8"),
        ("embed --model brainjep", "unknown model 'brainjep'. Did you mean 'brainjepa'?"),
        ("embed --batch-size 0", "batch_size=0: expected 1 or more"),
        ("embed --precision bf16", "Expected one of ('float32', 'bfloat16')"),
        ("embed --device gpu", "device 'gpu' is unknown: use auto, cpu or cuda"),
        ("align --loss clipp", "Expected one of ('info_nce', 'clip', 'siglip')"),
        ("align --batch-size 1", "batch_size=1: one pair has nothing to be told from"),
        ("align --dropout 1.5", "dropout=1.5: expected at least 0 and less than 1"),
        ("retrieve --top 0", "--top 0: expected 1 or more"),
        ("retrieve --permutations 0", "--permutations 0: expected 1 or more"),
        ("retrieve --query-from genes", "Expected one of ('auto', 'dna', 'brain')"),
        ("probe --bootstrap 1", "--bootstrap 1: expected 2 or more"),
        ("report extra", "extra does not exist: expected the folder of an alignment or"),
        ("import", "missing: SOURCE"),
        ("import here --out x", "here does not exist: expected a folder of recordings"),
        ("import here --out x --tr-s 720", "tr_s=720 is no repetition time in seconds"),
        ("import here --out x --tr-s 2", "here does not exist: expected a folder of recordings"),
        ("import --dna evo2", "missing: PATH"),
        ("align --config", "--config needs a value"),
    ],
)
def test_a_wrong_word_is_named_with_what_was_expected(call, words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in call(*words.split()).error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("pretrain --model brainlm --n-trs 64 --standardiser zscore", "unknown standardiser"),
        ("pretrain --model brainlm --steps 0", "steps=0: expected 1 or more"),
        ("pretrain --model brainlm --batch-size 0", "batch_size=0: expected 1 or more"),
        ("pretrain --model brainlm --n-trs 96", "0 training and 0 validation recordings"),
        ("pretrain --model brainlm --n-trs 64 --n-parcels 50", "has 20 parcels but the encoder"),
        ("pretrain --model brainlm --device tpu", "device 'tpu' is unknown"),
        ("embed --pooling maen", "pooling 'maen' is unknown. Did you mean 'mean'?"),
        ("embed --pooling cls", "this encoder has no CLS token"),
        ("embed --checkpoint nowhere", "nowhere does not exist"),
        ("align --brain brainjep", "'brainjep' is no encoder. Did you mean 'brainjepa'?"),
        ("align --dna evo", "unknown DNA model 'evo'. Did you mean 'evo2'?"),
        ("align --residualise agee", "no column 'agee' in the subjects table"),
        ("retrieve --dna evo", "unknown DNA model 'evo'. Did you mean 'evo2'?"),
        ("retrieve --brain brainjep", "'brainjep' is no encoder. Did you mean 'brainjepa'?"),
        ("retrieve --brain brainlm", "run 'brainfusion align --brain brainlm --dna evo2"),
        ("retrieve --query nobody", "there is no person 'nobody' among the 120 pairs"),
        ("probe --targets agee", "has no column 'agee'. Did you mean 'age'?"),
        ("probe --targets age --confounds agee", "confound 'agee' is no column"),
        ("probe --targets age --n-folds 1", "n_folds=1"),
        ("probe --targets age --n-folds 99", "for 99 folds"),
        ("report --brain brainlm", "run 'brainfusion align --brain brainlm --dna evo2"),
    ],
)
def test_a_value_that_does_not_fit_the_cohort_changes_nothing(site, call, words, says):
    before = tree(site.workspace)
    assert says in call(*words.split(), *site.place).error
    assert tree(site.workspace) == before


# -- configs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("patience: 3\npatince: 3\n", "unknown key 'patince' for AlignConfig. Did you mean 'pat"),
        ("max_steps: soon\n", "max_steps='soon': expected int, got str"),
        ("loss: clipp\n", "loss='clipp': Did you mean 'clip'?"),
        ("dropout: 7\n", "dropout=7.0: expected at least 0 and less than 1"),
        ("residualise: age\n", "residualise='age': expected a list"),
        ("- a list\n", "expected a mapping of keys to values"),
        ("a: [1\n", "is not valid YAML"),
    ],
)
def test_a_config_typo_is_an_error_and_not_a_default(site, call, tmp_path, text, says):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    before = tree(site.workspace)
    error = call("align", "--config", path, *site.place).error
    assert says in error
    assert str(path) in error
    assert tree(site.workspace) == before


def test_a_config_that_is_not_there_is_named(call, tmp_path):
    path = tmp_path / "none.yaml"
    assert f"{path} does not exist: --config expects" in call("align", "--config", path).error


def test_a_nested_config_typo_is_named_with_its_place(site, call, tmp_path):
    config = site.workspace / "pretrain" / "brainlm" / "config.yaml"
    values = yaml.safe_load(config.read_text())
    values["encoder"]["patch_tr"] = values["encoder"].pop("patch_trs")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    error = call("pretrain", "--model", "brainlm", "--config", path, *site.place).error
    assert "encoder: unknown key 'patch_tr' for BrainLMConfig. Did you mean 'patch_trs'?" in error


def test_the_config_of_another_encoder_is_refused(site, call):
    config = site.workspace / "pretrain" / "brainjepa" / "config.yaml"
    error = call("pretrain", "--model", "brainlm", "--config", config, *site.place).error
    assert "brainjepa" in error or "for BrainLMConfig" in error


# -- cohorts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["pretrain --model brainlm", "embed", "align"])
def test_a_cohort_that_is_not_there_is_named(call, tmp_path, command):
    place = ("--cohort", tmp_path / "none", "--workspace", tmp_path / "work")
    error = call(*command.split(), *place).error
    assert f"{tmp_path / 'none'} does not exist: --cohort expects a cohort folder" in error
    assert list(tmp_path.iterdir()) == []


def spoil(folder, file, change):
    """Rewrite one Parquet table of a cohort."""
    change(pl.read_parquet(folder / file)).write_parquet(folder / file)


def test_duplicate_subject_ids_are_refused(copy, call, tmp_path):
    spoil(copy, "subjects.parquet", lambda t: pl.concat([t, t[:2]]))
    error = call("embed", "--cohort", copy, "--workspace", tmp_path / "w").error
    assert "2 subject ids repeat (for example sim-00" in error


def test_numeric_subject_ids_are_refused(copy, call, tmp_path):
    number = pl.col("subject").str.slice(4).cast(pl.Int64)
    spoil(copy, "subjects.parquet", lambda t: t.with_columns(number))
    error = call("embed", "--cohort", copy, "--workspace", tmp_path / "w").error
    assert "'subject' is Int64, expected text" in error


def test_recordings_of_people_who_are_not_in_the_table_are_refused(copy, call, tmp_path):
    spoil(copy, "subjects.parquet", lambda t: t[5:])
    error = call("embed", "--cohort", copy, "--workspace", tmp_path / "w").error
    assert "5 recordings belong to 5 people who are not in subjects.parquet" in error


@pytest.mark.parametrize("file", ["subjects.parquet", "recordings/index.parquet"])
def test_a_broken_table_of_the_cohort_is_one_line(copy, call, tmp_path, file):
    (copy / file).write_bytes((copy / file).read_bytes()[:100])
    error = call("embed", "--cohort", copy, "--workspace", tmp_path / "w").error
    assert f"{copy / file} is not a readable Parquet file" in error


@pytest.mark.parametrize("file", ["cohort.json", "atlas.json", "splits.json"])
def test_a_broken_json_of_the_cohort_is_one_line(copy, call, tmp_path, file):
    (copy / file).write_text((copy / file).read_text()[:30])
    place = ("--cohort", copy, "--workspace", tmp_path / "w")
    error = call("pretrain", "--model", "brainjepa", *SMALL, *place).error
    assert f"{copy / file} is not JSON" in error


def test_a_truncated_shard_is_refused(copy, call, tmp_path):
    shard = copy / "recordings" / "shard-00000.npy"
    with shard.open("r+b") as handle:
        handle.truncate(5000)
    error = call("embed", "--cohort", copy, "--workspace", tmp_path / "w").error
    assert f"{shard} is truncated: 5000 bytes of" in error


def test_too_few_people_for_three_splits_are_refused(source, call, done, tmp_path):
    for path in sorted(source.iterdir())[2:]:
        path.unlink()
    done("import", source, "--out", tmp_path / "few", "--tr-s", 2)
    place = ("--cohort", tmp_path / "few", "--workspace", tmp_path / "w")
    error = call("pretrain", "--model", "brainjepa", "--n-trs", 32, *place).error
    assert "2 families cannot fill 3 sides (train, validation, test)" in error


# -- recordings ------------------------------------------------------------------------------------


def importing(call, source, tmp_path, *words):
    """Import into a folder that must not be there after an error."""
    said = call("import", source, "--out", tmp_path / "new", "--tr-s", 2, *words)
    if said.code:
        assert {path.name for path in tmp_path.iterdir()} <= {"tables", "people.csv", "atlas.json"}
    return said


def test_a_recording_with_nan_is_refused(call, source, tmp_path):
    hole = pl.when(pl.int_range(pl.len()) == 7).then(None).otherwise(pl.col("C")).alias("C")
    respell(source / "p2.tsv", lambda t: t.with_columns(hole))
    error = importing(call, source, tmp_path).error
    assert "recording 'p2' has 1 single NaN values in 1 parcels" in error


def test_a_recording_with_another_number_of_parcels_is_refused(call, tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    for i, n_parcels in enumerate((5, 5, 4)):
        np.save(folder / f"p{i}.npy", np.random.default_rng(i).normal(size=(n_parcels, 40)))
    error = importing(call, folder, tmp_path, "--orientation", "parcels-first").error
    assert "p2.npy has 4 parcels but the first recording has 5 parcels" in error


def test_parcels_in_another_order_are_matched_by_name_and_said(done, source, tmp_path):
    original = pl.read_csv(source / "p3.tsv", separator="\t")
    respell(source / "p3.tsv", lambda t: t.select(list("CABED")))
    said = importing(done, source, tmp_path)
    assert "1 recordings put into the atlas's parcel order by name" in said.out
    shard = np.load(tmp_path / "new" / "recordings" / "shard-00000.npy")
    np.testing.assert_allclose(shard[3], original.to_numpy().T, atol=1e-6)


def test_a_cohort_in_another_parcel_order_is_embedded_the_same_and_said(
    site, copy, call, done, tmp_path
):
    order = np.random.default_rng(0).permutation(20)
    atlas = json.loads((copy / "atlas.json").read_text())
    for key in ("parcels", "xyz_mm", "networks"):
        atlas[key] = [atlas[key][i] for i in order]
    (copy / "atlas.json").write_text(json.dumps(atlas))
    shard = copy / "recordings" / "shard-00000.npy"
    np.save(shard, np.ascontiguousarray(np.load(shard)[:, order]))
    checkpoint = ("--checkpoint", site.workspace / "pretrain" / "brainlm")
    place = ("--cohort", copy, "--workspace", tmp_path / "w")
    said = done("embed", "--model", "brainlm", *checkpoint, *place)
    assert "parcels are in another order than the encoder's: matched by name" in said.err
    now = read_features(tmp_path / "w" / "features" / "brainlm.parquet")
    was = read_features(site.workspace / "features" / "brainlm.parquet")
    np.testing.assert_allclose(now.vectors, was.vectors, atol=1e-5)
    # Without a parcel the encoder has nothing to read there.
    atlas["parcels"][0] = "another"
    (copy / "atlas.json").write_text(json.dumps(atlas))
    assert (
        "lacks 1 of the 20 parcels"
        in call("embed", "--model", "brainlm", *checkpoint, *place).error
    )


def test_recordings_without_a_row_in_the_table_are_refused_or_dropped_and_said(
    call, source, tmp_path
):
    people = tmp_path / "people.csv"
    people.write_text("subject,age\n" + "".join(f"p{i},{30 + i}\n" for i in (0, 1, 2, 3, 9)))
    error = importing(call, source, tmp_path, "--subjects", people).error
    assert "2 of 6 people with recordings are not in" in error
    said = importing(call, source, tmp_path, "--subjects", people, "--missing-subjects", "drop")
    assert said.code == 0
    assert "2 recordings dropped: their subject is not in the table" in said.out
    assert "1 people in the table have no recording: kept" in said.out


def test_a_table_of_people_with_duplicate_ids_is_refused(call, source, tmp_path):
    people = tmp_path / "people.csv"
    people.write_text("subject,age\n" + "".join(f"p{i},30\n" for i in (0, 1, 2, 3, 4, 5, 5)))
    error = importing(call, source, tmp_path, "--subjects", people).error
    assert "1 subject ids repeat (for example p5)" in error


def test_an_import_over_a_cohort_needs_the_word(call, done, source, tmp_path):
    words = ("import", source, "--out", tmp_path / "new", "--tr-s", 2)
    done(*words)
    before = tree(tmp_path)
    assert "exists: give another --out, or --overwrite" in call(*words).error
    assert tree(tmp_path) == before
    done(*words, "--overwrite")


# -- features and DNA ------------------------------------------------------------------------------


@pytest.fixture
def own(site):
    """A place for features of anyone's making."""
    path = site.workspace / "features" / "own.parquet"
    yield path
    path.unlink(missing_ok=True)


def some_vectors(n):
    return np.random.default_rng(0).normal(size=(n, 8)).astype(np.float32)


def test_features_of_other_people_are_counted_and_refused_when_nobody_is_left(site, call, own):
    names = [f"sub-{i:02d}" for i in range(30)]
    write_features(own, names, some_vectors(30), provenance={})
    said = call("align", "--brain", "own", *site.place)
    assert "0 people have own features and evo2 embeddings" in said.err
    assert "30 unknown to the cohort" in said.err
    assert "nobody has both own features and evo2 embeddings" in said.error


def test_people_without_features_or_dna_are_counted_and_left_out(site, done, own, tmp_path):
    subjects = pl.read_parquet(site.cohort / "subjects.parquet")["subject"].to_list()
    write_features(own, [*subjects[20:], "stranger"], some_vectors(101), provenance={})
    words = ("--brain", "own", "--max-steps", 2, "--no-control", "--out", tmp_path / "run")
    said = done("align", *words, *site.place)
    assert "pairs: 100 people have own features and evo2 embeddings" in said.err
    assert "0 only brain, 20 only DNA, 1 unknown to the cohort" in said.err
    flow = json.loads((tmp_path / "run" / "summary.json").read_text())["flow"]
    assert [step["n"] for step in flow] == [120, 100, 120, 100, 1]


def test_features_with_numeric_ids_are_refused(site, call, own):
    table = pl.DataFrame({"subject": range(30), "vector": some_vectors(30)})
    table.write_parquet(own)
    error = call("align", "--brain", "own", *site.place).error
    assert "column 'subject' is int64, expected text" in error


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t: t.rename({"vector": "embedding"}), "has no column ['vector']"),
        (lambda t: pl.concat([t, t[:1]]), "1 subject ids repeat"),
        (lambda t: t.with_columns(vector=pl.lit("x")), "vector"),
        (lambda t: t.with_columns(vector=pl.lit(None, pl.List(pl.Float32))), "vector"),
        (lambda t: t.clear(), "nobody"),
    ],
)
def test_features_of_another_form_are_refused(site, call, own, spoil, says):
    ids = [f"sim-{i:06d}" for i in range(30)]
    spoil(pl.DataFrame({"subject": ids, "vector": some_vectors(30).tolist()})).write_parquet(own)
    assert says in call("align", "--brain", "own", *site.place).error


def test_a_broken_feature_file_is_refused(site, call, own):
    own.write_bytes(b"PAR1 and then nothing")
    assert (
        f"{own} is not a readable Parquet file"
        in call("align", "--brain", "own", *site.place).error
    )


def test_too_few_pairs_to_align_are_refused(site, call, own):
    subjects = pl.read_parquet(site.cohort / "subjects.parquet")["subject"].to_list()
    write_features(own, subjects[:3], some_vectors(3), provenance={})
    error = call("align", "--brain", "own", *site.place).error
    assert "people" in error
    assert not (site.workspace / "align" / "own-evo2").exists()


def test_dna_of_other_people_is_refused(copy, call):
    ids = copy / "sources" / "evo2" / "subjects.txt"
    ids.write_text("".join(f"other-{i}\n" for i in range(120)))
    before = tree(copy)
    error = call("import", "--dna", "evo2", ids.parent, "--cohort", copy).error
    assert "none of the 120 ids in" in error
    assert tree(copy) == before


def test_dna_of_some_people_is_counted(copy, done):
    ids = copy / "sources" / "evo2" / "subjects.txt"
    names = ids.read_text().split()
    ids.write_text("".join(f"{name}\n" for name in [*names[:100], *(f"x{i}" for i in range(20))]))
    said = done("import", "--dna", "evo2", ids.parent, "--cohort", copy)
    assert "evo2: 120 people (100 of the cohort's 120)" in said.err


@pytest.mark.parametrize(
    ("model", "folder", "says"),
    [
        ("evo", "evo2", "unknown DNA model 'evo'. Did you mean 'evo2'?"),
        ("evo2", "nowhere", "does not exist"),
        ("evo2", "generator", "says model 'generator', but 'evo2' is asked for"),
    ],
)
def test_dna_that_is_not_what_it_is_called_is_refused(copy, call, model, folder, says):
    error = call("import", "--dna", model, copy / "sources" / folder, "--cohort", copy).error
    assert says in error


def test_a_missing_dna_source_names_the_command_that_adds_it(copy, site, call, tmp_path):
    shutil.rmtree(copy / "sources")
    shutil.rmtree(copy / "genetics", ignore_errors=True)
    features = tmp_path / "w" / "features"
    features.mkdir(parents=True)
    shutil.copy(site.workspace / "features" / "brainjepa.parquet", features)
    error = call("align", "--cohort", copy, "--workspace", tmp_path / "w").error
    assert f"add them with 'brainfusion import --dna evo2 PATH --cohort {copy}'" in error


# -- checkpoints -----------------------------------------------------------------------------------


def test_a_checkpoint_of_the_other_encoder_is_refused(site, call):
    run = site.workspace / "pretrain" / "brainjepa"
    error = call("embed", "--model", "brainlm", "--checkpoint", run, *site.place).error
    assert "holds a brainjepa encoder, expected brainlm" in error


@pytest.fixture
def spoilt(site, tmp_path):
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(site.checkpoint("brainlm"), tmp_path / "step-0000004"))


def test_a_truncated_checkpoint_is_refused(site, spoilt, call, tmp_path):
    file = spoilt / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    words = ("--checkpoint", spoilt, "--out", tmp_path / "out.parquet")
    error = call("embed", "--model", "brainlm", *words, *site.place).error
    assert f"{file} is truncated or not a safetensors file" in error
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "state.json"])
def test_a_checkpoint_that_lacks_a_file_is_refused(site, spoilt, call, file):
    (spoilt / file).unlink()
    error = call("embed", "--model", "brainlm", "--checkpoint", spoilt, *site.place).error
    assert str(spoilt) in error


def test_a_broken_state_of_a_checkpoint_is_refused(site, spoilt, call):
    (spoilt / "state.json").write_text('{"format": 1, "mod')
    error = call("embed", "--model", "brainlm", "--checkpoint", spoilt, *site.place).error
    assert f"{spoilt / 'state.json'} is not JSON" in error


def test_an_empty_checkpoint_folder_is_refused(site, call, tmp_path):
    error = call("embed", "--model", "brainlm", "--checkpoint", tmp_path, *site.place).error
    assert f"{tmp_path} holds no checkpoint" in error


def test_a_run_with_another_config_is_not_continued(site, call):
    words = [*SMALL, "--lr", 0.5]
    error = call("pretrain", "--model", "brainlm", *words, *site.place).error
    assert "was trained with another config (optim.lr: " in error


# -- folders and disks -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "simulate --n-people 20 --n-parcels 14 --n-trs 32 --out FILE/x",
        "import SOURCE --tr-s 2 --out FILE/x",
        "pretrain --model brainlm --n-trs 64 --out FILE/x",
        "embed --out FILE/x.parquet",
        "align --out FILE/x",
        "align --out FILE",
    ],
)
def test_an_output_below_a_file_is_refused_at_once(site, source, call, tmp_path, words):
    file = tmp_path / "file"
    file.write_text("mine")
    words = words.replace("FILE", str(file)).replace("SOURCE", str(source)).split()
    place = () if words[0] in ("simulate", "import") else site.place
    error = call(*words, *place).error
    assert str(file) in error
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    "words", ["align --out FOLDER", "pretrain --model brainlm --restart --out FOLDER"]
)
def test_a_folder_with_other_things_is_never_replaced(site, call, tmp_path, words):
    (tmp_path / "thesis.txt").write_text("years of work")
    error = call(*words.replace("FOLDER", str(tmp_path)).split(), *site.place).error
    assert "so it is not replaced: give another --out" in error
    assert tree(tmp_path) == {"thesis.txt": 13}


@pytest.fixture
def full_disk(monkeypatch):
    """Every file that is opened for writing fails as on a full disk."""
    real = Path.open

    def refuse(self, mode="r", *args, **kwargs):
        if set(mode) & set("wax+"):
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return real(self, mode, *args, **kwargs)

    def fill():
        monkeypatch.setattr(Path, "open", refuse)
        monkeypatch.setattr(Path, "write_text", lambda self, *a, **k: refuse(self, "w"))

    return fill


@pytest.mark.parametrize(
    "words",
    [
        "simulate --n-people 20 --n-parcels 14 --n-trs 32 --out OUT",
        "import SOURCE --tr-s 2 --out OUT",
        "pretrain --model brainlm --n-trs 64 --out OUT",
        "align --no-control --max-steps 2 --out OUT",
        "report",
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(site, source, call, full_disk, tmp_path, words):
    words = words.replace("OUT", str(tmp_path / "out")).replace("SOURCE", str(source)).split()
    place = () if words[0] in ("simulate", "import") else site.place
    before = tree(site.workspace)
    full_disk()
    assert "No space left on device" in call(*words, *place).error
    assert not [name for name in tree(tmp_path) if not name.startswith("tables")]
    assert tree(site.workspace) == before


@pytest.fixture
def small_disk():
    """Real writes fail within a file, in numpy, Arrow, Polars, safetensors and torch alike."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(n_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("words", "n_bytes"),
    [
        # The subjects' table (Polars), the DNA files (torch), the recordings (numpy).
        ("simulate --n-people 200 --n-parcels 14 --n-trs 16 --out OUT", 3_000),
        ("simulate --n-people 200 --n-parcels 14 --n-trs 16 --out OUT", 40_000),
        ("simulate --n-people 20 --n-parcels 40 --n-trs 300 --out OUT", 500_000),
        ("import SOURCE --tr-s 2 --out OUT", 2_000),
        ("pretrain --model brainlm --n-trs 64 --steps 2 --out OUT", 20_000),
        ("embed --out OUT/features.parquet", 20_000),
        ("align --no-control --max-steps 2 --out OUT", 100_000),
        ("report", 20_000),
    ],
)
def test_a_write_that_fails_halfway_is_one_line_and_leaves_no_half_file(
    site, source, call, small_disk, tmp_path, words, n_bytes
):
    words = words.replace("OUT", str(tmp_path / "out")).replace("SOURCE", str(source)).split()
    place = () if words[0] in ("simulate", "import") else site.place
    before = tree(site.workspace)
    small_disk(n_bytes)
    error = call(*words, *place).error
    small_disk(resource.RLIM_INFINITY)
    assert "rite" in error or "File too large" in error
    left = {name for name in tree(tmp_path) if not name.startswith("tables")}
    whole = {"config.yaml", "metrics.jsonl", "run.log", "reconstruction.npz"}
    assert left <= {f"out/{name}" for name in whole}
    assert tree(site.workspace) == before


def test_a_disk_that_fills_up_within_a_run_keeps_the_last_checkpoint(
    site, call, monkeypatch, tmp_path
):
    from brainfusion.runtime import checkpoint

    real, saved = checkpoint.save_weights, []

    def save_weights(path, weights):
        if saved:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        saved.append(path)
        real(path, weights)

    monkeypatch.setattr(checkpoint, "save_weights", save_weights)
    words = (*SMALL, "--save-every", 2, "--out", tmp_path / "run")
    error = call("pretrain", "--model", "brainlm", *words, *site.place).error
    assert "No space left on device" in error
    folders = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert folders == ["step-0000002"]


def test_a_failed_alignment_leaves_the_earlier_one(site, call, monkeypatch):
    from brainfusion.cli import align

    before = tree(site.workspace)

    def fail(path, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(align, "write_features", fail)
        said = call("align", "--max-steps", 2, *site.place)
    assert "No space left on device" in said.error
    parts = "align/.brainjepa-evo2-parts"
    assert f"the same command goes on from the checkpoints in {site.workspace / parts}" in said.err
    left = {name: size for name, size in tree(site.workspace).items() if name not in before}
    assert left.keys() >= {f"{parts}/checkpoints/step-0000002/{n}" for n in ("state.json",)}
    assert all(name.startswith(parts) for name in left)
    assert tree(site.workspace) == {**before, **left}
    shutil.rmtree(site.workspace / parts)


def test_an_interrupted_command_says_so_and_leaves_nothing(call, monkeypatch, tmp_path):
    from brainfusion.data import simulate

    def interrupt(folder, config):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate, "_write", interrupt)
    said = call("simulate", "--out", tmp_path / "x")
    assert said.code == 130
    assert said.err.splitlines() == ["interrupted."]
    assert list(tmp_path.iterdir()) == []
