"""Calibration plots, learning curves and the tables of metrics on the page."""

import re
from functools import cache

import numpy as np
import polars as pl

from brainfusion.cli.probe import _rows
from brainfusion.eval.probing.probes import Extras, probe
from brainfusion.eval.report.probes import probes_section


@cache
def made() -> str:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 6))
    subjects = pl.DataFrame(
        {
            "trait": x[:, 0] + rng.standard_normal(200),
            "a<b": x[:, 0] + rng.standard_normal(200) > 0,
            "kind": np.array(["x", "y", "z"])[rng.integers(0, 3, 200)],
        }
    )
    features = {f"features {i}": x + i * rng.standard_normal(x.shape) for i in range(7)}
    table = probe(
        features, subjects, ["trait", "a<b", "kind"], confounds=[], n_permutations=9,
        n_bootstrap=30, penalties=[1.0, 30.0], extras=Extras(learning_curve=[0.3]),
    )  # fmt: skip
    return probes_section({"probes": _rows(table)})


def test_calibration_and_learning_curves_are_drawn_and_said_in_words() -> None:
    text = made()
    labels = re.findall(r'<svg class="figure"[^>]*aria-label="([^"]+)"', text)
    assert sum(label.startswith("Calibration of") for label in labels) == 2
    assert sum(label.startswith("Learning curves of") for label in labels) == 3
    assert all(re.search(r"\d\.\d\d", label) for label in labels)
    assert "1 more, lower over all targets, not drawn" in text
    assert "<b>a&lt;b</b>" in text
    assert "a<b" not in text
    names = re.findall(r'\bid="([^"]+)"', text)
    assert len(names) == len(set(names))


def test_features_look_the_same_in_the_curves_of_all_targets() -> None:
    looks = []
    for svg in re.findall(r'<svg class="figure"[^>]*aria-label="Learning.*?</svg>', made(), re.S):
        lines = re.findall(r"stroke: (#\w{6})[^\"]*stroke-linejoin|>(features \d)</text>", svg)
        names = [name for _, name in lines if name]
        looks.append(names)
    assert len(looks) == 3
    assert looks[0] == looks[1] == looks[2]
    assert len(looks[0]) == 6


def test_all_metrics_and_adjusted_p_values_are_in_the_tables() -> None:
    text = made()
    for word in ("average precision", "Brier score", "mean absolute error", "p, adjusted"):
        assert word in text
    assert "each against the rest" in text


def test_rows_without_what_is_new_have_a_section_without_it() -> None:
    row = {
        "target": "age", "features": "net", "metric": "r2", "value": 0.1, "chance": 0.0,
        "ci_low": 0.0, "ci_high": 0.2, "p_value": 0.01, "n": 90, "kind": "continuous",
    }  # fmt: skip
    text = probes_section({"probes": [row]})
    assert "All 1 rows" in text
    assert "<h3>" not in text
    assert "All metrics" not in text
