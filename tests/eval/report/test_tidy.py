"""The tidy table and the model card say what results.json says."""

import copy
import json
import math
from importlib.resources import files

import polars as pl
from jsonschema import Draft202012Validator

from brainfusion.eval.report.model_card import model_card
from brainfusion.eval.report.tidy import SCHEMA, tidy, write_tidy
from tests.eval.report.example_results import IDS, write_example


def test_every_measured_number_is_a_row_with_its_interval(tmp_path):
    results = write_example(tmp_path)
    table = pl.read_parquet(write_tidy(tmp_path / "results.parquet", results))
    assert dict(table.schema) == SCHEMA
    row = results["retrieval"]["brain_to_dna"]
    auc = table.filter(section="retrieval", direction="brain_to_dna", metric="auc").row(
        0, named=True
    )
    assert auc["value"] == row["auc"]
    assert (auc["ci_low"], auc["ci_high"]) == (row["ci_low"], row["ci_high"])
    assert (auc["p_value"], auc["n"]) == (row["p_value"], row["n_gallery"])
    recall = table.filter(section="retrieval", direction="dna_to_brain", metric="recall_at_5")
    assert recall["chance"].item() == results["retrieval"]["dna_to_brain"]["recall_at_5_chance"]
    assert recall["p_value"].item() is None
    assert not table["metric"].str.ends_with("_chance").any()
    probes = table.filter(section="probes")
    assert len(probes) == len(results["probes"])
    for got, want in zip(probes["value"], (r["value"] for r in results["probes"]), strict=True):
        assert got == want or (got is None and (want is None or math.isnan(want)))
    text = table.write_csv()
    assert not any(subject in text for subject in IDS)


def test_results_without_parts_give_an_empty_table_of_the_same_schema():
    assert dict(tidy({}).schema) == SCHEMA
    assert len(tidy({})) == 0


def test_the_card_says_what_was_found_and_what_was_not_measured(tmp_path):
    results = write_example(tmp_path)
    card = model_card(results)
    assert "# Brain-DNA alignment: brainjepa with evo2" in card
    assert "simulated: no real person" in card
    assert f"AUC {results['retrieval']['shuffled_control']['auc']:.3f}, at chance" in card
    assert "residualised on age" in card
    assert not any(subject in card for subject in IDS)
    del results["retrieval"]["shuffled_control"], results["retrieval"]["strata"]
    card = model_card(results)
    assert "A control on shuffled pairs: not done." in card
    assert "not measured" in card


def schema() -> dict:
    text = (
        files("brainfusion.eval.report").joinpath("results.schema.json").read_text(encoding="utf-8")
    )
    return json.loads(text)


def test_the_example_fits_the_schema_and_what_is_wrong_does_not(tmp_path):
    results = write_example(tmp_path)
    Draft202012Validator.check_schema(schema())
    validator = Draft202012Validator(schema())
    validator.validate(results)
    for path, bad in (
        (("retrieval", "brain_to_dna", "auc"), 1.2),
        (("retrieval", "brain_to_dna", "p_value"), 0.0),
        (("retrieval", "brain_to_dna", "chance"), 0.4),
        (("cohort", "n_people"), -1),
        (("format",), 2),
        (("probes",), {}),
    ):
        wrong = copy.deepcopy(results)
        place = wrong
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = bad
        assert not validator.is_valid(wrong), path
