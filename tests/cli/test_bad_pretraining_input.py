"""Twenty-odd ways to get pretraining or importing wrong, and the one line that each gets."""

from pathlib import Path

import numpy as np
import pytest

from tests.encoders.tiny_cohort import N_PARCELS, N_TRS, tiny_cohort

TINY = "pretrain --model brainlm --n-trs 64 --patch-trs 16 --width 16 --steps 2"
IMPORT = "--out DIR/new --tr-s 2 --orientation trs-first"

PRETRAINING = [
    ("pretrain", "missing: --model STR"),
    ("pretrain --model brainlmm", "unknown model 'brainlmm'. Did you mean 'brainlm'?"),
    ("pretrain --model brainlm --preset 13M", "unknown preset '13M' for brainlm. Did you mean"),
    ("pretrain --model brainlm --recipe publishd", "Did you mean 'published'?"),
    ("pretrain --model brainlm --n-trs 65", "is not a multiple of patch_trs=8: the last 1 TRs"),
    ("pretrain --model brainlm --n-trs 96", "0 training and 0 validation recordings of at least"),
    (f"{TINY} --learning-rate 0.1", "unknown options or words: --learning-rate, 0.1"),
    (f"{TINY} --epochs 2", "steps=2 with epochs=2: expected one of the two above 0"),
    (f"{TINY} --batch-size 0", "batch_size=0: expected 1 or more"),
    (f"{TINY} --mask-ratio 1.0", "mask_ratio=1.0 is not a share of the tokens"),
    (f"{TINY} --divide-by 0", "divide_by=0.0: expected a number above zero"),
    (f"{TINY} --tr-s 735", "a TR in milliseconds is divided by 1000"),
    (f"{TINY} --standardiser zscore", "unknown standardiser 'zscore'. Did you mean"),
    (f"{TINY} --frames brainjepa --tr-s 2", "thins recordings out by itself"),
    (f"{TINY} --n-parcels 50", "has 16 parcels but the encoder 'brainlm' expects 50"),
    (f"{TINY} --width 15", "must be even and a multiple of the number of heads (4): use width=8"),
    (f"{TINY} --accumulation 3", "accumulation=3 does not divide the 4 windows"),
    (f"{TINY} --sharding fsdp", "there is one: start them with torchrun"),
    (f"{TINY} --device tpu", "device 'tpu' is unknown: use auto, cpu or cuda"),
    (f"{TINY} --probe-every 1 --probe-columns aeg", "--probe-columns aeg: the people's table has"),
    (f"{TINY} --resume must", "holds no checkpoint to go on from"),
    (f"{TINY} --precision float16", "Expected one of ('float32', 'bfloat16')"),
    (f"{TINY} --tr-s 1.5 --cohort DIR/timeless", "have a TR that is not known, which tr_s=1.5"),
    (f"{TINY} --cohort DIR/nowhere", "nowhere does not exist: --cohort expects a cohort folder"),
]
IMPORTING = [
    ("import DIR/nowhere", "nowhere does not exist: expected a folder of recordings"),
    ("import DIR/empty", "cannot tell what to read (it holds none of them): choose with --kind"),
    ("import DIR/nan", "recording 'p1' has 1 single NaN values in 1 parcels"),
    ("import DIR/infinite", "recording 'p1' has 1 infinite values"),
    ("import DIR/odd", "p1.npy has 12 parcels but the first recording has 16 parcels"),
    ("import DIR/broken", "p1.npy is not a whole .npy array of numbers"),
    ("import DIR/good --tr-s 735", "tr_s=735 is no repetition time in seconds"),
    ("import DIR/good --pattern sub-(", "--pattern 'sub-(' is no regular expression (missing )"),
    ("import DIR/good --glob *.tsv", "cannot tell what to read (it holds none of them)"),
    ("import DIR/good --out DIR/cohort", "cohort exists: give another --out, or --overwrite"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort, one whose TRs nobody knows, and folders of three recordings, spoilt each in a
    way."""
    folder, rng = tmp_path_factory.mktemp("bad"), np.random.default_rng(0)
    tiny_cohort(folder / "cohort")
    tiny_cohort(folder / "timeless", tr_s=None)
    (folder / "empty").mkdir()
    for name in ("good", "nan", "infinite", "odd", "broken"):
        (folder / name).mkdir()
        for i in range(3):
            bold = rng.normal(size=(N_TRS, N_PARCELS))
            if i == 1 and name in ("nan", "infinite"):
                bold[3, 4] = np.nan if name == "nan" else np.inf
            np.save(folder / name / f"p{i}.npy", bold[:, : 12 if (name, i) == ("odd", 1) else None])
    (folder / "broken" / "p1.npy").write_bytes(b"no array")
    return folder


@pytest.mark.parametrize(("words", "says"), PRETRAINING)
def test_wrong_words_for_pretraining_get_one_line(words, says, call, folder, tmp_path):
    place = ["--workspace", str(tmp_path)]
    place += [] if "--cohort" in words else ["--cohort", str(folder / "cohort")]
    assert says in call(*words.replace("DIR", str(folder)).split(), *place).error
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(("words", "says"), IMPORTING)
def test_what_cannot_be_imported_gets_one_line_and_leaves_nothing(words, says, call, folder):
    command, source, *given = words.replace("DIR", str(folder)).split()
    rest = IMPORT.replace("DIR", str(folder)).split()
    for name in (
        word for word in given if word.startswith("--")
    ):  # what is given twice counts once
        if name in rest:
            place = rest.index(name)
            rest[place : place + 2] = []
    assert says in call(command, source, *rest, *given).error
    assert not (folder / "new").exists()


def test_a_run_is_not_gone_on_with_under_another_recipe(call, folder, tmp_path):
    place = ["--cohort", str(folder / "cohort"), "--workspace", str(tmp_path)]
    assert call(*TINY.split(), *place).code == 0
    for words, says in (
        ("--lr 0.5", "was trained with another config (optim.lr: 0.003 -> 0.5)"),
        ("--resume never", "--resume never: "),
        ("--restart --resume must", "--restart forgets a run and --resume must goes on with it"),
    ):
        assert says in call(*TINY.split(), *words.split(), *place).error
