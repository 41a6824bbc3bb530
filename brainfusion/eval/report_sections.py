"""The report's sections with figures: training, shared space, retrieval, control, probes.

Each takes the whole results and returns HTML; a part that is missing becomes one line that names
the command which makes it.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.eval import figures
from brainfusion.eval.report_tables import table
from brainfusion.eval.verdict import (
    CONTROL_LIMIT,
    DIRECTIONS,
    attainable,
    base_name,
    by_name,
    control_distance,
    control_failed,
    direction_of,
    is_confounds,
    main_metric,
    number,
    p_text,
    people,
    with_interval,
)
from brainfusion.runtime.logs import read_metrics

Row = Mapping[str, Any]

_METRIC_NAMES = {
    "r2": "R2, against the training mean",
    "auroc": "AUROC",
    "balanced_accuracy": "balanced accuracy",
    "r": "correlation",
    "accuracy": "accuracy",
}


def training_section(results: Row, workspace: Path) -> str:
    """Loss curves of pretraining and alignment."""
    drawn = []
    for model, row in (results.get("pretraining") or {}).items():
        caption = f"Pretraining of <b>{escape(str(model))}</b>" + _training_facts(row)
        rows = _metrics(workspace, row)
        drawn.append(
            _figure(
                figures.losses(
                    rows, name=f"loss-{len(drawn)}", label=f"Loss of pretraining {model}."
                ),
                caption,
            )
            if rows
            else _missing(f"No loss curve of {model}: its metrics are not in the workspace.")
        )
    text = "" if drawn else _missing("No pretraining in this run.", "pretrain")
    alignment = results.get("alignment") or {}
    log_n = alignment.get("log_n")
    rows = [{"log_n": log_n, **row} for row in _metrics(workspace, alignment)]
    if not rows:
        text += _missing("No loss curve of an alignment.", "align")
    else:
        best = alignment.get("best_step")
        label = "Loss of the alignment, with log N, the loss of guessing."
        brain, dna = (escape(str(alignment.get(key))) for key in ("brain", "dna"))
        drawn.append(
            _figure(
                figures.losses(rows, name="loss-align", label=label, best_step=best),
                f"Alignment of <b>{brain}</b> and <b>{dna}</b>. A loss at log N is that of "
                "guessing among N people.",
            )
        )
        if any(math.isfinite(number(row, "validation_auc")) for row in rows):
            drawn.append(
                _figure(
                    figures.validation_auc(rows, best_step=best),
                    "Retrieval among the validation people while the alignment trained. The step "
                    "was chosen on them, never on the test people.",
                )
            )
    if facts := _alignment_facts(alignment):
        drawn.append(f"<div>{table(['the alignment in numbers', ''], facts)}</div>")
    return text + _figures(drawn)


def _training_facts(row: Row) -> str:
    facts = []
    if row.get("n_steps"):
        facts.append(f"{row['n_steps']:,} steps")
    if math.isfinite(number(row, "seconds")):
        facts.append(f"{number(row, 'seconds'):.0f} s")
    first, last = (
        number(row.get(key) or {}, "validation_loss", number(row, f"validation_loss_{key}"))
        for key in ("first", "last")
    )
    if math.isfinite(first + last):
        facts.append(f"validation loss from {first:.3g} to {last:.3g}")
    elif math.isfinite(number(row, "final_loss")):
        facts.append(f"final loss {number(row, 'final_loss'):.3g}")
    return f": {', '.join(facts)}." if facts else "."


def _alignment_facts(row: Row) -> list[tuple[str, str]]:
    words = {
        "n_train": ("people to train on", ",.0f"),
        "n_validation": ("people to choose the step on", ",.0f"),
        "n_test": ("people to test on", ",.0f"),
        "best_step": ("step that was kept", ",.0f"),
        "loss": ("loss, nats", ".3f"),
        "log_n": ("loss of guessing, log N, nats", ".3f"),
        "logit_scale": ("logit scale (inverse temperature)", ".1f"),
    }
    return [
        (text, format(number(row, key), form))
        for key, (text, form) in words.items()
        if math.isfinite(number(row, key))
    ]


def space_section(results: Row, workspace: Path) -> str:
    """The map of the shared space and the similarities of pairs and non-pairs."""
    arrays = _similarity_arrays(results, workspace)
    drawn = []
    if {"brain_2d", "dna_2d"} <= arrays.keys():
        drawn.append(
            _figure(
                figures.shared_space(arrays["brain_2d"], arrays["dna_2d"]),
                "Test people in the plane of the first two principal axes of the shared space. "
                "Short lines mean that a person's brain and DNA lie together. Two axes of many: "
                "pairs that look apart here may be close in the whole space.",
            )
        )
    if {"pairs", "non_pairs"} <= arrays.keys():
        pairs, others = arrays["pairs"], arrays["non_pairs"]
        spread = math.sqrt((float(pairs.var()) + float(others.var())) / 2)
        gap = (float(pairs.mean()) - float(others.mean())) / spread if spread else math.nan
        drawn.append(
            _figure(
                figures.similarity(pairs, others),
                "Similarity of a person's brain to their own DNA and to other people's. The means "
                f"are {gap:.2f} standard deviations apart.",
            )
        )
    return _figures(drawn) if drawn else _missing("No map of the shared space.", "retrieve")


def retrieval_section(results: Row, workspace: Path) -> str:
    """Ranks, recall and AUC, each beside chance and, where it is known, what is attainable."""
    retrieval = _with_recall_ceilings(results)
    rows = {name: retrieval[name] for name in DIRECTIONS if retrieval.get(name)}
    if not rows:
        return _missing("No retrieval was run.", "retrieve")
    arrays = _similarity_arrays(results, workspace)
    ranks = {name: arrays[f"ranks_{name}"] for name in rows if f"ranks_{name}" in arrays}
    drawn = []
    if ranks:
        drawn.append(
            _figure(
                figures.rank_curves(ranks),
                "How much of the gallery must be looked through to find the partner. The area "
                "under a curve is its AUC; bands are pointwise 95% intervals.",
            )
        )
    ks = _recall_ks(rows)
    if ks:
        drawn.append(
            _figure(
                figures.recall_bars(retrieval, ks),
                f"Recall in {escape(people(next(iter(rows.values()))))}. "
                + "Black marks are chance, green marks, if the truth is known, what is attainable. "
                + "Bars are 95% intervals, people taken as independent.",
            )
        )
    groups = _auc_groups(retrieval)
    drawn.append(
        _figure(
            figures.auc_intervals(groups),
            "The aligner beside simpler methods, its control and its own figures within strata. "
            f"The control's bar is {CONTROL_LIMIT:.0f} standard errors to each side. Within a "
            "stratum, people compete only with people of the same site, sex and so on. Green, for "
            "simulated cohorts: what a perfect model attains, and what these recordings allow.",
        )
    )
    if others := _auc_table(retrieval):
        drawn.append(f"<div>{others}</div>")
    return _figures(drawn) + _retrieval_table(rows, ks)


def _recall_ks(rows: Mapping[str, Row]) -> list[int]:
    keys = {key.removeprefix("recall_at_") for row in rows.values() for key in row}
    return sorted(int(key) for key in keys if key.isdigit())


def _auc_groups(retrieval: Row) -> list[tuple[str, dict[str, list[Row]]]]:
    """(heading, name -> rows) of everything that has an AUC."""
    ours = [{**retrieval[d], "direction": d} for d in DIRECTIONS if retrieval.get(d)]
    control = retrieval.get("shuffled_control")
    shuffled = {"pairs shuffled": _control_rows(control)} if control else {}
    groups = [
        ("aligner", {"this run": ours}),
        ("baselines", by_name(retrieval.get("baselines") or [])),
        ("control", shuffled),
        ("within strata", by_name(retrieval.get("strata") or [])),
    ]
    return [(heading, rows) for heading, rows in groups if rows]


def _control_rows(control: Row) -> list[Row]:
    """The control in each direction, if it says so, judged by its standard error."""
    spread = {"ci_low": None, "standard_error": control.get("standard_error")}
    both: list[Row] = [
        {**control[name], **spread, "direction": name} for name in DIRECTIONS if control.get(name)
    ]
    return both or [{**control, **spread}]


def _with_recall_ceilings(results: Row) -> dict[str, Any]:
    """The retrieval part, with the oracle's recall where its gallery is of the same size."""
    retrieval = dict(results.get("retrieval") or {})
    oracle = (results.get("truth") or {}).get("oracle_g_z") or {}
    for name in DIRECTIONS:
        row = retrieval.get(name)
        if row and oracle.get("n_gallery") == row.get("n_gallery"):
            known = {f"{k}_attainable": v for k, v in oracle.items() if k.startswith("recall_at_")}
            if "median_rank" in oracle:
                known["median_rank_attainable"] = oracle["median_rank"]
            retrieval[name] = {**known, **row}
    return retrieval


def _retrieval_table(rows: Mapping[str, Row], ks: Sequence[int]) -> str:
    metrics = [("AUC", "auc", 2, False), ("permutation p", "p_value", 4, False)]
    metrics += [(f"recall at {k}", f"recall_at_{k}", 1, True) for k in ks]
    metrics += [("median rank", "median_rank", 1, False), ("mean reciprocal rank", "mrr", 3, False)]
    body = []
    for text, key, digits, is_share in metrics:
        if not any(math.isfinite(number(row, key)) for row in rows.values()):
            continue
        cells = [text]
        cells += [_metric_cell(row, key, digits, is_share=is_share) for row in rows.values()]
        first = next(iter(rows.values()))
        chance = number(first, "chance" if key == "auc" else f"{key}_chance")
        cells += [
            _share(chance, digits, is_share=is_share),
            _share(attainable(first, key), digits, is_share=is_share),
        ]
        body.append(cells)
    names = [figures.DIRECTION_NAMES[name] for name in rows]
    return table(["", *names, "chance", "ceiling"], body)


def _metric_cell(row: Row, key: str, digits: int, *, is_share: bool) -> str:
    if key == "auc":
        return with_interval(row)
    text = _share(number(row, key), digits, is_share=is_share)
    low, high = number(row, f"{key}_ci_low"), number(row, f"{key}_ci_high")
    if is_share:
        low, high = figures.recall_interval(row, int(key.rsplit("_", 1)[1]))
    if key == "p_value":
        return _p(number(row, key))
    if math.isnan(low + high):
        return text
    scale = 100 if is_share else 1
    return f"{text} [{low * scale:.{digits}f}, {high * scale:.{digits}f}]"


def _p(p: float) -> str:
    return p_text(p).removeprefix("p = ").removeprefix("p ") if math.isfinite(p) else ""


def _share(value: float, digits: int, *, is_share: bool) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.{digits}%}" if is_share else f"{value:,.{digits}f}"


def _auc_table(retrieval: Row) -> str:
    """Everything beside the aligner: one line a name, the two directions side by side."""
    body = []
    for heading, named in _auc_groups(retrieval)[1:]:
        for name, rows in named.items():
            cells = dict.fromkeys([None, *DIRECTIONS], "")
            for row in rows:
                error, text = number(row, "standard_error"), with_interval(row)
                if heading == "control" and math.isfinite(error):
                    text = f"{row['auc']:.2f}, s.e. {error:.2f}"
                cells[direction_of(row)] = text
            p = max(number(row, "p_value") for row in rows)
            n = number(rows[0], "n_queries", number(rows[0], "n_gallery"))
            body.append([name, *cells.values(), _p(p), f"{n:,.0f}" if math.isfinite(n) else ""])
    directions = [f"AUC, {figures.DIRECTION_NAMES[name]}" for name in DIRECTIONS]
    return table(["beside the aligner", "AUC", *directions, "p", "people"], body)


def control_section(results: Row) -> str:
    """The shuffled pairs, and what was regressed out."""
    control = (results.get("retrieval") or {}).get("shuffled_control")
    if not control:
        text = _missing("No shuffled-pairs control was run.", "retrieve")
    else:
        distance, error = control_distance(control), number(control, "standard_error")
        failed = control_failed(results["retrieval"])
        text = (
            "<p>The same again with the pairs shuffled: every brain goes with somebody else's DNA. "
            "Whatever is found then is no alignment, so it has to be at chance.</p>"
            f"<p><b class='{'bad' if failed else ''}'>AUC {control['auc']:.3f}</b>"
        )
        if math.isfinite(error):
            text += (
                f", standard error {error:.3f}: {distance:.1f} standard errors from 0.5, "
                f"{'outside' if failed else 'within'} the limit of {CONTROL_LIMIT:.0f}."
            )
        text += "</p>"
    alignment = results.get("alignment") or {}
    controls = alignment.get("controls") or {}
    covariates = controls.get("residualised", alignment.get("residualised_on"))
    if covariates is not None:
        names = [name for name in covariates if isinstance(name, str)]
        text += (
            "<p class='note'>Regressed out of the features before the alignment: "
            + escape(", ".join(names) if names else "nothing, so the strata above matter")
            + ".</p>"
        )
    return text


def probes_section(results: Row) -> str:
    """Forest plots by metric, and all rows folded away."""
    rows = [row for row in results.get("probes") or [] if math.isfinite(number(row, "value"))]
    if not rows:
        return _missing("No probes were run.", "probe")
    order = sorted(
        dict.fromkeys(base_name(str(row["features"])) for row in rows),
        key=lambda name: not is_confounds(name),
    )
    targets = dict.fromkeys(str(row["target"]) for row in rows)
    main: dict[str, list[Row]] = {}
    for target in targets:
        mine = [row for row in rows if str(row["target"]) == target]
        metric = main_metric(mine)
        main.setdefault(metric, []).extend(r for r in mine if r.get("metric", "") == metric)
    drawn = []
    for metric, group in main.items():
        name = _METRIC_NAMES.get(metric, metric.replace("_", " "))
        drawn.append(
            _figure(
                figures.probe_forest(group, metric=metric, title=name, order=order),
                f"Linear probes judged by {escape(name)}. Confounds alone (grey) are what a filled "
                "mark has to beat; hollow marks, confounds taken out, have to beat chance.",
            )
        )
    return _figures(drawn) + (
        f"<details><summary>All {len(rows)} rows</summary>{_probe_table(rows)}</details>"
    )


def _probe_table(rows: Sequence[Row]) -> str:
    body, last = [], None
    for row in rows:
        n, target = number(row, "n"), str(row["target"])
        body.append(
            [
                "" if target == last else target,
                str(row["features"]),
                str(row.get("metric", "")).replace("_", " "),
                with_interval(row, "value"),
                _share(number(row, "chance"), 2, is_share=False),
                _p(number(row, "p_value")),
                f"{n:,.0f}" if math.isfinite(n) else "",
            ]
        )
        last = target
    heading = ["target", "predicted from", "metric", "value", "chance", "p", "people"]
    return table(heading, body, text_columns=(1, 2))


# -- parts -------------------------------------------------------------------------------------


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>\n"


def _figures(drawn: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(drawn)}</div>\n' if drawn else ""


def _missing(what: str, command: str | None = None) -> str:
    hint = f" <code>brainfusion {command}</code> makes it." if command else ""
    return f'<p class="missing">{escape(what)}{hint}</p>\n'


def _metrics(workspace: Path, row: Row) -> list[dict[str, Any]]:
    """The rows of the metrics file that a part of the results names; none when it is not there."""
    path = workspace / str(row.get("metrics") or "metrics.jsonl")
    if not row.get("metrics") or not path.is_file():
        return []
    return [line for line in read_metrics(path) if "step" in line]


def _similarity_arrays(results: Row, workspace: Path) -> dict[str, np.ndarray]:
    name = (results.get("figures") or {}).get("similarity")
    path = workspace / str(name)
    if not name or not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as stored:
        arrays = {key: np.asarray(stored[key], dtype=np.float64) for key in stored.files}
    return {key: array for key, array in arrays.items() if array.size}
