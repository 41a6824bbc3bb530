"""The CCA's place in the page, the table and the schema: a planted component, and none."""

import copy
import re
from functools import cache

import numpy as np

from brainfusion.eval.cca_permutation import cca_test
from brainfusion.eval.report.cca import cca_section, sentences
from brainfusion.eval.report.tidy import tidy
from brainfusion.eval.report.verdict import verdict
from tests.eval.report.test_tidy import schema

N = 400


@cache
def found(shared: tuple[float, ...]) -> dict:
    """cca.json of two views whose first columns are correlated as `shared` says."""
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((N, 8)), rng.standard_normal((N, 6))
    for i, rho in enumerate(shared):
        y[:, i] = rho * x[:, i] + np.sqrt(1 - rho**2) * y[:, i]
    x, y = x @ rng.standard_normal((8, 8)), y @ rng.standard_normal((6, 6))
    how = {"n_components": 3, "n_permutations": 199, "n_held_out_permutations": 99}
    rows = cca_test(x, y, n_bootstrap=199, **how).rows()
    about = {"brain": "brainjepa", "dna": "evo2", "n": N, "n_people": N, "n_pcs": [8, 6]}
    about |= {"n_folds": 5, "n_permutations": 199, "confounds": ["age"], "held_out_only": False}
    return {**about, "exchanged_within": ["site", "family"], "components": rows}


def test_a_planted_component_is_found_said_and_drawn_beside_its_null() -> None:
    cca = found((0.7,))
    [text] = sentences(cca)
    assert "finds 1 component that brain and DNA share, of 3 tested" in text
    first, second, _ = cca["components"]
    assert first["ci_low"] < 0.7 < first["ci_high"] + 0.05
    assert first["held_out"] > first["null_high"]
    assert second["null_low"] <= second["held_out"] <= second["null_high"]
    page = cca_section({"cca": cca})
    assert page.count('<td class="name">') == 3
    assert page.count("is there</span>") == 1
    label = re.search(r'aria-label="(component 1[^"]*)"', page)
    assert label
    assert f"{first['held_out']:.2f} [" in label[1]
    assert f"{first['null_low']:.2f} to {first['null_high']:.2f}" in label[1]
    assert "nothing was trained on pairs" in page
    assert "199 exchanges of whole families within their site" in page
    assert f"<td>{first['correlation']:.3f}</td>" in page


def test_without_a_link_no_component_is_said_to_be_there() -> None:
    cca = found(())
    [text] = sentences(cca)
    assert "finds no component that brain and DNA share: p = " in text
    page = cca_section({"cca": cca})
    assert "is there" not in page
    # The verdict says the same.
    assert text in verdict({"cca": cca})


def test_the_grey_range_holds_about_95_of_100_held_out_correlations_without_a_link() -> None:
    how = {"n_components": 1, "n_permutations": 1, "n_bootstrap": 0, "n_folds": 3}
    inside = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        views = rng.standard_normal((48, 3)), rng.standard_normal((48, 2))
        [row] = cca_test(*views, n_held_out_permutations=49, seed=seed, **how).rows()
        inside += row["null_low"] <= row["held_out"] <= row["null_high"]
    # Binomial of 60 at 0.94 (49 draws): 50 or fewer has a probability below 1%.
    assert inside >= 51


def test_no_cca_names_the_command_and_a_tuned_encoder_is_said() -> None:
    assert "<code>brainfusion probe --cca 3</code>" in cca_section({})
    assert sentences({}) == []
    assert "tuned on pairs" not in cca_section({"cca": found((0.7,))})
    tuned = {**found((0.7,)), "held_out_only": True}
    assert "only people on whom it was not are in it" in cca_section({"cca": tuned})


def test_what_was_not_computed_is_left_out_and_the_rest_is_there() -> None:
    cca = copy.deepcopy(found((0.7,)))
    for row in cca["components"]:
        for name in ("held_out", "ci_low", "ci_high", "p_held_out", "null_low", "null_high"):
            del row[name]
    page = cca_section({"cca": cca})
    assert "<table" in page
    assert "nan" not in page
    assert "; in people held out" not in sentences(cca)[0]


def test_rows_of_the_tidy_table_are_those_of_the_components() -> None:
    cca = found((0.7,))
    table = tidy({"cca": cca})
    held = table.filter(metric="held_out_correlation")
    first = cca["components"][0]
    asked = held.row(0, named=True)
    assert (asked["section"], asked["name"]) == ("cca", "component 1")
    assert (asked["value"], asked["ci_low"]) == (first["held_out"], first["ci_low"])
    assert (asked["p_value"], asked["n"]) == (first["p_held_out"], N)
    fitted = table.filter(metric="fitted_correlation")
    assert fitted["p_value"].to_list() == [row["p_family_wise"] for row in cca["components"]]
    assert len(table) == 12


def test_the_schema_takes_it_and_refuses_what_is_wrong() -> None:
    from jsonschema import Draft202012Validator

    part = Draft202012Validator(schema()["properties"]["cca"])
    part.validate({})
    part.validate(found((0.7,)))
    for change in ({"p_family_wise": 0.0}, {"held_out": 1.3}, {"component": 0}):
        wrong = copy.deepcopy(found((0.7,)))
        wrong["components"][1] |= change
        assert not part.is_valid(wrong), change
    assert not part.is_valid({"brain": "brainjepa"})
