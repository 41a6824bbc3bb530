"""`brainfusion retrieve`: score cross-modal retrieval, or ask for the nearest people.

Scores the test people of an alignment in both directions, beside baselines, strata and the control.

With a query it answers instead: whose brains are nearest to this DNA, or whose DNA, or which genes,
to this brain? A person of the cohort asks by --query ID, a new one by --recording FILE or
--dna-vector FILE, which become vectors in the same way as those that the alignment was trained on.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import tyro

from brainfusion.cli.options import at_least, parse
from brainfusion.cli.query.answer import answer
from brainfusion.cli.query.options import QueryOptions
from brainfusion.cli.runs import WhichRun, check_cohort, find_run
from brainfusion.cli.scoring import DIRECTIONS, score
from brainfusion.cli.workspace import Place, Workspace
from brainfusion.runtime.files import write_json
from brainfusion.runtime.logs import say
from brainfusion.runtime.threads import one_thread


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrieveOptions:
    """Options of `brainfusion retrieve`."""

    alignment: tyro.conf.OmitArgPrefixes[WhichRun] = field(default_factory=WhichRun)
    place: tyro.conf.OmitArgPrefixes[Place] = field(default_factory=Place)
    asking: tyro.conf.OmitArgPrefixes[QueryOptions] = field(default_factory=QueryOptions)
    json: bool = False
    """Print JSON instead of a table."""
    permutations: int = 999
    """Permutations of whole families for each p-value."""
    bootstrap: int = 1000
    """Bootstrap samples of families for each interval."""
    seed: int = 0
    """Seeds permutations and bootstrap."""

    def __post_init__(self) -> None:
        at_least(self, 1, "permutations")
        at_least(self, 2, "bootstrap")


def main(argv: list[str]) -> int:
    """Score the test people's retrieval, or answer a query."""
    options = parse(RetrieveOptions, argv, prog="brainfusion retrieve", description=__doc__ or "")
    options.asking.check()
    workspace = Workspace.of(options.place)
    run = find_run(workspace, options.alignment)
    if options.asking.is_asked:
        answer(workspace, run, options.asking, as_json=options.json)
        return 0
    cohort = workspace.open_cohort()
    check_cohort(run, cohort)
    with one_thread():
        scores = score(
            workspace,
            cohort,
            run,
            n_permutations=options.permutations,
            n_bootstrap=options.bootstrap,
            seed=options.seed,
        )
    write_json(run.path / "retrieval.json", scores)
    print(json.dumps(scores, indent=2) if options.json else _table(scores))
    say(f"written: {run.path / 'retrieval.json'}")
    return 0


def _table(scores: dict[str, Any]) -> str:
    rows = [("brain to DNA", scores["brain_to_dna"]), ("DNA to brain", scores["dna_to_brain"])]
    if "cosine" in scores:
        cosine = scores["cosine"]
        rows += [(f"{_words(name)}, by cosine", cosine[name]) for name in DIRECTIONS.values()]
    rows += [(row["name"], row) for row in scores["baselines"]]
    rows += [
        (f"{row['name']}, {_words(DIRECTIONS[row['direction']])}", row)
        for row in scores["strata"]
        if row["auc"] is not None
    ]
    if "shuffled_control" in scores:
        rows.append(("shuffled pairs (control), mean of both", scores["shuffled_control"]))
    lines = [f"{'':<42} {'AUC':>6} {'95% interval':>16} {'p':>7} {'chance':>7} {'gallery':>8}"]
    for name, row in rows:
        interval = f"[{row['ci_low']:.3f}, {row['ci_high']:.3f}]" if "ci_low" in row else ""
        lines.append(
            f"{name:<42} {row['auc']:>6.3f} {interval:>16} "
            f"{row.get('p_value', float('nan')):>7.3f} {0.5:>7.3f} {row['n_gallery']:>8}"
        )
    row = scores["brain_to_dna"]
    lines.append(
        f"R@1 {row['recall_at_1']:.3f} (chance {row['recall_at_1_chance']:.3f}), "
        f"R@10 {row['recall_at_10']:.3f} (chance {row['recall_at_10_chance']:.3f}), "
        f"median rank {row['median_rank']:.1f} (chance {row['median_rank_chance']:.1f}); brain "
        f"to DNA, score: {row['score']}, unit: {row['unit']}"
    )
    if row["attainable"] is not None:
        lines.append(f"attainable AUC: {row['attainable']:.3f} (oracle of the simulation)")
    if "attainable_linear" in scores:
        lines.append(_linear(scores))
    return "\n".join(lines)


def _linear(scores: dict[str, Any]) -> str:
    """How far the run has come of what a linear model attains."""
    from brainfusion.eval.attainable import share_of_attainable

    row, n_pairs = scores["attainable_linear"], scores["attainable_linear"]["n_pairs"]
    interval = f"[{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
    text = f"best linear-Gaussian model of {n_pairs} such people: AUC {row['auc']:.3f} {interval}"
    if row["auc"] <= 0.5:
        return f"{text}: it finds nothing (p = {row['p_value']:.2f})"
    aucs = [scores[name]["auc"] for name in DIRECTIONS.values()]
    share = share_of_attainable(sum(aucs) / len(aucs), row["auc"])
    return (
        f"{text}, R@1 {row['recall_at_1']:.3f}, R@10 {row['recall_at_10']:.3f}; this run has come "
        f"{share:.2f} of its way from chance"
    )


def _words(direction: str) -> str:
    return direction.replace("_", " ").replace("dna", "DNA")
