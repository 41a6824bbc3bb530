"""What is measured while an encoder trains, against brute force, closed forms, planted signals."""

import dataclasses

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import LeaveOneOut, cross_val_predict

from brainfusion.data.cohort import Cohort
from brainfusion.encoders import online_probe
from brainfusion.encoders.objectives import N_NEIGHBOURS, from_neighbours, interpolated
from brainfusion.encoders.online_probe import score
from brainfusion.encoders.pretrain import pretrain
from brainfusion.encoders.pretrain_config import DataConfig
from brainfusion.encoders.validation import collapse_alarm, spread_of
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import read_metrics
from tests.encoders.tiny_cohort import (
    IMAGE,
    N_PARCELS,
    N_TRS,
    XYZ_MM,
    settings,
    tiny_cohort,
)

# -- interpolation ---------------------------------------------------------------------------------


def test_interpolation_equals_numpys_parcel_by_parcel():
    rng = np.random.default_rng(0)
    bold = rng.normal(size=(3, 5, 24))
    hidden = np.repeat(rng.random((3, 5, 6)) < 0.6, 4, axis=2)
    hidden[0, 0] = True
    hidden[0, 1] = False
    assert (hidden.all(2).sum(), hidden[:, :, 0].any(), hidden[:, :, -1].any()) >= (1, True, True)
    expected = bold.copy()
    for b, p in np.ndindex(3, 5):
        seen = ~hidden[b, p]
        level = bold[b][~hidden[b]].mean()
        expected[b, p] = (
            np.interp(np.arange(24), np.flatnonzero(seen), bold[b, p][seen])
            if seen.any()
            else level
        )
    found = interpolated(torch.from_numpy(bold), torch.from_numpy(hidden))
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_a_straight_line_is_interpolated_without_error():
    bold = torch.linspace(-1, 2, 32).expand(1, 2, 32)
    hidden = torch.zeros(1, 2, 32, dtype=torch.bool)
    hidden[..., 8:16] = True
    torch.testing.assert_close(interpolated(bold, hidden), bold)


def test_neighbours_are_the_nearest_visible_parcels_weighted_by_distance():
    """Against a loop; one window hides all of a time, one leaves three parcels of it."""
    rng = np.random.default_rng(1)
    xyz = rng.uniform(-60, 60, size=(14, 3))
    patches = rng.normal(size=(3, 14, 4, 6))
    hidden = rng.random((3, 14, 4)) < 0.3
    hidden[0, :, 1] = True
    hidden[1, :11, 2], hidden[1, 11:, 2] = True, False
    expected = []
    for b, p, m in np.argwhere(hidden):
        visible = [q for q in range(14) if not hidden[b, q, m]]
        visible.sort(key=lambda q, p=p: np.linalg.norm(xyz[q] - xyz[p]))
        chosen = visible[:N_NEIGHBOURS]
        weights = [np.sum((xyz[q] - xyz[p]) ** 2) ** -1.0 for q in chosen]
        if chosen:
            expected.append(np.average(patches[b, chosen, m], axis=0, weights=weights))
        else:
            expected.append(np.full(6, patches[b][~hidden[b]].mean()))
    found = from_neighbours(*map(torch.from_numpy, (patches, hidden, xyz)))
    torch.testing.assert_close(found, torch.from_numpy(np.stack(expected)), rtol=1e-9, atol=1e-9)


def test_parcels_that_lie_in_one_place_are_averaged():
    patches = torch.arange(3.0).view(1, 3, 1, 1)
    hidden = torch.tensor([True, False, False]).view(1, 3, 1)
    found = from_neighbours(patches, hidden, torch.zeros(3, 3))
    torch.testing.assert_close(found, torch.tensor([[1.5]]))


# -- spread and collapse ---------------------------------------------------------------------------


def test_effective_rank_counts_equal_directions():
    rng = np.random.default_rng(1)
    turned, _ = np.linalg.qr(rng.normal(size=(200, 12)))
    flat = torch.from_numpy(np.linalg.qr(turned - turned.mean(0))[0])  # centred, orthonormal
    axes = torch.from_numpy(np.linalg.qr(rng.normal(size=(12, 12)))[0])
    for n in (1, 3, 12):
        found = spread_of((flat[:, :n] - flat[:, :n].mean(0)) @ axes[:n] + 5.0)
        assert found["effective_rank"] == pytest.approx(n, rel=1e-6)
    assert spread_of(torch.ones(4, 3)) == {"feature_std": 0.0, "effective_rank": 0.0}
    assert spread_of(torch.ones(1, 3)) == {}
    x = torch.randn(50, 4, dtype=torch.float64)
    assert spread_of(x)["feature_std"] == pytest.approx(float(x.std(0, correction=0).mean()))


@pytest.mark.parametrize(
    ("std", "rank", "alarmed"),
    [(0.5, 6.0, False), (0.011, 6.0, False), (0.009, 6.0, True), (0.5, 1.2, True), (0, 0, True)],
)
def test_the_alarm_on_collapse(std, rank, alarmed):
    first = {"feature_std": 0.5, "effective_rank": 8.0}
    said = collapse_alarm(first, {"feature_std": std, "effective_rank": rank})
    assert (said is not None) == alarmed
    if said:
        assert "the features have collapsed" in said
        assert f"{rank:.1f} effective dimensions (untrained 8.0)" in said
    assert collapse_alarm({}, {"feature_std": 0.0, "effective_rank": 0.0}) is None


def test_a_run_that_collapses_says_so_once_while_its_loss_falls(tmp_path, capsys, monkeypatch):
    """The target encoder follows at once and weights decay to nothing: the trivial solution."""
    cohort = tiny_cohort(tmp_path / "cohort")
    options = settings(
        "brainjepa", steps=30, lr=0.05, warmup_share=0.0, lr_end=0.05, momentum=(0.0, 0.0),
        weight_decay=19.0, weight_decay_end=19.0, clip=0.0, run={"validate_every": 5},
    )  # fmt: skip
    pretrain(options, cohort, tmp_path / "run", ranks=Ranks())
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    said = capsys.readouterr().err
    assert said.count("the features have collapsed") == 1
    assert rows[-1]["feature_std"] < 0.02 * rows[0]["feature_std"]
    assert "have collapsed" in (tmp_path / "run" / "run.log").read_text()


# -- probes ----------------------------------------------------------------------------------------


def planted(n: int, n_features: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(n, n_features)) * 3.0 + 7.0
    return x, x @ rng.normal(size=n_features) + noise * rng.normal(size=n)


def test_the_ridge_is_scikit_learns_with_the_penalty_of_least_leave_one_out_error():
    x, y = planted(60, 90, 20.0)
    train, test = slice(0, 40), slice(40, None)
    z = (x - x[train].mean(0)) / x[train].std(0)
    unit = np.linalg.eigvalsh(z[train] @ z[train].T).mean()
    errors = [
        np.square(
            cross_val_predict(Ridge(penalty * unit), z[train], y[train], cv=LeaveOneOut())
            - y[train]
        ).sum()
        for penalty in online_probe.PENALTIES
    ]
    best = Ridge(online_probe.PENALTIES[int(np.argmin(errors))] * unit).fit(z[train], y[train])
    found = online_probe._ridge(z[train], y[train], z[test])
    np.testing.assert_allclose(found, best.predict(z[test]), rtol=1e-7)


def test_a_planted_trait_is_found_and_a_shuffled_one_is_not():
    x, y = planted(300, 20, 3.0)
    assert score(x, y, n_train=200, binary=False) > 0.9
    shuffled = np.random.default_rng(3).permutation(y)
    assert abs(score(x, shuffled, n_train=200, binary=False)) < 0.25
    halves = (y > np.median(y)).astype(float)
    assert score(x, halves, n_train=200, binary=True) > 0.9
    y[::7] = np.nan
    assert score(x, y, n_train=200, binary=False) > 0.9
    x[:, :5] = 4.0  # features without any spread
    assert np.isfinite(score(x, y, n_train=200, binary=False))
    assert score(np.ones((300, 3)), y, n_train=200, binary=False) == pytest.approx(0.0)


def test_the_area_under_the_curve_is_scikit_learns_with_ties():
    rng = np.random.default_rng(4)
    guess, positive = rng.integers(0, 5, 50).astype(float), rng.random(50) < 0.4
    assert online_probe._auc(guess, positive) == pytest.approx(roc_auc_score(positive, guess))


def probed_cohort(path) -> Cohort:
    """A cohort whose people differ in how loud their signal is, which the table tells."""
    cohort = tiny_cohort(path, n_people=120)
    loud = np.array([cohort.recordings.read(i).std() for i in range(120)])
    table = pl.read_parquet(cohort.path / "subjects.parquet").with_columns(
        age=pl.Series(50.0 + 40.0 * loud),
        sex=pl.Series(np.where(loud > np.median(loud), "F", "M")),
        site=pl.Series([f"s{i % 3}" for i in range(120)]),
    )
    table.write_parquet(cohort.path / "subjects.parquet")
    return Cohort.open(cohort.path)


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Cohort:
    return probed_cohort(tmp_path_factory.mktemp("people"))


@pytest.mark.parametrize("model", ["brainlm", "brainjepa"])
def test_a_run_probes_age_and_sex_at_the_start_every_so_often_and_at_the_end(
    people, tmp_path, model
):
    options = settings(
        model, steps=5, run={"probe_every": 2, "log_every": 9, "validate_every": 9, "seed": 1}
    )
    # Levels carry the trait: recordings are left as they are.
    options = dataclasses.replace(options, data=DataConfig(standardiser="none"))
    pretrain(options, people, tmp_path, ranks=Ranks())
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    for row in rows:
        assert row["probe_age_r"] > 0.5
        assert row["probe_sex_auc"] > 0.6


def test_columns_that_cannot_be_probed(people, tmp_path, capsys):
    options = settings("brainlm", steps=1, run={"probe_every": 1, "probe_columns": ("aeg",)})
    with pytest.raises(UserError, match=r"--probe-columns aeg: .*Did you mean 'age'"):
        pretrain(options, people, tmp_path / "a", ranks=Ranks())
    options = settings("brainlm", steps=1, run={"probe_every": 1, "probe_columns": ("site",)})
    pretrain(options, people, tmp_path / "b", ranks=Ranks())
    assert "no online probe of 'site': expected numbers or two groups" in capsys.readouterr().err
    assert not any("probe" in key for key in read_metrics(tmp_path / "b" / "metrics.jsonl")[0])


# -- reconstruction --------------------------------------------------------------------------------


def test_brainlm_leaves_a_reconstruction_and_its_figures_agree_with_it(tmp_path):
    cohort = tiny_cohort(tmp_path / "cohort", n_people=20)
    options = settings("brainlm", steps=2, run={"n_validation": 1})
    pretrain(options, cohort, tmp_path / "run", ranks=Ranks())
    with np.load(tmp_path / "run" / "reconstruction.npz") as found:
        signal, rebuilt, hidden = (found[n] for n in ("signal", "reconstruction", "hidden"))
    assert signal.shape == rebuilt.shape == hidden.shape == (N_PARCELS, N_TRS)
    assert hidden.dtype == bool
    assert 0.1 < hidden.mean() < 0.9
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    truth = signal[hidden].astype(np.float64)
    error = np.square(rebuilt[hidden] - truth).sum()
    spread = np.square(truth - truth.mean()).sum()
    assert row["masked_r2"] == pytest.approx(1 - error / spread, abs=1e-5)
    guess = interpolated(torch.from_numpy(signal[None]), torch.from_numpy(hidden[None]))[0].numpy()
    of_guess = np.square(guess[hidden] - truth).sum()
    assert row["interpolation_r2"] == pytest.approx(1 - of_guess / spread, abs=1e-5)
    patches = torch.from_numpy(signal).unflatten(-1, (-1, 16))[None]
    shut = torch.from_numpy(hidden[None, :, ::16])
    near = from_neighbours(patches, shut, torch.from_numpy(XYZ_MM)).numpy()
    of_near = np.square(near - patches[shut].numpy()).sum()
    assert row["neighbours_r2"] == pytest.approx(1 - of_near / spread, abs=1e-5)
    assert row["r2_over_interpolation"] == pytest.approx(1 - error / of_guess, abs=1e-5)
    assert row["target_std"] == pytest.approx(truth.std(), rel=1e-5)


def test_images_and_brainjepa_leave_none(tmp_path):
    cohort = tiny_cohort(tmp_path / "cohort", n_people=20)
    for model, encoder in (("brainlm", IMAGE), ("brainjepa", None)):
        run_dir = tmp_path / model
        pretrain(settings(model, encoder=encoder, steps=1), cohort, run_dir, ranks=Ranks())
        assert not (run_dir / "reconstruction.npz").exists()
