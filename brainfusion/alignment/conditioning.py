"""Features made fit for alignment; everything is fitted on training people and saved.

In this order: constant columns dropped, columns standardised, covariates regressed out, principal
components (whitened or not). Shape legend: n people, d columns, c covariates, k components.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import polars as pl

from brainfusion.runtime.errors import UserError, nearest

_ARRAYS = ("kept", "mean", "scale", "covariate_mean", "coefficients", "rotation")
_SMALLEST = 1e-6
"""A column whose standard deviation is below this share of its mean counts as constant."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditioner:
    """A fitted map from raw features [n, d] to conditioned ones [n, dim_out], float32."""

    dim_in: int
    """Columns that features must have."""
    n_people: int
    """People it was fitted on."""
    covariates: tuple[str, ...]
    """Columns of the design matrix that `transform` must be given; often none."""
    explained: float
    """Share of the variance, after standardising and residualising, that the output holds."""
    kept: np.ndarray
    """int64 [d']: the columns that vary among the people it was fitted on."""
    mean: np.ndarray
    """float64 [d']."""
    scale: np.ndarray
    """float64 [d']: standard deviations."""
    covariate_mean: np.ndarray
    """float64 [c]."""
    coefficients: np.ndarray
    """float64 [c, d']: what a unit of each covariate adds to each standardised column."""
    rotation: np.ndarray | None = None
    """float64 [d', k]: principal axes, each over its standard deviation if whitened."""

    @classmethod
    def fit(
        cls,
        features: np.ndarray,
        *,
        n_components: int = 0,
        whiten: bool = True,
        shrinkage: float = 0.3,
        covariates: np.ndarray | None = None,
        covariate_names: Sequence[str] = (),
    ) -> Self:
        """Fit on training people only.

        Args:
            features: [n, d], finite.
            n_components: Principal components to keep, at most n // 2 and d; 0 keeps the columns.
            whiten: Scale the components to unit variance. No effect without components.
            shrinkage: Share of the mean variance of the components that is added to the variance
                of each before whitening, which holds back those that are mostly noise; 0 whitens
                exactly.
            covariates: [n, c] from `design_matrix`, regressed out of each column.
            covariate_names: Names of the covariates, in order; numbers if omitted.

        Raises:
            UserError: Fewer than 4 people, or no column that varies.
        """
        x = np.asarray(features, dtype=np.float64)
        if len(x) < 4:
            raise UserError(f"{len(x)} people to fit on: expected at least 4.")
        kept = np.flatnonzero(~constant_columns(x))
        if not len(kept):
            raise UserError(f"all {x.shape[1]} columns are constant: expected features that vary.")
        mean, scale = x[:, kept].mean(0), x[:, kept].std(0)
        x = (x[:, kept] - mean) / scale
        design = np.zeros((len(x), 0)) if covariates is None else np.asarray(covariates, float)
        covariate_mean = design.mean(0)
        design = design - covariate_mean
        coefficients = np.linalg.lstsq(design, x, rcond=_SMALLEST)[0]
        x -= design @ coefficients
        rotation, explained = None, 1.0
        if n_components:
            limit = min(n_components, len(x) // 2, x.shape[1])
            rotation, explained = principal_axes(x, limit, shrinkage=shrinkage if whiten else None)
        names = tuple(covariate_names) or tuple(str(i) for i in range(design.shape[1]))
        if len(names) != design.shape[1]:
            raise UserError(f"{len(names)} names for {design.shape[1]} covariates.")
        return cls(
            dim_in=features.shape[1],
            n_people=len(x),
            covariates=names,
            explained=explained,
            kept=kept,
            mean=mean,
            scale=scale,
            covariate_mean=covariate_mean,
            coefficients=coefficients,
            rotation=rotation,
        )

    @property
    def dim_out(self) -> int:
        """Columns of the conditioned features."""
        return len(self.kept) if self.rotation is None else self.rotation.shape[1]

    @property
    def n_dropped(self) -> int:
        """Columns left out because they do not vary."""
        return self.dim_in - len(self.kept)

    def transform(self, features: np.ndarray, covariates: np.ndarray | None = None) -> np.ndarray:
        """Condition the features of anyone: [n, d] to float32 [n, dim_out].

        Raises:
            UserError: Another number of columns than it was fitted on, a value that is not finite,
                or covariates that are missing or not asked for.
        """
        x = np.asarray(features)
        if x.ndim != 2 or x.shape[1] != self.dim_in:
            raise UserError(
                f"features have shape {x.shape}: expected (people, {self.dim_in}), made by the "
                "same model as those that it was fitted on."
            )
        n_covariates = len(self.covariates)
        shape = None if covariates is None else np.shape(covariates)
        if shape != ((len(x), n_covariates) if n_covariates else None):
            wanted = f"({len(x)}, {n_covariates}): {', '.join(self.covariates)}"
            raise UserError(
                f"covariates have shape {shape}, expected {wanted if n_covariates else 'none'}. "
                "Make them with design_matrix(subjects, columns, names=conditioner.covariates)."
            )
        x = (x[:, self.kept].astype(np.float64) - self.mean) / self.scale
        if covariates is not None:
            x -= (np.asarray(covariates, float) - self.covariate_mean) @ self.coefficients
        if not np.isfinite(x).all():
            raise UserError("features or covariates hold NaN or infinite values: expected none.")
        return (x if self.rotation is None else x @ self.rotation).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, and under "arrays" the NumPy arrays (for safetensors)."""
        return {
            "dim_in": self.dim_in,
            "n_people": self.n_people,
            "covariates": list(self.covariates),
            "explained": self.explained,
            "arrays": {
                name: np.ascontiguousarray(getattr(self, name))
                for name in _ARRAYS
                if getattr(self, name) is not None
            },
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The conditioner that `to_dict` described."""
        scalars = {key: value for key, value in values.items() if key != "arrays"}
        return cls(**{**scalars, "covariates": tuple(scalars["covariates"])}, **values["arrays"])


def constant_columns(x: np.ndarray) -> np.ndarray:
    """Which columns of x [n, d] do not vary, bool [d]."""
    x = np.asarray(x, dtype=np.float64)
    # A constant column's standard deviation is rounding error of its mean, not 0.
    return x.std(0) <= _SMALLEST * np.maximum(np.abs(x.mean(0)), np.finfo(float).tiny)


def principal_axes(
    x: np.ndarray, limit: int, *, shrinkage: float | None
) -> tuple[np.ndarray, float]:
    """Leading axes of centred rows, and the share of the variance that they hold.

    Args:
        x: float64 [n, d], centred.
        limit: Axes at most.
        shrinkage: Whiten, holding back small variances as for `Conditioner.fit`; none: do not.

    Returns:
        [d, k], from the smaller of the two Gram matrices, and the share.
    """
    n, d = x.shape
    values, vectors = np.linalg.eigh(x.T @ x if d <= n else x @ x.T)
    values, vectors = values[::-1][:limit], vectors[:, ::-1][:, :limit]
    # A Gram matrix squares the singular values: 1e-10 of the largest is near its rounding error.
    solid = values > 1e-10 * values[0]
    values, vectors = values[solid], vectors[:, solid]
    explained = min(float(values.sum() / np.square(x).sum()), 1.0)
    if d > n:
        vectors = x.T @ (vectors / np.sqrt(values))
    # The sign of an axis is arbitrary; fixed, so that machines agree.
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(len(values))])
    if shrinkage is None:
        return vectors, explained
    variances = values / n
    shrunk = variances + shrinkage * variances.mean()
    unit = np.sqrt((variances / shrunk).mean())
    return vectors / (np.sqrt(shrunk) * unit), explained


# -- covariates ----------------------------------------------------------------------------------


def design_matrix(
    subjects: pl.DataFrame, columns: Sequence[str], *, names: Sequence[str] | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Covariates as numbers: float64 [n, c] in the row order of `subjects`, and their names.

    Numbers and booleans stay as they are; text becomes one column a value ("site=B").

    Args:
        subjects: One row a person.
        columns: Columns to use; `*` stands for anything ("ancestry_*").
        names: The names that an earlier call returned: the same columns are made again, and
            a value that was not seen then is refused.

    Raises:
        UserError: An unknown column, a missing value, or a value outside `names`.
    """
    parts: list[np.ndarray] = []
    made: list[str] = []
    for column in _expand(subjects, columns):
        values = subjects[column]
        missing = int(values.is_null().sum())
        if values.dtype.is_float():
            missing += int(values.is_nan().sum())
        if missing:
            raise UserError(
                f"column '{column}' is missing for {missing} of {len(values)} people: expected a "
                "value for each. Fill it in, leave these people out, or do not residualise on it."
            )
        if values.dtype.is_numeric() or values.dtype == pl.Boolean:
            parts.append(values.cast(pl.Float64).to_numpy())
            made.append(column)
            continue
        text = values.cast(pl.String)
        levels = sorted(text.unique())
        for level in _levels(column, levels, names):
            parts.append((text == level).cast(pl.Float64).to_numpy())
            made.append(f"{column}={level}")
    if names is not None and tuple(made) != tuple(names):
        raise UserError(
            f"covariates are {', '.join(made)}; expected {', '.join(names)}, as they were fitted."
        )
    return np.stack(parts, axis=1) if parts else np.zeros((len(subjects), 0)), tuple(made)


def _expand(subjects: pl.DataFrame, columns: Sequence[str]) -> list[str]:
    found: dict[str, None] = {}
    for column in columns:
        hits = fnmatch.filter(subjects.columns, column)
        if not hits:
            raise UserError(
                f"no column '{column}' in the subjects table. {nearest(column, subjects.columns)}"
            )
        found.update(dict.fromkeys(hits))
    return list(found)


def _levels(column: str, levels: list[str], names: Sequence[str] | None) -> list[str]:
    if names is None:
        return levels
    known = [name.split("=", 1)[1] for name in names if name.startswith(f"{column}=")]
    new = [level for level in levels if level not in known]
    if new:
        raise UserError(
            f"column '{column}' has the value '{new[0]}', which nobody had when the model was "
            f"fitted; it knows {', '.join(known)}."
        )
    return known
