"""The page of one pretraining run: is it learning, is it healthy, is it fast, what was it made of.

Everything comes from the run's folder (docs/formats.md) and may be drawn while the run goes on;
what is not there yet is left out. The parts and the style are those of the report.
"""

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import numpy as np

from brainfusion.eval.report import figures
from brainfusion.eval.report.drawing import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION
from brainfusion.eval.report.figures_training import Line, over_steps, reconstruction, traces
from brainfusion.eval.report.parts import (
    date_text,
    document,
    figure,
    folded,
    missing,
    seconds_text,
    side_by_side,
    significant,
    table,
)
from brainfusion.eval.report.pretraining_run import (
    PretrainingRun,
    alarms,
    interpolated_r2,
    probed,
    read_run,
)
from brainfusion.eval.report.rows import number, rounded
from brainfusion.eval.report.tables import flat
from brainfusion.eval.report.training import MEANINGS
from brainfusion.runtime.files import write_text

_WORDS = MEANINGS | {
    "loss": ("training loss", ""),
    "lr": ("learning rate", ""),
    "grad_norm": ("gradient norm", "of all gradients together, before they are clipped"),
    "windows_per_s": ("windows a second", "of all processes together"),
    "wait_share": ("share of the time that steps wait for data", ""),
    "peak_mib": ("largest memory so far, MiB", ""),
    "neighbours_r2": (
        "R2 of interpolation between parcels",
        "of hidden values from the 8 nearest visible parcels at the same time, the nearer the more",
    ),
}
"""Keys of metrics.jsonl -> name, and a clause on what it means."""

_GUESSES = {
    "interpolation_r2": "linear interpolation in time",
    "neighbours_r2": "the nearest visible parcels",
}
"""What masked R2 is held against beside the mean, in words."""
_COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)


def write_pretraining_report(folder: Path, out: Path | None = None) -> Path:
    """Draw a pretraining run as one HTML page.

    Args:
        folder: The run's folder, with metrics.jsonl.
        out: Where the page goes; `folder/report.html` if omitted.

    Returns:
        The path of the page.

    Raises:
        UserError: It is no pretraining run, or has nothing logged yet.
    """
    target = out if out is not None else folder / "report.html"
    write_text(target, pretraining_page(read_run(folder)))
    return target


def pretraining_page(run: PretrainingRun) -> str:
    """The whole page as text."""
    parts = [
        ("learning", "What it learns", _learning(run)),
        ("reconstruction", "A reconstruction", _reconstruction(run)),
        ("health", "Features and gradients", _health(run)),
        ("pace", "Schedule and speed", _pace(run)),
        ("figures", "First and last figures", _ends(run)),
        ("provenance", "Configuration and provenance", _provenance(run)),
    ]
    footer = (
        "Drawn from <code>metrics.jsonl</code>, <code>config.yaml</code> and what else lies beside "
        f"them, {date_text(datetime.now(UTC).isoformat(timespec='seconds'))}. Validation is on "
        "people that the encoder is not trained on, with windows and masks that stay the same."
    )
    kept = [part for part in parts if part[2]]
    return document(f"brainfusion pretraining: {run.model}", _header(run), kept, footer)


def status(run: PretrainingRun) -> list[str]:
    """How the run stands, in plain sentences, the most important first."""
    return [_standing(run), *alarms(run), *_findings(run)]


# -- top of the page ---------------------------------------------------------------------------


def _standing(run: PretrainingRun) -> str:
    of = f" of {run.n_steps:,}" if run.n_steps else ""
    if run.finished:
        took = number(run.summary, "seconds")
        text = f"Finished: {run.step:,} steps"
        text += f" in {seconds_text(took)}" if math.isfinite(took) else ""
    else:
        text = f"Not finished: step {run.step:,}{of} was the last that was logged"
        left = _seconds_left(run)
        text += f", {seconds_text(left)} of training left at that pace" if left else ""
    loss = run.values("validation_loss")
    if len(loss) > 1:
        way = "fell" if loss[-1] < loss[0] else "rose"
        ends = f"{significant(loss[0], 3)} to {significant(loss[-1], 3)}"
        text += f"; the validation loss {way} from {ends}"
    return f"{text}."


def _seconds_left(run: PretrainingRun) -> float | None:
    pace = run.values("windows_per_s")
    batch = number(run.config.get("optim") or {}, "batch_size")
    if not pace or not run.n_steps or not math.isfinite(batch) or pace[-1] <= 0:
        return None
    return max(run.n_steps - run.step, 0) * batch / pace[-1]


def _findings(run: PretrainingRun) -> Iterator[str]:
    if r2 := run.values("masked_r2"):
        beside = "".join(
            f"; {text}: {rounded(run.values(key)[-1])}"
            for key, text in _GUESSES.items()
            if run.values(key)
        )
        yield (
            f"Hidden patches are rebuilt with R2 {rounded(r2[-1])} on validation people (their "
            f"mean: 0{beside})."
        )
        near = run.values("neighbours_r2")
        if near and r2[-1] <= near[-1]:
            yield (
                "The encoder does not beat an average of the nearest visible parcels: train it for "
                "longer, with shorter patches, or on more people."
            )
    for key in run.keys("probe_"):
        values = run.values(key)
        if len(values) > 1:
            yield (
                f"The online probe of {probed(key)} went from {rounded(values[0])} "
                f"to {rounded(values[-1])} on validation people."
            )


def _header(run: PretrainingRun) -> str:
    recordings = number(run.checkpoint, "n_recordings")
    weights = number(run.summary, "n_parameters")
    facts = [
        f"cohort {run.checkpoint['cohort']}" if run.checkpoint.get("cohort") else None,
        f"{recordings:,.0f} training recordings" if math.isfinite(recordings) else None,
        f"{weights:,.0f} parameters" if math.isfinite(weights) else None,
        f"version {run.checkpoint['package_version']}"
        if run.checkpoint.get("package_version")
        else None,
    ]
    meta = " &middot; ".join(escape(fact) for fact in facts if fact)
    first, *rest = status(run)
    bad = [text.startswith("COLLAPSE") for text in rest]
    lines = "".join(
        f'<li><span class="alarm">{escape(text)}</span></li>'
        if text.startswith(("COLLAPSE", "Warning"))
        else f"<li>{escape(text)}</li>"
        for text in rest
    )
    state = "failed" if any(bad) else "found" if run.finished else "open"
    return (
        f"<h1>Pretraining of {escape(run.model)}</h1>\n<div class='meta'>{meta}</div>\n"
        f'<div class="verdict {state}"><p class="lead">{escape(first)}</p>\n'
        + (f"<ul>{lines}</ul>" if lines else "")
        + "</div>\n"
    )


# -- the sections ------------------------------------------------------------------------------


def _learning(run: PretrainingRun) -> str:
    """Losses, masked R2 beside its baselines, online probes."""
    drawn = []
    if run.values("loss") or run.values("validation_loss"):
        svg = figures.losses(run.rows, name="loss", label=f"Loss of pretraining {run.model}.")
        drawn.append(figure(svg, "The loss, of each logged batch and on validation people."))
    if run.values("masked_r2"):
        svg = over_steps(
            run.rows,
            [
                Line(key="masked_r2", text="the encoder"),
                *(
                    Line(key=key, text=text, colour=colour, dashes=dashes)
                    for (key, text), (colour, dashes) in zip(
                        _GUESSES.items(), ((GREEN, "-."), (ORANGE, "--")), strict=True
                    )
                ),
            ],
            name="masked-r2",
            label="Masked R2 on validation people against the step, with its three baselines.",
            unit="masked R2",
            references=[(0.0, "the mean")],
        )
        text = "How much of what was hidden is rebuilt, on validation people: 1 is all of it."
        drawn.append(figure(svg, text))
    if keys := [key for key in run.keys("probe_") if run.values(key)]:
        svg = over_steps(
            run.rows,
            [
                Line(key=key, text=probed(key), colour=_COLOURS[i % len(_COLOURS)])
                for i, key in enumerate(keys)
            ],
            name="probes",
            label="Scores of ridge predictions on validation people against the step.",
            unit="score, validation people",
        )
        text = (
            "What a ridge regression on training people reads from pooled features: r for numbers, "
            "where 0 is chance; AUC for two groups, where 0.5 is. The first point is the untrained "
            "encoder."
        )
        drawn.append(figure(svg, text))
    return side_by_side(drawn) or missing("No losses yet.")


def _reconstruction(run: PretrainingRun) -> str:
    """The picture of a validation window, with its own R2."""
    text = "".join(missing(note) for note in run.notes)
    if not run.window:
        return text
    arrays = (run.window["signal"], run.window["reconstruction"], run.window["hidden"])
    model, line = interpolated_r2(run.window)
    share = float(np.mean(run.window["hidden"]))
    caption = (
        f"One window of a validation person, {share:.0%} of it hidden. R2 of the hidden values: "
        f"<b>{rounded(model)}</b>; of linear interpolation in time: {rounded(line)}; of their "
        "mean: 0."
    )
    three = "Three parcels of the same window, at the quartiles of the error among all."
    return text + side_by_side(
        [figure(reconstruction(*arrays), caption), figure(traces(*arrays), three)]
    )


def _health(run: PretrainingRun) -> str:
    """What tells learning from collapse, and how large steps would be without clipping."""
    drawn = []
    spreads = [
        Line(key="target_std", text="targets"),
        Line(key="feature_std", text="pooled features", colour=VERMILLION),
    ]
    if any(run.values(line.key) for line in spreads):
        svg = over_steps(
            run.rows,
            spreads,
            name="spread",
            label="Spread of targets and features between recordings against the step.",
            unit="standard deviation",
            from_zero=True,
        )
        text = "How far recordings lie apart. A fall towards 0 is collapse."
        drawn.append(figure(svg, text))
    if run.values("effective_rank"):
        svg = over_steps(
            run.rows,
            [Line(key="effective_rank", text="effective rank")],
            name="rank",
            label="Effective rank of the features against the step.",
            unit="effective rank",
            from_zero=True,
        )
        text = "Dimensions that the features make use of. A fall towards 1 is collapse."
        drawn.append(figure(svg, text))
    if run.values("grad_norm"):
        clip = number(run.config.get("optim") or {}, "clip")
        svg = over_steps(
            run.rows,
            [Line(key="grad_norm", text="gradient norm")],
            name="gradient",
            label="Norm of the gradient before clipping, against the step.",
            unit="gradient norm",
            references=[(clip, f"clipped at {clip:g}")] if clip > 0 else [],
            log=True,
        )
        drawn.append(figure(svg, "Norm of all gradients together, before they are clipped."))
    return side_by_side(drawn)


def _pace(run: PretrainingRun) -> str:
    """Learning rate, weight decay, windows a second, waiting, memory."""
    plots = (
        ("lr", "learning rate", "The learning rate of each step.", {}),
        ("weight_decay", "weight decay", "Of weights; biases, norms and tokens have none.", {}),
        ("windows_per_s", "windows a second", "Of all processes together, since the start.", {}),
        (
            "wait_share",
            "share of the time",
            "How long steps wait for data: above 5%, give the loader more workers.",
            {"shares": True, "references": [(0.05, "5%")]},
        ),
        ("peak_mib", "MiB", "The largest memory so far, of the first process.", {}),
    )
    drawn = []
    for key, unit, text, options in plots:
        values = run.values(key)
        if not values or (key == "weight_decay" and len(set(values)) == 1):
            continue
        label = f"{key.replace('_', ' ')} against the step."
        svg = over_steps(
            run.rows,
            [Line(key=key, text=unit)],
            name=key,
            label=f"{label[0].upper()}{label[1:]}",
            unit=unit,
            from_zero=True,
            **options,
        )
        drawn.append(figure(svg, text))
    return side_by_side(drawn)


def _ends(run: PretrainingRun) -> str:
    """Everything that was logged: first, last, lowest, highest."""
    lines = []
    for key in run.keys(""):
        values = run.values(key)
        if key == "step" or not values:
            continue
        text, meaning = _WORDS.get(key, (key.replace("_", " "), ""))
        name = f"{text}\n{meaning}" if meaning else text
        ends = (values[0], values[-1], min(values), max(values))
        lines.append((name, *(significant(value, 3) for value in ends), f"{len(values):,}"))
    return table(["logged", "first", "last", "lowest", "highest", "rows"], lines)


def _provenance(run: PretrainingRun) -> str:
    blocks = {
        "Configuration": run.config,
        "The newest checkpoint and its data": run.checkpoint,
        "Summary of the run": run.summary,
    }
    return "".join(
        folded(name, table(["key", "value"], list(flat(values)), css="keys"))
        for name, values in blocks.items()
        if values
    )
