import json
from collections import Counter

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainfusion.data.splits import SIDES, Splits
from brainfusion.runtime.errors import UserError

FRACTIONS = (0.7, 0.1, 0.2)


@st.composite
def tables(draw):
    n = draw(st.integers(3, 80))
    families = draw(
        st.lists(st.sampled_from(["a", "b", "c", "d", "", None]), min_size=n, max_size=n)
    )
    sites = draw(st.lists(st.sampled_from(["x", "y", None]), min_size=n, max_size=n))
    # Three people without relatives, so that every side can be filled.
    families[:3] = [None, "", None]
    schema = {"subject": pl.String, "family": pl.String, "site": pl.String}
    ids = [f"{i:03d}" for i in range(n)]
    return pl.DataFrame({"subject": ids, "family": families, "site": sites}, schema=schema)


@settings(max_examples=80, deadline=None)
@given(table=tables(), seed=st.integers(0, 5))
def test_no_person_and_no_family_stands_on_two_sides(table, seed):
    splits = Splits.make(table, seed=seed)
    lists = [getattr(splits, side) for side in SIDES]
    assert sorted(s for side in lists for s in side) == sorted(table["subject"])
    assert all(lists)
    side_of = {subject: i for i, side in enumerate(lists) for subject in side}
    for family, members in table.filter(pl.col("family") != "").group_by("family"):
        assert len({side_of[s] for s in members["subject"]}) == 1, family
    splits.check_families(table)


@settings(max_examples=40, deadline=None)
@given(table=tables(), seed=st.integers(0, 5))
def test_split_depends_on_seed_and_ids_and_not_on_row_order(table, seed):
    splits = Splits.make(table, seed=seed)
    assert Splits.make(table.reverse(), seed=seed) == splits
    assert Splits.make(table.sample(fraction=1.0, shuffle=True, seed=1), seed=seed) == splits


@settings(max_examples=60, deadline=None)
@given(table=tables())
def test_sizes_match_the_fractions_to_within_the_largest_family(table):
    splits = Splits.make(table)
    named = [name for name in table["family"] if name]
    largest = max(Counter(named).values(), default=1)
    for side, fraction in zip(SIDES, FRACTIONS, strict=True):
        assert abs(len(getattr(splits, side)) - fraction * len(table)) <= 1.5 * largest + 1


def test_every_site_is_shared_out_in_proportion():
    sizes = {"big": 400, "middle": 130, "small": 30}
    sites = [site for site, n in sizes.items() for _ in range(n)]
    sites += [f"tiny-{i}" for i in range(200)]  # one person each: only the total can fit
    ids = [f"{i:04d}" for i in range(len(sites))]
    splits = Splits.make(pl.DataFrame({"subject": ids, "site": sites}))
    site_of = dict(zip(ids, sites, strict=True))
    for side, fraction in zip(SIDES, FRACTIONS, strict=True):
        counts = Counter(site_of[subject] for subject in getattr(splits, side))
        for site, n in sizes.items():
            assert abs(counts[site] - fraction * n) <= 2, (side, site)
        n_tiny = sum(count for site, count in counts.items() if site.startswith("tiny"))
        assert abs(n_tiny - fraction * 200) <= 2, side
    assert (splits.group, splits.stratify) == ("subject", "site")


def test_families_of_all_sizes_are_on_every_side():
    families = [f"pair-{i // 2}" for i in range(400)] + [None] * 600
    ids = [f"{i:04d}" for i in range(1000)]
    splits = Splits.make(pl.DataFrame({"subject": ids, "family": families}))
    for side, fraction in zip(SIDES, FRACTIONS, strict=True):
        members = getattr(splits, side)
        assert abs(len(members) - 1000 * fraction) <= 2
        assert abs(sum(s < "0400" for s in members) - 400 * fraction) <= 4


def test_another_seed_gives_another_split():
    table = pl.DataFrame({"subject": [f"{i}" for i in range(100)]})
    first, second = Splits.make(table, seed=0), Splits.make(table, seed=1)
    overlap = len(set(first.test) & set(second.test))
    assert first.hash != second.hash
    assert overlap < 15  # 4 of 20 by chance


def test_a_saved_split_is_read_back_with_its_labels(tmp_path):
    table = pl.DataFrame({"subject": ["a", "b", "c", "d"]})
    splits = Splits.make(table)
    splits.save(tmp_path / "splits.json")
    back = Splits.load(tmp_path / "splits.json")
    assert back == splits
    assert back.hash == splits.hash
    assert [back.label([subject])[0] for subject in splits.test] == ["test"] * len(splits.test)
    assert back.label([*splits.train, *splits.validation]) == ["train"] * len(splits.train) + [
        "validation"
    ] * len(splits.validation)


def test_too_few_families_for_three_sides_is_an_error():
    table = pl.DataFrame({"subject": list("abcdef"), "family": ["x"] * 3 + ["y"] * 3})
    with pytest.raises(UserError, match="2 families cannot fill 3 sides"):
        Splits.make(table)
    splits = Splits.make(table, fractions=(0.5, 0.0, 0.5))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (3, 0, 3)


@pytest.mark.parametrize(
    "fractions", [(0.5, 0.5), (0.5, 0.2, 0.2), (0.0, 0.5, 0.5), (1.2, -0.1, -0.1)]
)
def test_fractions_that_are_no_shares_are_refused(fractions):
    with pytest.raises(UserError, match="must be three shares"):
        Splits.make(pl.DataFrame({"subject": list("abc")}), fractions=fractions)


def test_unknown_people_have_no_label():
    splits = Splits.make(pl.DataFrame({"subject": list("abc")}))
    with pytest.raises(UserError, match=r"1 of 2 people are in no split \(for example z\)"):
        splits.label(["a", "z"])


def test_an_edited_file_is_refused(tmp_path):
    path = tmp_path / "splits.json"
    Splits.make(pl.DataFrame({"subject": [f"{i}" for i in range(20)]})).save(path)
    values = json.loads(path.read_text())
    moved = {**values, "train": values["train"][1:], "test": [*values["test"], values["train"][0]]}
    path.write_text(json.dumps(moved))
    with pytest.raises(UserError, match="was edited: its lists hash to"):
        Splits.load(path)
    path.write_text(json.dumps({**values, "test": [*values["test"], values["train"][0]]}))
    with pytest.raises(UserError, match="lists 1 people twice"):
        Splits.load(path)
    path.write_text('{"train": []}')
    with pytest.raises(UserError, match="expected the keys"):
        Splits.load(path)


def test_a_table_that_no_longer_fits_is_refused():
    table = pl.DataFrame({"subject": [f"{i}" for i in range(20)]})
    splits = Splits.make(table)
    with pytest.raises(UserError, match="1 people are only in the split and 0 only in the table"):
        splits.check_families(table.slice(1))
    torn = table.with_columns(pl.lit("one family").alias("family"))
    with pytest.raises(UserError, match="puts 1 families on two sides"):
        splits.check_families(torn)
