"""Several modalities, any of which a person may lack, and who is a negative of whom."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from brainfusion.alignment import AlignConfig, AlignmentModel, load, train
from brainfusion.alignment.batches import Batch, Batches, batch_rows, shared_rows
from brainfusion.alignment.losses.pair_ids import PairIds
from brainfusion.alignment.modalities import modality_pairs, side_mean, sides_of
from brainfusion.alignment.objective import Objective
from brainfusion.alignment.prepare import related
from brainfusion.alignment.validation import Validation, chance_level, pair_auc, uniformity
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import UserError
from tests.alignment.test_train import CLOSED, TINY

NAMES = ("brain_jepa", "brain_lm", "dna")


def views(
    n: int = 600, *, names: tuple[str, ...] = NAMES, missing: float = 0.2, seed: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[str]]:
    """Noisy views of the same latents, each lacking for some people, where rows are NaN."""
    random = np.random.default_rng(seed)
    latents = random.normal(size=(n, 4))
    features, present = {}, {}
    for name in names:
        columns = 0.9 * latents + 0.44 * random.normal(size=latents.shape)
        columns = np.column_stack([columns, random.normal(size=(n, 8))])
        features[name] = columns @ np.linalg.qr(random.normal(size=(12, 12)))[0]
        present[name] = random.random(n) >= missing
        features[name][~present[name]] = np.nan
    labels = ["train"] * (n // 2) + ["validation"] * (n // 6)
    return features, present, labels + ["test"] * (n - len(labels))


def auc_of(a: np.ndarray, b: np.ndarray) -> float:
    return pair_auc(torch.from_numpy(a), torch.from_numpy(b))


# -- the loss --------------------------------------------------------------------------------------


def brute_force(
    embedded: dict[str, torch.Tensor], scale: torch.Tensor, weights: dict, ids: PairIds | None
) -> torch.Tensor:
    """The weighted mean of losses, person by person; rows of who lacks a modality are NaN."""
    total, mass = torch.tensor(0.0, dtype=torch.float64), 0.0
    for first, second in itertools.combinations(embedded, 2):
        a, b = embedded[first], embedded[second]
        both = [i for i in range(len(a)) if not (a[i].isnan().any() or b[i].isnan().any())]
        weight = weights.get((first, second), 1.0)
        if weight == 0 or len(both) < 2:
            continue
        loss = torch.tensor(0.0, dtype=torch.float64)
        for i in both:
            others = [j for j in both if j == i or ids is None or is_negative(ids, i, j)]
            rows = torch.stack([scale * a[i] @ b[j] for j in others])
            columns = torch.stack([scale * a[j] @ b[i] for j in others])
            loss = loss + rows.logsumexp(0) + columns.logsumexp(0) - 2 * scale * a[i] @ b[i]
        total, mass = total + weight * loss / (2 * len(both)), mass + weight
    return total / mass


def is_negative(ids: PairIds, i: int, j: int) -> bool:
    if ids.within is not None and ids.within[i] != ids.within[j]:
        return False
    return ids.excluded is None or not any(
        x == y and x >= 0 for x, y in zip(ids.excluded[i], ids.excluded[j], strict=True)
    )


def some_ids(n: int, seed: int = 3) -> PairIds:
    random = np.random.default_rng(seed)
    excluded = random.integers(-1, n // 3, size=(n, 2))
    return PairIds(
        excluded=torch.from_numpy(excluded), within=torch.from_numpy(random.integers(0, 2, n))
    )


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize(
    ("weights", "by_pair"),
    [
        ((), {}),
        (("brain_jepa-dna=0.25", "brain_lm-brain_jepa=0"), {("brain_jepa", "dna"): 0.25,
                                                              ("brain_jepa", "brain_lm"): 0.0}),
    ],
)  # fmt: skip
def test_the_loss_of_people_who_lack_modalities_is_that_of_brute_force(weights, by_pair, with_ids):
    n = 40
    features, present, _ = views(n, missing=0.4)
    torch.manual_seed(0)
    model = AlignmentModel(dict.fromkeys(NAMES, 12), dim_hidden=8, dim_out=6, dropout=0.0).double()
    batch = Batch(
        inputs={name: torch.from_numpy(np.nan_to_num(x)) for name, x in features.items()},
        present=present,
        ids=some_ids(n) if with_ids else None,
    )
    pairs = modality_pairs(present, weights)
    objective = Objective(batch, pairs, TINY, whole=True)
    found = objective(model, batch, np.arange(n), {})
    gradients = torch.autograd.grad(found.value, list(model.parameters()))

    embedded = {name: model.embed(name, batch.inputs[name]) for name in NAMES}
    for name, has in present.items():
        embedded[name] = torch.where(
            torch.from_numpy(has)[:, None], embedded[name], torch.tensor(math.nan).double()
        )
    expected = brute_force(embedded, model.logit_scale, by_pair, batch.ids)
    torch.testing.assert_close(found.value, expected, rtol=1e-10, atol=0)
    for got, want in zip(
        gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    alike = {name: torch.ones_like(x).where(~x.isnan(), x) for name, x in embedded.items()}
    chance = brute_force(alike, torch.tensor(0.0), by_pair, batch.ids)
    assert found.chance == pytest.approx(float(chance.detach()), rel=1e-6)
    shared = [present[a] & present[b] for a, b in itertools.combinations(NAMES, 2)]
    zero = [by_pair.get(pair, 1.0) == 0 for pair in itertools.combinations(NAMES, 2)]
    assert found.n_pairs == sum(s.sum() for s, z in zip(shared, zero, strict=True) if not z)


def test_a_batch_in_which_nobody_has_two_modalities_moves_nothing():
    present = {"brain": np.arange(40) < 20, "dna": np.arange(40) >= 10}
    model = AlignmentModel({"brain": 3, "dna": 3}, dim_hidden=4, dim_out=4, dropout=0.0)
    people = Batch(inputs={name: torch.randn(40, 3) for name in present}, present=present)
    objective = Objective(people, modality_pairs(present, ()), TINY, whole=False)
    rows = np.array([0, 1, 30, 31])
    found = objective(model, people.take(rows), rows, {})
    found.value.backward()
    assert float(found.value.detach()) == 0.0
    assert found.n_pairs == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_rows_of_who_lacks_a_modality_change_nothing(tmp_path):
    features, present, labels = views()
    config = replace(TINY, max_steps=4, n_components=6)
    train(features, labels, config=config, run_dir=tmp_path / "a", present=present)
    other = {name: np.where(present[name][:, None], x, 1e6) for name, x in features.items()}
    train(other, labels, config=config, run_dir=tmp_path / "b", present=present)
    for file in ("model.safetensors", "conditioners.safetensors"):
        a, b = (tmp_path / run / "model" / file for run in "ab")
        assert a.read_bytes() == b.read_bytes()


# -- what is learnt --------------------------------------------------------------------------------


def test_modalities_find_each_other_and_a_shuffled_one_finds_none(tmp_path):
    names = (*NAMES, "dna_other")
    features, present, labels = views(900, names=names)
    order = np.random.default_rng(9).permutation(900)
    features["dna_other"], present["dna_other"] = (
        x["dna_other"][order] for x in (features, present)
    )
    config = replace(TINY, dim_hidden=64, dim_out=32, max_steps=60)
    result = train(features, labels, config=config, run_dir=tmp_path, present=present)
    opened, test = load(tmp_path), np.asarray(labels) == "test"
    assert opened.sides == {"brain": ("brain_jepa", "brain_lm"), "dna": ("dna", "dna_other")}

    def held_out(first: str, second: str) -> tuple[float, int]:
        both = test & present[first] & present[second]
        a, b = (opened.embed(name, features[name][both]) for name in (first, second))
        return auc_of(a, b), int(both.sum())

    for first, second in itertools.combinations(NAMES, 2):
        assert held_out(first, second)[0] > 0.75, (first, second)
    for name in NAMES:
        auc, n = held_out(name, "dna_other")
        # A uniform rank has variance 1/12; both directions taken as one.
        assert abs(auc - 0.5) < 3 / math.sqrt(12 * n), name
    by_pair = {(row["first"], row["second"]): row for row in result.summary["pairs"]}
    assert len(by_pair) == 6
    assert by_pair["brain_jepa", "dna"]["validation_auc"] > 0.75
    assert by_pair["brain_jepa", "brain_lm"]["validation_auc"] is None  # of one side
    across = [row["validation_auc"] for row in by_pair.values() if row["validation_auc"]]
    assert result.summary["validation_auc"] == pytest.approx(np.mean(across))
    assert result.summary["n_people"]["brain_lm"]["test"] == (present["brain_lm"] & test).sum()


def test_training_goes_on_from_the_closed_form_and_keeps_its_score(tmp_path):
    features, present, labels = views(900)
    found = {}
    for init in ("rcca", "random"):
        config = replace(CLOSED, init=init, max_steps=6, eval_every=1, lr=1e-4)
        result = train(features, labels, config=config, run_dir=tmp_path / init, present=present)
        rows = (tmp_path / init / "metrics.jsonl").read_text().splitlines()
        found[init] = json.loads(rows[0])["validation_auc"], result
    # One step of almost nothing: what is there is what it started from.
    assert found["rcca"][0] > 0.85 > 0.7 > found["random"][0]
    assert found["rcca"][1].summary["start"]["components"] >= 4
    assert "start" not in found["random"][1].summary
    head = found["rcca"][1].alignment.head
    assert head is not None
    assert (head.first, head.second) == ("brain", "dna")
    opened, test = load(tmp_path / "rcca"), np.asarray(labels) == "test"
    both = test & present["brain_lm"] & present["dna"]
    u = opened.score_vectors("brain_lm", features["brain_lm"][both])
    v = opened.score_vectors("dna", features["dna"][both])
    s = u @ v.T
    wins = (s < np.diag(s)[:, None]).sum() + (s < np.diag(s)[None]).sum()
    assert wins / (2 * len(s) * (len(s) - 1)) > 0.85


def test_a_side_is_the_mean_of_the_modalities_that_a_person_has(tmp_path):
    features, present, labels = views()
    result = train(features, labels, config=TINY, run_dir=tmp_path, present=present)
    opened = load(tmp_path)
    has = {name: present[name] for name in NAMES[:2]}
    rows = {name: opened.embed(name, features[name][has[name]]) for name in has}
    side = side_mean(rows, has)
    both, only = has["brain_jepa"] & has["brain_lm"], has["brain_jepa"] & ~has["brain_lm"]
    neither = ~has["brain_jepa"] & ~has["brain_lm"]
    np.testing.assert_allclose(np.linalg.norm(side[~neither], axis=1), 1.0, rtol=1e-5)
    assert neither.any()
    assert not side[neither].any()
    given = {"jepa": features["brain_jepa"], "lm": features["brain_lm"]}
    together = opened.embed_brain({key: x[both] for key, x in given.items()})
    np.testing.assert_allclose(side[both], together, atol=1e-6)
    alone = opened.embed_brain(given["jepa"][only], encoder="jepa")
    np.testing.assert_allclose(side[only], alone, atol=1e-6)
    np.testing.assert_array_equal(opened.embed_brain({"jepa": given["jepa"][only]}), alone)
    # The only modality of a side needs no name.
    dna = features["dna"][present["dna"]]
    np.testing.assert_array_equal(opened.embed_dna(dna), opened.embed("dna", dna))
    with pytest.raises(UserError, match=r"has 2 modalities: name one with encoder=.*jepa, lm"):
        opened.embed_brain(given["jepa"][only])
    with pytest.raises(UserError, match=r"no brain modality 'jeppa'.*Did you mean 'jepa'"):
        opened.embed_brain(given["jepa"][only], encoder="jeppa")
    assert result.alignment.sides == opened.sides


def test_people_with_one_dna_vector_are_no_negatives_in_training_nor_in_validation(tmp_path):
    """Everybody is there twice: told from a double, at best a coin is tossed, which costs log 2."""
    double = np.arange(400) // 2
    random = np.random.default_rng(0)
    dna = random.normal(size=(200, 6))[double]
    features = {"brain": dna + 1e-3 * random.normal(size=dna.shape), "dna": dna}
    labels = ["train"] * 300 + ["validation"] * 100
    ids = PairIds(excluded=torch.from_numpy(double[:, None]))
    config = replace(
        TINY,
        max_steps=50,
        patience=50,
        dim_hidden=64,
        dim_out=16,
        lr=0.02,
        weight_decay=0.0,
        dropout=0.0,
        init_scale=30.0,
    )
    found = {}
    for name, who in (("all", None), ("unrelated", ids)):
        result = train(features, labels, config=config, run_dir=tmp_path / name, ids=who)
        found[name] = result.summary
    assert found["all"]["log_n"] == pytest.approx(math.log(300))
    assert found["unrelated"]["log_n"] == pytest.approx(math.log(299), rel=1e-6)
    assert found["all"]["least_loss"] > 0.9 * math.log(2)
    assert found["unrelated"]["least_loss"] < 0.5 * math.log(2)
    # Of 99 others one is the double, which wins every second time.
    assert found["all"]["validation_auc"] < 1 - 0.4 / 99
    assert found["unrelated"]["validation_auc"] > 1 - 0.2 / 99


def test_people_are_related_through_others_too():
    excluded = torch.tensor([[0, -1], [0, 3], [-1, 3], [-1, -1], [5, 0], [5, -1], [1, -1]])
    found = related(PairIds(excluded=excluded))
    assert found is not None
    assert found.dtype == np.int64
    same = [[i, j] for i, j in itertools.combinations(range(7), 2) if found[i] == found[j]]
    assert same == [[0, 1], [0, 2], [1, 2], [4, 5]]
    assert related(None) is None
    assert related(PairIds(within=torch.zeros(3, dtype=torch.int64))) is None


# -- batches ---------------------------------------------------------------------------------------


def test_dropout_of_a_person_does_not_depend_on_the_number_of_processes():
    config = replace(TINY, dropout=0.4, batch_size=11)
    present = {name: np.ones(30, dtype=bool) for name in NAMES}
    people = Batch(inputs={name: torch.zeros(30, 2) for name in NAMES}, present=present)
    model = AlignmentModel(dict.fromkeys(NAMES, 2), dim_hidden=32, dim_out=4, dropout=0.4)
    rows = batch_rows(30, 3, config)
    alone = Batches(people, config, Ranks()).keep(model, 3, len(rows))
    for rank in range(3):
        batches = Batches(people, config, Ranks(rank=rank, world_size=3))
        own = batches.keep(model, 3, len(rows))
        for name in NAMES:
            torch.testing.assert_close(own[name], alone[name][rank::3], rtol=0, atol=0)
    assert not torch.equal(alone["dna"], alone["brain_lm"])
    again = Batches(people, config, Ranks()).keep(model, 4, len(rows))
    assert not torch.equal(alone["dna"], again["dna"])
    share = torch.stack(list(alone.values())).float().mean()
    # 3 x 11 x 32 draws of probability 0.6
    assert float(share) == pytest.approx(0.6, abs=4 * math.sqrt(0.24 / (33 * 32)))


def test_units_that_are_kept_are_scaled_as_torch_scales_them():
    model = AlignmentModel({"brain": 5, "dna": 5}, dim_hidden=7, dim_out=4, dropout=0.25)
    x, keep = torch.randn(6, 5), torch.rand(6, 7) > 0.25
    linear, gelu, _, out, norm = model.projectors["brain"].layers
    want = norm(out(gelu(linear(x)) * keep / 0.75))
    torch.testing.assert_close(model.projectors["brain"](x, keep), want)


def test_shared_rows_are_the_same_people_on_both_sides():
    _, present, _ = views(50, missing=0.5)
    number = torch.arange(50.0)[:, None]
    embedded = {name: number[has] for name, has in present.items()}
    batch = Batch(inputs={}, present=present, ids=PairIds(within=torch.arange(50)))
    a, b, ids = shared_rows(embedded, batch, "brain_lm", "dna")
    both = np.flatnonzero(present["brain_lm"] & present["dna"])
    assert a.flatten().tolist() == b.flatten().tolist() == both.tolist()
    assert ids is not None
    assert ids.within is not None
    assert ids.within.tolist() == both.tolist()


# -- measures --------------------------------------------------------------------------------------


def test_uniformity_and_alignment_are_those_of_wang_and_isola():
    x, y = torch.nn.functional.normalize(torch.randn(2, 30, 5, dtype=torch.float64), dim=-1)
    squared = torch.pdist(x).square()
    want = float(squared.mul(-2).exp().mean().log())
    assert uniformity(x, tile=7) == pytest.approx(want, rel=1e-9)
    assert uniformity(torch.ones(5, 1)) == pytest.approx(0.0, abs=1e-6)
    present = {"brain": np.ones(30, dtype=bool), "dna": np.ones(30, dtype=bool)}
    people = Batch(inputs={"brain": x, "dna": y}, present=present)

    class Identity(torch.nn.Module):
        logit_scale = torch.tensor(3.0)

        def embed(self, name, inputs, *, keep=None):
            return inputs

    look = Validation(people, modality_pairs(present, ()), Ranks())
    found = look(Identity())  # type: ignore[arg-type]
    assert found["validation_alignment"] == pytest.approx(float((x - y).square().sum(1).mean()))
    assert found["validation_uniformity"] == pytest.approx((uniformity(x) + uniformity(y)) / 2)
    logits = 3.0 * x.float() @ y.float().T
    target = torch.arange(30)
    loss = (
        torch.nn.functional.cross_entropy(logits, target)
        + torch.nn.functional.cross_entropy(logits.T, target)
    ) / 2
    bound = math.log(30) - float(loss)
    assert found["validation_information"] == pytest.approx(bound, abs=1e-5)


def test_pair_auc_leaves_out_who_is_no_negative():
    a, b = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(1))
    ids = some_ids(40)
    s, wins, n = a @ b.T, 0.0, 0
    for i, j in itertools.permutations(range(40), 2):
        if is_negative(ids, i, j):
            wins += float(s[i, j] < s[i, i]) + float(s[j, i] < s[i, i])
            n += 2
    assert pair_auc(a, b, ids=ids, tile=7) == pytest.approx(wins / n)
    assert chance_level(40, None, a.device) == pytest.approx(math.log(40))


@pytest.mark.parametrize("metric", ["auc", "information"])
def test_training_stops_by_the_metric_that_was_asked_for(tmp_path, metric):
    features, _, labels = views(200, names=("brain", "dna"), missing=0.0)
    settings = {"lr": 0.05, "max_steps": 60, "patience": 3, "dropout": 0.1}
    config = replace(TINY, **settings, early_stopping=metric)
    result = train(features, labels, config=config, run_dir=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    looks = [row for row in rows if f"validation_{metric}" in row]
    best = max(looks, key=lambda row: (row[f"validation_{metric}"], -row["step"]))
    assert result.summary["best_step"] == best["step"] < result.summary["n_steps"] < 60


# -- sides, pairs, refusals ------------------------------------------------------------------------


def test_sides_are_what_stands_before_the_first_underscore():
    assert sides_of(["brain_jepa", "dna", "brain_lm_2"]) == {
        "brain": ("brain_jepa", "brain_lm_2"),
        "dna": ("dna",),
    }
    assert sides_of(["view_1", "view_2"]) == {"view_1": ("view_1",), "view_2": ("view_2",)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": ("brain_jepa-dan=2",)}, "'brain_jepa-dan' is no pair.*Did you mean"),
        ({"weights": ("brain_jepa-dna",)}, "expected a number of 0 or more after the ="),
        ({"weights": ("brain_jepa-dna=-1",)}, "expected a number of 0 or more"),
        ({"weights": ("brain_jepa-dna=1", "dna-brain_jepa=2")}, "has two weights"),
        ({"weights": ("brain_jepa-dna=0", "brain_lm-dna=0")}, "leave no pair of .* sides"),
        ({"lacking": "dna"}, "0 train people with both modalities: expected at least 8"),
        ({"lacking": "brain_lm"}, "'brain_lm' shares fewer than 8 training people with every"),
    ],
)
def test_pairs_that_cannot_be_learnt_from_are_refused_in_one_line(change, message):
    present = {name: np.ones(30, dtype=bool) for name in NAMES}
    if "lacking" in change:
        present[change["lacking"]] = np.zeros(30, dtype=bool)
    with pytest.raises(UserError, match=message) as caught:
        modality_pairs(present, change.get("weights", ()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ({"dan": np.ones(600, dtype=bool)}, "present: no modality 'dan'. Did you mean 'dna'"),
        ({"dna": np.ones(599, dtype=bool)}, r"bool of shape \(599,\): expected bool \(600,\)"),
        ({"dna": np.ones(600)}, "float64 of shape"),
        ({"dna": np.arange(600) > 310}, "0 train people with both"),
        ({"dna": np.arange(600) < 300}, "0 validation people with both"),
        ({}, "NaN or infinite values in"),
    ],
)
def test_who_has_what_is_checked(tmp_path, present, message):
    features, _, labels = views(names=("brain", "dna"), missing=0.0)
    if not present:
        features["dna"][5] = np.nan
    with pytest.raises(UserError, match=message):
        train(features, labels, config=AlignConfig(), run_dir=tmp_path, present=present)
