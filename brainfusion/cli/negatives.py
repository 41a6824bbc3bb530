"""Who is a negative of whom: relatives and people with the same DNA vector may be left out.

Of two siblings each other's DNA is half right; of people whose DNA vectors are identical no score
can tell the one from the other. As negatives they would teach the model to tell them apart.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl

from brainfusion.alignment.genes.vectors import GeneVectors
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import say

if TYPE_CHECKING:
    from brainfusion.alignment.losses.pair_ids import PairIds

Negatives = Literal["auto", "all", "unrelated", "within-site"]


def chosen_rule(rule: Negatives, people: pl.DataFrame, *, loss: str) -> Negatives:
    """The rule that `auto` stands for: unrelated where there are families; said out loud.

    Raises:
        UserError: The rule needs a column that there is not.
    """
    if rule == "within-site" and "site" not in people.columns:
        raise UserError(
            "--negatives within-site: subjects.parquet has no column 'site': add it, or use "
            "--negatives all or unrelated."
        )
    if rule == "unrelated" and "family" not in people.columns:
        say("warning: subjects.parquet has no column 'family': only identical DNA is left out.")
    if rule != "auto":
        return rule
    if "family" not in people.columns:
        say("negatives: everybody else (no column 'family' says who is related).")
        return "all"
    if loss != "info_nce":
        say(f"negatives: everybody else, relatives too: --loss {loss} cannot leave them out.")
        return "all"
    return "unrelated"


def pair_ids(
    rule: Negatives,
    people: pl.DataFrame,
    dna: Mapping[str, GeneVectors],
    present: Mapping[str, np.ndarray],
    *,
    order: np.ndarray | None = None,
) -> "PairIds | None":
    """The ids of people's pairs under a rule, said with counts; none where all are negatives.

    Args:
        rule: "all"; "unrelated": neither family nor people whose DNA vectors are identical in some
            modality; "within-site": of these only people of the same site.
        people: Rows of subjects.parquet, one a pair.
        dna: DNA modalities, row by row as `people`.
        present: bool [n] a modality, row by row.
        order: Of a control on shuffled pairs: whose DNA each row got. Two pairs are then related
            if their brains' or their DNA's people are.
    """
    import torch

    from brainfusion.alignment.losses.pair_ids import PairIds

    if rule == "all":
        return None
    families = _shared(people["family"]) if "family" in people.columns else None
    columns = [] if families is None else [families]
    if order is not None and families is not None:
        columns.append(families[order])
    twins = {name: identical_rows(vectors, present[name]) for name, vectors in dna.items()}
    columns += [column for column in twins.values() if (column >= 0).any()]
    columns = [column for column in columns if (column >= 0).any()]
    within = _codes(people["site"].fill_null("unknown")) if rule == "within-site" else None
    n_related = 0 if families is None else int((families >= 0).sum())
    alike = ", ".join(
        f"{int((column >= 0).sum())} share their whole {name} vector with somebody"
        for name, column in twins.items()
    )
    if order is None:
        where = "" if within is None else f"people of the same of {within.max() + 1} sites, "
        say(
            f"negatives: {where}unrelated people only; of {len(people)} people {n_related} have a "
            f"relative among them, {alike}."
        )
    if not columns and within is None:
        return None
    return PairIds(
        excluded=torch.from_numpy(np.stack(columns, axis=1)) if columns else None,
        within=None if within is None else torch.from_numpy(within),
    )


def identical_rows(vectors: GeneVectors, has: np.ndarray) -> np.ndarray:
    """Groups of people whose vectors are the same in every gene.

    Returns:
        int64 [n]: the group's number; -1 for who is alone, or is not in `has`.
    """
    random = np.random.default_rng(0)
    sums = np.zeros(len(vectors), dtype=np.uint64)
    for (_, values), known in zip(vectors.columns(), vectors.mask.T, strict=True):
        # A sum of bits times odd random numbers, modulo 2^64: equal for equal rows, and by chance
        # for one pair of others in 10^19. Adding 0 makes one of the two zeros.
        bits = (np.ascontiguousarray(values, np.float32) + 0.0).view(np.uint32).astype(np.uint64)
        factors = random.integers(0, 2**63, bits.shape[1] + 1, dtype=np.uint64) * np.uint64(2)
        factors += np.uint64(1)
        sums += np.where(known, bits @ factors[1:] + factors[0], np.uint64(0))
    _, first, counts = np.unique(sums[has], return_inverse=True, return_counts=True)
    groups = np.full(len(has), -1, dtype=np.int64)
    groups[has] = np.where(counts[first] > 1, first, -1)
    return groups


def _codes(values: pl.Series) -> np.ndarray:
    """Numbers of the values, int64 from 0 in the order of their text."""
    return np.unique(values.cast(pl.String).to_numpy(), return_inverse=True)[1].astype(np.int64)


def _shared(values: pl.Series) -> np.ndarray:
    """Numbers of the values that more than one row has; -1 for the others and where missing."""
    filled = values.cast(pl.String).fill_null("")
    codes = _codes(filled)
    alone = np.bincount(codes)[codes] < 2
    return np.where(alone | (filled == "").to_numpy(), -1, codes)


def facts(rule: Negatives, ids: "PairIds | None") -> dict[str, Any]:
    """What the summary keeps: the rule, and how many people it concerns."""
    excluded = None if ids is None else ids.excluded
    n_people = 0 if excluded is None else int((excluded >= 0).any(dim=1).sum())
    return {"negatives": rule, "n_people_with_exclusions": n_people}
