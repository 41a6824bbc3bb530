"""Recordings whose connectivity the latent traits move.

A person's log covariance is S = S0 + step * (sum of patterns, each times the person's coefficient),
and the signal follows the first-order model

    x[t + 1] = A x[t] + L e[t],    A = E V0 Phi V0' E^-1,    L = E V0 (1 - Phi^2)^(1/2)

with E = exp(S / 2), V0 the eigenvectors of S0 and Phi diagonal, between 0 and 1: A is stable
whatever S is, and the stationary covariance is exp(S) exactly. In y = V0' E^-1 x the model is p
separate AR(1) processes of unit variance, so a recording is made as x = E V0 y. Strong modes are
slower.

A pure VAR(1) with white innovations and sparse couplings leaves FC nearly empty; this one does not.

Shapes: n people, p parcels, t TRs, d directions (patterns), k traits.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from brainfusion.data.simulation.config import SimulationConfig
from brainfusion.data.simulation.people import People

NETWORKS = ("Vis", "SomMot", "DorsAttn", "SalVentAttn", "Limbic", "Cont", "Default")
# Where each network is centred in the left hemisphere, MNI mm.
_CENTRES = np.asarray(
    [
        [-14, -84, 2],
        [-32, -24, 58],
        [-28, -58, 52],
        [-46, 8, 8],
        [-30, 2, -34],
        [-40, 32, 30],
        [-10, 40, 30],
    ],
    dtype=np.float64,
)
_N_IDIOSYNCRATIC = 12
_BLOCK = 50
"""People generated at a time; it bounds memory and changes no value."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Simulated parcels: left hemisphere first, by network, as in the Schaefer atlases."""

    names: tuple[str, ...]
    networks: tuple[str, ...]
    network_index: np.ndarray
    """int64 [p], into NETWORKS."""
    xyz_mm: np.ndarray
    """float64 [p, 3] on an ellipsoid about the size of the MNI brain; hemispheres mirror."""


def make_layout(n_parcels: int) -> Layout:
    """Parcels without randomness: the same for every seed."""
    from scipy.optimize import linear_sum_assignment

    n_left = (n_parcels + 1) // 2
    # A golden-angle lattice on the left half of the ellipsoid.
    order = np.arange(n_left)
    x = -np.sqrt((order + 0.5) / n_left)
    angle = order * np.pi * (3 - np.sqrt(5))
    ring = np.sqrt(1 - x**2)
    unit = np.stack([x, ring * np.cos(angle), ring * np.sin(angle)], axis=1)
    points = np.array([0.0, -15.5, 16.0]) + unit * np.array([61.0, 80.5, 57.0])
    slots = np.sort(order % len(NETWORKS))
    distance = ((points[:, None] - _CENTRES[slots]) ** 2).sum(axis=2)
    parcel, slot = linear_sum_assignment(distance)
    points, left = points[parcel[np.argsort(slot)]], slots
    n_right = n_parcels - n_left
    # An odd count leaves the last left parcel without a mirror.
    index = np.concatenate([left, left[:n_right]])
    xyz_mm = np.concatenate([points, points[:n_right] * np.array([-1.0, 1.0, 1.0])])
    names, seen = [], {}
    for row, network in enumerate(index):
        key = (NETWORKS[network], "L" if row < n_left else "R")
        seen[key] = seen.get(key, 0) + 1
        names.append(f"sim-{key[0]}-{key[1]}-{seen[key]:02d}")
    return Layout(
        names=tuple(names),
        networks=tuple(NETWORKS[network] for network in index),
        network_index=index,
        xyz_mm=np.round(xyz_mm, 2),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Dynamics:
    """What all people share."""

    base_log_covariance: np.ndarray
    """S0, float64 [p, p]."""
    modes: np.ndarray
    """V0, float64 [p, p], weak modes first."""
    memory: np.ndarray
    """Diagonal of Phi [p], ascending: strong modes are slower."""
    patterns: np.ndarray
    """float64 [d, p, p], symmetric, orthonormal: traits first, then the confounds, then the own."""
    pattern_names: tuple[str, ...]
    site_gain: np.ndarray
    """float64 [sites]: multiplies the signal."""
    motion_map: np.ndarray
    """float64 [p]: how a head movement shows in each parcel."""


def make_dynamics(rng: np.random.Generator, config: SimulationConfig, layout: Layout) -> Dynamics:
    """Draw patterns and confounds on the networks of `layout`."""
    base = base_log_covariance(layout)
    values, modes = np.linalg.eigh(base)
    rank = (values - values[0]) / (values[-1] - values[0])
    site_names = [f"site-{i + 1}" for i in range(config.n_sites)]
    group_names = [f"population-{i + 1}" for i in range(config.n_populations)]
    names = [f"trait-{i}" for i in range(config.n_traits)]
    names += ["age", "sex", "motion", *site_names, *group_names]
    raw = [_network_pattern(rng, layout) for _ in names]
    raw += [_own_pattern(rng, layout) for _ in range(_N_IDIOSYNCRATIC)]
    names += [f"own-{i}" for i in range(_N_IDIOSYNCRATIC)]
    return Dynamics(
        base_log_covariance=base,
        modes=modes,
        memory=0.4 + 0.37 * rank,
        patterns=_orthonormal(np.stack(raw)),
        pattern_names=tuple(names),
        site_gain=1 + 0.08 * rng.standard_normal(config.n_sites),
        motion_map=rng.uniform(0.3, 1.0, config.n_parcels),
    )


def base_log_covariance(layout: Layout) -> np.ndarray:
    """S0 [p, p]: networks, homotopic pairs and neighbours are coupled; parcels have unit variance.

    Default and limbic parcels go less with the attention networks than others do, as in real FC.
    """
    index, xyz = layout.network_index, layout.xyz_mm
    between = np.full((7, 7), 0.19)
    for a, b, value in (
        (0, 1, 0.3), (0, 2, 0.34), (1, 2, 0.36), (1, 3, 0.38), (2, 3, 0.3), (2, 5, 0.28),
        (3, 5, 0.26), (5, 6, 0.34), (4, 6, 0.3), (2, 6, -0.1), (3, 6, -0.04), (1, 6, -0.02),
    ):  # fmt: skip
        between[a, b] = between[b, a] = value
    between[np.diag_indices(7)] = 0.66
    covariance = between[np.ix_(index, index)]
    distance = np.linalg.norm(xyz[:, None] - xyz, axis=2)
    covariance += 0.2 * np.exp(-distance / 20)
    mirrored = np.linalg.norm(xyz[:, None] * np.array([-1.0, 1.0, 1.0]) - xyz, axis=2)
    covariance += 0.2 * (mirrored < 1e-6)
    values, vectors = np.linalg.eigh(covariance - np.diag(np.diag(covariance) - 1))
    covariance = (vectors * np.maximum(values, 0.1)) @ vectors.T
    scale = 1 / np.sqrt(np.diag(covariance))
    values, vectors = np.linalg.eigh(covariance * np.outer(scale, scale))
    return (vectors * np.log(values)) @ vectors.T


def _network_pattern(rng: np.random.Generator, layout: Layout) -> np.ndarray:
    """Change of connectivity within and between networks and of the parcels' amplitudes."""
    index = layout.network_index
    loading = 1 + 0.4 * rng.standard_normal(len(index))
    blocks = rng.standard_normal((7, 7))
    # Some network pairs only: a trait has a profile of its own.
    blocks *= rng.random((7, 7)) < 0.4
    blocks += blocks.T
    pattern = blocks[np.ix_(index, index)] * np.outer(loading, loading)
    amplitude = rng.standard_normal(7)[index] + 0.5 * rng.standard_normal(len(index))
    norm = max(float(np.linalg.norm(pattern)), 1e-9)
    return np.sqrt(0.8) * pattern / norm + np.sqrt(0.2) * np.diag(
        amplitude / np.linalg.norm(amplitude)
    )


def _own_pattern(rng: np.random.Generator, layout: Layout) -> np.ndarray:
    """A contrast of two smooth maps over the cortex."""
    maps = []
    for _ in range(2):
        wave = rng.standard_normal((3, 4)) / 35
        phase = rng.uniform(0, 2 * np.pi, 4)
        field = np.cos(layout.xyz_mm @ wave + phase).sum(axis=1)
        maps.append(field + 0.5 * rng.standard_normal(len(field)))
    first, second = maps
    return np.outer(first, first) / (first @ first) - np.outer(second, second) / (second @ second)


def _orthonormal(patterns: np.ndarray) -> np.ndarray:
    """Gram-Schmidt in the Frobenius product; sums of symmetric matrices stay symmetric."""
    flat = patterns.reshape(len(patterns), -1)
    q, r = np.linalg.qr(flat.T)
    return (q * np.sign(np.diag(r))).T.reshape(patterns.shape)


def coefficients(
    rng: np.random.Generator, config: SimulationConfig, people: People, dynamics: Dynamics
) -> np.ndarray:
    """What every pattern is multiplied by in every person [n, d], before `step`."""
    n = config.n_people
    years = (people.age - 42) / 12
    sites = np.eye(config.n_sites)[people.site]
    groups = np.eye(config.n_populations)[people.population]
    own = config.idiosyncrasy * rng.standard_normal((n, _N_IDIOSYNCRATIC))
    confounds = [
        0.3 * years[:, None],
        0.3 * (people.is_male[:, None] - 0.5),
        0.3 * (np.log(people.motion_mm / 0.13) / 0.4)[:, None],
        0.6 * sites,
        config.environment * groups,
    ]
    values = np.concatenate([people.traits, *confounds, own], axis=1)
    assert values.shape == (n, len(dynamics.pattern_names))
    return values


def log_covariance(dynamics: Dynamics, weights: np.ndarray, *, step: float) -> np.ndarray:
    """S of each person [n, p, p] from the coefficients [n, d]."""
    n_parcels = len(dynamics.base_log_covariance)
    flat = dynamics.patterns.reshape(len(dynamics.patterns), -1)
    return dynamics.base_log_covariance + step * (weights @ flat).reshape(-1, n_parcels, n_parcels)


def mixing(dynamics: Dynamics, log_covariances: np.ndarray) -> np.ndarray:
    """E V0 of each person [n, p, p], with E = exp(S / 2)."""
    values, vectors = np.linalg.eigh(log_covariances)
    return (vectors * np.exp(values / 2)[:, None]) @ (vectors.transpose(0, 2, 1) @ dynamics.modes)


def autoregress(memory: np.ndarray, innovations: np.ndarray) -> np.ndarray:
    """Separate AR(1) processes of unit variance from white noise [t, ..., p], in place."""
    phi = memory.astype(innovations.dtype)
    fresh = np.sqrt(1 - phi**2)
    for t in range(1, len(innovations)):
        innovations[t] *= fresh
        innovations[t] += phi * innovations[t - 1]
    return innovations


def generate(
    config: SimulationConfig,
    people: People,
    dynamics: Dynamics,
    *,
    weights: np.ndarray,
    stream: np.random.SeedSequence,
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (person, run, recording [p, t] float32), people in order.

    Each person has a random stream of their own, so nobody's data depend on who else is there.
    """
    runs, parcels, trs = config.n_runs, config.n_parcels, config.n_trs
    for start in range(0, config.n_people, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, config.n_people))
        mix = mixing(dynamics, log_covariance(dynamics, weights[rows], step=config.step))
        mix = mix.astype(np.float32)
        mix *= dynamics.site_gain[people.site[rows], None, None].astype(np.float32)
        rngs = [
            np.random.default_rng(
                np.random.SeedSequence(stream.entropy, spawn_key=(*stream.spawn_key, int(row)))
            )
            for row in rows
        ]
        sources = np.empty((trs, len(rows), runs, parcels), dtype=np.float32)
        for i, rng in enumerate(rngs):
            sources[:, i] = rng.standard_normal((trs, runs, parcels), dtype=np.float32)
        autoregress(dynamics.memory, sources)
        for i, (row, rng) in enumerate(zip(rows.tolist(), rngs, strict=True)):
            for run in range(runs):
                bold = mix[i] @ sources[:, i, run].T
                moved = movements(rng, trs, motion_mm=people.motion_mm[row], tr_s=config.tr_s)
                bold += dynamics.motion_map.astype(np.float32)[:, None] * moved
                noise = rng.standard_normal(bold.shape, dtype=np.float32)
                bold += np.float32(config.observation_noise) * noise
                yield row, run, bold


def movements(rng: np.random.Generator, n_trs: int, *, motion_mm: float, tr_s: float) -> np.ndarray:
    """What head movements add to the global signal [t]: rare jumps that fade in seconds."""
    jumps = rng.poisson(0.06 * motion_mm, n_trs) * rng.normal(0, 1.5, n_trs)
    fade = np.exp(-tr_s / 3 * np.arange(int(np.ceil(15 / tr_s)) + 1))
    return np.convolve(jumps, fade)[:n_trs].astype(np.float32)
