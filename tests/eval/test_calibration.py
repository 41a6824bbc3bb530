"""The statistics keep their promises: `benchmarks/calibration.py` on fewer cohorts."""

import pytest

from tests.test_benchmarks import load


def test_traps_catch_the_naive_test_and_not_the_blocked_one() -> None:
    lines = list(load("calibration").traps(60))
    assert [what for what, _, _ in lines] == ["trap of sites", "trap of families"]
    for what, figures, holds in lines:
        assert holds, (what, figures)


def test_a_statistic_that_cheats_is_found_out() -> None:
    calibration = load("calibration")
    rng = calibration.np.random.default_rng(0)
    uniform = rng.random(200)
    assert calibration._uniform("honest", uniform)[2]
    assert not calibration._uniform("too often small", uniform**2)[2]
    assert not calibration._uniform("never small", uniform**0.5)[2]
    covered = rng.random((2000, 1))
    assert calibration._covers("honest", covered < 0.95)[2]
    assert not calibration._covers("too short", covered < 0.9)[2]
    assert not calibration._covers("too long", covered < 0.995)[2]


@pytest.mark.slow
@pytest.mark.parametrize("study", ["null", "comparisons", "probes", "coverage", "power"])
def test_p_values_intervals_and_power_are_as_promised(study) -> None:
    study, n_cohorts = load("calibration").STUDIES[study]
    for what, figures, holds in study(n_cohorts):
        assert holds, (what, figures)
