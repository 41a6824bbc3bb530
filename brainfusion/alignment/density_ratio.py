"""The density ratio of two embeddings: the best score of a pair, as an inner product.

A cosine counts every direction of the shared space alike and every person's length not at all. The
log density ratio of canonical variates (`brainfusion.data.oracle`) counts each direction by what it
tells, and no score of one pair at a time ranks better where the variates are normal. Directions
come from training people; ridge, number and correlations come from validation people, because
training people's correlations are always high.

Where embeddings are no linear map of normal variates, canonical correlations count the same thing
twice (a variate and its square are uncorrelated, not independent). An InfoNCE loss drives scale
times cosine to the log density ratio, too, whatever the distribution. Of the two the one is taken
that tells more held-out people from one another: by the lower bound log N - InfoNCE (van den Oord
2018, arXiv 1807.03748), half of the validation people estimating what the other half is scored by.

Shape legend: n people, o width of the shared space, k components.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from brainfusion.data.cca_choice import choose_cca, held_out_correlations
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.threads import one_thread

_ARRAYS = (
    *("first_weights", "first_offset", "second_weights", "second_offset"),
    *("gain", "penalty", "correlations"),
)
_LEAST = 0.02
"""Correlation where nothing was found in validation people: scores keep an order, all near 0."""
_PRIOR_PEOPLE = 20
"""Weight of training people, in people, in the mean and the variance of a variate."""
_LOG_SCALES = (-2.0, 6.0)
"""Between which the scale of the cosine lies."""
_PARTS = (5, 2)
"""Of the validation people, where there are few and where there are 300 or more: each part is
scored by what the others say."""
_AT_MOST = 1000
"""Validation people who are scored with one another to choose."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DensityRatio:
    """Scores of two sides' embeddings in nats, for any index that takes inner products.

    With variates u and v: sum(gain u v - penalty (u^2 + v^2)) + constant.
    """

    first: str
    """One side, for example "brain"."""
    second: str
    """The other, for example "dna"."""
    kind: str
    """"normal": variates are canonical, gain and penalty follow from their correlations. "cosine":
    variates are the embeddings themselves, gain is one scale and there is no penalty."""
    n_people: int
    """Validation people."""
    information: float
    """Lower bound on what the score tells about new people, in nats; about 0: nothing."""
    constant: float
    """In nats."""
    first_weights: np.ndarray
    """float64 [o, k]: to variates of about unit variance in people who were not trained on."""
    first_offset: np.ndarray
    """float64 [k]: subtracted after the weights."""
    second_weights: np.ndarray
    """float64 [o, k]."""
    second_offset: np.ndarray
    """float64 [k]."""
    gain: np.ndarray
    """float64 [k], 0 or more."""
    penalty: np.ndarray
    """float64 [k]."""
    correlations: np.ndarray
    """float64 [k]: of canonical variates in validation people, shrunk, falling; else empty."""

    @classmethod
    def fit(cls, training: Mapping[str, np.ndarray], validation: Mapping[str, np.ndarray]) -> Self:
        """Fit on the embeddings of people who have both sides.

        Args:
            training: [t, o] a side, row-paired; the order of the sides names first and second.
            validation: [v, o] a side, row-paired, v >= 4; people whom no weights were fitted on.

        Raises:
            UserError: Not two sides, rows that are no pairs, or too few people.
        """
        if len(training) != 2 or set(training) != set(validation):
            raise UserError(
                f"embeddings of {', '.join(training) or 'no side'} and, to validate, of "
                f"{', '.join(validation) or 'no side'}: expected the same two sides."
            )
        first, second = training
        trained = [np.asarray(training[side], np.float64) for side in (first, second)]
        held_out = [np.asarray(validation[side], np.float64) for side in (first, second)]
        cca, rho = choose_cca(*trained, *held_out)
        with one_thread():
            normal = _Normal.of(cca.weights_x, cca.weights_y, trained, held_out)
            counts = sorted({min(2**i, len(rho)) for i in range(12)})
            bounds = {k: _bound(normal.first(k)) for k in counts}
            k = max(counts, key=lambda count: bounds[count])
            cosine = _Cosine(held_out[0], held_out[1])
            of_cosine = _bound(cosine)
            chosen = cosine if of_cosine > bounds[k] else normal.first(k)
            terms = chosen.terms(np.arange(len(held_out[0])))
            weights = [np.eye(side.shape[1]) for side in held_out]
            if chosen is not cosine:
                weights = [cca.weights_x[:, :k], cca.weights_y[:, :k]]
        return cls(
            first=first,
            second=second,
            kind="cosine" if chosen is cosine else "normal",
            n_people=len(held_out[0]),
            information=float(max(of_cosine, bounds[k])),
            constant=terms.constant,
            first_weights=weights[0] / terms.scale_u,
            first_offset=terms.mean_u / terms.scale_u,
            second_weights=weights[1] / terms.scale_v,
            second_offset=terms.mean_v / terms.scale_v,
            gain=terms.gain,
            penalty=terms.penalty,
            correlations=terms.correlations,
        )

    def variates(self, side: str, embeddings: np.ndarray) -> np.ndarray:
        """Variates [n, k] of one side's embeddings [n, o].

        Raises:
            UserError: A side that is neither `first` nor `second`, or another width.
        """
        if side not in (self.first, self.second):
            raise UserError(f"side '{side}': expected '{self.first}' or '{self.second}'.")
        own = "first" if side == self.first else "second"
        weights, offset = getattr(self, f"{own}_weights"), getattr(self, f"{own}_offset")
        embeddings = np.asarray(embeddings, np.float64)
        if embeddings.ndim != 2 or embeddings.shape[1] != len(weights):
            raise UserError(
                f"{side} embeddings have shape {embeddings.shape}: expected (people, "
                f"{len(weights)}), made by the model that the density ratio was fitted on."
            )
        return embeddings @ weights - offset

    def vectors(self, side: str, embeddings: np.ndarray) -> np.ndarray:
        """Vectors whose inner product with the other side's is the score, for either direction.

        Args:
            side: `first` or `second`.
            embeddings: [n, o].

        Returns:
            float32 [n, k + 2], not of unit norm and not to be normalised. Of the last two columns
            one is 1 and one is what the person's own variates add to all their scores.

        Raises:
            UserError: As `variates`.
        """
        variates = self.variates(side, embeddings)
        own = self.constant / 2 - variates**2 @ self.penalty
        last = [own, np.ones(len(variates))]
        if side == self.second:
            last.reverse()
        columns = [variates * np.sqrt(self.gain), *(column[:, None] for column in last)]
        return np.concatenate(columns, axis=1).astype(np.float32)

    def scores(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Log density ratio in nats of every embedding [n, o] with every one [m, o], [n, m]."""
        u, v = self.variates(self.first, first), self.variates(self.second, second)
        return _scores(u, v, self.gain, self.penalty, self.constant)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, and under "arrays" the NumPy arrays (for safetensors)."""
        return {
            **{name: getattr(self, name) for name in ("first", "second", "kind", "n_people")},
            "information": self.information,
            "constant": self.constant,
            "arrays": {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The density ratio that `to_dict` described."""
        scalars = {key: value for key, value in values.items() if key != "arrays"}
        return cls(**scalars, **values["arrays"])


# -- two ways to a density ratio -------------------------------------------------------------------


class _Terms(NamedTuple):
    """What makes scores of raw variates."""

    mean_u: np.ndarray
    scale_u: np.ndarray
    mean_v: np.ndarray
    scale_v: np.ndarray
    gain: np.ndarray
    penalty: np.ndarray
    constant: float
    correlations: np.ndarray


@dataclass(frozen=True, eq=False)
class _Normal:
    """Canonical variates of validation people, taken as normal."""

    u: np.ndarray
    v: np.ndarray
    moments: tuple[np.ndarray, ...]
    """Of training people: mean and mean square of each column of u, then of v."""

    @classmethod
    def of(
        cls,
        weights_x: np.ndarray,
        weights_y: np.ndarray,
        trained: list[np.ndarray],
        held_out: list[np.ndarray],
    ) -> "_Normal":
        known: list[np.ndarray] = []
        for values, weights in zip(trained, (weights_x, weights_y), strict=True):
            variates = values @ weights
            known += [variates.mean(0), (variates**2).mean(0)]
        return cls(held_out[0] @ weights_x, held_out[1] @ weights_y, tuple(known))

    def first(self, k: int) -> "_Normal":
        return _Normal(self.u[:, :k], self.v[:, :k], tuple(m[:k] for m in self.moments))

    def terms(self, people: np.ndarray) -> _Terms:
        u, v = self.u[people], self.v[people]
        mean_u, scale_u = _location_scale(u, *self.moments[:2])
        mean_v, scale_v = _location_scale(v, *self.moments[2:])
        rho = held_out_correlations(u, v)
        if not rho.any():
            rho = np.full(len(rho), _LEAST)
        rest = 1 - rho**2
        constant = float(-0.5 * np.log(rest).sum())
        gain, penalty = rho / rest, rho**2 / (2 * rest)
        return _Terms(mean_u, scale_u, mean_v, scale_v, gain, penalty, constant, rho)


@dataclass(frozen=True, eq=False)
class _Cosine:
    """Unit rows of validation people, taken as they are."""

    u: np.ndarray
    v: np.ndarray

    def terms(self, people: np.ndarray) -> _Terms:
        """The scale with the greatest bound, and the constant that gives non-pairs a mean of 1."""
        from scipy.optimize import minimize_scalar

        o = self.u.shape[1]
        people = people[:_AT_MOST]
        cosine = self.u[people] @ self.v[people].T
        # The bound is concave in the scale.
        found = minimize_scalar(
            lambda log_scale: -_gained(np.exp(log_scale) * cosine).mean(),
            bounds=_LOG_SCALES,
            method="bounded",
            options={"xatol": 0.02},
        )
        scale = float(np.exp(found.x))
        away = scale * cosine[~np.eye(len(people), dtype=bool)]
        constant = -float(np.logaddexp.reduce(away) - np.log(len(away)))
        zero, one = np.zeros(o), np.ones(o)
        return _Terms(zero, one, zero, one, scale * one, zero, constant, np.zeros(0))


def _location_scale(
    held_out: np.ndarray, mean_trained: np.ndarray, square_trained: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of variates; training people count as a few, for their fit."""
    n, prior = len(held_out), _PRIOR_PEOPLE
    mean = (held_out.sum(0) + prior * mean_trained) / (n + prior)
    square = ((held_out**2).sum(0) + prior * square_trained) / (n + prior)
    variance = square - mean**2
    return mean, np.sqrt(np.where(variance > 0, variance, 1.0))


def _scores(
    u: np.ndarray, v: np.ndarray, gain: np.ndarray, penalty: np.ndarray, constant: float
) -> np.ndarray:
    scores = (u * gain) @ v.T
    scores += (constant - u**2 @ penalty)[:, None]
    scores -= v**2 @ penalty
    return scores


def _gained(scores: np.ndarray) -> np.ndarray:
    """The log of n less the InfoNCE of each pair, [n]."""
    rows, columns = (_log_sum_exp(s) for s in (scores, scores.T))
    return np.log(len(scores)) + scores.diagonal() - (rows + columns) / 2


def _log_sum_exp(scores: np.ndarray) -> np.ndarray:
    most = scores.max(axis=1)
    return most + np.log(np.exp(scores - most[:, None]).sum(axis=1))


def _bound(way: _Normal | _Cosine) -> float:
    """Mean of `_gained` over validation people, each scored by terms from the other parts."""
    n = min(len(way.u), _AT_MOST)
    parts = np.arange(n) % min(_PARTS[int(n >= 300)], n // 2)
    total = 0.0
    for part in range(parts.max() + 1):
        t = way.terms(np.flatnonzero(parts != part))
        u, v = (way.u[:n] - t.mean_u) / t.scale_u, (way.v[:n] - t.mean_v) / t.scale_v
        total += _gained(_scores(u, v, t.gain, t.penalty, t.constant))[parts == part].sum()
    return total / n
