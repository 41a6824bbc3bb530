"""Attribution of genes, networks and parcels: what was planted comes first, and of nothing planted
nothing is found. The whole way, from recordings on, as a user goes it.
"""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from brainfusion.cli import main
from brainfusion.data.cohort import Cohort
from brainfusion.eval.statistics import auroc
from brainfusion.runtime.files import read_json

KINDS = ("genes", "networks", "parcels")
SIZE = ("--n-people", 400, "--n-parcels", 30, "--n-trs", 96, "--n-genes", 12, "--step", 1.5)
ENCODER = ("--n-trs", 96, "--patch-trs", 16, "--width", 32, "--steps", 30, "--batch-size", 16)


def attributed(root: Path, preset: str, seed: int) -> tuple[Cohort, dict[str, pl.DataFrame]]:
    """A cohort from its simulation to the tables of its attribution."""
    place = ("--cohort", root / "cohort", "--workspace", root / "work")
    model = ("--model", "brainjepa")
    for words in (
        ("simulate", "--preset", preset, "--seed", seed, *SIZE, "--out", root / "cohort"),
        ("pretrain", *model, *ENCODER, *place),
        ("import", "--dna", "evo2", root / "cohort" / "sources" / "evo2", *place[:2]),
        ("embed", *model, *place),
        ("align", "--no-control", "--max-steps", 30, "--seed", seed, "--threads", 1, *place),
        ("attribute", "--what", *KINDS, "--target", "cognition", "--bootstrap", 100,
         "--threads", 1, *place),
    ):  # fmt: skip
        assert main([str(word) for word in words]) == 0
    found = read_json(root / "work" / "align" / "brainjepa-evo2" / "attribution.json")
    tables = {kind: pl.DataFrame(found[kind]["rows"]) for kind in KINDS}
    tables["cognition"] = pl.DataFrame(found["targets"]["cognition"]["rows"])
    return Cohort.open(root / "cohort"), tables


def n_found(tables: dict[str, pl.DataFrame]) -> dict[str, int]:
    """Units that pass at a false discovery rate of 5%."""
    return {
        kind: table.filter((pl.col("q_value") < 0.05) & (pl.col("drop") > 0)).height
        for kind, table in tables.items()
    }


@pytest.mark.slow
def test_planted_units_are_found_and_on_the_null_preset_no_more_than_chance(tmp_path):
    cohort, planted = attributed(tmp_path / "demo", "demo", 0)
    causal = set((cohort.truth() or {})["causal_genes"])
    assert len(causal) == 4
    for kind in ("genes", "cognition"):
        is_causal = np.array([unit in causal for unit in planted[kind]["unit"]])
        assert auroc(is_causal, planted[kind]["drop"].to_numpy()) > 0.8, kind
    assert min(n_found(planted).values()) >= 3
    nulls = [attributed(tmp_path / f"null-{seed}", "null", seed)[1] for seed in (0, 1)]
    # Of eight tables one may have a unit at a false discovery rate of 5% (of 32 of seeds 0 to 7,
    # two had); two or more have with a probability of 6%.
    assert sum(n > 0 for null in nulls for n in n_found(null).values()) <= 1
    for kind in nulls[0]:  # p-values are 0.5 in the mean; units of a table go together
        assert np.mean([null[kind]["p_value"].mean() for null in nulls]) > 0.2, kind
