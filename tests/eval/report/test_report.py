"""The page: complete, self-contained, small, accessible, and without subject ids."""

import copy
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from brainfusion.eval.report import figures
from brainfusion.eval.report.attribution import attribution_section
from brainfusion.eval.report.page import page, write_report
from brainfusion.eval.report.parts import bars, seconds_text, significant, table
from brainfusion.eval.report.tables import cohort_section, flat
from brainfusion.eval.report.verdict import PRETRAINED, UNTRAINED
from brainfusion.runtime.errors import UserError
from tests.eval.report.example_results import IDS, N_TEST, save, write_example

NO_FILES = Path("nowhere")
"""A workspace without side files: enough, and fast, where only words and numbers are looked at."""

VOID = {"meta", "br", "link", "img", "hr"}


class Checker(HTMLParser):
    """Collects ids and references, and holds that tags are nested."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str | None] = []
        self.references: list[str] = []
        self.svgs: list[dict] = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in values:
            self.ids.append(values["id"])
        for key in ("href", "src"):
            if key in values:
                self.references.append(values[key] or "")
        if tag == "svg":
            self.svgs.append(values)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def check(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict, str]:
    workspace = tmp_path_factory.mktemp("run")
    results = write_example(workspace)
    text = write_report(workspace).read_text(encoding="utf-8")
    return workspace, results, text


def test_page_is_well_formed_with_unique_ids_and_only_inner_references(run):
    checker = check(run[2])
    assert len(checker.ids) == len(set(checker.ids))
    targets = {f"#{name}" for name in checker.ids}
    for reference in checker.references:
        assert reference in targets or reference.startswith("data:image/png;base64,")


def test_page_needs_no_network_and_is_small(run):
    text = run[2]
    assert not re.search(r"https?://|@import|<script|<link|<iframe|url\((?!#)", text)
    assert len(text.encode()) < 1_000_000


def test_no_subject_id_is_on_the_page(run):
    workspace, _, text = run
    assert (workspace / "features" / "brainjepa.parquet").exists()
    assert not [subject for subject in IDS if subject in text]


def test_an_id_list_in_a_configuration_is_counted_not_printed(run):
    _, results, _ = run
    leaky = {**results, "config": {"people": IDS[:50]}}
    text = page(leaky, NO_FILES)
    assert "[50 values]" in text
    assert IDS[0] not in text


def test_every_figure_has_an_alternative_text(run):
    svgs = [svg for svg in check(run[2]).svgs if svg.get("aria-hidden") != "true"]
    assert len(svgs) >= 30
    for svg in svgs:
        assert svg["role"] == "img"
        assert len(svg["aria-label"]) > 20


def test_the_cca_is_a_figure_with_its_numbers_in_words(run):
    labels = [svg.get("aria-label", "") for svg in check(run[2]).svgs]
    assert "component 1, on the scale: 0.62 [0.57, 0.67] and -0.07 to 0.08" in labels
    assert "1 component that brain and DNA share, of 2 tested" in run[2]


def test_genes_of_a_prediction_are_a_figure_of_their_own_beside_those_of_retrieval(run):
    text = run[2]
    assert "<h3>Genes, prediction of cognition</h3>" in text
    assert "With all genes the R2 is 0.120, of 400 people." in text
    assert "R2 lost without it" in text
    assert "AUC lost without it" in text
    only = {"n_people": 200, "targets": run[1]["attribution"]["targets"]}
    section = attribution_section(only)
    assert "prediction of cognition" in section
    assert "Nobody has asked" not in section
    assert "retrieval loses" not in section


def test_a_row_of_a_forest_says_its_numbers_in_words(run):
    labels = [svg.get("aria-label", "") for svg in check(run[2]).svgs]
    row = run[1]["retrieval"]["baselines"][-1]
    assert row["auc"] == 0.5
    assert "covariates only, on the scale: 0.50 [0.50, 0.50] and 0.50" in labels


def test_simulated_data_are_labelled_before_the_title_and_imported_are_not(run):
    _, results, text = run
    assert text.index(">simulated data<") < text.index("<h1>")
    imported = copy.deepcopy(results)
    imported["cohort"]["origin"] = "imported"
    assert "simulated data" not in page(imported, NO_FILES)


def test_headline_numbers_and_intervals_are_those_of_the_results(run):
    _, results, text = run
    for name in ("brain_to_dna", "dna_to_brain"):
        row = results["retrieval"][name]
        assert f">{row['auc']:.2f} <" in text
        assert f"{row['ci_low']:.2f} to {row['ci_high']:.2f}" in text
    for row in results["probes"]:
        value = f"{row['value']:.2f} [{row['ci_low']:.2f},&nbsp;{row['ci_high']:.2f}]"
        assert value in text


def test_changed_results_change_the_page(run):
    _, results, text = run
    other = copy.deepcopy(results)
    other["retrieval"]["brain_to_dna"]["auc"] = 0.777
    other["cohort"]["sites"]["site-1"] = 98765
    changed = page(other, NO_FILES)
    assert ">0.78 <" in changed
    assert ">0.78 <" not in text
    assert "98,765" in changed


def test_recall_ceiling_comes_from_the_truth_of_the_same_gallery_only(run):
    _, results, text = run
    assert "90.0%" in text
    other = copy.deepcopy(results)
    other["truth"]["oracle_g_z"]["n_gallery"] = 17
    assert "90.0%" not in page(other, NO_FILES).split("provenance")[0]


def test_recall_that_the_recordings_allow_is_beside_what_is_attainable(run):
    assert "<td>90.0% (75.0%)</td>" in run[2]


def test_scores_that_are_all_tied_are_said_to_be(run):
    _, results, text = run
    assert text.count("all scores are tied") == 1
    other = copy.deepcopy(results)
    other["retrieval"]["baselines"][-1]["standard_error"] = 0.02
    assert "all scores are tied" not in page(other, NO_FILES)


def test_both_directions_of_a_baseline_are_shown_and_only_one_has_an_interval(run):
    auc = run[1]["retrieval"]["baselines"][-2]["auc"]
    row = re.search(r"the connectome, one way</td>.*?</tr>", run[2], re.DOTALL)
    assert row
    assert re.findall(r"<div>(.*?)</div>", row[0])[:2] == [
        f"{auc:.2f} [{auc - 1.96 * 0.25 / N_TEST**0.5:.2f}, {auc + 1.96 * 0.25 / N_TEST**0.5:.2f}]",
        f"{auc:.2f}",
    ]
    assert row[0].count("stroke-width") == 1


def test_the_untrained_encoder_is_one_more_baseline(run):
    _, results, _ = run
    other = copy.deepcopy(results)
    rows = other["retrieval"]["baselines"]
    for name, auc in ((PRETRAINED, 0.81), (UNTRAINED, 0.62)):
        rows.append({**rows[0], "name": name, "auc": auc, "ci_low": auc - 0.02})
        rows[-1] |= {"ci_high": auc + 0.02}
    text = page(other, NO_FILES)
    assert f'<td class="name">{UNTRAINED}</td>' in text
    assert "Pretraining helps: with" in text


def test_targets_that_go_beyond_the_confounds_are_marked_as_the_verdict_counts_them(run):
    # Cognition, trait_1 and sex from both representations, diagnosis from the features alone.
    assert run[2].count("beyond the confounds</span>") == 7
    assert "brainjepa features 4 (" in run[2]
    assert "brain embedding 3 (" in run[2]


def test_many_targets_are_folded_away(run):
    _, results, _ = run
    other = copy.deepcopy(results)
    more = [row for row in results["probes"] if row["target"] == "sex"]
    other["probes"] += [{**row, "target": f"trait {i}"} for i in range(20) for row in more]
    text = page(other, NO_FILES)
    check(text)
    shown = text[: text.index("13 more targets")]
    assert shown.count("<caption>") - text[: text.index('id="probes"')].count("<caption>") == 12
    assert "<caption>trait 19</caption>" in text


def test_what_was_watched_in_pretraining_is_told_with_its_meaning(run):
    text = run[2]
    assert re.search(
        r"brainlm: masked R2<span[^>]*>share of .*?<td>-0.620</td><td>0.370</td>", text
    )
    assert "brainjepa: loss of the mean target" in text
    assert "<td>0.220</td><td>0.340</td>" in text
    assert "brain columns used, of 6,400" in text


def test_diagnostics_come_from_the_metrics_where_the_summary_has_none(run):
    workspace, results, _ = run
    other = copy.deepcopy(results)
    for key in ("first", "last"):
        del other["pretraining"]["brainjepa"][key]
    assert "<td>0.450</td><td>0.114</td>" in page(other, workspace)


def test_people_unknown_to_the_cohort_are_no_step_of_its_flow():
    flow = [{"step": "people in the cohort", "n": 10}, {"step": "with brain features", "n": 5}]
    stranger = {"step": "in a table but not in the cohort", "n": 1000}
    text = cohort_section({"flow": [*flow, stranger]})
    assert "1,000 people of the tables" in text
    assert "<td>in a table" not in text
    assert 'style="width:50.0%"' in text
    assert "Nobody in the tables" in cohort_section({"flow": [*flow, {**stranger, "n": 0}]})


def test_what_an_import_left_out_is_counted_with_its_reason():
    counts = {"n_files": 40, "n_skipped_coverage": 6, "n_dropped_recordings": 0, "n_recordings": 34}
    text = cohort_section({"import": {**counts, "n_other_files": 3}})
    assert re.findall(r"width:([\d.]+%)", text) == ["100.0%", "15.0%", "85.0%"]
    assert "left out: too few parcels with data</td>" in text
    assert "in no table" not in text
    assert "3 other files of this kind were left out" in text


def test_relatives_are_a_note_to_the_families():
    facts = {"families": {"n_families": 900, "n_with_relatives": 200, "largest": 3}}
    text = cohort_section(facts)
    assert (
        '<td>families<span class="note">200 people have a relative in the cohort; at most 3' in text
    )
    assert text.count("<tr>") == 2


def test_small_sites_are_summed_up():
    text = cohort_section({"sites": {f"site {i}": i for i in range(1, 31)}})
    assert "<td>16 others</td>" in text
    assert f"<td>{sum(range(1, 17))}</td>" in text
    assert "<td>site 17</td>" in text
    assert "<td>site 16</td>" not in text


def test_failed_control_turns_the_page_red(run):
    _, results, text = run
    assert 'class="verdict found"' in text
    failed = copy.deepcopy(results)
    failed["retrieval"]["shuffled_control"]["auc"] = 0.7
    changed = page(failed, NO_FILES)
    assert 'class="verdict failed"' in changed
    assert "outside the limit" in changed


def test_missing_parts_name_the_command_that_makes_them(tmp_path: Path):
    save(tmp_path, {"format": 1, "cohort": {"name": "mine", "origin": "imported"}})
    text = write_report(tmp_path).read_text(encoding="utf-8")
    check(text)
    for command in ("pretrain", "align", "retrieve", "probe"):
        assert f"<code>brainfusion {command}</code>" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "gone", [{"cohort", "alignment", "probes"}, {"config", "pretraining", "figures"}, {"retrieval"}]
)
def test_any_part_may_be_missing(run, gone: set[str]):
    workspace, results, _ = run
    check(page({k: v for k, v in results.items() if k not in gone}, workspace))


@pytest.mark.parametrize("gone", [{"baselines", "dna_to_brain"}, {"strata", "shuffled_control"}])
def test_any_part_of_retrieval_may_be_missing(run, gone: set[str]):
    workspace, results, _ = run
    left = {k: v for k, v in results["retrieval"].items() if k not in gone}
    check(page({"format": 1, "figures": results["figures"], "retrieval": left}, workspace))


def test_missing_side_files_leave_the_rest(tmp_path: Path, run):
    save(tmp_path, run[1])
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "its metrics are not in the workspace" in text
    assert "No map of the shared space" in text
    check(text)


def test_results_that_cannot_be_read_are_one_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"results\.json does not exist"):
        write_report(tmp_path)
    save(tmp_path, {"format": 9})
    with pytest.raises(UserError, match="has format 9, expected 1"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="is not JSON"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_page_goes_where_it_is_asked(run, tmp_path: Path):
    target = tmp_path / "deep" / "page.html"
    assert write_report(run[0], target) == target
    assert target.read_text(encoding="utf-8") == run[2]


def test_names_are_escaped_and_never_read_as_formulas(run):
    workspace, results, _ = run
    hostile = copy.deepcopy(results)
    hostile["cohort"]["name"] = "<script>alert(1)</script>"
    hostile["cohort"]["sites"] = {"a & <b>": 3}
    hostile["retrieval"]["baselines"][0]["name"] = "cost $x_1$ & <i>"
    hostile["probes"][0]["target"] = "IQ \u77e5\u80fd $\\bad$"
    text = page(hostile, workspace)
    check(text)
    assert "<script" not in text
    assert "a &amp; &lt;b&gt;" in text
    assert "cost $x_1$ &amp; &lt;i&gt;" in text
    assert "\u77e5\u80fd" in text


def test_large_clouds_stay_small_and_keep_their_extremes():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(20_000, 2))
    svg = figures.shared_space(points, points)
    assert len(svg) < 400_000
    long = [{"step": i, "loss": 1.0 / (i + 1)} for i in range(50_000)]
    assert len(figures.losses(long, name="x", label="A very long curve.")) < 60_000


def test_losses_over_many_orders_of_magnitude_are_on_a_log_scale():
    rows = [{"step": i, "loss": 0.5 * 0.98**i, "loss_of_mean_target": 0.2} for i in range(200)]
    svg = figures.losses(rows, name="x", label="A curve that falls far.")
    assert ">loss, log scale<" in svg
    assert ">guessing the mean target<" in svg
    flat = [{"step": i, "loss": 0.5 + 0.1 * 0.98**i} for i in range(200)]
    assert ">loss<" in figures.losses(flat, name="x", label="A curve that falls little.")


def test_a_start_far_above_the_rest_does_not_hide_it_and_is_written_down():
    rows: list[dict] = [{"step": i, "loss": 1.0 - 0.002 * i} for i in range(1, 200)]
    high = [{"step": 0, "validation_loss": 9.5}, {"step": 199, "validation_loss": 0.6}]
    svg = figures.losses(rows + high, name="x", label="A curve with a high start.")
    assert ">from 9.5 at step 0, above the scale<" in svg
    assert ">8<" not in svg
    assert "above the scale" not in figures.losses(rows, name="x", label="Without the start.")


def test_area_under_the_rank_curve_is_the_auc():
    outranked = np.random.default_rng(0).beta(3, 1, size=400)
    svg = figures.rank_curves({"brain_to_dna": outranked})
    line = re.findall(r'<path d="([^"]+)" clip-path="[^"]+" style="[^"]*stroke: #0072b2', svg)
    points = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", line[-1]), dtype=float)
    x = (points[:, 0] - points[0, 0]) / (points[-1, 0] - points[0, 0])
    # The curve ends at 100%; the axis starts at 0%, where nobody's partner is first among 400.
    y = (points[:, 1].max() - points[:, 1]) / np.ptp(points[:, 1])
    area = ((y[1:] + y[:-1]) / 2 * np.diff(x)).sum()
    assert area == pytest.approx(outranked.mean(), abs=0.01)


def test_wilson_interval_against_its_closed_form_at_one_half():
    low, high = figures.wilson(np.array([0.5]), 100)
    half = 1.96 * np.sqrt(0.25 / 100 + 1.96**2 / 40_000) / (1 + 1.96**2 / 100)
    np.testing.assert_allclose([low[0], high[0]], [0.5 - half, 0.5 + half], rtol=1e-12)
    assert figures.wilson(np.array([0.0]), 50)[1][0] > 0.05


def test_gauge_puts_chance_between_its_ends_and_clips_what_is_outside():
    svg = figures.gauge({"auc": 0.2, "ci_low": 0.1, "ci_high": 1.2}, label="An AUC far below.")
    assert 'cx="6.0"' in svg
    assert 'x2="234.0"' in svg


def test_tables_leave_out_empty_columns():
    text = table(["a", "b", "c"], [["1", "", "3"], ["4", "", "6"]])
    assert "<th>b</th>" not in text
    assert text.count("<td>") == 4


def test_what_follows_a_line_break_in_a_cell_is_a_note():
    assert 'a &lt;b<span class="note">c &amp; d</span>' in table(["x"], [["a <b\nc & d"]])


def test_bars_are_shares_of_the_whole():
    text = bars([("a", 5, 20), ("b", 0, 0)], ("x", "n"))
    assert re.findall(r"width:([\d.]+%)", text) == ["25.0%", "0.0%"]


def test_significant_digits_need_no_exponent():
    values = [(0.0022172, 2), (0.45, 3), (1234.5, 2), (0.0, 3), (-0.62, 3), (99.96, 3)]
    assert [significant(*v) for v in values] == [
        "0.0022",
        "0.450",
        "1,234",
        "0",
        "-0.620",
        "100.0",
    ]


def test_nested_values_are_flattened_in_order():
    values = {"a": {"b": 1, "c": [1, 2]}, "d": [{"e": None}], "f": True, "g": list(range(99))}
    assert list(flat(values)) == [
        ("a.b", "1"),
        ("a.c", "1, 2"),
        ("d.0.e", "none"),
        ("f", "yes"),
        ("g", "[99 values]"),
    ]


def test_times_read_as_times():
    assert [seconds_text(s) for s in (0.44, 12.3, 185.0, 3600.0)] == [
        "0.4 s",
        "12 s",
        "3 min 05 s",
        "60 min 00 s",
    ]


def test_report_is_made_without_torch_pyplot_and_warnings(run):
    code = (
        "import sys, json; from pathlib import Path; from brainfusion.eval.report.page import "
        f"write_report; write_report(Path({str(run[0])!r}), Path({str(run[0] / 'again.html')!r}));"
        "print(json.dumps([m for m in ('torch', 'matplotlib.pyplot', 'pandas') if m in "
        "sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []
    assert (run[0] / "again.html").read_text(encoding="utf-8") == run[2]
