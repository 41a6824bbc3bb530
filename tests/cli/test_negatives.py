"""Who is a negative of whom, from the table of people and from their DNA."""

import numpy as np
import polars as pl
import pytest

from brainfusion.alignment import GeneArray, GeneVectors
from brainfusion.cli.negatives import chosen_rule, identical_rows, pair_ids
from brainfusion.runtime.errors import UserError


def vectors(x: np.ndarray, mask: np.ndarray | None = None) -> GeneVectors:
    mask = np.ones(x.shape[:2], dtype=bool) if mask is None else mask
    genes = tuple(f"g{i}" for i in range(x.shape[1]))
    return GeneVectors.of({"evo2": GeneArray(genes=genes, vectors=x, mask=mask)})


def groups(codes: np.ndarray) -> list[list[int]]:
    return sorted(np.flatnonzero(codes == code).tolist() for code in set(codes[codes >= 0]))


def test_people_are_identical_where_every_gene_is_to_the_bit():
    x = np.random.default_rng(0).normal(size=(8, 3, 5)).astype(np.float32)
    x[4], x[6] = x[1], x[1]
    x[5] = x[2]
    x[5, 2, 4] = np.nextafter(x[2, 2, 4], np.float32(9))  # the last bit of one number
    x[0], x[3] = 0.0, -0.0
    everybody = np.ones(8, dtype=bool)
    assert groups(identical_rows(vectors(x), everybody)) == [[0, 3], [1, 4, 6]]
    # The same numbers in another order, or of another gene, are others.
    x[7] = x[2][::-1]
    assert groups(identical_rows(vectors(x), everybody)) == [[0, 3], [1, 4, 6]]
    some = np.array([1, 1, 1, 0, 1, 1, 1, 1], dtype=bool)
    assert groups(identical_rows(vectors(x), some)) == [[1, 4, 6]]


def test_a_gene_that_is_not_there_differs_from_one_that_is_zero():
    x = np.zeros((3, 2, 4), dtype=np.float32)
    x[:, 0] = 1.0
    mask = np.array([[1, 1], [1, 0], [1, 0]], dtype=bool)
    x[2, 1] = 5.0  # where there is none, what stands does not matter
    assert groups(identical_rows(vectors(x, mask), np.ones(3, dtype=bool))) == [[1, 2]]


def people() -> tuple[pl.DataFrame, dict[str, GeneVectors], dict[str, np.ndarray]]:
    x = np.random.default_rng(1).normal(size=(6, 2, 3)).astype(np.float32)
    x[5] = x[0]
    table = pl.DataFrame(
        {
            "subject": list("abcdef"),
            "family": ["f1", "f2", "f1", None, None, "f3"],
            "site": ["A", "B", None, "A", None, "B"],
        }
    )
    has = np.ones(6, dtype=bool)
    return table, {"dna": vectors(x)}, {"brain": has, "dna": has}


def test_relatives_and_people_of_one_dna_vector_are_excluded_and_counted(capsys):
    ids = pair_ids("unrelated", *people())
    assert ids is not None
    assert ids.excluded is not None
    assert ids.within is None
    families, twins = ids.excluded.numpy().T
    # A family of one, and two people of no known family, are nobody's relatives.
    assert groups(families) == [[0, 2]]
    assert groups(twins) == [[0, 5]]
    said = capsys.readouterr().err
    assert "of 6 people 2 have a relative among them, 2 share their whole dna vector" in said


def test_within_a_site_relatives_are_left_out_too():
    ids = pair_ids("within-site", *people())
    assert ids is not None
    assert ids.within is not None
    assert groups(ids.within.numpy()) == [[0, 3], [1, 5], [2, 4]]
    assert ids.excluded is not None
    assert groups(ids.excluded.numpy()[:, 0]) == [[0, 2]]


def test_where_nobody_is_excluded_there_are_no_ids():
    table, dna, present = people()
    assert pair_ids("all", table, dna, present) is None
    alone = table[1:4].with_columns(family=pl.Series(["x", "y", "z"]))
    some = {"dna": dna["dna"].take(np.array([1, 2, 3]))}
    has = {"dna": np.ones(3, dtype=bool)}
    assert pair_ids("unrelated", alone, some, has) is None


def test_a_control_excludes_by_the_family_of_the_brain_and_by_that_of_the_dna():
    table, dna, present = people()
    order = np.array([3, 1, 2, 0, 5, 4])
    moved = {"dna": dna["dna"].take(order)}
    ids = pair_ids("unrelated", table, moved, present, order=order)
    assert ids is not None
    assert ids.excluded is not None
    of_brain, of_dna, twins = ids.excluded.numpy().T
    assert groups(of_brain) == [[0, 2]]
    assert groups(of_dna) == [[2, 3]]  # rows with the DNA of 2 and of 0
    assert groups(twins) == [[3, 4]]  # rows with the DNA of 0 and of 5


def test_the_rule_that_suits_a_cohort_is_said(capsys):
    table = people()[0]
    assert chosen_rule("auto", table, loss="info_nce") == "unrelated"
    assert chosen_rule("auto", table, loss="clip") == "all"
    assert "--loss clip cannot leave them out" in capsys.readouterr().err
    assert chosen_rule("auto", table.drop("family"), loss="info_nce") == "all"
    assert "no column 'family'" in capsys.readouterr().err
    assert chosen_rule("unrelated", table.drop("family"), loss="info_nce") == "unrelated"
    assert "only identical DNA is left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="no column 'site'"):
        chosen_rule("within-site", table.drop("site"), loss="info_nce")
