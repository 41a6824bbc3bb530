import dataclasses
import json

import numpy as np
import pytest

from brainfusion import genetics
from brainfusion.genetics import GeneticFeatures, Provenance, open_store, write_store
from brainfusion.genetics.checks import Alarm
from brainfusion.runtime.errors import UserError

SUBJECTS = ("007", "7", "sub-01", "0012", "x")
GENES = ("AVP", "OXT", "PDYN")
STORAGES = ("float32", "centred-float16", "dictionary")


@pytest.fixture
def features() -> GeneticFeatures:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(5, 3, 4)).astype(np.float32)
    mask = np.ones((5, 3), dtype=bool)
    mask[1, 2] = mask[4, 0] = False
    vectors[~mask] = 0.0
    provenance = Provenance(
        model="evo2",
        checkpoint="simulated",
        strands="averaged",
        pooling="mean",
        layer="blocks.26",
        simulated=True,
        steps=("a", "b"),
        extra={"device": "H100"},
    )
    alarm = Alarm(name="missing vectors", figure=2 / 15, finding="2 of 15", cure="look")
    return GeneticFeatures(
        subjects=SUBJECTS,
        genes=GENES,
        vectors=vectors,
        mask=mask,
        provenance=provenance,
        alarms=(alarm,),
    )


# -- features --------------------------------------------------------------------------------------


def test_select_takes_people_and_genes_by_id_in_the_order_given(features):
    picked = features.select(["x", "007"], ["PDYN", "AVP"])
    assert (picked.subjects, picked.genes) == (("x", "007"), ("PDYN", "AVP"))
    np.testing.assert_array_equal(picked.vectors, features.vectors[[4, 0]][:, [2, 0]])
    np.testing.assert_array_equal(picked.mask, features.mask[[4, 0]][:, [2, 0]])
    assert picked.provenance == features.provenance


def test_select_refuses_unknown_ids_with_their_count_and_without_naming_people(features):
    with pytest.raises(UserError, match="2 of 3 subject ids have no row") as info:
        features.select(["007", "12", "secret"])
    assert "secret" not in str(info.value)
    with pytest.raises(UserError, match="Did you mean 'OXT'"):
        features.select(SUBJECTS, ["OXTR"])
    with pytest.raises(UserError, match="asked for twice"):
        features.select(["7", "7"])


def test_concatenated_fills_missing_genes_with_the_mean_of_those_present(features):
    flat = features.concatenated()
    assert flat.shape == (5, 12)
    present = features.vectors[[0, 2, 3, 4], 2].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(flat[1, 8:], present, rtol=1e-6)
    np.testing.assert_array_equal(flat[0], features.vectors[0].ravel())
    assert features.n_missing == 2
    assert not features.vectors[1, 2].any()  # a copy was filled


def test_concatenated_can_fill_with_means_of_other_people(features):
    train = features.select(["007", "sub-01"])
    flat = features.concatenated(fill=train.gene_means())
    np.testing.assert_array_equal(flat[1, 8:], train.gene_means()[2])


def test_features_whose_shapes_do_not_fit_their_ids_are_refused(features):
    with pytest.raises(UserError, match="expected"):
        dataclasses.replace(features, subjects=SUBJECTS[:-1])
    with pytest.raises(UserError, match="mask"):
        dataclasses.replace(features, mask=features.mask.astype(np.int8))


# -- store -----------------------------------------------------------------------------------------


def test_store_round_trip_is_exact(tmp_path, features):
    write_store(tmp_path / "genetics" / "evo2", features)
    back = open_store(tmp_path / "genetics" / "evo2", verify=True)
    assert (back.subjects, back.genes) == (SUBJECTS, GENES)
    np.testing.assert_array_equal(back.vectors, features.vectors)
    np.testing.assert_array_equal(back.mask, features.mask)
    assert back.provenance == features.provenance
    assert back.alarms == features.alarms


@pytest.mark.parametrize("storage", STORAGES)
def test_store_vectors_are_mapped_and_read_only(tmp_path, features, storage):
    write_store(tmp_path / "evo2", features, storage=storage)
    before = {file: file.read_bytes() for file in (tmp_path / "evo2").iterdir()}
    back = open_store(tmp_path / "evo2")
    with pytest.raises(TypeError, match="does not support item assignment"):
        back.vectors[0, 0, 0] = 1.0
    with pytest.raises(ValueError, match="read-only"):
        back.mask[0, 0] = False
    for copy in (back.concatenated(), back.rows([0, 1]), back.pooled([0]), back.vectors[2]):
        copy[:] = 0.0
    assert {file: file.read_bytes() for file in (tmp_path / "evo2").iterdir()} == before


def test_read_takes_a_store_and_repeats_its_alarms(tmp_path, features, capsys):
    write_store(tmp_path / "evo2", features)
    back = genetics.read("evo2", tmp_path / "evo2")
    np.testing.assert_array_equal(back.vectors, features.vectors)
    assert "missing vectors: 2 of 15; look" in capsys.readouterr().err
    with pytest.raises(UserError, match="says model 'evo2', but 'caduceus'"):
        genetics.read("caduceus", tmp_path / "evo2")
    with pytest.raises(UserError, match=r"says layer 'blocks\.26', but 'blocks\.20'"):
        genetics.read("evo2", tmp_path / "evo2", layer="blocks.20")


def test_the_same_features_give_the_same_bytes(tmp_path, features):
    for name in ("a", "b"):
        write_store(tmp_path / name, features)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_writing_replaces_a_store_and_nothing_else(tmp_path, features):
    write_store(tmp_path / "evo2", features)
    write_store(tmp_path / "evo2", features.select(["x", "7"]))
    assert open_store(tmp_path / "evo2").subjects == ("x", "7")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="is no store"):
        write_store(tmp_path / "mine", features)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_failed_write_leaves_the_old_store_and_no_debris(tmp_path, features, monkeypatch):
    write_store(tmp_path / "evo2", features)

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(np.lib.format, "open_memmap", full)
        with pytest.raises(UserError, match="No space left on device"):
            write_store(tmp_path / "evo2", features.select(["x", "7"]))
    assert [p.name for p in tmp_path.iterdir()] == ["evo2"]
    assert open_store(tmp_path / "evo2", verify=True).subjects == SUBJECTS


@pytest.mark.parametrize(
    "name", ["vectors.npy", "mask.npy", "subjects.parquet", "genes.parquet", "meta.json"]
)
def test_an_incomplete_store_is_refused(tmp_path, features, name):
    write_store(tmp_path / "evo2", features)
    (tmp_path / "evo2" / name).unlink()
    with pytest.raises(UserError, match=f"incomplete: {name} is missing"):
        genetics.read("evo2", tmp_path / "evo2")


@pytest.mark.parametrize("name", ["vectors.npy", "mask.npy", "subjects.parquet", "meta.json"])
def test_a_truncated_store_is_refused(tmp_path, features, name):
    write_store(tmp_path / "evo2", features)
    file = tmp_path / "evo2" / name
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"truncated|is not JSON"):
        open_store(tmp_path / "evo2")


def test_changed_numbers_are_found_by_verifying_and_changed_ids_at_once(tmp_path, features):
    write_store(tmp_path / "evo2", features)
    file = tmp_path / "evo2" / "vectors.npy"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    open_store(tmp_path / "evo2")
    with pytest.raises(UserError, match="its hash differs"):
        open_store(tmp_path / "evo2", verify=True)
    ids = tmp_path / "evo2" / "subjects.parquet"
    changed = bytearray(ids.read_bytes())
    changed[len(changed) // 2] ^= 1
    ids.write_bytes(changed)
    with pytest.raises(UserError, match=r"subjects\.parquet is not what was written"):
        open_store(tmp_path / "evo2")


def test_a_store_of_a_later_format_is_refused(tmp_path, features):
    write_store(tmp_path / "evo2", features)
    file = tmp_path / "evo2" / "meta.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 3}))
    with pytest.raises(UserError, match=r"format 3.* but this version reads formats 1 to 2"):
        open_store(tmp_path / "evo2")


def test_a_store_of_format_1_is_still_read(tmp_path, features):
    write_store(tmp_path / "evo2", features)
    file = tmp_path / "evo2" / "meta.json"
    meta = json.loads(file.read_text())
    for key in ("storage", "haplotypes", "provenance_hash", "source"):
        del meta[key]
    file.write_text(json.dumps({**meta, "format": 1}))
    np.testing.assert_array_equal(open_store(tmp_path / "evo2").vectors, features.vectors)


def test_provenance_that_was_changed_by_hand_is_refused(tmp_path, features):
    write_store(tmp_path / "evo2", features)
    file = tmp_path / "evo2" / "meta.json"
    meta = json.loads(file.read_text())
    meta["provenance"]["layer"] = "blocks.20"
    file.write_text(json.dumps(meta))
    with pytest.raises(UserError, match="the provenance is not what was written"):
        open_store(tmp_path / "evo2")


def test_a_store_that_is_not_there_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"does not exist; make the store again"):
        open_store(tmp_path / "evo2")
