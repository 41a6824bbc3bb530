"""Which genes a phenotype's prediction rests on: R2 of a ridge probe with one gene left out.

The probe is of the DNA vectors as they are stored, so nothing of the alignment is in it and all
people of the run take part, by nested cross-validation over whole families.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from brainfusion.cli.attribution.attributed import Attributed
from brainfusion.cli.attribution.hidden import progress
from brainfusion.cli.pairs import families_of
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import say
from brainfusion.runtime.threads import one_thread

if TYPE_CHECKING:
    from brainfusion.eval.probing.targets import Target


def known_targets(asked: Attributed, names: Sequence[str]) -> "list[Target]":
    """The columns to predict, of the run's people.

    Raises:
        UserError: No such column, or one of more than two labels.
    """
    from brainfusion.eval.probing.targets import parse_target

    found = [parse_target(asked.people.people, name) for name in dict.fromkeys(names)]
    for target in found:
        if target.kind == "multi-class":
            raise UserError(
                f"target '{target.name}' has {len(target.classes)} labels: expected numbers or two "
                "values, of which R2 is known."
            )
    return found


def target_tables(
    asked: Attributed,
    targets: "Sequence[Target]",
    *,
    confounds: Sequence[str],
    n_folds: int,
    n_bootstrap: int,
    seed: int,
) -> dict[str, tuple[dict[str, Any], pl.DataFrame]]:
    """Of each target what attribution.json says of it, and a row a gene.

    Args:
        asked: The run, whose people and genes these are.
        targets: Of `known_targets`; two values are 0 and 1 to the probe.
        confounds: Columns to take out in the fold; the target itself is not among them.
        n_folds: Outer folds.
        n_bootstrap: Bootstrap samples of families.
        seed: Of folds and bootstrap.

    Raises:
        UserError: A confound that is no column, fewer families than folds, or fewer than two genes
            that vary.
    """
    from brainfusion.eval.attribution import target_contributions
    from brainfusion.eval.probing.leave_out import blocks_out
    from brainfusion.eval.probing.probes import PENALTIES
    from brainfusion.eval.probing.targets import known_confounds

    if not targets:
        return {}
    people = asked.people.people
    known = known_confounds(people, confounds)
    units, blocks = _blocks(asked)
    found = {}
    for target in targets:
        own, columns = (
            people.filter(pl.Series(target.known)),
            [c for c in known if c != target.name],
        )
        families = families_of(own)
        folds, fixed = _design(own, families, columns, target.classes, target.values, n_folds, seed)
        with one_thread():
            out = blocks_out(
                [block[target.known] for block in blocks],
                target.values,
                folds,
                fixed=fixed,
                penalties=PENALTIES,
            )
        r2, table = target_contributions(
            units, target.values, out, families=families, n_bootstrap=n_bootstrap, seed=seed
        )
        facts = {
            "r2": r2,
            "kind": target.kind,
            "n_people": len(target.values),
            "n_missing": int((~target.known).sum()),
            "n_folds": n_folds,
            "confounds": columns,
            "penalty": float(np.median(PENALTIES[out.chosen[:, 0]])),
        }
        say(f"{target.name}: R2 {r2:.3f} from {len(units)} genes of {len(target.values)} people.")
        found[target.name] = facts, table
    return found


def _blocks(asked: Attributed) -> tuple[list[str], list[np.ndarray]]:
    """The genes that vary, each with everybody's columns [n, r]; 0 for who lacks it."""
    from brainfusion.eval.probing.leave_out import principal_columns

    units, blocks, n_flat = [], [], 0
    total = sum(len(vectors.genes) for vectors in asked.people.dna.values())
    step = progress("reading genes", total)
    for name, vectors in asked.people.dna.items():
        present = asked.people.present[name]
        for (gene, values), has in zip(vectors.columns(), vectors.mask.T, strict=True):
            columns = principal_columns(values, has & present)
            if columns.shape[1]:
                units.append(asked.unit(gene))
                blocks.append(columns)
            n_flat += not columns.shape[1]
            step()
    if n_flat:
        say(f"{n_flat} of {total} genes do not vary between people, and are not asked about.")
    if len(blocks) < 2:
        raise UserError("only one gene varies: leaving it out would leave nothing to compare.")
    return units, blocks


def _design(
    people: pl.DataFrame,
    families: Sequence[str],
    confounds: Sequence[str],
    classes: Sequence[str],
    values: np.ndarray,
    n_folds: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Folds [n] of whole families, even in classes and sites; unpenalised columns [n, q]."""
    from brainfusion.eval.design import covariate_matrix, group_folds
    from brainfusion.eval.statistics import family_codes

    even = [(values == 1).astype(np.float64)] if classes else []
    if "site" in people.columns:
        site = people["site"].cast(pl.String).fill_null("").to_numpy()
        even += [(site == level).astype(np.float64) for level in np.unique(site)]
    folds = group_folds(
        family_codes(families, len(values)),
        n_folds,
        balance=np.stack(even, axis=1) if even else np.empty((len(values), 0)),
        seed=seed,
    )
    ones = np.ones((len(values), 1))
    return folds, np.concatenate([ones, covariate_matrix(people, confounds)], axis=1)
