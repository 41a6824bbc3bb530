"""The benchmarks run; what they measure is nobody's promise here."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_encoders_benchmark_runs_and_both_sides_of_each_case_agree(
    capsys: pytest.CaptureFixture[str],
) -> None:
    load("encoders").main(["--quick"])  # stops where the two sides give different numbers
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.endswith(("materialised", "transformers"))]
    assert len([row for row in rows if row.endswith("materialised")]) == 6
    for row in rows:
        figures = [float(word) for word in row.split()[3:-1]]
        assert len(figures) == 9
        assert min(figures) >= 0


def test_the_encoders_benchmark_counts_the_published_operations() -> None:
    benchmark = load("encoders")
    # Base Brain-JEPA on 4,500 tokens, and a block by hand: 3 tokens, width 2, hidden width 8.
    assert benchmark.operations(4500, 768, 12, 3072) == pytest.approx(1.51e12, rel=0.005)
    qkv, proj, mlp, scores, mix = (
        2 * 3 * 2 * 6,
        2 * 3 * 2 * 2,
        2 * 2 * 3 * 2 * 8,
        2 * 9 * 2,
        2 * 9 * 2,
    )
    assert benchmark.operations(3, 2, 1, 8) == qkv + proj + mlp + scores + mix


def test_the_encoders_benchmark_refuses_a_case_that_it_has_not() -> None:
    with pytest.raises(SystemExit, match="no case has 'brainjpea'"):
        load("encoders").main(["--quick", "--only", "brainjpea"])
