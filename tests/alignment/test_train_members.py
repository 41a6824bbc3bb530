"""Averages over steps and seeds, and settings chosen on validation people."""

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from brainfusion.alignment import AlignConfig, AlignmentModel, load, train
from brainfusion.alignment.density_ratio import DensityRatio
from brainfusion.alignment.member import MovingAverage
from brainfusion.alignment.validation import pair_auc
from brainfusion.runtime import checkpoint
from brainfusion.runtime.errors import CheckpointError, UserError
from brainfusion.runtime.signals import Stopped
from tests.alignment.power_cut import PowerCutError
from tests.alignment.test_train import CLOSED, TINY, cohort
from tests.alignment.test_train_resume import assert_same_run, metrics

CONFIG = replace(CLOSED, dropout=0.3, batch_size=50, eval_every=2, max_steps=8, lr=0.01)
MEMBERS = replace(CONFIG, average_decay=0.7, choose_dropout=(0.0, 0.4), n_seeds=2)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


def run(folder: Path, config: AlignConfig, **how: Any) -> dict[str, Any]:
    """Train on one small cohort; the summary."""
    features, labels = cohort(n=200)
    return train(features, labels, config=config, run_dir=folder, **how).summary


def test_a_moving_average_is_a_plain_mean_at_first_and_an_exponential_one_later():
    model = AlignmentModel({"brain": 3, "dna": 4}, dim_hidden=5, dim_out=4)
    generator = torch.Generator().manual_seed(0)
    seen = [{name: p.detach().clone().double() for name, p in model.named_parameters()}]
    average = MovingAverage(model, decay=0.75)  # a quarter of each step: a mean of up to four
    expected = seen[0]
    for step in range(1, 8):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
        seen.append({name: p.detach().clone().double() for name, p in model.named_parameters()})
        average.update(model, step)
        if step < 4:
            expected = {name: sum(w[name] for w in seen) / len(seen) for name in seen[0]}
        else:
            expected = {name: 0.75 * x + 0.25 * seen[-1][name] for name, x in expected.items()}
        for name, p in average.model.named_parameters():
            torch.testing.assert_close(p.double(), expected[name], rtol=1e-5, atol=1e-6)
            assert not p.requires_grad


def test_the_average_over_steps_is_kept_where_it_is_better_and_only_there(tmp_path):
    config = replace(CONFIG, dropout=0.0, average_decay=0.8)
    found = run(tmp_path / "averaged", config)
    looks = [row for row in metrics(tmp_path / "averaged") if "validation_information" in row]
    bounds = [row["average_validation_information"] for row in looks if row["step"]]
    assert found["kept"] == "average over steps"
    assert found["validation_information"] == max(bounds)
    assert max(bounds) > max(row["validation_information"] for row in looks)
    features, labels = cohort(n=200)
    people = np.asarray(labels) == "validation"
    a, b = (load(tmp_path / "averaged").embed(name, x[people]) for name, x in features.items())
    auc = pair_auc(torch.from_numpy(a), torch.from_numpy(b))
    assert auc == pytest.approx(found["validation_auc"], abs=1e-4)

    # A slow average of a run that still improves lags behind: it changes nothing.
    slow = run(tmp_path / "slow", replace(TINY, average_decay=0.99))
    run(tmp_path / "without", replace(TINY, average_decay=0.0))
    assert slow["kept"] == "weights"
    for key, value in weights(tmp_path / "without").items():
        assert torch.equal(value, weights(tmp_path / "slow")[key])


def test_each_candidate_is_the_run_that_it_would_be_alone_and_the_best_is_kept(tmp_path, capsys):
    config = replace(
        CONFIG, init="random", lr=0.0, choose_weight_decay=(3.0, 0.0), choose_dropout=(0.6, 0.1)
    )
    found = run(tmp_path / "all", config)
    said = capsys.readouterr().err.splitlines()
    rows, bounds = metrics(tmp_path / "all"), []
    for number, (decay, dropout) in enumerate([(3.0, 0.6), (3.0, 0.1), (0.0, 0.6), (0.0, 0.1)]):
        alone = replace(config, choose_weight_decay=(), choose_dropout=(), weight_decay=decay)
        summary = run(tmp_path / str(number), replace(alone, dropout=dropout))
        own = [{**row, "member": 0} for row in rows if row["member"] == number]
        assert own == metrics(tmp_path / str(number))
        row = found["members"][number]
        assert (row["weight_decay"], row["dropout"], row["seed"]) == (decay, dropout, 0)
        assert row["validation_information"] == summary["validation_information"]
        bounds.append(summary["validation_information"])
    best = int(np.argmax(bounds))
    assert len(set(bounds)) == 4
    assert found["member"] == best
    chosen = {name: found["members"][best][name] for name in ("weight_decay", "dropout")}
    assert found["chosen"] == chosen
    for key, value in weights(tmp_path / str(best)).items():
        assert torch.equal(value, weights(tmp_path / "all")[key])
    assert load(tmp_path / "all").model.settings["dropout"] == chosen["dropout"]
    line = f"weight decay {chosen['weight_decay']:g} and dropout {chosen['dropout']:g} chosen of 4"
    assert sum(text.startswith(line) and f"{max(bounds):.4f}" in text for text in said) == 1


def bent(n: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """A link that is not linear, so that training finds more than its start."""
    features, labels = cohort(n=n, rho=0.95, n_latents=3, n_nuisance=3)
    return {**features, "brain": np.sign(features["brain"]) * features["brain"] ** 2}, labels


@pytest.mark.parametrize(("lr", "kept"), [(3e-3, "average over seeds"), (1e-3, "weights")])
def test_an_average_over_seeds_is_the_mean_of_runs_by_themselves(tmp_path, capsys, lr, kept):
    config = replace(CONFIG, lr=lr, seed=5, score="cosine")
    features, labels = bent(200)
    known = {"labels": labels, "run_dir": tmp_path / "all"}
    found = train(features, **known, config=replace(config, n_seeds=2)).summary
    said = capsys.readouterr().err
    alone = [
        train(features, labels, config=replace(config, seed=s), run_dir=tmp_path / str(s)).summary
        for s in (5, 6)
    ]
    bounds = [one["validation_information"] for one in alone]
    assert [row["validation_information"] for row in found["members"]] == bounds
    assert [row["seed"] for row in found["members"]] == [5, 6]
    assert found["kept"] == kept
    averaged = found["average_over_seeds"]["validation_information"]
    every = [weights(tmp_path / str(s)) for s in (5, 6)]
    expected = every[int(np.argmax(bounds))]
    if kept == "weights":
        assert averaged <= max(bounds) == found["validation_information"]
        assert "2 seeds: the average of their weights is not kept" in said
    else:
        assert averaged == found["validation_information"] > max(bounds)
        assert "2 seeds: the average of their weights is kept" in said
        expected = {key: (one.double() + every[1][key]) / 2 for key, one in every[0].items()}
    for key, value in weights(tmp_path / "all").items():
        torch.testing.assert_close(value.double(), expected[key].double(), rtol=1e-5, atol=1e-6)


def test_a_start_that_the_density_ratio_scores_better_is_kept_after_all(tmp_path, capsys):
    features, labels = bent(200)
    config = replace(CONFIG, lr=3e-3, seed=5)
    by_cosine = train(
        features, labels, config=replace(config, score="cosine"), run_dir=tmp_path / "cosine"
    )
    assert by_cosine.summary["best_step"] > 0  # training beat the start's cosines
    found = train(features, labels, config=config, run_dir=tmp_path / "ratio")
    assert (found.summary["kept"], found.summary["best_step"]) == ("start", 0)
    first = metrics(tmp_path / "ratio")[0]
    assert found.summary["validation_information"] == first["validation_information"]
    assert "the start is kept" in capsys.readouterr().err
    # What was not kept has a density ratio that says less of the same people.
    rows = [np.asarray(labels) == split for split in ("train", "validation")]
    parts = [
        {name: by_cosine.alignment.embed(name, x[people]) for name, x in features.items()}
        for people in rows
    ]
    assert found.alignment.head is not None
    assert found.alignment.head.information > DensityRatio.fit(*parts).information


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of members that nothing interrupts."""
    folder = tmp_path_factory.mktemp("members") / "whole"
    run(folder, MEMBERS)
    return folder


def test_a_run_of_members_that_was_cut_goes_on_to_the_bit(tmp_path, cut, whole):
    again = {"checkpoint_every": 3, "resume": True}
    # In the middle, just after a member began, in a later one, and at the last step of all.
    for place in ((0, 4), (1, 1), (1, 7), (2, 5), (2, 8)):
        cut(place[1], member=place[0])
        with pytest.raises(PowerCutError):
            run(tmp_path / "cut", MEMBERS, **again)
    found = run(tmp_path / "cut", MEMBERS, **again)
    assert [row["member"] for row in found["members"]] == [0, 1, 2]
    assert_same_run(whole, tmp_path / "cut")
    run(tmp_path / "cut", MEMBERS, **again)  # once more, from its end
    assert_same_run(whole, tmp_path / "cut")


@pytest.mark.parametrize(("place", "said"), [((0, 7), "8, member 1"), ((1, 2), "3, member 2")])
def test_a_signal_stops_a_run_between_and_within_members(tmp_path, cut, capsys, whole, place, said):
    again = {"checkpoint_every": 100, "resume": True}
    cut(place[1], signal.SIGTERM, member=place[0])
    with pytest.raises(Stopped, match=f"at step {said} of 3"):
        run(tmp_path / "cut", MEMBERS, **again)
    capsys.readouterr()
    run(tmp_path / "cut", MEMBERS, **again)
    assert f"was stopped at step {said} of 3." in capsys.readouterr().err
    assert_same_run(whole, tmp_path / "cut")


def test_a_member_that_stops_early_makes_room_for_the_next_in_checkpoints(tmp_path, cut):
    config = replace(MEMBERS, lr=0.05, patience=1, max_steps=20)
    whole = run(tmp_path / "whole", config)
    taken = [row["n_steps"] for row in whole["members"]]
    assert max(taken) < 20
    cut(taken[2], member=2)
    with pytest.raises(PowerCutError):
        run(tmp_path / "cut", config, checkpoint_every=1)
    newest = checkpoint.steps(tmp_path / "cut")[-1].name
    assert newest == f"step-{sum(taken) - 1:07d}"
    run(tmp_path / "cut", config, checkpoint_every=1, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_other_candidates_are_refused_when_a_run_goes_on(tmp_path, cut):
    cut(4, member=1)
    with pytest.raises(PowerCutError):
        run(tmp_path, MEMBERS, checkpoint_every=3)
    with pytest.raises(CheckpointError, match=r"choose_dropout: \[0.0, 0.4\] -> \[0.0\]"):
        run(tmp_path, replace(MEMBERS, choose_dropout=(0.0,)), checkpoint_every=3, resume=True)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"n_seeds": 0}, "n_seeds=0: expected more than 0"),
        ({"n_seeds": 3, "init": "random"}, "n_seeds=3 with init='random': .* use init='rcca'"),
        ({"average_decay": 1.0}, "average_decay=1.0: expected at least 0 and less than 1"),
        ({"choose_dropout": (0.1, 1.0)}, "choose_dropout=.*expected numbers of at least 0"),
        ({"choose_weight_decay": (-1.0,)}, "choose_weight_decay=.*expected numbers of 0 or more"),
        ({"choose_dropout": (0.1, 0.1)}, "choose_dropout=.*expected each number once"),
    ],
)
def test_members_that_cannot_be_are_refused_in_one_line(wrong, says):
    with pytest.raises(UserError, match=says) as error:
        AlignConfig(**wrong)
    assert "\n" not in str(error.value)


def test_seeds_are_refused_where_no_closed_form_is_found_to_start_from(tmp_path):
    features, labels = cohort(n=200)
    # A space too narrow for a variate and its constants.
    config = replace(CONFIG, n_seeds=2, dim_out=3)
    with pytest.raises(UserError, match="n_seeds=2: no closed form was found") as error:
        train(features, labels, config=config, run_dir=tmp_path)
    assert "\n" not in str(error.value)
