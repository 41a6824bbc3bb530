"""Projectors that start as ridge CCA scored by the density ratio, as nearly as they can.

A projector is Linear, GELU, Dropout, Linear, LayerNorm, and its embedding has unit norm. Two hidden
units with inputs z and -z give, with the exact GELU,

    GELU(z) - GELU(-z) = z        GELU(z) + GELU(-z) = z erf(z / sqrt 2) ~ sqrt(2 / pi) z^2

so one pair of units gives a canonical variate u and, for small z, its square. The log density ratio
of two people (`brainfusion.data.oracle`) is the inner product of u sqrt(g) and v sqrt(g), with
g = rho / (1 - rho^2), less g rho (u^2 + v^2) / 2. Unit norm takes g u^2 / 2 off, times the share of
the squared norm that pairs have in common; a column with what that is too much, which meets a
constant of the other side, gives it back. A constant that all share keeps the norm nearly the same.
All of it lies in directions whose columns add up to 0, from which LayerNorm takes nothing, and the
logit scale starts at the squared norm: the logits of the cosine are the density ratio and a
constant, and training starts where the closed form ends.

People on whom directions were fitted look more alike in them than anyone else will. So training
sees, in place of a person's own variates, those of directions fitted without that person
(`Start.inputs`); what it then learns about variates holds for new people.

Hidden units that are left over are bends along single variates; they start with no effect.

Shape legend: n people, i inputs, k components, h hidden units, o width of the shared space.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from brainfusion.alignment.config import AlignConfig
from brainfusion.alignment.modalities import sides_of
from brainfusion.alignment.network import AlignmentModel, Inputs, n_people, take
from brainfusion.alignment.projector import Projector
from brainfusion.data.cca import CCA
from brainfusion.data.cca_choice import (
    N_COMPONENTS,
    cross_validated_cca,
    fold_of,
    held_out_correlations,
)
from brainfusion.data.multiset_cca import Directions, fit_multiset, out_of_fold
from brainfusion.runtime.logs import say

_BEND = 0.5
"""z is this times the variate: small enough for a square, large enough for float32."""
_SQUARE = math.sqrt(2 / math.pi) * _BEND**2 / math.sqrt(1 + _BEND**2)
"""Mean of z erf(z / sqrt 2) over standard normal variates: divides it to mean 1."""
_STEADY = 2.0
"""Squared constants of an embedding, in mean squared lengths of its weighted variates."""
_MEETING = 0.5
"""Squared constant that meets the other side's squares, in the same unit; a part of the former."""
_SLOPE, _FARTHEST = 1.5, 1.5
"""Of bends: slope, and the outermost knot in standard deviations of a variate."""
_LEAST = 0.02
"""Least correlation that a component starts with: with 0 it would not move."""
_LEAST_PEOPLE = 8
"""People whom two modalities must share for their correlations to be looked at."""


@dataclass(frozen=True, eq=False)
class _Part:
    """What a modality's projector is to give."""

    mean: np.ndarray
    """[i]."""
    weights: np.ndarray
    """[i, k]: to variates of about unit variance in new people."""
    loadings: np.ndarray
    """[k]: those of two modalities multiply to their correlation."""

    @property
    def gain(self) -> np.ndarray:
        """[k]: what a variate is multiplied with, squared; two modalities' multiply to g."""
        return self.loadings**2 / (1 - self.loadings**4)


@dataclass(frozen=True, eq=False)
class Start:
    """Where an alignment starts: found once, written into any model of the same widths."""

    inputs: dict[str, Inputs]
    """As given, but with variates of directions that were fitted without the person: train on
    these, and fit on these whatever is fitted on training people afterwards."""
    facts: dict[str, float]
    """For the summary: components, information in nats, ridges."""
    parts: dict[str, _Part]

    def write(self, model: AlignmentModel) -> None:
        """Put the start into the projectors and the logit scale; the rest stays as it is."""
        if not self.parts:
            return
        strength = max(float(part.gain.sum()) for part in self.parts.values())
        wanted = (1 + _STEADY) * strength
        scale = min(max(wanted, model.settings["min_scale"]), model.settings["max_scale"])
        # Where the scale may not rise far enough, variates are made smaller.
        share = min(1.0, scale / wanted)
        for place, (name, part) in enumerate(self.parts.items()):
            projector = model.projectors[name]
            assert isinstance(projector, Projector)
            basis = _balanced(
                part.weights.shape[1] + 1 + len(self.parts), model.settings["dim_out"]
            )
            _write(
                projector, part, place, basis, scale=scale, strength=share * strength, share=share
            )
        with torch.no_grad():
            model.log_scale.fill_(math.log(scale))
            if model.logit_bias is not None and len(self.parts) == 2:
                model.logit_bias.fill_(self._bias(model))

    def _bias(self, model: AlignmentModel) -> float:
        """With which SigLIP's logits are the log odds of a pair: non-pairs average 1 over n."""
        training = model.training
        model.eval()
        a, b = (model.embed(name, take(self.inputs[name], slice(1024))) for name in self.parts)
        model.train(training)
        logits = (a @ b.T * model.logit_scale).flatten()
        n = n_people(self.inputs[next(iter(self.parts))])
        return float(math.log(len(logits) / n) - torch.logsumexp(logits, 0))


def initialise(
    model: AlignmentModel,
    inputs: Mapping[str, Inputs],
    present: Mapping[str, np.ndarray],
    config: AlignConfig,
) -> dict[str, float]:
    """`find_start` and its `write` in one: in place, deterministic, without random numbers.

    Args:
        model: Gets the weights of every projector whose modality is a matrix of features.
        inputs: Conditioned features of the training people [n, i] a modality.
        present: bool [n] a modality: who has it; other rows are not looked at.
        config: For the widths.

    Returns:
        Facts for the run's summary.
    """
    start = find_start(inputs, present, config)
    start.write(model)
    return start.facts


def find_start(
    inputs: Mapping[str, Inputs],
    present: Mapping[str, np.ndarray],
    config: AlignConfig,
    *,
    groups: np.ndarray | None = None,
) -> Start:
    """Find where projectors start: ridge CCA of two modalities, multiset CCA of more.

    Ridges, the number of components and their correlations are chosen over folds of the training
    people. Modalities whose genes the model pools itself have no matrix to start from; they and
    those that share too few people with others keep the weights that they have.

    Args:
        inputs: Conditioned features of the training people [n, i] a modality.
        present: bool [n] a modality: who has it; other rows are not looked at.
        config: For the widths of the projectors.
        groups: int [n]: people of one group (one family) are held out together.
    """
    views = {
        name: x.detach().double().cpu().numpy()
        for name, x in inputs.items()
        if isinstance(x, Tensor)
    }
    folds = fold_of(len(next(iter(present.values()))), groups=groups)
    limit = min(config.dim_hidden // 2, config.dim_out - 2 - len(inputs))
    pairs = {}
    for first, second in _across(views):
        both = present[first] & present[second]
        if both.sum() >= _LEAST_PEOPLE and limit > 0:
            pairs[first, second] = cross_validated_cca(
                views[first][both],
                views[second][both],
                folds=fold_of(int(both.sum())) if len(views) > 2 else folds[both],
                n_components=sorted({min(k, limit) for k in N_COMPONENTS}),
            )
    names = [name for name in views if any(name in pair for pair in pairs)]
    if left_out := sorted(set(inputs) - set(names)):
        say(f"{', '.join(left_out)}: no closed form to start from, so projectors start at random.")
    if len(names) < 2:
        return Start(dict(inputs), {}, {})
    how = _ridges(names, pairs)
    joined = [(names.index(first), names.index(second)) for first, second in pairs]
    fitted = fit_multiset(
        [views[name] for name in names],
        [present[name] for name in names],
        ridges=[how[name] for name in names],
        n_components=max(len(rho) for _, rho in pairs.values()),
        joined=joined,
    )
    held_out = out_of_fold(
        [views[name] for name in names],
        [present[name] for name in names],
        fitted,
        ridges=[how[name] for name in names],
        folds=folds,
        joined=joined,
    )
    correlations = {}
    for i, j in joined:
        both = present[names[i]] & present[names[j]]
        correlations[i, j] = held_out_correlations(held_out[i][both], held_out[j][both])
    loadings = _loadings(len(names), correlations)
    parts, replaced = {}, dict(inputs)
    for i, name in enumerate(names):
        parts[name], variates = _unit(fitted[i], held_out[i], present[name], loadings[i])
        rows = _with_variates(views[name], present[name], parts[name], variates)
        replaced[name] = torch.from_numpy(rows).to(inputs[name])  # type: ignore[arg-type]
    found = [-0.5 * float(np.log1p(-(rho**2)).sum()) for rho in correlations.values()]
    facts = {
        "components": float(fitted[0].weights.shape[1]),
        "information": max(found),
        **{f"ridge_{name}": how[name] for name in names},
    }
    return Start(replaced, facts, parts)


# -- the closed form ------------------------------------------------------------------------------


def _across(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of modalities of different sides, whose retrieval is what counts.

    Two modalities of a side often share more with one another than with any of the other side
    (two models have read the same DNA), and would be all that a joint closed form finds.
    """
    side = {name: key for key, members in sides_of(names).items() for name in members}
    return [(a, b) for a, b in combinations(side, 2) if side[a] != side[b]]


def _ridges(names: list[str], pairs: Mapping[tuple[str, str], tuple[CCA, np.ndarray]]) -> dict:
    """Each modality's ridge, from the partner with which it shares most information."""
    found = {}
    for name in names:
        own = [(pair, cca, rho) for pair, (cca, rho) in pairs.items() if name in pair]
        pair, cca, _ = max(own, key=lambda one: -np.log1p(-(one[2] ** 2)).sum())
        found[name] = cca.ridge_x if pair[0] == name else cca.ridge_y
    return found


def _loadings(n: int, correlations: Mapping[tuple[int, int], np.ndarray]) -> np.ndarray:
    """One factor a component [n, k]: products approach the pairs' correlations (least squares)."""
    k = min(len(rho) for rho in correlations.values())
    table = {pair: np.maximum(rho[:k], _LEAST) for pair, rho in correlations.items()}
    loadings = np.tile(np.sqrt(np.mean(list(table.values()), axis=0)), (n, 1))
    for _ in range(50 if n > 2 else 0):
        for i in range(n):
            others = [
                (rho, loadings[b if a == i else a]) for (a, b), rho in table.items() if i in (a, b)
            ]
            above = sum(rho * other for rho, other in others)
            below = sum(other**2 for _, other in others)
            loadings[i] = np.clip(above / below, np.sqrt(_LEAST), 0.997)
    return loadings


def _unit(
    fitted: Directions, held_out: np.ndarray, has: np.ndarray, loadings: np.ndarray
) -> tuple[_Part, np.ndarray]:
    """Directions and held-out variates scaled so that the latter have mean 0 and variance 1."""
    k = len(loadings)
    mean, spread = held_out[has].mean(0), held_out[has].std(0)
    scale = np.where(spread > 1e-6, spread, 1.0)
    part = _Part(fitted.mean, fitted.weights[:, :k] / scale[:k], loadings)
    return part, ((held_out - mean) / scale)[:, :k]


def _with_variates(
    view: np.ndarray, has: np.ndarray, part: _Part, variates: np.ndarray
) -> np.ndarray:
    """The rows with other variates: moved along what goes with a variate in the people."""
    rows = view[has]
    own = (rows - part.mean) @ part.weights
    goes_with = np.linalg.lstsq(own, rows - part.mean, rcond=None)[0]
    found = view.copy()
    found[has] = rows + (variates[has] - own) @ goes_with
    return found


# -- into the weights -----------------------------------------------------------------------------


@torch.no_grad()
def _write(
    projector: Projector,
    part: _Part,
    place: int,
    basis: np.ndarray,
    *,
    scale: float,
    strength: float,
    share: float,
) -> None:
    """Put a part into a projector, the `place`-th of those that start so.

    Args:
        projector: Of the part's modality.
        part: What it is to give.
        place: Its number among those that start so.
        basis: [o, k + 1 + parts]: directions of the variates, of the constant that all share, and
            of the squares of each part.
        scale: Squared norm of the rows, about.
        strength: Mean squared length of the weighted variates; the constants go by it.
        share: What squared weights are multiplied with.
    """
    into, out, norm = (projector.layers[layer] for layer in (0, 3, 4))
    assert isinstance(into, nn.Linear)
    assert isinstance(out, nn.Linear)
    assert isinstance(norm, nn.LayerNorm)
    h, k = into.out_features, part.weights.shape[1]
    n_pairs = max(1, h // (4 * k))
    gain = share * part.gain
    meeting = _MEETING * strength
    steady = scale - gain.sum() - meeting
    # -- hidden units --------------------------------------------------------------------------
    up, shift = _BEND * part.weights.T, -_BEND * part.mean @ part.weights
    bends, at = _bends(part, h - 2 * k * n_pairs)
    weights = np.concatenate([*[up, -up] * n_pairs, bends])
    bias = np.concatenate([*[shift, -shift] * n_pairs, at])
    # -- what they give ------------------------------------------------------------------------
    common = (steady + (gain * part.loadings**2).sum()) / scale
    too_much = 0.5 * gain * (common - part.loadings**2) / math.sqrt(meeting)
    line = basis[:, :k] * np.sqrt(gain) / (_BEND * n_pairs)
    square = np.outer(basis[:, k + 1 + place], too_much) / (_SQUARE * n_pairs)
    given = np.concatenate(
        [*[square + line, square - line] * n_pairs, np.zeros((len(basis), len(bends)))], axis=1
    )
    level = basis[:, k] * math.sqrt(steady) - basis[:, k + 1 + place] * too_much.sum()
    others = [column for column in range(k + 1, basis.shape[1]) if column != k + 1 + place]
    level = level + basis[:, others].sum(axis=1) * math.sqrt(meeting)
    # LayerNorm finds unit variance and leaves it.
    size = math.sqrt(len(basis) / scale)
    for parameter, values in (
        *((into.weight, weights), (into.bias, bias)),
        *((out.weight, size * given), (out.bias, size * level)),
    ):
        parameter.copy_(torch.from_numpy(values))
    norm.weight.fill_(1.0)
    norm.bias.zero_()


def _balanced(n_columns: int, width: int) -> np.ndarray:
    """Orthonormal columns [width, n_columns] that each add up to 0 (cosines, DCT-II)."""
    place = (np.arange(width) + 0.5) / width
    return math.sqrt(2 / width) * np.cos(np.pi * np.outer(place, np.arange(1, n_columns + 1)))


def _bends(part: _Part, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights [n, i] and biases [n] of units that bend along one variate each, spread evenly."""
    unit = np.arange(n)
    component = unit % part.weights.shape[1]
    turn = unit // part.weights.shape[1]
    slope = _SLOPE * np.where(turn % 2, -1.0, 1.0)
    # Multiples of the golden ratio fill an interval evenly, however many there are.
    knot = _FARTHEST * (2 * ((turn // 2 + 0.5) * 0.6180339887 % 1) - 1)
    weights = slope[:, None] * part.weights.T[component]
    return weights, -slope * ((part.mean @ part.weights)[component] + knot)
