"""Writes tests/goldens/cca_zoo_ridge.npz: what cca-zoo's RidgeCCA finds in two small views.

Needs cca-zoo, which no test needs; tests/goldens/README.md gives the command.
"""

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "goldens" / "cca_zoo_ridge.npz"
SHRINKAGE = {"narrow": (0.0, 0.0), "ridged": (0.2, 0.6), "wide": (0.3, 0.5)}
"""Case -> cca-zoo's shrinkage of each view towards the identity."""


def views(case: str) -> tuple[np.ndarray, np.ndarray]:
    """Two views [40, 6] and [40, 5], or [40, 60] and [40, 50] for "wide", with shared latents."""
    rng = np.random.default_rng(3)
    widths = (60, 50) if case == "wide" else (6, 5)
    latents = rng.standard_normal((40, 3))
    first, second = (
        latents @ rng.standard_normal((3, width)) + rng.standard_normal((40, width)) + 2.0
        for width in widths
    )
    return first, second


def main() -> None:
    """Fit every case and store weights [d, 3] and the correlations [3] of the variates."""
    import cca_zoo
    from cca_zoo.linear import RidgeCCA

    found: dict[str, np.ndarray] = {"version": np.array(cca_zoo.__version__)}
    for case, shrinkage in SHRINKAGE.items():
        x, y = views(case)
        model = RidgeCCA(n_components=3, shrinkage=list(shrinkage)).fit([x, y])
        weights = [np.asarray(w) for w in model.weights_]
        u, v = ((z - z.mean(0)) @ w for z, w in zip((x, y), weights, strict=True))
        found |= {f"{case}.x": weights[0], f"{case}.y": weights[1]}
        found[f"{case}.correlations"] = np.array(
            [np.corrcoef(a, b)[0, 1] for a, b in zip(u.T, v.T, strict=True)]
        )
    np.savez(GOLDEN, **found)


if __name__ == "__main__":
    main()
