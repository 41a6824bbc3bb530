"""A pretraining run as its folder tells it: what was logged, how it stands, what is wrong with it.

Read while the run goes on too: what is not there yet is left out.

Shape legend: p parcels, t TRs.
"""

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.eval.report.rows import number
from brainfusion.runtime.config import read_yaml
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import read_json
from brainfusion.runtime.logs import read_metrics

COLLAPSED_SPREAD = 0.02
"""Spread, as a share of the untrained encoder's, below which features are collapsed."""
COLLAPSED_RANK = 1.5
"""Effective rank below which features vary along one line alone."""
MAX_WAIT = 0.05
"""Share of the time that steps may wait for data."""

_WATCHED = {
    "target_std": "spread of the targets",
    "feature_std": "spread of the features",
    "effective_rank": "effective rank of the features",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class PretrainingRun:
    """What `read_run` found."""

    folder: Path
    model: str
    rows: list[dict[str, float]]
    """metrics.jsonl: numbers alone, by step."""
    config: dict[str, Any]
    """config.yaml; empty where there is none."""
    summary: dict[str, Any]
    """summary.json; empty while the run goes on."""
    checkpoint: dict[str, Any]
    """What the newest checkpoint says of its data; empty where there is none."""
    window: dict[str, np.ndarray]
    """reconstruction.npz: signal, reconstruction, hidden, each [p, t]; empty if there is none."""
    notes: tuple[str, ...] = ()
    """What could not be read."""

    def values(self, key: str) -> list[float]:
        """The finite values of a key, in order."""
        return [row[key] for row in self.rows if math.isfinite(row.get(key, math.nan))]

    def keys(self, prefix: str) -> list[str]:
        """Keys of the rows that start so, in order of appearance."""
        return list(dict.fromkeys(k for row in self.rows for k in row if k.startswith(prefix)))

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return int(self.rows[-1]["step"])

    @property
    def n_steps(self) -> int | None:
        """Steps of the whole run; None where the config counts in epochs."""
        planned = number(self.config.get("optim") or {}, "steps", 0.0)
        return int(number(self.summary, "n_steps", planned)) or None

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.summary) and (self.n_steps is None or self.step >= self.n_steps)


def probed(key: str) -> str:
    """The trait of a logged probe and its measure: "age (r)", "sex (AUC)".

    Keys are `probe_<column>_r` and `probe_<column>_auc`; what ends otherwise is shown as it is.
    """
    column, _, measure = key.removeprefix("probe_").rpartition("_")
    words = {"r": "r", "auc": "AUC"}
    known = column and measure in words
    return f"{column} ({words[measure]})" if known else key.removeprefix("probe_")


def read_run(folder: Path) -> PretrainingRun:
    """Read a run folder.

    Raises:
        UserError: It is no pretraining run, or has nothing logged yet.
    """
    rows = _rows(folder)
    path = folder / "config.yaml"
    config = read_yaml(path) if path.is_file() else {}
    path = folder / "summary.json"
    summary = read_json(path) if path.is_file() else {}
    summary = summary if isinstance(summary, dict) else {}
    window, notes = _window(folder / "reconstruction.npz")
    model = config.get("model") or summary.get("model") or folder.name
    return PretrainingRun(
        folder=folder,
        model=str(model),
        rows=rows,
        config=config,
        summary=summary,
        checkpoint=_checkpoint(folder),
        window=window,
        notes=notes,
    )


def alarms(run: PretrainingRun) -> list[str]:
    """Plain sentences about collapse and a starved loader; none when all is well."""
    found = []
    for key, text in _WATCHED.items():
        values = run.values(key)
        if len(values) < 2:
            continue
        first, last = values[0], values[-1]
        least = COLLAPSED_RANK if key == "effective_rank" else COLLAPSED_SPREAD * first
        if last <= least < first:
            found.append(
                f"COLLAPSE: the {text} went from {first:.3g}, untrained, to {last:.3g}: recordings "
                "look alike to this encoder, however low its loss is."
            )
    loss, mean = run.values("validation_loss"), run.values("loss_of_mean_target")
    if loss and mean and loss[-1] >= mean[-1]:
        found.append(
            f"Warning: the validation loss, {loss[-1]:.3g}, is no lower than that of guessing the "
            f"mean target, {mean[-1]:.3g}: nothing has been learnt yet."
        )
    waits = run.values("wait_share")
    if waits and (wait := float(np.median(waits))) > MAX_WAIT:
        found.append(
            f"Warning: steps wait {wait:.0%} of the time for data: give the loader more workers, "
            "or put the cohort on a faster disk."
        )
    return found


def interpolated_r2(window: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """R2 of a window's hidden values: of the model, and of linear interpolation in time.

    Each parcel is interpolated between its visible frames, held at its ends; one that is wholly
    hidden gets the mean of what is visible. 0 is the mean of the hidden values.
    """
    signal, hidden = window["signal"], window["hidden"]
    guess, frames = np.full(signal.shape, signal[~hidden].mean()), np.arange(signal.shape[1])
    for parcel in np.flatnonzero((~hidden).any(1)):
        seen = ~hidden[parcel]
        guess[parcel] = np.interp(frames, frames[seen], signal[parcel, seen])
    truth = signal[hidden]
    spread = ((truth - truth.mean()) ** 2).sum()
    model, line = (
        float(1 - ((x[hidden] - truth) ** 2).sum() / spread)
        for x in (window["reconstruction"], guess)
    )
    return model, line


def _rows(folder: Path) -> list[dict[str, float]]:
    expected = "expected the folder of a pretraining run, such as runs/demo/pretrain/brainlm"
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {state}: {expected}.")
    path = folder / "metrics.jsonl"
    if not path.is_file():
        logs = [*folder.glob("pretrain/*/metrics.jsonl"), *folder.glob("align/*/metrics.jsonl")]
        if runs := sorted(str(path.parent.relative_to(folder)) for path in logs):
            raise UserError(
                f"{folder} is a workspace: {expected}, here {' or '.join(runs)}; "
                f"'brainfusion report --workspace {folder}' reports the workspace."
            )
        raise UserError(f"{folder} has no metrics.jsonl: {expected}.")
    try:
        found = read_metrics(path)
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text: {expected}.") from None
    rows = [
        {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and k != "seconds"}
        for row in found
        if isinstance(row, dict) and isinstance(row.get("step"), int)
    ]
    if not rows:
        raise UserError(
            f"{path} has no rows{' that can be read' * bool(path.stat().st_size)}: expected one a "
            "logged step; wait for the first, or look at what the run said."
        )
    if not any(k in row for row in rows for k in ("loss", "validation_loss")) or any(
        "log_n" in row or "validation_auc" in row for row in rows
    ):
        raise UserError(f"{folder} is no pretraining run, by its metrics.jsonl: {expected}.")
    return rows


def _checkpoint(folder: Path) -> dict[str, Any]:
    """The newest checkpoint's facts about its data, without what config.yaml has."""
    states = sorted(folder.glob("checkpoints/*/state.json"))
    if not states:
        return {}
    state = read_json(states[-1])
    left_out = {"config", "conditioning", "config_class", "atlas", "format", "seeds"}
    facts = {k: v for k, v in state.items() if k not in left_out} if isinstance(state, dict) else {}
    atlas = state.get("atlas") if isinstance(state, dict) else None
    if isinstance(atlas, dict):
        facts["atlas"] = atlas.get("name")
    return {"checkpoint": states[-1].parent.name, **facts}


def _window(path: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The stored reconstruction, or a note on why there is none to show."""
    if not path.is_file():
        return {}, ()
    try:
        # Opened here: numpy leaves a file open that it cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            signal, rebuilt = (
                np.asarray(stored[key], dtype=np.float64) for key in ("signal", "reconstruction")
            )
            hidden = np.asarray(stored["hidden"], dtype=bool)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}, (f"{path.name} could not be read: its picture is left out.",)
    if signal.ndim != 2 or not signal.shape == rebuilt.shape == hidden.shape:
        return {}, (f"{path.name} holds arrays of other shapes: its picture is left out.",)
    if not hidden.any() or hidden.all() or not np.isfinite(signal).all():
        return {}, (f"{path.name} hides nothing or everything: its picture is left out.",)
    return {"signal": signal, "reconstruction": rebuilt, "hidden": hidden}, ()
