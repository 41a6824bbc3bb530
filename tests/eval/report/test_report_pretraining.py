"""The page of a pretraining run: complete, honest about collapse, and readable while it goes on."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from brainfusion.cli import main
from brainfusion.eval.report.pretraining import pretraining_page, status, write_pretraining_report
from brainfusion.eval.report.pretraining_run import alarms, interpolated_r2, probed, read_run
from brainfusion.runtime.errors import UserError
from tests.eval.report.test_report import check

N_STEPS, EVERY = 200, 20


def rows_of(n_steps: int = N_STEPS) -> list[dict]:
    """A healthy run's log: a row every 20 steps, a validation every 40."""
    rows = []
    for step in range(0, n_steps + 1, EVERY):
        share = step / N_STEPS
        row: dict = {"step": step}
        if step:
            row |= {"loss": 1.0 - 0.4 * share, "lr": 1e-3 * (1 - share), "weight_decay": 0.05}
            row |= {"grad_norm": 2.0 - share, "windows_per_s": 40.0, "wait_share": 0.01}
            row |= {"peak_mib": 500.0 + step}
        if step % 40 == 0:
            row |= {"validation_loss": 1.01 - 0.4 * share, "masked_r2": -0.1 + 0.5 * share}
            row |= {
                "interpolation_r2": 0.123,
                "neighbours_r2": 0.353,
                "target_std": 0.8,
                "feature_std": 0.05 + 0.05 * share,
            }
            row |= {"effective_rank": 9.0 + share, "probe_age_r": 0.1 + 0.21 * share}
        rows.append(row)
    return rows


def save(folder: Path, rows: list[dict], *, finished: bool = True) -> Path:
    """A run folder with these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    config = f"model: brainlm\noptim:\n  steps: {N_STEPS}\n  batch_size: 4\n  clip: 1.0\n"
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    if finished:
        summary = {"model": "brainlm", "n_steps": N_STEPS, "n_parameters": 1234567, "seconds": 61.2}
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def save_window(folder: Path, *, n_parcels: int = 30, n_trs: int = 64) -> dict[str, np.ndarray]:
    """A reconstruction that is the signal and some noise, in blocks of 16 frames."""
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((n_parcels, n_trs)).cumsum(1) / 4
    hidden = np.repeat(rng.random((n_parcels, n_trs // 16)) < 0.3, 16, axis=1)
    rebuilt = signal + 0.2 * rng.standard_normal(signal.shape)
    arrays = {"signal": signal, "reconstruction": rebuilt, "hidden": hidden}
    np.savez(folder / "reconstruction.npz", signal=signal, reconstruction=rebuilt, hidden=hidden)
    return arrays


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = save(tmp_path_factory.mktemp("run") / "brainlm", rows_of())
    save_window(folder)
    state = {"cohort": "site-a", "n_recordings": 700, "cohort_hash": "abc", "config": {"x": 1}}
    state |= {"atlas": {"name": "A424", "parcels": ["one", "two"]}}
    place = folder / "checkpoints" / "step-0000200"
    place.mkdir(parents=True)
    (place / "state.json").write_text(json.dumps(state), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def text(folder) -> str:
    return write_pretraining_report(folder).read_text(encoding="utf-8")


def test_the_page_is_well_formed_small_and_needs_no_network(text):
    checker = check(text)
    assert len(checker.ids) == len(set(checker.ids))
    assert not re.search(r"https?://|@import|<script|<link|<iframe|url\((?!#)", text)
    assert len(text.encode()) < 1_000_000


def test_every_figure_is_there_and_has_an_alternative_text(text):
    svgs = check(text).svgs
    # Loss, R2, probe, two pictures, spread, rank, gradient, rate, windows, waiting, memory; the
    # weight decay never changes and has no figure.
    assert len(svgs) == 12
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 15 for svg in svgs)


def test_the_page_says_how_it_stands_beside_the_baselines(text):
    assert "Finished: 200 steps in 61 s; the validation loss fell from 1.01 to 0.610." in text
    assert (
        "R2 0.40 on validation people (their mean: 0; linear interpolation in time: 0.12; the "
        "nearest visible parcels: 0.35)."
    ) in text
    assert "does not beat an average of the nearest" not in text
    assert "The online probe of age (r) went from 0.10 to 0.31" in text
    assert "cohort site-a &middot; 700 training recordings &middot; 1,234,567 parameters" in text
    assert 'class="verdict found"' in text


def test_an_encoder_that_neighbours_beat_is_said_to_be_one(tmp_path):
    rows = [row | {"neighbours_r2": 0.41} if "masked_r2" in row else row for row in rows_of()]
    said = status(read_run(save(tmp_path / "run", rows)))
    assert any(
        line.startswith("The encoder does not beat an average of the nearest") for line in said
    )


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("probe_age_r", "age (r)"),
        ("probe_sex_auc", "sex (AUC)"),
        ("probe_reaction_time_r", "reaction_time (r)"),
        ("probe_age", "age"),
    ],
)
def test_a_probe_is_called_by_its_trait_and_measure(key, text):
    assert probed(key) == text


def test_first_and_last_figures_and_provenance_are_on_the_page(text):
    row = r"masked R2<span[^>]*>.*?<td>-0.100</td><td>0.400</td><td>-0.100</td><td>0.400</td>"
    assert re.search(row, text)
    assert "<td>optim.batch_size</td><td>4</td>" in text
    assert "<td>atlas</td><td>A424</td>" in text
    assert "step-0000200" in text


def test_keys_that_are_not_logged_are_left_out(tmp_path):
    bare = [{"step": step, "loss": 1.0 / (step + 1)} for step in range(1, 30)]
    page = pretraining_page(read_run(save(tmp_path / "run", bare)))
    assert len(check(page).svgs) == 1
    assert "health" not in page


def test_a_run_that_is_going_on_says_how_far_it_is(tmp_path):
    run = read_run(save(tmp_path / "run", rows_of(120), finished=False))
    first, *_ = status(run)
    # 80 steps of 4 windows at 40 a second.
    assert first.startswith("Not finished: step 120 of 200 was the last that was logged, 8.0 s of")
    assert 'class="verdict open"' in pretraining_page(run)


def test_a_row_that_is_just_being_written_is_left_out(tmp_path):
    folder = save(tmp_path / "run", rows_of(120), finished=False)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as handle:
        handle.write('{"step": 140, "lo')
    assert read_run(folder).step == 120


@pytest.mark.parametrize(
    ("key", "last", "word"),
    [
        ("feature_std", 0.0009, "spread of the features"),
        ("target_std", 0.001, "spread of the targets"),
        ("effective_rank", 1.2, "effective rank"),
    ],
)
def test_collapse_turns_the_page_red(tmp_path, key, last, word):
    rows = rows_of()
    rows[-1][key] = last
    run = read_run(save(tmp_path / "run", rows))
    [alarm] = alarms(run)
    assert alarm.startswith("COLLAPSE")
    assert word in alarm
    page = pretraining_page(run)
    assert 'class="verdict failed"' in page
    assert f'<span class="alarm">COLLAPSE: the {word}' in page


def test_a_healthy_run_and_one_that_shrinks_a_little_raise_no_alarm(tmp_path):
    assert alarms(read_run(save(tmp_path / "well", rows_of()))) == []
    rows = rows_of()
    rows[-1]["feature_std"] = 0.01  # a fifth of the untrained encoder's
    assert alarms(read_run(save(tmp_path / "less", rows))) == []


def test_a_starved_loader_and_a_loss_of_the_mean_target_are_warned_of(tmp_path):
    rows = [row | {"wait_share": 0.3} for row in rows_of()]
    rows[-1]["loss_of_mean_target"] = 0.6
    wait, mean = sorted(alarms(read_run(save(tmp_path / "run", rows))), key=len, reverse=True)
    assert "steps wait 30% of the time" in mean + wait
    assert "no lower than that of guessing the mean target, 0.6" in mean + wait


def test_r2_of_a_window_is_that_of_the_formula():
    hidden = np.zeros((2, 7), dtype=bool)
    hidden[0, 2:5] = hidden[1, 5:] = True
    signal = np.array([[0.0, 1, 2, 3, 4, 5, 6], [1.0, 1, 1, 1, 1, 3, 5]])
    made = np.where(hidden, signal + 1, signal)
    model, line = interpolated_r2({"signal": signal, "reconstruction": made, "hidden": hidden})
    # Hidden: 2 3 4 of a straight line, which interpolation finds, and 3 5, where it holds 1.
    truth = np.array([2, 3, 4, 3, 5.0])
    spread = ((truth - truth.mean()) ** 2).sum()
    assert model == pytest.approx(1 - 5 / spread)
    assert line == pytest.approx(1 - (4 + 16) / spread)


@pytest.mark.parametrize("broken", ["bytes", "keys", "shape", "nothing hidden"])
def test_a_reconstruction_that_cannot_be_drawn_is_said_and_left_out(tmp_path, broken):
    folder = save(tmp_path / "run", rows_of())
    arrays = save_window(folder)
    path, signal = folder / "reconstruction.npz", arrays["signal"]
    if broken == "bytes":
        path.write_bytes(b"PK\x03\x04 half a file")
    elif broken == "keys":
        np.savez(path, signal=signal)
    elif broken == "shape":
        np.savez(path, signal=signal, reconstruction=signal, hidden=arrays["hidden"][:5])
    else:
        np.savez(path, signal=signal, reconstruction=signal, hidden=np.zeros_like(signal))
    page = pretraining_page(read_run(folder))
    assert len(re.findall(r'class="missing">reconstruction.npz', page)) == 1
    assert 'aria-label="A window' not in page


def test_an_id_list_in_the_configuration_is_counted_not_printed(tmp_path):
    folder = save(tmp_path / "run", rows_of())
    ids = ", ".join(f"sub-{i:04d}" for i in range(40))
    with (folder / "config.yaml").open("a", encoding="utf-8") as handle:
        handle.write(f"people: [{ids}]\n")
    page = pretraining_page(read_run(folder))
    assert "[40 values]" in page
    assert "sub-0001" not in page


def _workspace(path: Path) -> None:
    save(path / "pretrain" / "brainlm", rows_of())


def _alignment(path: Path) -> None:
    path.mkdir()
    (path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0, "validation_auc": 0.5}\n')


def _with_metrics(content: bytes):
    def make(path: Path) -> None:
        path.mkdir()
        (path / "metrics.jsonl").write_bytes(content)

    return make


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda path: None,
            "does not exist: expected the folder of an alignment or pretraining run",
        ),
        (lambda path: path.write_text("x"), "is a file: expected the folder"),
        (lambda path: path.mkdir(), "has no metrics.jsonl: expected the folder"),
        (_workspace, "is a workspace: expected the folder of a pretraining run"),
        (_alignment, "is no pretraining run, by its metrics.jsonl"),
        (_with_metrics(b""), "has no rows: expected one a logged step; wait for the first"),
        (_with_metrics(b"no json\n"), "has no rows that can be read"),
        (_with_metrics(b'[1]\n{"loss": 1}\n'), "has no rows that can be read"),
        (_with_metrics(b"\xff\xfe\x00"), "is no text"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys, make, says):
    path = tmp_path / "given"
    make(path)
    assert main(["report", str(path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not list(tmp_path.rglob("report.html"))


def test_the_command_draws_the_run_and_prints_how_it_stands(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "run")
    (copy / "report.html").unlink(missing_ok=True)
    assert main(["report", str(copy)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("Finished: 200 steps in 61 s")
    assert (copy / "report.html").is_file()
    with pytest.raises(UserError, match="does not exist"):
        write_pretraining_report(tmp_path / "nothing")
