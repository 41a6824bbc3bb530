"""Strata that show what an alignment rests on: people compete with those who are like them.

If all people of a site look alike in brain and DNA, retrieval among everyone finds partners and
retrieval among people of one site does not. The same for ancestry, for sex and age, and for
relatives, whose brains and genomes both resemble each other.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from brainfusion.eval.statistics import Labels, family_codes

AGE_BAND_YEARS = 5
"""Width of an age band."""
_COLUMNS = {"same site": "site", "same ancestry group": "group"}


def standard_strata(
    people: pl.DataFrame, families: Labels | None = None, *, seed: int = 0
) -> dict[str, Labels]:
    """What `retrieval.stratified_auc` takes, for the columns that a cohort has.

    Args:
        people: One row a person; of `site`, `group`, `sex` and `age` (years) those there are.
        families: Family of each person; the column `family` of `people` if omitted.
        seed: Which relative stands for a family.

    Returns:
        "same site", "same ancestry group", "same sex and age band", "unrelated only" -> a label a
        person. People of unknown label are left out of that stratum.
    """
    strata: dict[str, Labels] = {
        name: people[column].to_list()
        for name, column in _COLUMNS.items()
        if column in people.columns
    }
    if {"sex", "age"} <= set(people.columns):
        strata["same sex and age band"] = sex_age_bands(people["sex"].to_list(), people["age"])
    if families is None and "family" in people.columns:
        families = people["family"].to_list()
    if families is not None:
        strata["unrelated only"] = unrelated(families, seed=seed)
    return strata


def sex_age_bands(
    sex: Sequence[str | None], age: Sequence[float | None] | pl.Series
) -> list[str | None]:
    """Sex and band of `AGE_BAND_YEARS` in one label, for example "F 45-49"; None if unknown."""
    labels: list[str | None] = []
    for own_sex, years in zip(sex, age, strict=True):
        if not own_sex or years is None or years != years:
            labels.append(None)
            continue
        low = int(years // AGE_BAND_YEARS) * AGE_BAND_YEARS
        labels.append(f"{own_sex} {low}-{low + AGE_BAND_YEARS - 1}")
    return labels


def unrelated(families: Labels, *, seed: int = 0) -> list[str | None]:
    """One random person a family in one stratum; None for the relatives."""
    n = len(families)
    family = family_codes(families, n)
    order = np.random.default_rng([seed, 4]).permutation(n)
    chosen = order[np.unique(family[order], return_index=True)[1]]
    labels: list[str | None] = [None] * n
    for person in chosen:
        labels[person] = "unrelated"
    return labels
