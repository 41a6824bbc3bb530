"""What a trained alignment has to beat: ridge-CCA, the plain connectome, and covariates alone.

Ridge-CCA is fitted in closed form and scored by the density ratio of its canonical variates
(`data.oracle.pmi_scores`), which is the best score there is for linear-Gaussian pairs; the cosine
of the same variates finds a third as many. Correlations in the training people are always high, so
everything that is chosen or estimated beyond the directions comes from the validation people.

Sources: Vinod 1976 and Leurgans et al. 1993 (ridge CCA); Barlow et al. 1972 (isotonic regression).

Shape legend: n people, d and e widths, p parcels, t TRs, k components, q covariates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from brainfusion.data.oracle import pmi_scores
from brainfusion.data.recordings import Recordings
from brainfusion.eval.retrieval.metrics import metrics_from_scores
from brainfusion.eval.statistics import Labels
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.threads import one_thread

N_COMPONENTS = (1, 2, 4, 8, 16, 32, 64)
N_PCS = (16, 32, 64, 128, 256)
RIDGES = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
COVARIATE_PENALTIES = tuple(np.logspace(-2, 5, 8))

_RHO_RANGE = (0.02, 0.98)


def connectome(recordings: Recordings, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Pearson correlations of parcels over time, as Fisher's z.

    Args:
        recordings: [p, t] each.
        rows: Which, by row of the index.

    Returns:
        float32 [n, p (p - 1) / 2], the upper triangle row by row. Pairs with a missing or constant
        parcel are NaN: `fill_missing` gives them the mean of the training people.
    """
    first, second = np.triu_indices(recordings.n_parcels, 1)
    out = np.empty((len(rows), len(first)), np.float32)
    with one_thread():
        for i, row in enumerate(rows):
            bold = recordings.read(int(row)).astype(np.float64)
            bold -= bold.mean(axis=1, keepdims=True)
            size = np.sqrt((bold**2).sum(axis=1, keepdims=True))
            # A constant parcel has no correlation; what is left of it is rounding.
            scale = np.nanmax(size, initial=0.0)
            bold /= np.where(size > 1e-7 * scale, size, np.nan)
            z = (bold @ bold.T)[first, second]
            out[i] = np.arctanh(np.clip(z, -0.999999, 0.999999))
    return out


def fill_missing(values: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Put the training people's column mean where a value [n, d] is NaN.

    Args:
        values: [n, d].
        train: bool [n].

    Returns:
        A copy without NaN. A column that no training person has becomes 0 for everyone.
    """
    known = np.isfinite(values)
    if known.all():
        return values
    counts = known[train].sum(axis=0)
    means = np.where(known[train], values[train], 0).sum(axis=0, dtype=np.float64)
    means = (means / np.maximum(counts, 1)).astype(values.dtype)
    return np.where(counts == 0, means, np.where(known, values, means))


class RidgeCCA:
    """Canonical correlation analysis of two PCA-reduced views, with ridge.

    A grid of PCs, ridges and numbers of components is fitted on the training people; the best AUC
    of the density ratio in the validation people wins. A ridge of 1 adds the mean variance of the
    kept PCs to each.
    """

    def __init__(
        self,
        n_components: Sequence[int] = N_COMPONENTS,
        n_pcs: Sequence[int] = N_PCS,
        ridge: Sequence[float] = RIDGES,
    ) -> None:
        self.n_components, self.n_pcs, self.ridge = n_components, n_pcs, ridge

    def fit(
        self,
        x_train: np.ndarray,
        y_train: np.ndarray,
        x_validation: np.ndarray,
        y_validation: np.ndarray,
    ) -> "RidgeCCA":
        """Fit on pairs of rows; sets `rho_`, `chosen_`, `validation_auc_`.

        Args:
            x_train: [n, d].
            y_train: [n, e], the same people.
            x_validation: [v, d], v >= 3.
            y_validation: [v, e].
        """
        if len(x_train) != len(y_train) or len(x_validation) != len(y_validation):
            raise UserError("ridge-CCA needs pairs: row i of x and row i of y are one person.")
        if len(x_validation) < 3:
            raise UserError(
                f"ridge-CCA got {len(x_validation)} validation people: expected 3 or more to "
                "choose its ridge with; make a larger validation split."
            )
        with one_thread():
            self._search(x_train, y_train, x_validation, y_validation)
        return self

    def _search(
        self, x_train: np.ndarray, y_train: np.ndarray, x_val: np.ndarray, y_val: np.ndarray
    ) -> None:
        self._x, self._y = _pca(x_train, max(self.n_pcs)), _pca(y_train, max(self.n_pcs))
        x_pcs, y_pcs = self._x.transform(x_train), self._y.transform(y_train)
        x_held, y_held = self._x.transform(x_val), self._y.transform(y_val)
        cross = x_pcs.T @ y_pcs / len(x_pcs)
        best = -1.0
        tried: set[tuple[int, int]] = set()
        for n_pcs in self.n_pcs:
            a, b = min(n_pcs, x_pcs.shape[1]), min(n_pcs, y_pcs.shape[1])
            if (a, b) in tried:
                continue
            tried.add((a, b))
            for ridge in self.ridge:
                whiten_x, whiten_y = self._x.whitening(a, ridge), self._y.whitening(b, ridge)
                left, _, right = np.linalg.svd(
                    whiten_x[:, None] * cross[:a, :b] * whiten_y, full_matrices=False
                )
                to_u, to_v = whiten_x[:, None] * left, whiten_y[:, None] * right.T
                u, v = x_held[:, :a] @ to_u, y_held[:, :b] @ to_v
                u_at, v_at = _location_scale(u), _location_scale(v)
                u, v = (u - u_at[0]) / u_at[1], (v - v_at[0]) / v_at[1]
                rho = held_out_correlations(u, v)
                for k in self.n_components:
                    k = min(k, len(rho))
                    auc = _mean_auc(pmi_scores(u[:, :k], v[:, :k], rho[:k]))
                    if auc > best + 1e-12:
                        best = auc
                        self._to_u, self._to_v = to_u[:, :k], to_v[:, :k]
                        self._u_at, self._v_at = u_at[:, :k], v_at[:, :k]
                        self.rho_ = rho[:k]
                        self.chosen_ = {"n_pcs": n_pcs, "ridge": ridge, "n_components": k}
        self.validation_auc_ = best

    def embed(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Canonical variates [n, k] and [m, k], of unit variance in the validation people."""
        u = self._x.transform(x)[:, : len(self._to_u)] @ self._to_u
        v = self._y.transform(y)[:, : len(self._to_v)] @ self._to_v
        return (u - self._u_at[0]) / self._u_at[1], (v - self._v_at[0]) / self._v_at[1]

    def scores(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Density ratio in nats of every x with every y, [n, m]."""
        return pmi_scores(*self.embed(x, y), self.rho_)


def held_out_correlations(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Canonical correlations [k] from people that the directions were not fitted on.

    Fisher's adjustment takes out what chance gives in so few people; the training order says that
    they should fall, so the squares are made to (isotonic regression). Negative ones mean nothing
    was found; a floor of 0.02 keeps an order among scores.
    """
    from scipy.optimize import isotonic_regression

    falling = isotonic_regression(_adjusted_square(u, v), increasing=False).x
    return np.clip(np.sqrt(np.maximum(falling, 0)), *_RHO_RANGE)


def covariate_scores(
    brain: np.ndarray, dna: np.ndarray, covariates: np.ndarray, labels: Sequence[str]
) -> np.ndarray:
    """Match test people by the covariates that each modality predicts; no other link is used.

    Ridge from each modality to each covariate on the training people, its penalty by the error in
    the validation people; predictions are standardised by those of the training people and weighted
    by how well both modalities predict the covariate in the validation people (0: not at all, or
    any direction that the modalities share would pass for a covariate); cosine.

    Args:
        brain: [n, d].
        dna: [n, e].
        covariates: [n, q], no NaN.
        labels: "train", "validation" or "test" of each person.

    Returns:
        Scores of the test people's brains with their DNA, [test, test].
    """
    train, validation, test = (np.array(labels) == s for s in ("train", "validation", "test"))
    spread = covariates[train].std(axis=0)
    wanted = (covariates - covariates[train].mean(axis=0)) / np.where(spread > 0, spread, 1)
    sides, skill = [], []
    with one_thread():
        for view in (brain, dna):
            pca = _pca(view[train], min(int(train.sum()), view.shape[1]))
            pcs = pca.transform(view)
            moments = pcs[train].T @ wanted[train] / train.sum()
            error, fits = [], []
            for penalty in COVARIATE_PENALTIES:
                fit = pcs @ (moments / (pca.variance + penalty * pca.variance.mean())[:, None])
                fits.append(fit)
                error.append(((fit - wanted)[validation] ** 2).mean(axis=0))
            best = np.argmin(error, axis=0)
            fit = np.stack([fits[b][:, j] for j, b in enumerate(best)], axis=1)
            scale = fit[train].std(axis=0)
            sides.append(fit / np.where(scale > 0, scale, 1))
            skill.append(np.maximum(_adjusted_square(fit[validation], wanted[validation]), 0))
    weight = (skill[0] * skill[1]) ** 0.25
    brain_side, dna_side = (_unit(side[test] * weight) for side in sides)
    return brain_side @ dna_side.T


def baseline_rows(
    views: Mapping[str, np.ndarray],
    dna: np.ndarray,
    *,
    labels: Sequence[str],
    covariates: np.ndarray | None = None,
    families: Labels | None = None,
    blocks: Labels | None = None,
    n_permutations: int = 1000,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Retrieval of the test people by ridge-CCA of each brain view, and by covariates alone.

    Args:
        views: Name -> brain features [n, d]: an encoder's, an untrained encoder's, connectomes.
            NaN are filled from the training people.
        dna: DNA features, flattened, [n, e].
        labels: "train", "validation" or "test" of each person; others are not used.
        covariates: Of `design.covariate_matrix`, [n, q]; predicted from the first view and DNA.
        families: Family of each person.
        blocks: Exchangeability blocks, for example the site.
        n_permutations: As in `retrieval_metrics`.
        n_bootstrap: As in `retrieval_metrics`.
        seed: Of both.

    Returns:
        Rows with `name` ("ridge-CCA, " and the view's, or "covariates only"), the numbers of
        `retrieval_metrics` for brain to DNA, and of the other direction `auc_dna_to_brain` and
        `p_value_dna_to_brain`; ridge-CCA adds `chosen` and `rho`.
    """
    split = np.array(labels)
    train, validation, test = (split == name for name in ("train", "validation", "test"))
    pick = np.flatnonzero(test)
    about: dict[str, Any] = {
        "families": None if families is None else [list(families)[i] for i in pick],
        "blocks": None if blocks is None else [list(blocks)[i] for i in pick],
        "n_permutations": n_permutations,
        "n_bootstrap": n_bootstrap,
        "seed": seed,
    }
    rows = []
    filled = {name: fill_missing(view, train) for name, view in views.items()}
    for name, view in filled.items():
        model = RidgeCCA().fit(view[train], dna[train], view[validation], dna[validation])
        row = _row(f"ridge-CCA, {name}", model.scores(view[test], dna[test]), about)
        rows.append(row | {"chosen": model.chosen_, "rho": model.rho_.tolist()})
    if covariates is not None and covariates.shape[1]:
        first = next(iter(filled.values()))
        scores = covariate_scores(first, dna, covariates, labels)
        rows.append(_row("covariates only", scores, about))
    return rows


@dataclass(frozen=True, eq=False)
class _PCA:
    mean: np.ndarray
    axes: np.ndarray
    """[d, r]."""
    variance: np.ndarray
    """[r], falling."""

    def transform(self, x: np.ndarray) -> np.ndarray:
        return (x - self.mean) @ self.axes

    def whitening(self, n: int, ridge: float) -> np.ndarray:
        variance = self.variance[:n]
        return 1 / np.sqrt(variance + ridge * variance.mean())


def _pca(x: np.ndarray, n_components: int) -> _PCA:
    """Principal components by the smaller Gram matrix; those without variance are left out."""
    x = np.asarray(x, np.float64)
    mean = x.mean(axis=0)
    x = x - mean
    wide = x.shape[1] > len(x)
    values, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
    values, vectors = values[::-1], vectors[:, ::-1]
    n_kept = min(n_components, int((values > 1e-9 * max(values[0], 0)).sum()))
    if not n_kept:
        raise UserError("the training people all have the same features: nothing can be aligned.")
    values, vectors = values[:n_kept], vectors[:, :n_kept]
    axes = x.T @ (vectors / np.sqrt(values)) if wide else vectors
    return _PCA(mean, axes, values / len(x))


def _adjusted_square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Squared correlation of each column pair [k], less what chance gives; keeps its sign."""
    u, v = u - u.mean(axis=0), v - v.mean(axis=0)
    size = np.sqrt((u**2).sum(axis=0) * (v**2).sum(axis=0))
    r = np.divide((u * v).sum(axis=0), size, out=np.zeros(len(size)), where=size > 0)
    return np.sign(r) * np.maximum(r**2 - (1 - r**2) / max(len(u) - 2, 1), 0)


def _unit(values: np.ndarray) -> np.ndarray:
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def _location_scale(values: np.ndarray) -> np.ndarray:
    spread = values.std(axis=0)
    return np.stack([values.mean(axis=0), np.where(spread > 0, spread, 1)])


def _mean_auc(scores: np.ndarray) -> float:
    """AUC of the diagonal, mean of both directions; ties count half."""
    own = np.diag(scores)
    wins = sum(
        (own[:, None] > s).sum() + 0.5 * (own[:, None] == s).sum() for s in (scores, scores.T)
    )
    n = len(scores)
    return float((wins - n) / (2 * n * (n - 1)))


def _row(name: str, scores: np.ndarray, about: dict[str, Any]) -> dict[str, Any]:
    found = metrics_from_scores(scores, **about)
    other = found["gallery_to_query"]
    return {
        "name": name,
        **found["query_to_gallery"],
        "auc_dna_to_brain": other["auc"],
        "p_value_dna_to_brain": other.get("p_value"),
    }
