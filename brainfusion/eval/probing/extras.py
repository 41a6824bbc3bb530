"""What else a probe does: rows and columns that cost time, and which names they may have."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from brainfusion.runtime.errors import UserError, nearest

CONFOUNDS_ONLY = "confounds only"
"""The name of the row without any features."""


@dataclass(frozen=True, kw_only=True)
class Extras:
    """Further rows, and columns of rows, that cost time."""

    fusion: Sequence[Sequence[str]] = ()
    """Names of features to join by late fusion (`eval.probing.stacking`), a row each."""
    pca: Sequence[str] = ()
    """Features to probe once more by their leading principal components."""
    n_pcs: int = 128
    """How many; at most half of the people in the smallest training set."""
    neighbours: bool = False
    """Whether all features are probed by k nearest neighbours as well."""
    learning_curve: Sequence[float] = ()
    """Shares of the training people to learn from, above 0 and below 1."""
    rechoose: bool = False
    """Whether the penalty is chosen again for each permutation of labels, as for numbers."""
    on_confounds: bool = field(default=True)
    """Whether fusion, too, gets a row with the confounds taken out."""
    compare: Sequence[tuple[str, str]] = ()
    """Pairs of rows, by name: is the first better than the second (`eval.probing.differences`)?"""


def check_extras(extras: Extras, named: Collection[str]) -> None:
    """Refuse what there are no features for.

    Raises:
        UserError: An unknown name, a number or a share out of range.
    """
    for name in (*extras.pca, *(name for names in extras.fusion for name in names)):
        if name not in named:
            raise UserError(f"'{name}' is no name of features. {nearest(name, list(named))}")
    for names in extras.fusion:
        if len(set(names)) != len(names) or not 2 <= len(names) <= 6:
            raise UserError(
                f"fusion of {len(names)} features ({', '.join(names)}): expected 2 to 6 different "
                "ones."
            )
    if extras.n_pcs < 1:
        raise UserError(f"n_pcs={extras.n_pcs}: expected 1 or more.")
    for share in extras.learning_curve:
        if not 0 < share < 1:
            raise UserError(
                f"a learning curve at {share:g} of the training people: expected shares above 0 "
                "and below 1; the whole is there anyhow."
            )


def row_names(named: Sequence[str], confounds: Sequence[str], extras: Extras) -> list[str]:
    """The representations that get rows, but for those of principal components."""
    names = [*named, *(" + ".join(names) for names in extras.fusion)]
    if confounds:
        names += [CONFOUNDS_ONLY, *(f"{name} | confounds" for name in names)]
    return [*names, *(f"{name}, kNN" for name in named if extras.neighbours)]
