"""`brainfusion power`: what a study of n people can find, before it is done.

From an assumed link between brains and DNA (canonical correlations, or the AUC that the best score
attains) to the retrieval that is attainable, the power of its permutation test, the people needed
for it, and what is left of the link after training on finitely many people.
"""

import json
from dataclasses import dataclass
from typing import Any

from brainfusion.cli.options import at_least, parse
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.threads import one_thread


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerOptions:
    """Options of `brainfusion power`."""

    n: tuple[int, ...] = (100, 200, 500, 1000, 2000, 5000)
    """Unrelated test people, who are the gallery as well: one number or several."""
    rho: tuple[float, ...] = ()
    """Canonical correlations that brains and DNA are assumed to have: one or several."""
    components: int = 1
    """How often the one correlation given occurs, in independent components."""
    auc: float | None = None
    """Instead of --rho: the AUC that the best score attains, in --components equal components."""
    alpha: float = 0.05
    """Level of the one-sided permutation test."""
    power: float = 0.8
    """Power that the number of people is asked for."""
    n_train: int | None = None
    """People to train on: what they leave of the link is simulated; needs --features."""
    features: tuple[int, int] | None = None
    """Brain and DNA features that training sees, for example principal components."""
    json: bool = False
    """Print JSON instead of a table."""
    seed: int = 0
    """Seeds the simulations."""

    def __post_init__(self) -> None:
        at_least(self, 1, "components")
        for value, name in ((self.alpha, "--alpha"), (self.power, "--power")):
            if not 0 < value < 1:
                raise UserError(f"{name} {value:g}: expected a number between 0 and 1.")
        if not self.n or min(self.n) < 10:
            raise UserError("--n: expected 10 people or more; below, no test has any power.")
        if (self.n_train is None) != (self.features is None):
            raise UserError(
                "--n-train and --features belong together: give both, for example --n-train 2000 "
                "--features 64 64."
            )
        if self.n_train is not None and self.n_train < 3:
            raise UserError(f"--n-train {self.n_train}: expected 3 people or more.")
        if self.features is not None and min(self.features) < 1:
            raise UserError("--features: expected two numbers of 1 or more.")


def main(argv: list[str]) -> int:
    """Print what is attainable, with which power, and how many people it needs."""
    options = parse(PowerOptions, argv, prog="brainfusion power", description=__doc__ or "")
    from brainfusion.eval.power import plan

    with one_thread():
        rho = _correlations(options)
        trained = {} if options.n_train is None else {"training": _training(options, rho)}
        found = plan(rho, options.n, alpha=options.alpha, power=options.power, seed=options.seed)
        found |= trained
    print(json.dumps(found, indent=2) if options.json else table(found))
    return 0


def _correlations(options: PowerOptions) -> tuple[float, ...]:
    """The canonical correlations that the options assume."""
    from brainfusion.eval.power import correlation_for

    if bool(options.rho) == (options.auc is not None):
        raise UserError(
            "what link is assumed? Give --rho (canonical correlations) or --auc (what the best "
            "score attains), one of the two."
        )
    if options.auc is not None:
        return (correlation_for(options.auc, options.components),) * options.components
    if not all(0 <= value < 1 for value in options.rho):
        raise UserError("--rho: expected correlations of 0 or more and below 1.")
    if options.components > 1 and len(options.rho) > 1:
        raise UserError("--components repeats one correlation: give one --rho, or none of it.")
    return options.rho * options.components


def _training(options: PowerOptions, rho: tuple[float, ...]) -> dict[str, Any]:
    """What the fitted components can still attain, for each number of test people."""
    from brainfusion.eval.power import after_training, plan

    assert options.n_train is not None
    assert options.features is not None
    left = after_training(rho, options.n_train, options.features, seed=options.seed).tolist()
    found = plan(left, options.n, alpha=options.alpha, power=options.power, seed=options.seed)
    return {
        "n_train": options.n_train,
        "features": list(options.features),
        "method": "canonical correlation analysis without penalty, Gaussian features, simulated",
        **found,
    }


def table(found: dict[str, Any]) -> str:
    """The plan in lines for a terminal."""
    rho = found["correlations"]
    level, target = f"{found['alpha']:g}", f"{found['target_power']:.0%}"
    lines = [
        f"assumed: canonical correlations {_listed(rho)}; mutual information "
        f"{found['mutual_information']:.3f} nats",
        f"attainable AUC {found['auc']:.3f} in a gallery of any size (chance 0.500)",
        _needed(found),
        "",
        *_rows(found["rows"]),
        "",
        f"power: share of studies whose permutation p (one-sided) is below {level}; detectable: "
        f"smallest AUC found with power {target}.",
        "People are taken as unrelated: with families, give the number of families.",
    ]
    training = found.get("training")
    if training is None:
        return "\n".join(
            [
                *lines,
                "All of it is for one who knows the link. Training on finite people loses a part, "
                "without a closed form:",
                "--n-train 2000 --features 64 64 simulates one case.",
            ]
        )
    first, second = training["features"]
    return "\n".join(
        [
            *lines,
            "",
            f"after training on {training['n_train']:,} people with {first} and {second} features: "
            f"correlations {_listed(training['correlations'])}",
            f"attainable AUC {training['auc']:.3f}",
            _needed(training),
            "",
            *_rows(training["rows"]),
            "",
            "simulated for canonical correlation analysis without penalty of Gaussian features; "
            "there is no closed form, and a penalty",
            "or features whose leading directions carry the link can do better.",
        ]
    )


def _needed(found: dict[str, Any]) -> str:
    people, target = found["n_needed"], f"{found['target_power']:.0%}"
    if people is None or people > 10**8:
        return "no number of test people finds it"
    fewest = " (or fewer)" if people == 10 else ""
    return f"test people needed for power {target}: {people:,}{fewest}"


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"{'n':>8} {'power':>7} {'detectable':>11} {'R@1 (chance)':>18} {'R@10 (chance)':>18} "
        f"{'median rank (chance)':>22}"
    ]
    for row in rows:
        hits = [f"{row[k]:.4f} ({row[f'{k}_chance']:.4f})" for k in ("recall_at_1", "recall_at_10")]
        rank = f"{row['median_rank']:,.1f} ({row['median_rank_chance']:,.1f})"
        lines.append(
            f"{row['n']:>8,} {row['power']:>7.1%} {row['smallest_detectable_auc']:>11.3f} "
            f"{hits[0]:>18} {hits[1]:>18} {rank:>22}"
        )
    return lines


def _listed(rho: list[float]) -> str:
    if len(rho) > 1 and len(set(rho)) == 1:
        return f"{len(rho)} x {rho[0]:.3f}"
    shown = ", ".join(f"{value:.3f}" for value in rho[:8])
    return shown + (f", ... ({len(rho)} in all)" if len(rho) > 8 else "")
