"""The models that we offer to brainmarks, and how it finds them."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from brainfusion.data.atlas import Atlas
from brainfusion.encoders import to_upstream
from brainfusion.encoders.brainjepa import BrainJEPA, BrainJEPAConfig
from brainfusion.encoders.brainlm import BrainLM, BrainLMConfig
from brainfusion.encoders.brainlm_image import BrainLMImage, BrainLMImageConfig
from brainfusion.encoders.pretrain import pretrain
from brainfusion.integrations import brainmarks as ours
from brainfusion.integrations.brainmarks import (
    MODELS,
    brainjepa,
    brainlm,
    checkpoint,
    read_coordinates,
    register,
)
from brainfusion.integrations.brainmarks_transform import SPACES, EncoderTransform, raw_bold
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import UserError
from tests.encoders.tiny_cohort import N_PARCELS, XYZ_MM, settings, tiny_cohort

ROOT = Path(__file__).parents[2]
A424, TIAN_SCHAEFER = 424, 450
RNG = np.random.default_rng(11)
XYZ = np.round(RNG.uniform(-70, 70, size=(A424, 3))).astype(np.float32)  # ties in Y
GRADIENT = RNG.normal(size=(TIAN_SCHAEFER, 6)).astype(np.float32)

RECORDING = BrainLMConfig(
    n_trs=40, width=16, depth=2, n_heads=2, dim_hidden=32, decoder_depth=1, decoder_n_heads=2,
    decoder_dim_hidden=32, init_std=0.2,
)  # fmt: skip
RECORDING_UPSTREAM = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32, "num_brain_voxels": A424, "num_timepoints_per_voxel": 40,
    "timepoint_patching_size": 20, "mask_ratio": 0.2,
}  # fmt: skip
IMAGE = BrainLMImageConfig(
    width=16, depth=2, n_heads=2, dim_hidden=32, decoder_width=16, decoder_depth=1,
    decoder_n_heads=2, decoder_dim_hidden=32, init_std=0.2,
)  # fmt: skip
IMAGE_UPSTREAM = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32, "decoder_hidden_size": 16, "image_size": [432, 432],
    "patch_size": 16,
}  # fmt: skip
JEPA = BrainJEPAConfig(
    n_trs=32, width=16, depth=1, n_heads=2, predictor_width=8, predictor_depth=1, gradient_dim=6
)
JEPA_UPSTREAM = {
    "crop_size": [TIAN_SCHAEFER, 32], "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2,
    "pred_emb_dim": 8, "pred_depth": 1, "add_w": "mapping", "gradient_dim": 6,
}  # fmt: skip
FAMILIES = ("recording", "image", "brainjepa")
SHAPES = {"recording": (A424, A424 * 2, True), "image": (A424, 27 * 27, True)}
SHAPES |= {"brainjepa": (TIAN_SCHAEFER, TIAN_SCHAEFER * 2, False)}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Weights in the authors' own files, centroids and a gradient table."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(5)
    for name, module, config in (
        ("recording", BrainLM(RECORDING), RECORDING_UPSTREAM),
        ("image", BrainLMImage(IMAGE), IMAGE_UPSTREAM),
    ):
        (folder / name).mkdir()
        torch.save(to_upstream(module), folder / name / "pytorch_model.bin")
        (folder / name / "config.json").write_text(json.dumps(config))
    flat = to_upstream(BrainJEPA(JEPA, GRADIENT))
    parts: dict[str, Any] = {"encoder": {}, "predictor": {}, "target_encoder": {}, "epoch": 300}
    for key, value in flat.items():
        part, own = key.split("/")
        # The target encoder is another one, so that a mix-up would be noticed.
        parts[part][f"module.{own}"] = value * 1.1 if "blocks" in own and "tar" in part else value
    torch.save(parts, folder / "jepa-ep300.pth.tar")
    np.savetxt(folder / "gradient.csv", GRADIENT, delimiter=",")
    indexed = np.column_stack([np.arange(1, A424 + 1), XYZ])
    np.savetxt(folder / "A424_Coordinates.dat", indexed, fmt="%g")
    return folder


def make(files: Path, family: str, **options: Any):
    if family == "brainjepa":
        return brainjepa(
            ckpt_path=files / "jepa-ep300.pth.tar",
            gradient=files / "gradient.csv",
            config=JEPA_UPSTREAM,
            **options,
        )
    return brainlm(
        ckpt_path=files / family / "pytorch_model.bin",
        coordinates=files / "A424_Coordinates.dat",
        **options,
    )


def bold_like(n_frames: int, n_parcels: int, seed: int, *, scale: float = 1.0) -> np.ndarray:
    """Raw BOLD [frames, parcels] with a level that a person has."""
    rng = np.random.default_rng(seed)
    drift = np.cumsum(rng.normal(size=(n_frames, 4)), axis=0) @ rng.normal(size=(4, n_parcels))
    level = 10_000.0 + 500.0 * rng.normal(size=n_parcels)
    return level + scale * 40.0 * (drift / 4 + rng.normal(size=(n_frames, n_parcels)))


def sample_of(raw: np.ndarray, *, tr: float, **more: Any) -> dict[str, Any]:
    """What brainmarks' data sets hold: z-scored in half precision, with what undoes it."""
    mean, std = raw.mean(axis=0, keepdims=True), raw.std(axis=0, keepdims=True)
    seen = std > 1e-6
    bold = np.where(seen, (raw - mean) / np.where(seen, std, 1.0), 0.0)
    return {
        "bold": torch.from_numpy(bold).half(),
        "mean": torch.from_numpy(mean * seen).float(),
        "std": torch.from_numpy(std * seen).float(),
        "tr": tr,
        **more,
    }


def samples(n: int, n_frames: int, n_parcels: int, *, tr: float, first: int = 0) -> list[dict]:
    """Different people; the parcels' scales differ, so that a wrong fit shows."""
    scales = 1.0 + np.arange(n_parcels) / n_parcels
    return [
        sample_of(bold_like(n_frames, n_parcels, first + i) * scales, tr=tr, sub=f"s{i}", target=i)
        for i in range(n)
    ]


TR = {"recording": 0.735, "image": 0.735, "brainjepa": 2.0}
N_FRAMES = {"recording": 90, "image": 450, "brainjepa": 70}


@pytest.fixture(scope="module")
def train() -> dict[str, list[dict]]:
    return {
        family: samples(3, N_FRAMES[family], SHAPES[family][0], tr=TR[family], first=100)
        for family in FAMILIES
    }


def ready(files: Path, train: dict, family: str, **options: Any):
    transform, wrapper = make(files, family, **options)
    transform.fit(train[family])
    return transform, wrapper


# -- the wrapper -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_frames", [16, 160])
def test_a_model_goes_through_brainmarks_own_check(files, family, n_frames):
    """What `brainmarks.models.test_models` does with each registered model."""
    transform, model = make(files, family)
    n_parcels, n_tokens, has_cls = SHAPES[family]
    assert SPACES[model.__space__] == n_parcels
    batch = [
        {
            "tr": 1.0,
            "bold": torch.randn(n_frames, n_parcels),
            "mean": torch.randn(1, n_parcels),
            "std": torch.randn(1, n_parcels),
        }
        for _ in range(2)
    ]
    if hasattr(transform, "fit"):
        transform.fit(batch)
    batch = default_collate([transform(sample) for sample in batch])
    cls_embeds, reg_embeds, patch_embeds = model(batch)
    assert reg_embeds is None
    assert patch_embeds.shape == (2, n_tokens, 16)
    assert patch_embeds.isfinite().all()
    assert (cls_embeds is not None) == has_cls
    if has_cls:
        assert cls_embeds.shape == (2, 1, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_pooled_tokens_equal_encode(files, train, family):
    """Over windows that cover the recording, the last flush with its end."""
    transform, wrapper = ready(files, train, family, n_windows=None)
    n_parcels, _, has_cls = SHAPES[family]
    sample = samples(1, N_FRAMES[family], n_parcels, tr=TR[family])[0]
    cls, _, tokens = wrapper(default_collate([transform(sample)]))

    config = {"recording": RECORDING, "image": IMAGE, "brainjepa": JEPA}[family]
    kind = {"recording": BrainLM, "image": BrainLMImage}.get(family)
    module = kind(config) if kind else BrainJEPA(config, GRADIENT)
    own = wrapper.encoder.state_dict()
    (module.target_encoder if family == "brainjepa" else module).load_state_dict(own)
    prepared = transform.conditioning.prepare(raw_bold(sample, n_parcels), tr_s=TR[family])
    assert prepared.shape[1] % module.window_trs  # more than a window, and not a multiple
    bold = torch.from_numpy(prepared)[None]
    xyz = () if family == "brainjepa" else (torch.from_numpy(XYZ),)
    torch.testing.assert_close(tokens.mean(1), module.encode(bold, *xyz), atol=1e-5, rtol=1e-5)
    if has_cls:
        expected = module.encode(bold, *xyz, pooling="cls")
        torch.testing.assert_close(cls[:, 0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_repeat_and_do_not_depend_on_what_else_is_in_the_batch(files, train, family):
    transform, wrapper = ready(files, train, family)
    ready_samples = [transform(sample) for sample in train[family]]
    together, again = (
        wrapper(default_collate(ready_samples)),
        wrapper(default_collate(ready_samples)),
    )
    for i, sample in enumerate(ready_samples):
        alone = wrapper(default_collate([sample]))
        for whole, repeated, single in zip(together, again, alone, strict=True):
            if whole is None:
                continue
            assert torch.equal(whole, repeated)
            torch.testing.assert_close(whole[i : i + 1], single, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together.patch_embeds[0], together.patch_embeds[1], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_windows_have_the_same_mean_as_averaged_ones(files, train, family):
    transform, average = ready(files, train, family, n_windows=2)
    _, stack = make(files, family, n_windows=2, windows="stack")
    batch = default_collate([transform(train[family][0])])
    averaged, stacked = average(batch), stack(batch)
    assert stacked.patch_embeds.shape[1] == 2 * averaged.patch_embeds.shape[1]
    torch.testing.assert_close(
        stacked.patch_embeds.mean(1), averaged.patch_embeds.mean(1), atol=1e-6, rtol=1e-5
    )
    first = stack({"bold": batch["bold"][:, :1]}).patch_embeds
    torch.testing.assert_close(
        stacked.patch_embeds[:, : first.shape[1]], first, atol=1e-6, rtol=1e-5
    )


def test_brainjepas_features_are_those_of_the_target_encoder(files, train):
    _, wrapper = make(files, "brainjepa")
    state = torch.load(files / "jepa-ep300.pth.tar", weights_only=True)
    key = "module.blocks.0.mlp.fc1.weight"
    assert torch.equal(wrapper.encoder.state_dict()[key[7:]], state["target_encoder"][key])
    assert not torch.equal(state["encoder"][key], state["target_encoder"][key])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrapper_is_frozen_runs_in_half_precision_and_can_be_fine_tuned(files, train, family):
    transform, wrapper = ready(files, train, family)
    assert not wrapper.training
    assert not any(parameter.requires_grad for parameter in wrapper.parameters())
    batch = default_collate([transform(train[family][0])])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert wrapper(batch).patch_embeds.isfinite().all()
    wrapper.requires_grad_(True)
    wrapper(batch).patch_embeds.square().mean().backward()
    gradient = next(p.grad for n, p in wrapper.named_parameters() if "qkv.weight" in n)
    assert gradient is not None
    assert gradient.abs().max() > 0


# -- the transform ---------------------------------------------------------------------------------


def test_z_scores_are_undone_and_a_parcel_without_data_is_missing():
    raw = bold_like(120, 8, 3)
    raw[:, 5] = 0.0
    undone = raw_bold(sample_of(raw, tr=1.0), 8)
    assert undone.dtype == np.float32
    assert np.isnan(undone[5]).all()
    present = [i for i in range(8) if i != 5]
    # Half precision of z-scores up to 4: 2^-9 of a standard deviation of some tens.
    bound = 2e-3 * raw[:, present].std(axis=0, keepdims=True).T
    assert (np.abs(undone[present] - raw.T[present]) < bound).all()


@pytest.mark.parametrize("family", ["recording", "image"])
def test_medians_and_iqrs_are_those_of_the_training_samples_alone(files, train, family):
    transform, _ = ready(files, train, family)
    centred = [raw_bold(s, A424).astype(np.float64) for s in train[family]]
    centred = [x - x.mean(axis=1, keepdims=True) for x in centred]
    stacked = np.concatenate([x[:, :200] for x in centred], axis=1)
    median = np.median(stacked, axis=1)
    low, high = np.percentile(stacked, [25, 75], axis=1)
    standardiser = transform.conditioning.standardiser
    np.testing.assert_allclose(standardiser.median, median, atol=1e-2)
    np.testing.assert_allclose(standardiser.iqr, high - low, rtol=1e-3)
    assert standardiser.n_recordings == 3
    assert standardiser.n_people == 3

    before = json.dumps(standardiser.to_dict())
    test = samples(2, N_FRAMES[family], A424, tr=TR[family], first=900)
    windows = transform(test[0])["bold"].numpy()
    assert json.dumps(transform.conditioning.standardiser.to_dict()) == before
    other, _ = make(files, family)
    other.fit(test)
    assert not np.allclose(other(test[0])["bold"].numpy(), windows, atol=1e-2)

    # The first window by hand, in the space's own row order.
    x = raw_bold(test[0], A424).astype(np.float64)
    by_hand = (x - x.mean(axis=1, keepdims=True) - median[:, None]) / (high - low)[:, None]
    if family == "image":
        by_hand = by_hand[np.argsort(XYZ[:, 1], kind="stable")] / 5.6430855
    np.testing.assert_allclose(windows[0], by_hand[:, : windows.shape[2]], atol=2e-3)


def test_fit_takes_any_iterable_and_the_scaling_can_be_changed(files, train):
    transform, _ = make(files, "recording", scaling="brainlm-code")
    transform.fit(iter(train["recording"]))
    assert transform.conditioning.standardiser.kind == "brainlm-code"
    unfitted, _ = make(files, "recording", scaling="parcel-zscore")
    assert abs(float(unfitted(train["recording"][0])["bold"].mean())) < 0.2


def test_brainjepa_takes_the_first_frames_of_a_recording_z_scored_as_a_whole(files, train):
    transform, _ = make(files, "brainjepa")
    sample = train["brainjepa"][0]
    windows = transform(sample)["bold"].numpy()
    x = raw_bold(sample, TIAN_SCHAEFER).astype(np.float64)
    by_hand = (x - x.mean()) / x.std(ddof=1)
    assert windows.shape == (1, TIAN_SCHAEFER, 32)
    np.testing.assert_allclose(windows[0], by_hand[:, :32], atol=1e-4)


@pytest.mark.parametrize(("family", "tr"), [("recording", 0.3675), ("brainjepa", 1.0)])
def test_recordings_come_at_the_encoders_tr(files, train, family, tr):
    """At half the encoder's TR every other frame is taken, by either method."""
    transform, _ = ready(files, train, family)
    n_parcels = SHAPES[family][0]
    raw = bold_like(2 * N_FRAMES[family], n_parcels, 7)
    fast = transform(sample_of(raw, tr=tr))["bold"].numpy()
    prepared = transform.conditioning.standardiser.transform(
        raw_bold(sample_of(raw, tr=tr), n_parcels)
    )
    np.testing.assert_allclose(fast[0], prepared[:, : 2 * fast.shape[2] : 2], atol=1e-5)
    same = transform(sample_of(raw, tr=torch.tensor(TR[family])))["bold"].numpy()
    np.testing.assert_allclose(same[0], prepared[:, : same.shape[2]], atol=1e-5)


def test_short_samples_are_filled_with_parcel_means_and_this_is_said_once(files, train, capsys):
    transform, _ = ready(files, train, "recording")
    capsys.readouterr()
    sample = sample_of(bold_like(25, A424, 4), tr=0.735)
    windows = transform(sample)["bold"].numpy()
    transform(sample)
    assert capsys.readouterr().err.count("a sample has 25 TRs where a window takes 40") == 1
    assert windows.shape == (1, A424, 40)
    mean = windows[0, :, :25].mean(axis=1, keepdims=True)
    np.testing.assert_allclose(windows[0, :, 25:], mean.repeat(15, axis=1), atol=1e-5)


def test_a_number_of_windows_lets_recordings_of_any_length_share_a_batch(files, train):
    transform, wrapper = ready(files, train, "recording", n_windows=3)
    short, long = (sample_of(bold_like(n, A424, n), tr=0.735) for n in (40, 333))
    parts = [transform(short), transform(long)]
    tokens = wrapper(default_collate(parts)).patch_embeds
    assert tokens.shape == (2, A424 * 2, 16)
    long_bold = transform.conditioning.prepare(raw_bold(long, A424), tr_s=0.735)
    last = parts[1]["bold"][2].numpy()
    np.testing.assert_array_equal(last, long_bold[:, -40:])
    _, once = ready(files, train, "recording", n_windows=1)
    single = once({"bold": parts[0]["bold"][None, :1]}).patch_embeds
    torch.testing.assert_close(tokens[:1], single, atol=1e-5, rtol=1e-5)


def test_other_keys_of_a_sample_pass_through_and_the_sample_is_left_alone(files, train):
    transform, _ = ready(files, train, "recording")
    sample = train["recording"][1]
    before = sample["bold"].clone()
    out = transform(sample)
    assert (out["target"], out["sub"]) == (1, "s1")
    assert torch.equal(sample["bold"], before)


def test_a_run_of_ours_is_a_model_with_its_own_conditioning(tmp_path, monkeypatch):
    monkeypatch.setitem(SPACES, "sixteen", N_PARCELS)
    cohort = tiny_cohort(tmp_path / "cohort")
    for model in ("brainlm", "brainjepa"):
        pretrain(settings(model, steps=1), cohort, tmp_path / model, ranks=Ranks())
        transform, wrapper = checkpoint(ckpt_path=tmp_path / model)
        assert wrapper.__space__ == "sixteen"
        own = transform.conditioning
        sample = sample_of(bold_like(150, N_PARCELS, 1), tr=own.tr_s or 2.0)
        transform.fit([sample])
        assert transform.conditioning is own  # fitted before, and never on the benchmark
        tokens = wrapper(default_collate([transform(sample)])).patch_embeds
        bold = own.prepare(raw_bold(sample, N_PARCELS), tr_s=own.tr_s or 2.0)
        if model == "brainlm":
            xyz = torch.from_numpy(XYZ_MM)
            expected = wrapper.encoder.encode(torch.from_numpy(bold)[None], xyz)
            torch.testing.assert_close(tokens.mean(1), expected, atol=1e-5, rtol=1e-5)


# -- finding the models ----------------------------------------------------------------------------


REGISTRY = '''
"""brainmarks' registry as its documentation describes it: plugins of a namespace package."""
import importlib, pkgutil
import brainmarks.models

_MODELS = {}

def register_model(name_or_func=None):
    def decorate(func):
        name = name_or_func if isinstance(name_or_func, str) else func.__name__
        assert name not in _MODELS, f"{name} was registered twice"
        _MODELS[name] = func
        return func
    return decorate(name_or_func) if callable(name_or_func) else decorate

def list_models():
    return list(_MODELS)

def create_model(name, **kwargs):
    return _MODELS[name](**kwargs)

for _, name, _ in pkgutil.iter_modules(brainmarks.models.__path__):
    if name not in ("base", "registry", "template") and not name.startswith("test_"):
        try:
            importlib.import_module(f"brainmarks.models.{name}")
        except ImportError as error:
            print(f"plugin {name} failed: {error}")
'''


def python(code: str, *path: Path, **environment: str) -> str:
    """Run code in a fresh interpreter with `path` in front, and nothing of ours in the way."""
    search = os.pathsep.join(map(str, [*path, ROOT]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": search, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def shipped(tmp_path) -> Path:
    """The folder of site-packages that the wheel's plugin lies in."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    included = build["targets"]["wheel"]["force-include"]
    site = tmp_path / "site"
    for source, target in included.items():
        (site / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source, site / target)
    return site


@pytest.fixture
def documented(tmp_path) -> Path:
    folder = tmp_path / "documented" / "brainmarks" / "models"
    folder.mkdir(parents=True)
    (folder / "registry.py").write_text(REGISTRY)
    return tmp_path / "documented"


OURS_FIRST = """
import os, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "brainmarks.models.registry":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import brainfusion.integrations.brainmarks as ours
assert ours.register() == []
sys.meta_path.pop(0)
sys.path.insert(0, os.environ["DOCUMENTED"])
assert ours.register() == list(ours.MODELS)
assert ours.register() == list(ours.MODELS)
from brainmarks.models.registry import create_model
try:
    create_model("brainfusion_brainlm_13m")
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_ours_imports_without_brainmarks_and_registers_once_where_it_is(shipped, documented, files):
    """Also where our own plugin alone makes a namespace package of that name."""
    out = python(
        OURS_FIRST,
        shipped,
        DOCUMENTED=str(documented),
        BRAINFUSION_BRAINLM_13M=str(files / "recording" / "pytorch_model.bin"),
        BRAINFUSION_A424_COORDINATES=str(files / "A424_Coordinates.dat"),
    )
    # The weights that the environment names were read: they are not of the size that we asked for.
    assert "holds a BrainLM of width 16 and depth 2, but brainlm 13m has width 512" in out


BRAINMARKS_FIRST = """
import os
import torch
from brainmarks.models.registry import create_model, list_models
transform, model = create_model(
    "brainfusion_brainjepa",
    config=eval(os.environ["CONFIG"]),
    ckpt_path=os.environ["FILES"] + "/jepa-ep300.pth.tar",
    gradient=os.environ["FILES"] + "/gradient.csv",
)
found = model({"bold": torch.randn(2, 1, 450, 32)})
assert model.__space__ == "schaefer400_tians3"
print(found._fields)
print(sorted(name for name in list_models() if name.startswith("brainfusion_")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("registry", ["documented", "real"])
def test_brainmarks_finds_our_plugin_by_itself(shipped, documented, files, registry):
    path = [documented, shipped]
    if registry == "real":
        try:
            path[0] = Path(str(metadata.distribution("brainmarks").locate_file("")))
        except metadata.PackageNotFoundError:
            pytest.skip("the package brainmarks, the benchmark itself, is not installed")
    out = python(BRAINMARKS_FIRST, *path, FILES=str(files), CONFIG=repr(JEPA_UPSTREAM))
    fields, names = out.splitlines()[-2:]
    assert fields == "('cls_embeds', 'reg_embeds', 'patch_embeds')"
    assert names == str(sorted(MODELS))


@pytest.mark.parametrize("spec", [None, ModuleNotFoundError("brainmarks")])
def test_without_brainmarks_nothing_is_registered(monkeypatch, spec):
    def find_spec(name):
        if spec is not None:
            raise spec

    monkeypatch.setattr(ours, "find_spec", find_spec)
    assert register() == []


def test_each_size_has_a_name_of_its_own_and_no_name_is_brainmarks_own():
    assert {name for name in MODELS if "brainlm" in name} == {
        f"brainfusion_brainlm_{size}" for size in ("5m", "13m", "111m", "650m")
    }
    assert all(name.startswith("brainfusion_") for name in MODELS)


# -- bad input -------------------------------------------------------------------------------------


def refused(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_that_are_not_named_or_not_there_are_one_clear_line(files, monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("BRAINFUSION_"):
            monkeypatch.delenv(name)
    for model, variable in (
        ("brainfusion_brainlm_650m", "BRAINFUSION_BRAINLM_650M"),
        ("brainfusion_brainjepa", "BRAINFUSION_BRAINJEPA"),
        ("brainfusion_checkpoint", "BRAINFUSION_CHECKPOINT"),
    ):
        message = refused(MODELS[model])
        assert f"environment variable {variable} " in message
        assert "nothing is downloaded" in message
    assert "does not exist" in refused(brainlm, ckpt_path=tmp_path / "absent.bin")
    weights = files / "recording" / "pytorch_model.bin"
    assert "BRAINFUSION_A424_COORDINATES" in refused(brainlm, ckpt_path=weights)
    weights = files / "jepa-ep300.pth.tar"
    assert "BRAINFUSION_BRAINJEPA_GRADIENT" in refused(brainjepa, ckpt_path=weights)


def test_an_encoder_whose_parcels_brainmarks_does_not_have_is_one_clear_line(tmp_path):
    cohort = tiny_cohort(tmp_path / "cohort")
    pretrain(settings("brainjepa", steps=1), cohort, tmp_path / "run", ranks=Ranks())
    message = refused(checkpoint, ckpt_path=tmp_path / "run")
    assert "no parcellation with the 16 parcels of this encoder" in message
    assert "schaefer400_tians3 (450)" in message


def test_samples_that_do_not_fit_are_one_clear_line(files, train):
    transform, wrapper = make(files, "recording")
    sample = train["recording"][0]
    assert "call its fit()" in refused(transform, sample)
    transform.fit(train["recording"])
    message = refused(transform, {**sample, "bold": torch.zeros(50, 400)})
    assert "shape [50, 400], expected [frames, 424]" in message
    assert "space 'a424'" in message
    assert "no 'std'" in refused(transform, {k: v for k, v in sample.items() if k != "std"})
    assert "no 'tr'" in refused(transform, {k: v for k, v in sample.items() if k != "tr"})
    assert "no recording to fit on" in refused(make(files, "recording")[0].fit, [])
    assert "apply the transform" in refused(wrapper, {"bold": torch.zeros(2, 424, 40)})


def test_options_that_are_not_known_are_one_clear_line(files):
    assert "Did you mean 'stack'?" in refused(make, files, "recording", windows="stacked")
    assert "n_windows=0" in refused(make, files, "recording", n_windows=0)
    assert "unknown standardiser" in refused(make, files, "brainjepa", scaling="zscore")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3\n4 5 6\n", r"table of \[2, 3\]: expected 3 rows"),
        ("2 1 2 3\n3 1 2 3\n1 1 2 3\n", r"table of \[3, 4\]"),  # rows in another order
        ("1 2 3\n4 5 six\n7 8 9\n", "not a table of numbers"),
        ("1 2 nan\n4 5 6\n7 8 9\n", "expected 3 rows"),
    ],
)
def test_centroids_that_do_not_fit_are_one_clear_line(tmp_path, text, message):
    (tmp_path / "xyz.dat").write_text(text)
    with pytest.raises(UserError, match=message):
        read_coordinates(tmp_path / "xyz.dat", 3)


def test_centroids_are_read_from_tables_and_atlases(tmp_path):
    xyz = np.array([[1.0, -2.0, 3.5], [4.0, 5.0, 6.0]], dtype=np.float32)
    (tmp_path / "plain.csv").write_text("1,-2,3.5\n4,5,6\n")
    (tmp_path / "indexed.dat").write_text("1 1 -2 3.5\n2 4 5 6\n")
    Atlas(name="two", parcels=("a", "b"), xyz_mm=xyz).save(tmp_path / "atlas.json")
    for name in ("plain.csv", "indexed.dat", "atlas.json"):
        np.testing.assert_array_equal(read_coordinates(tmp_path / name, 2), xyz)
    Atlas(name="two", parcels=("a", "b")).save(tmp_path / "bare.json")
    assert "has no coordinates" in refused(read_coordinates, tmp_path / "bare.json", 2)


def test_a_transform_is_given_one_conditioning():
    with pytest.raises(AssertionError):
        EncoderTransform(n_parcels=3, window_trs=4)
