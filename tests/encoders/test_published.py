"""The authors' files become encoders that embed a cohort as the references would."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from brainfusion.cli import main
from brainfusion.data.atlas import Atlas
from brainfusion.data.cohort import Cohort, write_cohort_tables
from brainfusion.data.features import read_features
from brainfusion.data.recordings import RecordingWriter
from brainfusion.data.standardise import Standardiser
from brainfusion.encoders import create, from_upstream, to_upstream
from brainfusion.encoders.embed import EmbedSettings, embed
from brainfusion.encoders.gradients import connectivity_of, gradient_table
from brainfusion.encoders.published import is_published, load_published, published_order
from brainfusion.runtime.errors import UserError
from tests.encoders.brainlm_goldens import Golden, golden

GOLDENS = Path(__file__).parents[1] / "goldens"
JEPA = load_file(GOLDENS / "brainjepa_a.safetensors")
JEPA_CONFIG = json.loads((GOLDENS / "brainjepa_a.json").read_text())["spec"]["config"]
PARTS = ("encoder", "predictor", "target_encoder")


def cohort_of(
    path: Path, recordings: np.ndarray, *, tr_s: float | None, atlas: Atlas, n_people: int = 0
) -> Cohort:
    """One recording [p, t] a person; more people have none."""
    ids = [f"s{i}" for i in range(max(len(recordings), n_people))]
    people = pl.DataFrame({"subject": ids})
    write_cohort_tables(path, name="new", origin="imported", subjects=people, atlas=atlas)
    with RecordingWriter(path / "recordings", n_parcels=atlas.n_parcels) as writer:
        for subject, bold in zip(ids, recordings, strict=False):
            writer.add(np.asarray(bold), recording=subject, subject=subject, tr_s=tr_s)
    return Cohort.open(path)


def atlas_of(n_parcels: int, *, name: str = "own", names: str = "{}", **tables: Any) -> Atlas:
    parcels = tuple(names.format(i + 1) for i in range(n_parcels))
    return Atlas(name=name, parcels=parcels, **tables)


def save_brainlm(folder: Path, fixture: Golden, *, kind: str = "bin") -> Path:
    """BrainLM's files as on the authors' hub; returns the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fixture.config()))
    state = {key: value.contiguous() for key, value in fixture.part("state/").items()}
    if kind == "safetensors":
        save_file(state, folder / "model.safetensors")
        return folder / "model.safetensors"
    torch.save(state, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def save_brainjepa(path: Path, *, prefix: str = "module.", state: Any = None) -> Path:
    """A checkpoint as the authors' training writes it."""
    if state is None:
        state = {
            key.removeprefix("state/"): value for key, value in JEPA.items() if "state/" in key
        }
    parts: dict[str, Any] = {name: {} for name in PARTS}
    for key, value in state.items():
        part, rest = key.split("/", 1)
        if part in parts:
            parts[part][prefix + rest] = value
    rest = {"opt": {"state": {}}, "scaler": None, "epoch": 300, "loss": 0.1, "batch_size": 16}
    torch.save({**parts, **rest, "world_size": 4, "lr": 1e-3}, path)
    return path


def features(pretrained: Any, cohort: Cohort, pooling: str) -> np.ndarray:
    embedded = embed(pretrained, cohort, EmbedSettings(pooling=pooling))
    assert embedded is not None
    return embedded.vectors


@pytest.fixture(scope="module")
def lm() -> Golden:
    return golden("brainlm_a")


@pytest.fixture(scope="module")
def lm_cohort(tmp_path_factory: pytest.TempPathFactory, lm: Golden) -> Cohort:
    """The fixture's recordings, at BrainLM's TR, under A424's name."""
    atlas = atlas_of(24, xyz_mm=lm.tensors["in/xyz"][0].numpy())
    signal = lm.tensors["in/signal"].numpy()
    folder = tmp_path_factory.mktemp("lm") / "cohort"
    return cohort_of(folder, signal, tr_s=0.735, atlas=atlas)


@pytest.fixture(scope="module")
def jepa_cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    folder = tmp_path_factory.mktemp("jepa") / "cohort"
    fmri = JEPA["in/fmri"][:, 0].numpy()
    return cohort_of(folder, fmri, tr_s=2.0, atlas=atlas_of(20, name="Tian50+Schaefer400"))


# -- against the references ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("folder", [True, False])
def test_brainlm_features_of_a_cohort_are_the_references(tmp_path, lm, lm_cohort, kind, folder):
    """CLS of the reference's own pass over unmasked tokens in their natural order."""
    path = save_brainlm(tmp_path, lm, kind=kind)
    path = path.parent if folder else path
    assert is_published(path)
    pretrained = load_published("brainlm", path, lm_cohort, standardiser="none")
    hidden = lm.tensors["out/nomask_sorted/last_hidden_state"]
    vectors = features(pretrained, lm_cohort, "cls")
    np.testing.assert_allclose(vectors, hidden[:, 0].numpy(), atol=1e-4)  # the fixture's tolerance
    vectors = features(pretrained, lm_cohort, "mean")
    np.testing.assert_allclose(vectors, hidden[:, 1:].mean(1).numpy(), atol=1e-4)


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_brainjepa_features_of_a_cohort_are_the_references(tmp_path, jepa_cohort, prefix):
    """Mean tokens of the reference's target encoder, which its downstream head gets."""
    path = save_brainjepa(tmp_path / "ep300.pth.tar", prefix=prefix)
    np.savetxt(tmp_path / "gradient.csv", JEPA["in/gradient"][0].numpy(), delimiter=",")
    (tmp_path / "config.yaml").write_text(json.dumps(JEPA_CONFIG))
    pretrained = load_published(
        "brainjepa",
        path,
        jepa_cohort,
        config=tmp_path / "config.yaml",
        gradient=tmp_path / "gradient.csv",
        standardiser="none",
    )
    x = torch.from_numpy(features(pretrained, jepa_cohort, "mean"))
    head = {
        key.removeprefix("state/downstream/"): v for key, v in JEPA.items() if "downstream" in key
    }
    x = torch.layer_norm(x, x.shape[1:], head["fc_norm.weight"], head["fc_norm.bias"], 1e-6)
    logits = x @ head["head.weight"].T + head["head.bias"]
    torch.testing.assert_close(logits, JEPA["out/downstream/logits"], rtol=0, atol=1e-5)


def test_image_shaped_brainlm_gets_rows_by_y_from_a_cohort_in_any_order(tmp_path):
    fixture = golden("brainlm_vitmae_a")
    rng = np.random.default_rng(0)
    order = rng.permutation(424)
    xyz = np.zeros((424, 3), np.float32)
    xyz[:, 1] = np.linspace(-92, 66, 424)
    atlas = Atlas(
        name="a424",
        parcels=tuple(f"region {i}" for i in range(424)),
        xyz_mm=xyz[order],
    )
    signal = fixture.tensors["in/signal"].numpy()[:, order]
    cohort = cohort_of(tmp_path / "cohort", signal, tr_s=0.735, atlas=atlas)
    path = save_brainlm(tmp_path / "111m", fixture)
    pretrained = load_published("brainlm", path, cohort, standardiser="none")
    hidden = fixture.tensors["out/nomask/last_hidden_state"]
    # Attention does not know the order of tokens: their mean is that of the reference's.
    vectors = features(pretrained, cohort, "mean")
    np.testing.assert_allclose(vectors, hidden[:, 1:].mean(1).numpy(), atol=1e-5)
    np.testing.assert_allclose(features(pretrained, cohort, "cls"), hidden[:, 0].numpy(), atol=1e-5)


# -- conditioning ----------------------------------------------------------------------------------


def robust(cohort: Cohort, row: int) -> np.ndarray:
    """The formula of BrainLM's paper, from the recordings of training people."""
    split = cohort.splits().train
    rows = [i for i, subject in enumerate(cohort.recordings.index["subject"]) if subject in split]
    centred = [cohort.recordings.read(i) for i in rows]
    centred = np.concatenate([x - x.mean(1, keepdims=True) for x in centred], axis=1)
    low, middle, high = np.percentile(centred.astype(np.float64), [25, 50, 75], axis=1)
    own = cohort.recordings.read(row)
    own = own - own.mean(1, keepdims=True)
    return (own - middle[:, None]) / (high - low)[:, None]


def test_brainlm_inputs_are_scaled_by_training_people_and_said(tmp_path, lm, lm_cohort, capsys):
    pretrained = load_published("brainlm", save_brainlm(tmp_path, lm), lm_cohort)
    n_train = len(lm_cohort.splits().train)
    assert 0 < n_train < 3
    said = capsys.readouterr().err
    assert f"'brainlm-robust' is fitted on {n_train} training people of this cohort instead" in said
    assert pretrained.conditioning.tr_s == 0.735
    assert pretrained.conditioning.resampling == "linear"
    x = pretrained.conditioning.prepare(lm_cohort.recordings.read(2), tr_s=0.735)
    np.testing.assert_allclose(x, robust(lm_cohort, 2), atol=1e-4)
    module = from_upstream("brainlm", lm.part("state/"), lm.config())
    with torch.no_grad():
        expected = module.encode(torch.from_numpy(x[None]), lm.tensors["in/xyz"][0])  # type: ignore[operator]
    np.testing.assert_allclose(features(pretrained, lm_cohort, "mean")[2:], expected, atol=1e-5)


def test_the_image_family_divides_by_its_constant(tmp_path):
    fixture = golden("brainlm_vitmae_a")
    signal = np.random.default_rng(0).normal(size=(4, 424, 60)).astype(np.float32)
    atlas = atlas_of(424, xyz_mm=np.random.default_rng(1).normal(size=(424, 3)))
    cohort = cohort_of(tmp_path / "cohort", signal, tr_s=0.735, atlas=atlas)
    pretrained = load_published("brainlm", save_brainlm(tmp_path / "m", fixture), cohort)
    x = pretrained.conditioning.prepare(signal[0], tr_s=0.735)
    np.testing.assert_allclose(x, robust(cohort, 0) / 5.6430855, atol=1e-5)


def test_brainjepa_inputs_are_one_z_score_a_recording_every_two_seconds(tmp_path):
    rng = np.random.default_rng(0)
    fast = 50 + 9 * rng.normal(size=(1, 20, 480)).astype(np.float32)
    cohort = cohort_of(tmp_path / "c", fast, tr_s=0.7, atlas=atlas_of(20))
    path = save_brainjepa(tmp_path / "x.pth.tar")
    pretrained = load_published(
        "brainjepa", path, cohort, config=JEPA_CONFIG, gradient=JEPA["in/gradient"][0]
    )
    x = pretrained.conditioning.prepare(cohort.recordings.read(0), tr_s=0.7)
    z = (fast[0] - fast[0].mean()) / fast[0].std(ddof=1)
    nearest = np.round(np.arange(x.shape[1]) * 2.0 / 0.7).astype(int)
    assert x.shape[1] == 168
    np.testing.assert_allclose(x, z[:, nearest], atol=1e-4)


def test_a_standardiser_of_ones_own_is_taken(tmp_path, lm, lm_cohort):
    own = Standardiser(kind="none", n_parcels=24, cohort="x", n_people=9, n_recordings=9)
    path = save_brainlm(tmp_path, lm)
    pretrained = load_published("brainlm", path, lm_cohort, standardiser=own)
    assert pretrained.conditioning.standardiser is own
    code = load_published("brainlm", path, lm_cohort, standardiser="brainlm-code")
    assert code.conditioning.standardiser.kind == "brainlm-code"
    with pytest.raises(UserError, match="unknown standardiser 'zscore'"):
        load_published("brainlm", path, lm_cohort, standardiser="zscore")


def test_untrained_weights_of_the_same_architecture_are_the_baseline(tmp_path, jepa_cohort):
    path = save_brainjepa(tmp_path / "x.pth.tar")
    options: Any = {"config": JEPA_CONFIG, "gradient": JEPA["in/gradient"][0]}
    trained = load_published("brainjepa", path, jepa_cohort, **options)
    blank = load_published("brainjepa", path, jepa_cohort, untrained=True, **options)
    again = load_published("brainjepa", path, jepa_cohort, untrained=True, **options)
    assert blank.hash == "untrained"
    assert blank.module.config == trained.module.config
    differ = 0
    for key, value in blank.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[key])
        differ += not torch.equal(value, trained.module.state_dict()[key])
    assert differ > 10
    np.testing.assert_array_equal(
        blank.module.state_dict()["encoder.position.gradient"].numpy(), JEPA["in/gradient"][0]
    )


# -- parcels ---------------------------------------------------------------------------------------


def test_fitted_statistics_follow_the_parcels_into_the_weights_order(tmp_path, lm, lm_cohort):
    """A cohort whose parcels are numbered, in another order, has the same features."""
    order = np.random.default_rng(3).permutation(24)
    xyz = lm.tensors["in/xyz"][0].numpy()
    atlas = Atlas(name="mine", parcels=tuple(f"A424_{i + 1:03d}" for i in order), xyz_mm=xyz[order])
    signal = lm.tensors["in/signal"].numpy()[:, order]
    other = cohort_of(tmp_path / "other", signal, tr_s=0.735, atlas=atlas)
    path = save_brainlm(tmp_path / "m", lm)
    expected = features(load_published("brainlm", path, lm_cohort), lm_cohort, "mean")
    pretrained = load_published("brainlm", path, other)
    np.testing.assert_allclose(features(pretrained, other, "mean"), expected, atol=1e-5)
    assert pretrained.atlas.parcels[:2] == ("A424_001", "A424_002")


def test_tians_parcels_come_before_schaefers_however_the_cohort_has_them(capsys):
    tian = [f"HIP-{i}-rh" for i in range(50)]
    schaefer = [f"17Networks_LH_Vis_{i}" for i in range(400)]
    atlas = Atlas(name="x", parcels=(*schaefer, *tian))
    order = published_order("brainjepa", atlas, 450)
    assert order.tolist() == [*range(400, 450), *range(400)]
    assert "put into the order of Tian50+Schaefer400" in capsys.readouterr().err
    atlas = Atlas(name="x", parcels=(*tian, *schaefer))
    assert published_order("brainjepa", atlas, 450).tolist() == list(range(450))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "names", "warned"),
    [
        ("own", "{}", False),  # A424's numbers
        ("own", "{:03d}", False),
        ("A-424", "region {}", False),
        ("own", "region {}", True),
        ("own", "lh{}", True),
    ],
)
def test_an_order_that_nothing_tells_is_taken_as_given_with_a_warning(name, names, warned, capsys):
    order = published_order("brainlm", atlas_of(424, name=name, names=names), 424)
    assert order.tolist() == list(range(424))
    said = capsys.readouterr().err
    assert ("its order is taken to be that of A424" in said) is warned
    assert len(said.splitlines()) == warned


def test_parcels_are_matched_by_the_weights_own_atlas_where_it_is_given():
    theirs = atlas_of(5, name="theirs", names="p{}")
    own = Atlas(name="own", parcels=("p3", "x", "p1", "p5", "p4", "p2"))
    assert published_order("brainlm", own, 5, theirs).tolist() == [2, 5, 0, 4, 3]
    with pytest.raises(UserError, match=r"'own' lacks 1 of the 5 .*'theirs'.*\['p1'\]"):
        published_order("brainlm", Atlas(name="own", parcels=("p3", "p2", "p5", "p4")), 5, theirs)
    with pytest.raises(UserError, match=r"'theirs' of the weights has 5 parcels but .* have 6"):
        published_order("brainlm", own, 6, theirs)


# -- gradients -------------------------------------------------------------------------------------


def test_brainjepa_without_its_table_takes_the_atlases_or_makes_one_and_says_so(
    tmp_path, jepa_cohort, capsys
):
    path = save_brainjepa(tmp_path / "x.pth.tar")

    def table(cohort: Cohort) -> np.ndarray:
        loaded = load_published("brainjepa", path, cohort, config=JEPA_CONFIG)
        return loaded.module.state_dict()["target_encoder.position.gradient"].numpy()

    made = table(jepa_cohort)
    said = capsys.readouterr().err
    n_train = len(jepa_cohort.splits().train)
    assert f"one is made from the connectivity of {n_train} training recordings" in said
    assert "features, are not those of the published model" in said
    rows = jepa_cohort.recordings.rows(jepa_cohort.splits().train).tolist()
    connectivity = connectivity_of(jepa_cohort.recordings, rows)
    np.testing.assert_array_equal(made, gradient_table(connectivity, 30))
    own = JEPA["in/gradient"][0].numpy()
    dataclasses.replace(jepa_cohort.atlas, gradient=own).save(tmp_path / "atlas.json")
    copy = Path(shutil.copytree(jepa_cohort.path, tmp_path / "copy"))
    shutil.copy(tmp_path / "atlas.json", copy / "atlas.json")
    capsys.readouterr()
    np.testing.assert_array_equal(table(Cohort.open(copy)), own)
    assert "the one of the cohort's atlas 'Tian50+Schaefer400' is taken" in capsys.readouterr().err


def test_a_checkpoint_with_origin_positions_needs_no_table(tmp_path, jepa_cohort, capsys):
    config = {**JEPA_CONFIG, "add_w": "origin"}
    torch.manual_seed(0)
    ours = {"n_parcels": 20, "n_trs": 160, "width": 48, "depth": 2, "n_heads": 4}
    predictor = {"predictor_width": 32, "predictor_depth": 2}
    module = create("brainjepa", positions="origin", patch_trs=16, **ours, **predictor)
    path = save_brainjepa(tmp_path / "x.pth.tar", state=to_upstream(module))
    pretrained = load_published("brainjepa", path, jepa_cohort, config=config)
    assert "gradient" not in capsys.readouterr().err
    x = pretrained.conditioning.prepare(jepa_cohort.recordings.read(0), tr_s=2.0)[None]
    with torch.no_grad():
        expected = module.eval().encode(torch.from_numpy(x))  # type: ignore[operator]
    np.testing.assert_allclose(features(pretrained, jepa_cohort, "mean")[:1], expected, atol=1e-5)


# -- what a user may get wrong ---------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


class Malicious:
    def __reduce__(self):
        return print, ("code ran",)


def test_brainlm_files_that_do_not_fit_are_refused(tmp_path, lm, lm_cohort, capsys):
    state, config = lm.part("state/"), lm.config()

    def refused(state: Any, **changes: Any) -> str:
        torch.save(state, tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError) as caught:
            load_published("brainlm", tmp_path / "pytorch_model.bin", lm_cohort)
        return one_line(caught)

    assert "of another size" in refused(state, intermediate_size=48)
    assert "keys missing" in refused({k: v for k, v in state.items() if "cls_token" not in k})
    assert "such a pickle could run code" in refused({**state, "x": Malicious()})
    assert "code ran" not in capsys.readouterr().out
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\3\4 nothing")
    with pytest.raises(UserError, match="is truncated"):
        load_published("brainlm", tmp_path, lm_cohort)
    (tmp_path / "config.json").unlink()
    save_brainlm(tmp_path, lm)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json tells the sizes"):
        load_published("brainlm", tmp_path / "pytorch_model.bin", lm_cohort)
    with pytest.raises(UserError, match="holds no weights"):
        load_published("brainlm", tmp_path / "nowhere", lm_cohort)


def test_brainjepa_files_that_do_not_fit_are_refused(tmp_path, jepa_cohort):
    path = save_brainjepa(tmp_path / "x.pth.tar")
    table = JEPA["in/gradient"][0]

    def refused(**options: Any) -> str:
        options = {"config": JEPA_CONFIG, "gradient": table, **options}
        with pytest.raises(UserError) as caught:
            load_published("brainjepa", path, jepa_cohort, **options)
        return one_line(caught)

    assert "gradient table has shape (19, 30)" in refused(gradient=table[:-1])
    assert "does not exist" in refused(gradient=tmp_path / "none.csv")
    assert "does not exist" in refused(config=tmp_path / "none.json")
    assert "another size" in refused(config={**JEPA_CONFIG, "embed_dim": 96})
    (tmp_path / "list.json").write_text("[]")
    assert "is not an object" in refused(config=tmp_path / "list.json")
    # Without a config it is taken for a published size, of 450 parcels.
    assert "the cohort has 20 parcels" in refused(config=None)
    torch.save({"encoder": Malicious()}, path)
    assert "more than tensors" in refused()


def test_cohorts_that_do_not_fit_the_weights_are_refused(tmp_path, lm, capsys):
    path = save_brainlm(tmp_path / "m", lm)
    signal = lm.tensors["in/signal"].numpy()
    xyz = lm.tensors["in/xyz"][0].numpy()
    fewer = cohort_of(tmp_path / "a", signal[:, 1:], tr_s=0.735, atlas=atlas_of(23, xyz_mm=xyz[1:]))
    with pytest.raises(UserError, match=r"has 23 parcels \('own'\).*expect 24 \(A424\)") as caught:
        load_published("brainlm", path, fewer)
    one_line(caught)
    bare = cohort_of(tmp_path / "b", signal, tr_s=0.735, atlas=atlas_of(24))
    with pytest.raises(UserError, match="'own' has no coordinates, which BrainLM reads") as caught:
        load_published("brainlm", path, bare)
    one_line(caught)
    unknown = cohort_of(tmp_path / "c", signal, tr_s=None, atlas=atlas_of(24, xyz_mm=xyz))
    with pytest.raises(UserError, match="a TR that is not known") as caught:
        features(load_published("brainlm", path, unknown, standardiser="none"), unknown, "mean")
    one_line(caught)
    # 40 frames every 0.15 s are nine every 0.735 s, fewer than a patch of ten.
    brief = cohort_of(tmp_path / "d", signal, tr_s=0.15, atlas=atlas_of(24, xyz_mm=xyz))
    with pytest.raises(UserError, match=r"all 3 .* 10 TRs .* 0.735 s \(the longest has 8\)"):
        features(load_published("brainlm", path, brief, standardiser="none"), brief, "mean")


# -- the command -----------------------------------------------------------------------------------


def command(*words: object) -> int:
    return main(["embed", *(str(word) for word in words)])


def test_the_command_takes_a_folder_of_the_authors(tmp_path, lm, lm_cohort, capsys):
    folder = save_brainlm(tmp_path / "hub", lm).parent
    place = ("--cohort", lm_cohort.path, "--workspace", tmp_path / "work")
    words = ("--model", "brainlm", "--checkpoint", folder, "--standardiser", "none", *place)
    assert command(*words, "--pooling", "cls", "--device", "cpu") == 0
    found = read_features(tmp_path / "work" / "features" / "brainlm.parquet")
    hidden = lm.tensors["out/nomask_sorted/last_hidden_state"]
    np.testing.assert_allclose(found.vectors, hidden[:, 0].numpy(), atol=1e-4)
    assert found.provenance["tr_s"] == 0.735
    assert any("no statistics" in text for text in found.provenance["warnings"])
    assert "holds no statistics of its training recordings" in capsys.readouterr().err


def test_the_command_takes_a_brainjepa_file_with_its_gradient_and_config(
    tmp_path, jepa_cohort, capsys
):
    path = save_brainjepa(tmp_path / "ep300.pth.tar")
    np.save(tmp_path / "gradient.npy", JEPA["in/gradient"][0].numpy())
    (tmp_path / "config.json").write_text(json.dumps(JEPA_CONFIG))
    place = ("--cohort", jepa_cohort.path, "--workspace", tmp_path / "work")
    words = ("--checkpoint", path, "--upstream-config", tmp_path / "config.json", *place)
    gradient = ("--gradient", tmp_path / "gradient.npy")
    assert command(*words, *gradient, "--pooling", "mean") == 0
    found = read_features(tmp_path / "work" / "features" / "brainjepa.parquet")
    assert found.vectors.shape == (3, 48)
    assert "warning: no gradient table" not in capsys.readouterr().err
    own = tmp_path / "own.parquet"
    assert command(*words, "--pooling", "mean", "--out", own) == 0
    assert "warning: no gradient table was given" in capsys.readouterr().err
    assert np.abs(read_features(own).vectors - found.vectors).max() > 1e-3


def test_our_checkpoints_are_told_from_the_authors(tmp_path, lm):
    theirs = save_brainlm(tmp_path / "hub", lm, kind="safetensors")
    ours = tmp_path / "run" / "checkpoints" / "step-0000002"
    ours.mkdir(parents=True)
    (ours / "state.json").write_text("{}")
    shutil.copy(theirs, ours / "model.safetensors")
    for path, expected in (
        (theirs, True),
        (theirs.parent, True),
        (ours, False),
        (ours / "model.safetensors", False),
        (tmp_path / "run", False),
        (tmp_path / "nowhere", False),
    ):
        assert is_published(path) is expected, path


def test_flags_of_an_authors_file_are_refused_with_a_run_of_ours(tmp_path, jepa_cohort, capsys):
    place = ("--cohort", jepa_cohort.path, "--workspace", tmp_path / "work")
    run = tmp_path / "run"
    run.mkdir()
    for flag in ("gradient", "upstream-config", "upstream-atlas", "standardiser"):
        assert command("--checkpoint", run, f"--{flag}", "x.csv", *place) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"error: --{flag} goes with an authors' checkpoint file")
    assert not (tmp_path / "work").exists()


def test_restart_forgets_the_parts_of_another_run(tmp_path, lm, lm_cohort, capsys):
    folder = save_brainlm(tmp_path / "hub", lm).parent
    out = tmp_path / "x.parquet"
    parts = tmp_path / "x.parquet.parts"
    words = ("--model", "brainlm", "--checkpoint", folder, "--standardiser", "none", "--out", out)
    words = (*words, "--cohort", lm_cohort.path, "--workspace", tmp_path / "work")
    parts.mkdir()
    (parts / "key.json").write_text('{"pooling": "cls"}')
    (parts / "part-00000000.npy").write_bytes(b"old")
    assert command(*words, "--pooling", "mean") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "holds parts of another run" in last
    assert "pooling cls -> mean" in last
    assert command(*words, "--pooling", "mean", "--restart") == 0
    assert out.exists()
    assert not parts.exists()
