"""Closed-form maps of two sides into one space: ridge-CCA, PLS and ridge.

- **rcca**: canonical variates of both sides (Vinod 1976, J. Econometrics 4). Each is weighted by
  sqrt(rho / (1 - rho^2)), rho its correlation in the validation people: an inner product is then
  what the log density ratio of a pair (`data.oracle`) has of products of variates. One column
  more, of constant size, keeps the length of the variates through the unit norm.
- **pls**: singular vectors of the cross-covariance (Wegelin 2000, "A survey of partial least
  squares"; scikit-learn's PLSSVD).
- **ridge**: the whitened leading components of the DNA, and what multi-output ridge (scikit-learn's
  Ridge) predicts of them from the brain. The embedding of DNA is its whitened components.

Shape legend: n and m people, i and j columns of the two sides, k components, o columns put out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from brainfusion.alignment.conditioning import principal_axes
from brainfusion.data.cca_choice import choose_cca

LEAST_RHO = 0.02
"""Where validation people share nothing the first component keeps this: it orders ties."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearMaps:
    """Two maps, (row - mean) @ weight, and what was chosen for them."""

    means: tuple[np.ndarray, np.ndarray]
    """float64 [i] and [j]."""
    weights: tuple[np.ndarray, np.ndarray]
    """float64 [i, o] and [j, o]."""
    chosen: dict[str, float | int]
    """Numbers of components, ridges or penalty."""
    spare: float = 0.0
    """Size of the constant column that rcca puts beside the variates."""
    held_out: tuple[float, ...] = ()
    """Of rcca: canonical correlations in the validation people."""


def rcca_maps(x: np.ndarray, y: np.ndarray, x_val: np.ndarray, y_val: np.ndarray) -> LinearMaps:
    """Weighted canonical variates; ridges and components by the validation people's information.

    Args:
        x: [n, i], training people.
        y: [n, j], the same people.
        x_val: [m, i], validation people.
        y_val: [m, j].
    """
    cca, held_out = choose_cca(x, y, x_val, y_val)
    # What validation people do not share at all would only add noise to the embeddings.
    k = max(1, int((held_out > 0).sum()))
    rho = np.clip(held_out[:k], LEAST_RHO, None)
    # Variates have variance 1 in the training people, but not in anyone else.
    sizes = [
        np.concatenate([variates(of_train), variates(of_validation)])[:, :k].std(axis=0)
        for variates, of_train, of_validation in (
            (cca.variates_x, x, x_val),
            (cca.variates_y, y, y_val),
        )
    ]
    weight = np.sqrt(rho / (1 - rho**2))
    return LinearMaps(
        means=(cca.mean_x, cca.mean_y),
        weights=(
            cca.weights_x[:, :k] * (weight / sizes[0]),
            cca.weights_y[:, :k] * (weight / sizes[1]),
        ),
        chosen={"n_components": len(rho), "ridge_brain": cca.ridge_x, "ridge_dna": cca.ridge_y},
        spare=float(np.sqrt((weight**2).sum())),
        held_out=tuple(float(value) for value in held_out[:k]),
    )


def pls_maps(x: np.ndarray, y: np.ndarray, *, n_components: int) -> LinearMaps:
    """Singular vectors of the cross-covariance of x [n, i] and y [n, j], the largest first."""
    sides = [_axes(values) for values in (x, y)]
    (mean_x, axes_x), (mean_y, axes_y) = sides
    left, _, right = np.linalg.svd(
        ((x - mean_x) @ axes_x).T @ ((y - mean_y) @ axes_y), full_matrices=False
    )
    k = min(n_components, left.shape[1])
    a, b = axes_x @ left[:, :k], axes_y @ right[:k].T
    # The sign of a direction is arbitrary; fixed, so that machines agree.
    sign = np.sign(a[np.abs(a).argmax(0), np.arange(k)])
    return LinearMaps(
        means=(mean_x, mean_y), weights=(a * sign, b * sign), chosen={"n_components": k}
    )


def ridge_maps(
    x: np.ndarray, y: np.ndarray, *, n_components: int, penalties: Sequence[float]
) -> Iterator[LinearMaps]:
    """Whitened leading components of y [n, j], and ridge from x [n, i] to them, by penalty.

    A penalty of 1 adds the mean variance of the columns of x to each: scikit-learn's `alpha` is the
    penalty times the sum of squares of the centred x over i.
    """
    (mean_x, axes_x), (mean_y, axes_y) = _axes(x), _axes(y)
    axes_y = axes_y[:, :n_components]
    whitening = axes_y / ((y - mean_y) @ axes_y).std(axis=0)
    scores = (x - mean_x) @ axes_x
    squares = (scores**2).sum(axis=0)
    moments = scores.T @ ((y - mean_y) @ whitening)
    for penalty in penalties:
        added = penalty * squares.sum() / x.shape[1]
        yield LinearMaps(
            means=(mean_x, mean_y),
            weights=(axes_x @ (moments / (squares + added)[:, None]), whitening),
            chosen={"n_components": whitening.shape[1], "penalty": penalty},
        )


def _axes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the rows, and all principal axes along which they vary [i, r]."""
    mean = values.mean(axis=0)
    return mean, principal_axes(values - mean, min(values.shape), shrinkage=None)[0]
