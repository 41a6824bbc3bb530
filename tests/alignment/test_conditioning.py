import json

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load, save

from brainfusion.alignment.conditioning import Conditioner, design_matrix
from brainfusion.runtime.errors import UserError


def features(n: int = 60, d: int = 12, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(n, d)) @ random.normal(size=(d, d)) + 5.0


def test_standardising_uses_the_people_it_was_fitted_on_only():
    x = features()
    conditioner = Conditioner.fit(x[:40])
    expected = (x - x[:40].mean(0)) / x[:40].std(0)
    np.testing.assert_allclose(conditioner.transform(x), expected, rtol=1e-5, atol=1e-6)
    assert conditioner.transform(x).dtype == np.float32


def test_constant_columns_are_dropped_and_counted():
    x = features()
    x[:, [2, 7]] = 0.1, 1e6
    conditioner = Conditioner.fit(x)
    assert conditioner.n_dropped == 2
    assert conditioner.dim_out == 10
    assert np.isfinite(conditioner.transform(x)).all()


def test_residuals_are_those_of_least_squares_on_the_fitted_people():
    x, random = features(), np.random.default_rng(1)
    # Two one-hot columns that add up to 1: the design with an intercept is singular.
    site = random.integers(0, 2, 60)
    covariates = np.stack([random.normal(50, 8, 60), site, 1 - site], axis=1)
    conditioner = Conditioner.fit(x[:40], covariates=covariates[:40])
    z = (x - x[:40].mean(0)) / x[:40].std(0)
    design = np.column_stack([np.ones(60), covariates[:, :2]])
    beta = np.linalg.lstsq(design[:40], z[:40], rcond=None)[0]
    got = conditioner.transform(x, covariates)
    np.testing.assert_allclose(got, z - design @ beta, atol=1e-5)
    assert np.abs(covariates[:40].T @ got[:40]).max() < 1e-3


@pytest.mark.parametrize(("n", "d"), [(60, 12), (20, 50)])
def test_whitened_components_are_uncorrelated_with_unit_variance(n, d):
    x = features(n, d)
    conditioner = Conditioner.fit(x, n_components=8, shrinkage=0.0)
    z = conditioner.transform(x).astype(float)
    np.testing.assert_allclose(z.T @ z / n, np.eye(8), atol=1e-4)


@pytest.mark.parametrize(("n", "d"), [(60, 12), (20, 50)])
def test_components_without_whitening_are_those_of_the_svd(n, d):
    x = features(n, d)
    conditioner = Conditioner.fit(x, n_components=5, whiten=False)
    z = (x - x.mean(0)) / x.std(0)
    u, s, _ = np.linalg.svd(z, full_matrices=False)
    expected = np.abs(u[:, :5] * s[:5])
    np.testing.assert_allclose(np.abs(conditioner.transform(x)), expected, rtol=1e-4, atol=1e-4)
    assert conditioner.explained == pytest.approx((s[:5] ** 2).sum() / (s**2).sum())


def test_shrinkage_holds_back_components_of_small_variance():
    x = features(200, 12)
    z = Conditioner.fit(x, n_components=12, shrinkage=0.5).transform(x)
    variances = z.var(0)
    assert variances.mean() == pytest.approx(1.0, rel=1e-4)
    assert (np.diff(variances) < 0).all()
    raw = np.linalg.svd((x - x.mean(0)) / x.std(0), compute_uv=False) ** 2 / 200
    expected = raw / (raw + 0.5 * raw.mean())
    np.testing.assert_allclose(variances, expected / expected.mean(), rtol=1e-4)


def test_components_are_at_most_half_the_people_and_the_rank():
    assert Conditioner.fit(features(20, 50), n_components=64).dim_out == 10
    low_rank = features(60, 3) @ np.ones((3, 9)) + features(60, 9) * 0
    assert Conditioner.fit(low_rank, n_components=64).dim_out == 1


def test_a_conditioner_survives_json_and_safetensors_exactly():
    x = features()
    covariates = np.random.default_rng(1).normal(size=(60, 2))
    conditioner = Conditioner.fit(
        x, n_components=4, covariates=covariates, covariate_names=("age", "motion")
    )
    values = conditioner.to_dict()
    arrays = load(save(values.pop("arrays")))
    again = Conditioner.from_dict({**json.loads(json.dumps(values)), "arrays": arrays})
    assert again.covariates == ("age", "motion")
    np.testing.assert_array_equal(
        again.transform(x, covariates), conditioner.transform(x, covariates)
    )


def test_wrong_shapes_and_missing_covariates_are_refused_with_what_is_expected():
    x = features()
    plain = Conditioner.fit(x)
    with pytest.raises(UserError, match=r"expected \(people, 12\)"):
        plain.transform(x[:, :5])
    with pytest.raises(UserError, match="expected none"):
        plain.transform(x, np.zeros((60, 1)))
    residual = Conditioner.fit(x, covariates=x[:, :1], covariate_names=["age"])
    with pytest.raises(UserError, match=r"expected \(60, 1\): age"):
        residual.transform(x)
    x[3, 3] = np.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        plain.transform(x)


SUBJECTS = pl.DataFrame(
    {
        "subject": ["a", "b", "c", "d"],
        "age": [30.0, 40.0, 50.0, 60.0],
        "sex": ["F", "M", "M", "F"],
        "site": ["x", "y", "z", "x"],
        "motion": [0.1, 0.2, None, 0.4],
        "ancestry_1": [1.0, 2.0, 3.0, 4.0],
        "ancestry_2": [0.0, 0.0, 0.0, 1.0],
    }
)


def test_design_matrix_keeps_numbers_and_spreads_text():
    matrix, names = design_matrix(SUBJECTS, ["age", "sex", "site", "ancestry_*"])
    assert names == (
        *("age", "sex=F", "sex=M", "site=x", "site=y", "site=z"),
        *("ancestry_1", "ancestry_2"),
    )
    assert matrix[1].tolist() == [40.0, 0.0, 1.0, 0.0, 1.0, 0.0, 2.0, 0.0]


def test_design_matrix_of_other_people_has_the_same_columns():
    _, names = design_matrix(SUBJECTS, ["age", "site"])
    matrix, again = design_matrix(SUBJECTS[:1], ["age", "site"], names=names)
    assert again == names
    assert matrix.tolist() == [[30.0, 1.0, 0.0, 0.0]]
    moved = SUBJECTS.with_columns(site=pl.lit("new"))
    with pytest.raises(UserError, match="has the value 'new'"):
        design_matrix(moved, ["age", "site"], names=names)


@pytest.mark.parametrize(
    ("columns", "message"),
    [(["motion"], "missing for 1 of 4"), (["agee"], "Did you mean 'age'"), (["pc_*"], "Known: ")],
)
def test_design_matrix_refuses_missing_values_and_unknown_columns(columns, message):
    with pytest.raises(UserError, match=message):
        design_matrix(SUBJECTS, columns)
