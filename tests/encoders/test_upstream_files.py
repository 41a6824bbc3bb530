"""The authors' checkpoints and gradient tables as files: every form they come in, and bad ones."""

import json
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from brainfusion.encoders import brainjepa, from_upstream, to_upstream
from brainfusion.encoders.brainjepa_upstream import config_from_upstream, read_gradient
from brainfusion.encoders.upstream_files import read_tensors
from brainfusion.runtime.errors import CheckpointError
from tests.encoders import random_upstream as draw
from tests.encoders.random_upstream import config_of, load, one_line, state_of

# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("family", ["recording", "image"])
def test_brainlm_files_load_with_the_config_beside_them(
    tmp_path: Path, family: str, suffix: str, prefix: str
) -> None:
    config = config_of(family)
    state = state_of(family, config)
    wrapped = {prefix + key: value for key, value in state.items()}
    path = tmp_path / ("pytorch_model.bin" if suffix == ".bin" else "model.safetensors")
    if suffix == ".bin":
        torch.save(wrapped, path)
    else:
        save_file(wrapped, path)
    one_line(lambda: from_upstream("brainlm", path), "config.json does not exist")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for source in (path, str(path), tmp_path):
        back = to_upstream(from_upstream("brainlm", source))
        assert all(torch.equal(value, state[key]) for key, value in back.items())
    from_upstream("brainlm", path, config=tmp_path / "config.json")
    from_upstream("brainlm", path, config=config)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("form", ["nested.pth.tar", "flat.safetensors", "alone.pth.tar", "dict"])
def test_brainjepa_files_load_in_every_form(
    tmp_path: Path, form: str, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of("brainjepa")
    states = draw.jepa_states(config, 1)
    fmri, gradient, masks_enc, _ = draw.jepa_inputs(config, 1)
    wrapped = {
        part: {prefix + key: value for key, value in state.items()}
        for part, state in states.items()
    }
    path: Any = tmp_path / form
    if form == "nested.pth.tar":
        training = {"opt": {"state": {}}, "scaler": None, "epoch": 300, "loss": 0.1, "lr": 1e-3}
        torch.save(wrapped | training | {"batch_size": 16, "world_size": 4}, path)
    elif form == "flat.safetensors":
        save_file({f"{p}/{k}": v for p, state in wrapped.items() for k, v in state.items()}, path)
    elif form == "alone.pth.tar":
        torch.save(wrapped["target_encoder"], path)
    else:
        path = {"target_encoder": wrapped["target_encoder"]}
    whole = load("brainjepa", states, config, gradient=gradient)
    capsys.readouterr()
    module = load("brainjepa", path, config, gradient=gradient)
    said = capsys.readouterr().err
    with torch.no_grad():
        assert torch.equal(module.encode(fmri[:, 0]), whole.encode(fmri[:, 0]))
        if form in ("alone.pth.tar", "dict"):
            assert "target encoder alone" in said
            assert "predictor is untrained" in said
            assert torch.equal(module.encoder(fmri), module.target_encoder(fmri))
        else:
            assert said == ""
            assert torch.equal(module.encoder(fmri, masks_enc), whole.encoder(fmri, masks_enc))


def test_brainjepa_without_a_target_encoder_is_one_line() -> None:
    config = config_of("brainjepa")
    states = draw.jepa_states(config, 1)
    for parts in (("encoder",), ("encoder", "predictor"), ("predictor",)):
        some = {part: states[part] for part in parts}
        one_line(lambda s=some: load("brainjepa", s, config), "lacks", "target_encoder")
    both = {part: states[part] for part in ("encoder", "target_encoder")}
    one_line(lambda: load("brainjepa", both, config), "lacks predictor")
    one_line(lambda: load("brainjepa", states | {"model": {}}, config), "no entry 'model'")


def test_published_sizes_need_no_config(monkeypatch: pytest.MonkeyPatch) -> None:
    # At a small size in the published one's place: 22 million parameters are slow to draw.
    config = {
        "add_w": "mapping", "crop_size": [5, 20], "patch_size": 2, "embed_dim": 8, "depth": 1,
        "num_heads": 2, "pred_emb_dim": 8, "pred_depth": 1, "gradient_dim": 3,
    }  # fmt: skip
    small = config_from_upstream(config)
    monkeypatch.setitem(brainjepa.PRESETS, "small", small)
    for positions in ("mapping", "origin"):
        states = draw.jepa_states(config | {"add_w": positions}, 0)
        gradient = torch.rand(5, 3) if positions == "mapping" else None
        module = from_upstream("brainjepa", states, gradient=gradient)
        assert module.config == replace(small, positions=positions)
    states = draw.jepa_states(config | {"embed_dim": 12}, 0)
    one_line(lambda: from_upstream("brainjepa", states), "width 12, which is no published size")


# -- gradient tables -------------------------------------------------------------------------------


def test_gradient_tables_come_as_files_and_arrays_of_two_or_three_axes(tmp_path: Path) -> None:
    config = config_of("brainjepa") | {"gradient_dim": 3, "add_w": "mapping"}
    states = draw.jepa_states(config, 1)
    table = torch.randn(config["crop_size"][0], 3, generator=torch.Generator().manual_seed(0))
    fmri = draw.jepa_inputs(config, 1)[0]
    plain, headed = tmp_path / "table.csv", tmp_path / "headed.csv"
    np.savetxt(plain, table.numpy(), delimiter=",", fmt="%.9g")
    headed.write_text("g1,g2,g3\n" + plain.read_text() + "\n")
    flat, cube = tmp_path / "flat.npy", tmp_path / "cube.npy"
    np.save(flat, table.double().numpy())
    np.save(cube, table[None].numpy())
    frozen = table.numpy().copy()
    frozen.flags.writeable = False
    forms = [table, table[None], table.double(), table.numpy(), table[None].numpy(), frozen]
    forms += [table.tolist(), plain, str(plain), headed, flat, cube]
    with torch.no_grad():
        outputs = [load("brainjepa", states, config, gradient=g).encoder(fmri) for g in forms]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    # Left out of the config, the number of components is that of the table.
    del config["gradient_dim"]
    assert load("brainjepa", states, config, gradient=table).config.gradient_dim == 3


def test_bad_gradient_tables_are_one_line(tmp_path: Path) -> None:
    config = config_of("brainjepa") | {"gradient_dim": 3, "add_w": "mapping"}
    states = draw.jepa_states(config, 1)
    rows = config["crop_size"][0]
    table = np.random.default_rng(0).normal(size=(rows, 3))
    gap = table.copy()
    gap[1, 2] = np.nan
    files = {
        "words.csv": "a,b\nc,d\n", "empty.csv": "", "header.csv": "a,b,c\n",
        "ragged.csv": "1,2,3\n1,2\n", "blank.csv": "1,,3\n" * rows,
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.csv").write_bytes(bytes(range(128, 256)))
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    not_numbers = [tmp_path / n for n in (*files, "binary.csv", "cut.npy", "objects.npy")]

    def given(gradient: Any) -> Callable[[], Any]:
        return lambda: from_upstream("brainjepa", states, config=config, gradient=gradient)

    for path in not_numbers:
        one_line(given(path), path.name, "not a table of numbers")
    one_line(given([["a"]]), "not a table of numbers")
    one_line(given(tmp_path / "none.csv"), "none.csv does not exist")
    one_line(given(table[1:]), f"({rows - 1}, 3)", f"expects ({rows}, 3)")
    one_line(given(table[:, 1:]), f"({rows}, 2)", f"expects ({rows}, 3)")
    one_line(given(table[0]), "shape")
    one_line(given(np.stack([table, table])), "shape")
    one_line(given(gap), "not finite")
    one_line(given(None), "do not hold the gradient table")
    assert read_gradient(table).dtype == torch.float32


# -- files that are not what they should be --------------------------------------------------------


class Payload:
    """A pickle of this writes a file when it is run."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.target, "it ran"))


@pytest.mark.parametrize(
    ("name", "suffix"), [("brainlm", ".bin"), ("brainjepa", ".pth.tar"), ("brainjepa", ".bin")]
)
def test_code_in_a_checkpoint_is_refused_and_never_run(
    tmp_path: Path, name: str, suffix: str
) -> None:
    proof = tmp_path / "ran"
    payload = Payload(proof)
    evil, plain, old = (tmp_path / f"{stem}{suffix}" for stem in ("evil", "plain", "old"))
    torch.save({"encoder": {"a": torch.zeros(2)}, "b": payload}, evil)
    plain.write_bytes(pickle.dumps({"a": payload}, protocol=2))
    torch.save({"a": payload}, old, _use_new_zipfile_serialization=False)
    for path in (evil, plain, old):
        one_line(
            lambda p=path: from_upstream(name, p, config={}),
            path.name, "could run code", kind=CheckpointError,
        )  # fmt: skip
        assert not proof.exists()
    pickle.loads(plain.read_bytes())  # the proof proves: run, it leaves its mark
    assert proof.exists()


def test_damaged_files_are_one_line_each(tmp_path: Path) -> None:
    rng = random.Random(0)
    state = {"weight": torch.randn(20), "bias": torch.randn(3)}
    new, old, safe = tmp_path / "new.bin", tmp_path / "old.bin", tmp_path / "safe.safetensors"
    torch.save(state, new)
    torch.save(state, old, _use_new_zipfile_serialization=False)
    save_file(state, safe)
    outcomes = []
    for source in (new, old, safe):
        whole = source.read_bytes()
        for attempt in range(60):
            data = bytearray(whole)
            if attempt % 3 == 0:
                data = data[: rng.randrange(len(whole))]
            elif attempt % 3 == 1:
                for _ in range(3):
                    data[rng.randrange(len(data))] = rng.randrange(256)
            else:
                data = bytearray(b"\x80\x02" * (attempt % 2) + rng.randbytes(rng.randint(0, 200)))
            path = tmp_path / f"damaged{source.suffix}"
            path.write_bytes(data)
            outcomes.append(message_of(path))
    refused = [text for text in outcomes if text is not None]
    assert 100 < len(refused) < 180  # some damage is to numbers alone, which are read
    assert all("damaged." in text and "\n" not in text for text in refused)


def message_of(path: Path) -> str | None:
    try:
        read_tensors(path, expected="weights")
    except CheckpointError as error:
        return str(error)
    return None


def test_files_that_are_no_checkpoints_are_one_line_each(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.bin")
    torch.save({"step": 3, "weights": {"a": torch.zeros(1)}}, tmp_path / "nested.bin")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.bin")
    (tmp_path / "page.bin").write_text("<html>Not found</html>")
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "weights.h5").write_bytes(b"x")
    lines = {
        "list.bin": "holds a list",
        "page.bin": "",
        "empty.bin": "",
        "weights.h5": "ends in '.h5'",
        "absent.bin": "does not exist",
    }
    for file, message in lines.items():
        for name in ("brainlm", "brainjepa"):
            one_line(
                lambda f=file, n=name: from_upstream(n, tmp_path / f, config=config_of("image")),
                file, message, kind=CheckpointError,
            )  # fmt: skip
    for file in ("nested.bin", "other.bin"):
        for name in ("brainlm", "brainjepa"):
            one_line(
                lambda f=file, n=name: from_upstream(n, tmp_path / f, config={}),
                kind=CheckpointError,
            )
