"""A model card (Mitchell et al. 2019) of an alignment, written from its checkpoint and its results.

Nothing in it is typed by hand: what was not measured is said to be not measured.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from brainfusion.eval.report.rows import (
    DIRECTION_NAMES,
    DIRECTIONS,
    control_failed,
    number,
    rounded,
    with_interval,
)
from brainfusion.eval.report.verdict import verdict
from brainfusion.runtime.files import write_text

Row = Mapping[str, Any]


def write_model_card(path: Path, results: Row) -> Path:
    """Write the card as Markdown.

    Args:
        path: The file to write.
        results: `results.json` of the run.
    """
    write_text(path, model_card(results))
    return path


def model_card(results: Row) -> str:
    """The card as Markdown; no ids of people."""
    alignment, cohort = results.get("alignment") or {}, results.get("cohort") or {}
    brain, dna = alignment.get("brain", "brain"), alignment.get("dna", "DNA")
    parts = [
        f"# Brain-DNA alignment: {brain} with {dna}",
        "\n".join(verdict(results)),
        "## What it is",
        _paragraph(_model(alignment, results.get("config") or {})),
        "## Trained on",
        _paragraph(_data(cohort, alignment)),
        "## How well it does",
        _table(results.get("retrieval") or {}),
        "## What it is for, and what it is not for",
        "Research on groups of people: whether, where and how strongly two modalities of a cohort "
        "go together. Not for finding or identifying a person, not for diagnosis or any decision "
        "about a person, and not for people unlike those it was trained on: what it found may be "
        "their ancestry, their scanner or their recruitment. The cohort's terms of use hold for "
        "embeddings as they do for the data.",
        "## What was checked",
        "\n".join(f"- {line}" for line in _checks(results.get("retrieval") or {})),
        "## Where it came from",
        "\n".join(f"- {line}" for line in _provenance(results, alignment)),
    ]
    return "\n\n".join(parts) + "\n"


def _paragraph(sentences: Iterator[str]) -> str:
    return " ".join(sentences)


def _model(alignment: Row, config: Row) -> Iterator[str]:
    method = str(alignment.get("method", "infonce"))
    settings = config.get("align") or {}
    width = settings.get("dim_out")
    if method == "infonce":
        space = f"a shared space of {width} dimensions" if width else "a shared space"
        yield (
            f"One projector a modality (linear, GELU, dropout, linear, layer norm) into {space}, "
            f"trained with the loss {alignment.get('loss_name', 'info_nce')}."
        )
    else:
        yield f"Linear maps of both modalities into a shared space, by {method}."
    if (step := alignment.get("best_step")) is not None:
        yield f"Kept at step {step} of {alignment.get('n_steps', step)}, by the validation people."
    if covariates := alignment.get("residualised_on"):
        yield f"Both modalities were residualised on {', '.join(covariates)}."
    else:
        yield "No covariate was taken out of either modality."


def _data(cohort: Row, alignment: Row) -> Iterator[str]:
    simulated = " (simulated: no real person is in it)" * (cohort.get("origin") == "simulated")
    yield f"Cohort {cohort.get('name', 'unnamed')}{simulated}"
    counts = [f"{alignment.get(f'n_{part}', '?')} {part}" for part in ("train", "validation")]
    yield f"with {', '.join(counts)} and {alignment.get('n_test', '?')} test people, split by"
    yield "whole families."
    if age := cohort.get("age"):
        yield f"Age {age['mean']:.1f} (standard deviation {age['sd']:.1f}) years."
    for key in ("sex", "sites"):
        if counts := cohort.get(key):
            yield f"{key.capitalize()}: {', '.join(f'{k} {n}' for k, n in counts.items())}."


def _table(retrieval: Row) -> str:
    rows = [(DIRECTION_NAMES[name], retrieval[name]) for name in DIRECTIONS if retrieval.get(name)]
    rows += [(str(row["name"]), row) for row in retrieval.get("baselines") or []]
    if control := retrieval.get("shuffled_control"):
        rows.append(("shuffled pairs (control)", control))
    if not rows:
        return "Not measured."
    lines = ["| | AUC (chance 0.5) | R@10 (chance) | gallery |", "|---|---|---|---|"]
    for name, row in rows:
        recall, chance = number(row, "recall_at_10"), number(row, "recall_at_10_chance")
        at_10 = f"{rounded(recall, 3)} ({rounded(chance, 3)})" if recall == recall else ""
        lines.append(f"| {name} | {with_interval(row)} | {at_10} | {row.get('n_gallery', '')} |")
    return "\n".join(lines)


def _checks(retrieval: Row) -> Iterator[str]:
    if control := retrieval.get("shuffled_control"):
        failed = control_failed(retrieval)
        judged = "NOT at chance: do not trust it" if failed else "at chance, as it must be"
        yield f"Trained again on shuffled pairs: AUC {control['auc']:.3f}, {judged}."
    else:
        yield "A control on shuffled pairs: not done."
    strata = [row for row in retrieval.get("strata") or [] if row.get("auc") is not None]
    for row in strata:
        yield f"Among people of the {row['name']}: AUC {with_interval(row)}."
    if not strata:
        yield "Retrieval within sites or ancestry groups: not measured."


def _provenance(results: Row, alignment: Row) -> Iterator[str]:
    yield f"brainfusion {results.get('package_version', '?')}, {results.get('created', '')}"
    for key, value in (alignment.get("meta") or {}).items():
        if key.endswith("hash"):
            yield f"{key}: {value}"
    splits = ((results.get("cohort") or {}).get("splits") or {}).get("hash")
    if splits:
        yield f"split: {splits}"
