"""How well genes could be found in the simulated recordings: the two oracle lines of the truth.

Both score the test people as one gallery with the pointwise mutual information of the true model.
`oracle_g_z` knows the genetic scores and the latent traits. `oracle_g_bold` knows the genetic
scores and reads the traits from a recording of finite length, with a ridge that was trained on true
traits: no learner is told those, so it should end below.

Shapes: n people, p parcels, t TRs, c connectivity features, k traits.
"""

from typing import Any

import numpy as np

from brainfusion.data.oracle import both_directions, pmi_scores

_MAX_VALUES = 40_000_000
_MAX_PEOPLE = 4_000
_PENALTIES = 10.0 ** np.arange(-4, 3.01, 0.5)


def connectivity(bold: np.ndarray) -> np.ndarray:
    """Fisher-z Pearson correlations and log standard deviations of a recording [p, t]: [c]."""
    centred = bold - bold.mean(axis=1, keepdims=True)
    scale = np.sqrt((centred**2).mean(axis=1)) + 1e-12
    correlation = (centred / scale[:, None]) @ (centred / scale[:, None]).T / bold.shape[1]
    rows, columns = np.triu_indices(len(bold), 1)
    edges = np.arctanh(np.clip(correlation[rows, columns], -0.999, 0.999))
    return np.concatenate([edges, np.log(scale)]).astype(np.float32)


def n_connectivity(n_parcels: int) -> int:
    """Length of what `connectivity` returns."""
    return n_parcels * (n_parcels - 1) // 2 + n_parcels


def n_people_kept(n_people: int, n_parcels: int) -> int:
    """How many people the oracle lines use: 4,000 at most, and within 160 MB of connectivity."""
    wanted = max(100, _MAX_VALUES // n_connectivity(n_parcels))
    return min(n_people, wanted, _MAX_PEOPLE)


class Ridge:
    """Ridge regression with more features than people; the penalty is chosen leave-one-out."""

    def fit(self, x: np.ndarray, y: np.ndarray) -> "Ridge":
        """Fit `y` [n, k] on `x` [n, c]; learns `left_out_` [n, k], each person predicted unseen."""
        self.x_mean_, self.y_mean_ = x.mean(axis=0), y.mean(axis=0)
        self._x = x - self.x_mean_
        centred = y - self.y_mean_
        n = len(x)
        kernel = (self._x @ self._x.T).astype(np.float64)
        values, vectors = np.linalg.eigh(kernel)
        values, scale = np.maximum(values, 0.0), float(np.trace(kernel)) / n
        rotated, best = vectors.T @ centred, np.inf
        for penalty in _PENALTIES * scale:
            shrunk = values / (values + penalty)
            fitted = (vectors * shrunk) @ rotated
            leverage = (vectors**2) @ shrunk + 1 / n
            left_out = centred - (centred - fitted) / np.maximum(1 - leverage, 1e-6)[:, None]
            error = float(((left_out - centred) ** 2).sum())
            if error < best:
                best, self.penalty_ = error, penalty
                self.left_out_ = left_out + self.y_mean_
                self._dual = (vectors / (values + penalty)) @ rotated
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Predict [m, k] from [m, c]."""
        return ((x - self.x_mean_) @ self._x.T) @ self._dual + self.y_mean_


def oracle_latent(genetic: np.ndarray, traits: np.ndarray, *, h2: float) -> dict[str, Any]:
    """Retrieval of true genetic scores and true traits [n, k], both directions averaged."""
    rho = np.full(genetic.shape[1], np.sqrt(h2))
    return {**both_directions(pmi_scores(genetic, traits, rho)), "rho": rho.tolist()}


def oracle_bold(
    features: np.ndarray,
    genetic: np.ndarray,
    traits: np.ndarray,
    *,
    split: np.ndarray,
    h2: float,
) -> dict[str, Any]:
    """Retrieval of true genetic scores and traits read from connectivity, directions averaged.

    The genes move connectivity through the traits alone, so each canonical correlation is sqrt(h2)
    times the reading's own with the traits, and only that is estimated.

    Args:
        features: Of each person [n, c]; centred and scaled here, in place.
        genetic: True scores [n, k].
        traits: True traits [n, k].
        split: "train", "validation" or "test" of each person.
        h2: Share of a trait's variance that the scores explain.

    Returns:
        The metrics on the test people; `rho`, estimated on training people left out one at a time
        and on validation people; `n_train`, the people that the ridge was fitted on.
    """
    train, validation, test = (split == name for name in ("train", "validation", "test"))
    features = _balance(features, train, n_amplitudes=_n_parcels(features.shape[1]))
    ridge = Ridge().fit(features[train], traits[train])
    read = np.concatenate([ridge.left_out_, ridge.predict(features[validation])])
    true = np.concatenate([traits[train], traits[validation]])
    rotation, white, mean, reliability = _canonical(true, read)
    rho = np.sqrt(h2) * reliability
    scores = pmi_scores(
        genetic[test] @ rotation, (ridge.predict(features[test]) - mean) @ white, rho
    )
    return {
        **both_directions(scores),
        "rho": rho.tolist(),
        "reliability": reliability.tolist(),
        "n_train": int(train.sum()),
    }


def _canonical(
    true: np.ndarray, read: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rotation [k, k] of the traits, whitening [k, k] and mean of the reading, correlations [k]."""
    mean = read.mean(axis=0)
    true_root = _inverse_root(np.cov(true.T).reshape(true.shape[1], -1))
    read_root = _inverse_root(np.cov(read.T).reshape(read.shape[1], -1))
    cross = (true - true.mean(axis=0)).T @ (read - mean) / (len(true) - 1)
    rotation, reliability, other = np.linalg.svd(true_root @ cross @ read_root)
    return rotation, read_root @ other.T, mean, np.clip(reliability, 0.0, 0.999)


def _inverse_root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors / np.sqrt(np.maximum(values, 1e-9 * values[-1]))) @ vectors.T


def _balance(features: np.ndarray, train: np.ndarray, *, n_amplitudes: int) -> np.ndarray:
    """Give amplitudes a quarter of the variance of correlations, whatever their number."""
    edges, amplitudes = features[:, :-n_amplitudes], features[:, -n_amplitudes:]
    for block, share in ((edges, 1.0), (amplitudes, 0.25)):
        block -= block[train].mean(axis=0)
        block *= np.sqrt(share / (block[train].var(axis=0).sum() + 1e-12))
    return features


def _n_parcels(n_features: int) -> int:
    return int((np.sqrt(8 * n_features + 1) - 1) / 2)
