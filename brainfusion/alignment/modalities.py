"""Modalities, the sides that they belong to, and the pairs of them that a loss is made of.

A side is what comes before the first underscore of a name: "brain_brainlm" and "brain_brainjepa"
are of the side "brain", "dna" is a side of its own.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.logs import say

LEAST_TRAINING = 8
"""Training people whom two modalities must share to be contrasted."""
LEAST_VALIDATION = 4
"""Validation people whom two modalities must share to be measured."""


class ModalityPair(NamedTuple):
    """Two modalities that are contrasted over the people who have both."""

    first: str
    second: str
    weight: float
    """Of its loss in the mean over pairs."""
    across: bool
    """They are of different sides: retrieval between them is what is measured."""

    @property
    def name(self) -> str:
        """As in `AlignConfig.pair_weights`."""
        return f"{self.first}-{self.second}"


def sides_of(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The modalities of each side, in their order.

    Modalities that would all be of one side are each a side of their own.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        side = name.split("_", 1)[0]
        found[side] = (*found.get(side, ()), name)
    if len(found) == 1:
        return {name: (name,) for name in next(iter(found.values()))}
    return found


def modality_name(side: str, name: str) -> str:
    """What one of several modalities of a side is called: evo2+caduceus is dna_evo2_caduceus."""
    return f"{side}_{re.sub('[^0-9A-Za-z]+', '_', name)}"


def modality_pairs(
    present: Mapping[str, np.ndarray], weights: Sequence[str]
) -> tuple[ModalityPair, ...]:
    """The pairs of modalities that share enough training people to be contrasted.

    Args:
        present: bool [t] a modality: which training people have it.
        weights: "first-second=number" each; other pairs have the weight 1.

    Raises:
        UserError: A weight of a pair that there is not or that is no number of 0 or more; a
            modality that is in no pair; or no pair of different sides.
    """
    sides = {name: side for side, names in sides_of(present).items() for name in names}
    given = _parsed(weights, list(present))
    pairs, few, counts = [], [], []
    for first, second in combinations(present, 2):
        across = sides[first] != sides[second]
        n_shared = int((present[first] & present[second]).sum())
        pair = ModalityPair(first, second, given.get(frozenset((first, second)), 1.0), across)
        counts.append(n_shared if across else 0)
        if pair.weight == 0.0:
            continue
        (pairs if n_shared >= LEAST_TRAINING else few).append(pair)
    if not any(pair.across for pair in pairs):
        if given and max(counts) >= LEAST_TRAINING:
            raise UserError(
                "pair_weights leave no pair of modalities of different sides to learn from: "
                "expected a weight above 0 for at least one."
            )
        raise UserError(
            f"{max(counts)} train people with both modalities: expected at least "
            f"{LEAST_TRAINING}. Check that both were made from the same cohort."
        )
    used = {name for pair in pairs for name in (pair.first, pair.second)}
    if alone := [name for name in present if name not in used]:
        raise UserError(
            f"modality '{alone[0]}' shares fewer than {LEAST_TRAINING} training people with every "
            "other, or has no pair of a weight above 0: leave it out, or check its ids."
        )
    for pair in few:
        say(
            f"{pair.first} and {pair.second} share fewer than {LEAST_TRAINING} training people: "
            "this pair is left out of the loss."
        )
    return tuple(pairs)


def _parsed(weights: Sequence[str], names: list[str]) -> dict[frozenset[str], float]:
    known = [f"{first}-{second}" for first, second in combinations(names, 2)]
    found: dict[frozenset[str], float] = {}
    for text in weights:
        pair, _, number = text.partition("=")
        both = frozenset(pair.split("-"))
        if len(both) != 2 or not both <= set(names):
            raise UserError(
                f"pair_weights: '{pair}' is no pair of modalities. {nearest(pair, known)}"
            )
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not 0.0 <= weight < float("inf"):
            raise UserError(
                f"pair_weights: '{text}': expected a number of 0 or more after the =, such as "
                f"{pair}=0.5."
            )
        if both in found:
            raise UserError(f"pair_weights: '{pair}' has two weights: expected one.")
        found[both] = weight
    return found


def side_mean(embedded: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray]) -> np.ndarray:
    """The embedding of a side: the mean of those of its modalities that a person has, of unit norm.

    Args:
        embedded: Unit rows of each modality, of the people who have it, in their order.
        present: bool [n] a modality, of everybody.

    Returns:
        float32 [n, o]; zeros for a person without any.
    """
    n, width = len(next(iter(present.values()))), next(iter(embedded.values())).shape[1]
    total = np.zeros((n, width), dtype=np.float32)
    for name, rows in embedded.items():
        total[present[name]] += rows
    if len(embedded) == 1:
        return total
    return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)
