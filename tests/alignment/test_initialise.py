"""The closed-form start: it scores as ridge CCA does, and sees people as new ones are seen."""

from itertools import product

import numpy as np
import pytest
import torch

from brainfusion.alignment import initialise as start_module
from brainfusion.alignment.config import AlignConfig
from brainfusion.alignment.genes.tower import GeneBatch
from brainfusion.alignment.initialise import Start, find_start, initialise
from brainfusion.alignment.network import AlignmentModel
from brainfusion.data.cca_choice import cross_validated_cca, fold_of
from brainfusion.data.oracle import both_directions, pmi_scores

RHO = np.linspace(0.85, 0.4, 6)
CONFIG = AlignConfig(dim_hidden=128, dim_out=64)


def cohort(
    n: int, *, names: tuple[str, ...] = ("brain", "dna"), width: int = 40, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Views that share six latents with one another, all pairs with the correlations RHO."""
    mixing = np.random.default_rng(50)
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, len(RHO)))
    views = {}
    for name in names:
        shared = np.sqrt(RHO) * z + np.sqrt(1 - RHO) * rng.standard_normal(z.shape)
        own = rng.standard_normal((n, width - len(RHO))) * np.arange(1, width - 5) ** -0.5
        turn = np.linalg.qr(mixing.standard_normal((width, width)))[0]
        rows = np.concatenate([shared, own], axis=1) @ turn + 0.3
        views[name] = torch.from_numpy(rows.astype(np.float32))
    return views


def everyone(views: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: np.ones(len(x), dtype=bool) for name, x in views.items()}


def model_of(views: dict[str, torch.Tensor], config: AlignConfig = CONFIG, **how) -> AlignmentModel:
    torch.manual_seed(0)
    dims = {name: x.shape[1] for name, x in views.items()}
    how = {"dim_out": config.dim_out, "dim_hidden": config.dim_hidden, **how}
    return AlignmentModel(dims, **how).eval()


def variates(start: Start, name: str, view: torch.Tensor) -> np.ndarray:
    part = start.parts[name]
    return (view.double().numpy() - part.mean) @ part.weights


@torch.no_grad()
def logits(model: AlignmentModel, views: dict[str, torch.Tensor], *names: str) -> np.ndarray:
    a, b = (model.embed(name, views[name]) for name in names or tuple(views))
    return (model.logit_scale * a @ b.T).double().numpy()


def test_logits_are_the_log_density_ratio_where_nothing_is_rounded(monkeypatch):
    # A large constant, and squares near 0: unit norm and the bend of erf then cost nothing.
    monkeypatch.setattr(start_module, "_STEADY", 3e5)
    monkeypatch.setattr(start_module, "_MEETING", 3e3)
    monkeypatch.setattr(start_module, "_BEND", 0.02)
    monkeypatch.setattr(start_module, "_SQUARE", np.sqrt(2 / np.pi) * 0.02**2)
    train, new = cohort(600), cohort(150, seed=1)
    start = find_start(train, everyone(train), CONFIG)
    model = model_of(train, max_scale=1e9).double()
    start.write(model)
    u, v = (variates(start, name, new[name]) for name in new)
    expected = pmi_scores(u, v, start.parts["brain"].loadings ** 2)
    got = logits(model, {name: x.double() for name, x in new.items()})
    offset = (got - expected).mean()
    np.testing.assert_allclose(got - offset, expected, atol=0.02)


def test_as_it_is_the_cosine_ranks_new_people_as_the_density_ratio_does():
    train, new = cohort(1500), cohort(800, seed=1)
    start = find_start(train, everyone(train), CONFIG)
    model = model_of(train)
    start.write(model)
    u, v = (variates(start, name, new[name]) for name in new)
    closed = both_directions(pmi_scores(u, v, start.parts["brain"].loadings ** 2))
    got = both_directions(logits(model, new))
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (u, v))
    cosine = both_directions(u @ v.T)
    assert got["auc"] == pytest.approx(closed["auc"], abs=0.003)
    assert got["recall_at_10"] == pytest.approx(closed["recall_at_10"], abs=0.02)
    assert closed["auc"] > cosine["auc"] + 0.005


def test_directions_of_two_views_are_those_of_ridge_cca():
    train = cohort(500)
    start = find_start(train, everyone(train), CONFIG)
    x, y = (train[name].double().numpy() for name in train)
    cca, _ = cross_validated_cca(x, y, folds=fold_of(500), n_components=(1, 2, 4, 8, 16, 32, 60))
    for name, u in (("brain", cca.variates_x(x)), ("dna", cca.variates_y(y))):
        own = variates(start, name, train[name])
        alike = [abs(np.corrcoef(own[:, i], u[:, i])[0, 1]) for i in range(4)]
        np.testing.assert_allclose(alike, 1, atol=1e-6)


def test_training_people_look_as_new_people_do():
    train, new = cohort(400, width=100), cohort(4000, width=100, seed=1)
    start = find_start(train, everyone(train), CONFIG)

    def mean_correlation(views: dict) -> float:
        u, v = (variates(start, name, views[name]) for name in views)
        return float(np.mean([np.corrcoef(u[:, i], v[:, i])[0, 1] for i in range(4)]))

    assert mean_correlation(train) > mean_correlation(new) + 0.05
    assert mean_correlation(start.inputs) == pytest.approx(mean_correlation(new), abs=0.03)
    for name, rows in start.inputs.items():
        assert rows.dtype == torch.float32
        np.testing.assert_allclose(variates(start, name, rows).std(0), 1, atol=1e-4)


def test_shuffled_pairs_start_at_chance():
    aucs = []
    for seed in range(4):
        train, new = cohort(300, seed=seed), cohort(400, seed=seed + 10)
        rng = np.random.default_rng(seed)
        train["dna"] = train["dna"][rng.permutation(300)]
        new["dna"] = new["dna"][rng.permutation(400)]
        model = model_of(train)
        initialise(model, train, everyone(train), CONFIG)
        aucs.append(both_directions(logits(model, new))["auc"])
    # A uniform rank has variance 1/12; four cohorts of 400 people.
    assert abs(np.mean(aucs) - 0.5) < 3 * np.sqrt(1 / 12 / 400 / 4)


def test_three_modalities_of_which_people_lack_some_all_find_each_other():
    names = ("brain_a", "brain_b", "dna")
    train, new = cohort(1500, names=names), cohort(500, names=names, seed=1)
    rng = np.random.default_rng(3)
    present = {name: rng.random(1500) < 0.7 for name in names}
    for name, has in present.items():
        train[name][torch.from_numpy(~has)] = 0
    model = model_of(train)
    start = find_start(train, present, CONFIG)
    start.write(model)
    for first, second in (("brain_a", "dna"), ("brain_b", "dna"), ("brain_a", "brain_b")):
        # Half of the people have both.
        assert both_directions(logits(model, new, first, second))["auc"] > 0.87
    for name, has in present.items():
        np.testing.assert_array_equal(start.inputs[name][torch.from_numpy(~has)], 0)
        train[name][torch.from_numpy(~has)] = 7
    again = find_start(train, present, CONFIG)
    for name in names:
        np.testing.assert_array_equal(again.parts[name].weights, start.parts[name].weights)


def test_what_two_models_of_one_genome_share_does_not_hide_what_brains_and_dna_share():
    names = ("brain_a", "brain_b", "dna_a", "dna_b")
    train, new = (cohort(n, names=names, seed=seed) for n, seed in ((1500, 0), (500, 1)))
    pair = {name: train[name] for name in ("brain_a", "dna_a")}
    for rows, seed in ((train, 2), (new, 3)):
        for side in ("brain", "dna"):
            # Twice as many latents as brains and DNA share, seen without noise and far larger.
            own = np.random.default_rng(seed + len(side)).standard_normal((len(rows["dna_a"]), 12))
            for model in "ab":
                name = f"{side}_{model}"
                turn = np.random.default_rng(ord(model)).standard_normal((12, 40))
                rows[name] = rows[name] + torch.from_numpy(own @ turn).float()
    model = model_of(train)
    find_start(train, everyone(train), CONFIG).write(model)
    of_one = model_of(pair)
    find_start(pair, everyone(pair), CONFIG).write(of_one)
    for first, second in product(("brain_a", "brain_b"), ("dna_a", "dna_b")):
        found = both_directions(logits(model, new, first, second))["auc"]
        alone = {name: new[name] for name in ("brain_a", "dna_a")}
        assert found > 0.8, (first, second)
        assert found > both_directions(logits(of_one, alone))["auc"] - 0.1


def test_units_that_are_left_over_have_no_effect_but_learn():
    train = cohort(300)
    model = model_of(train)
    initialise(model, train, everyone(train), CONFIG)
    before = logits(model, train)
    spare = {}
    for name, projector in model.projectors.items():
        unused = (projector.layers[3].weight == 0).all(0)
        assert unused.any()
        projector.layers[0].weight.data[unused] *= 3
        spare[name] = unused
    np.testing.assert_array_equal(logits(model, train), before)
    a, b = (model.embed(name, x) for name, x in train.items())
    (model.logit_scale * a @ b.T).log_softmax(1).diagonal().sum().backward()
    for name, projector in model.projectors.items():
        assert (projector.layers[3].weight.grad[:, spare[name]].abs().sum(0) > 0).all()


@pytest.mark.parametrize(("dim_hidden", "dim_out"), [(32, 16), (5, 8), (1, 512), (1024, 4)])
def test_small_projectors_start_as_well_as_they_can(dim_hidden: int, dim_out: int, capsys):
    config = AlignConfig(dim_hidden=dim_hidden, dim_out=dim_out)
    train, new = cohort(600), cohort(300, seed=1)
    model = model_of(train, config)
    facts = initialise(model, train, everyone(train), config)
    if min(dim_hidden // 2, dim_out - 4) < 1:
        assert facts == {}
        assert "start at random" in capsys.readouterr().err
    else:
        assert facts["components"] <= min(dim_hidden // 2, dim_out - 4)
        assert both_directions(logits(model, new))["auc"] > 0.65


def test_strong_coupling_stays_below_the_greatest_scale():
    train = cohort(600)
    model = model_of(train, max_scale=5.0)
    initialise(model, train, everyone(train), CONFIG)
    assert float(model.logit_scale.detach()) == pytest.approx(5.0, rel=1e-5)
    new = cohort(300, seed=1)
    assert both_directions(logits(model, new))["auc"] > 0.85


def test_siglip_starts_with_the_odds_of_a_pair():
    train, new = cohort(1000), cohort(400, seed=1)
    model = model_of(train, init_bias=-10.0)
    initialise(model, train, everyone(train), CONFIG)
    odds = torch.from_numpy(logits(model, new)).add(float(model.logit_bias.detach())).exp()
    away = odds[~torch.eye(400, dtype=bool)]
    # Among 1,000 people one is the partner.
    assert float(away.mean()) == pytest.approx(1 / 1000, rel=0.5)


def test_genes_that_the_model_pools_start_at_random_and_it_is_said(capsys):
    train = cohort(100)
    genes = GeneBatch(torch.zeros(100, 3, 4), torch.ones(100, 3, dtype=torch.bool))
    start = find_start({"brain": train["brain"], "dna": genes}, everyone(train), CONFIG)
    assert start.parts == {}
    assert start.inputs["brain"] is train["brain"]
    assert "brain, dna: no closed form to start from" in capsys.readouterr().err


def test_families_are_held_out_together():
    # Each person twice: folds that part them would find the correlations of training people.
    once = cohort(120, width=60)
    twice = {name: torch.cat([x, x]) for name, x in once.items()}
    groups = np.arange(240) % 120
    apart = find_start(twice, everyone(twice), CONFIG)
    together = find_start(twice, everyone(twice), CONFIG, groups=groups)
    assert apart.facts["information"] > together.facts["information"] + 1
