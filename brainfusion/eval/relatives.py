"""Relatives whom nobody named: test people whose DNA is as alike as a sibling's to one in training.

A brain that resembles a sibling's and DNA that resembles the same sibling's find each other without
any link in a person, so a test is only one of strangers if families are known and kept whole. Where
they are not, the DNA says so: in whitened principal components the correlation of two strangers is
about 0 with standard deviation 1 / sqrt(k), that of full siblings 0.5, of one person's two samples
1 (the whitened components are a genomic relationship matrix in which linked columns count once;
Yang et al. 2011, Am. J. Hum. Genet. 88, on the matrix).

Shape legend: n people, e columns, k components.
"""

from typing import Any

import numpy as np

from brainfusion.eval.components import principal_scores, standardised
from brainfusion.runtime.threads import one_thread

LEAST_CORRELATION = 0.4
"""Full siblings have about 0.5, somewhat less where few people or genes were measured."""
LEAST_DEVIATIONS = 4.5
"""Standard deviations of strangers above 0 that a correlation has to be in any case."""
LEAST_SHARE = 0.05
"""Of the test people: fewer than this beyond chance are not worth a warning."""
_MOST_DEVIATIONS = 1.5
"""Scores are cut there: a rare haplotype that two strangers share would make them relatives."""
MAX_COMPONENTS = 256


def alike_in_training(dna: np.ndarray, train: np.ndarray, test: np.ndarray) -> dict[str, Any]:
    """Test people who have somebody in training with DNA as alike as that of close relatives.

    Args:
        dna: [n, e], finite, of everyone.
        train: Row numbers of training people.
        test: Row numbers of test people.

    Returns:
        `n_test`; `n_alike`, whose correlation with somebody in training is above `correlation`;
        `n_by_chance`, with whom somebody's is as far below 0, where only chance leads; and `warns`:
        whether the former are many more than the latter.
    """
    alike = opposite = 0
    with one_thread():
        scores = _whitened(dna)
        limit = max(LEAST_CORRELATION, LEAST_DEVIATIONS / max(scores.shape[1], 1) ** 0.5)
        for start in range(0, len(test), 512):
            r = scores[test[start : start + 512]] @ scores[train].T
            alike += int((r > limit).any(axis=1).sum())
            opposite += int((r < -limit).any(axis=1).sum())
    return {
        "n_test": len(test),
        "n_alike": alike,
        "n_by_chance": opposite,
        "correlation": limit,
        "n_components": scores.shape[1],
        "warns": alike > LEAST_SHARE * len(test) + 3 * opposite,
    }


def _whitened(dna: np.ndarray) -> np.ndarray:
    """Principal components of about unit variance [n, k], float32, each person's of length 1."""
    # What carries the last thousandth of the variance is rounding or noise, not inheritance.
    scores = principal_scores(standardised(dna), min(MAX_COMPONENTS, len(dna) // 4), share=0.999)
    scores = np.clip(scores / scores.std(axis=0), -_MOST_DEVIATIONS, _MOST_DEVIATIONS)
    size = np.linalg.norm(scores, axis=1, keepdims=True)
    return (scores / np.where(size > 0, size, 1)).astype(np.float32)
