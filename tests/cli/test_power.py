import json

import pytest

from brainfusion.cli.power import main
from brainfusion.runtime.errors import UserError


def test_a_table_shows_each_number_beside_chance(capsys) -> None:
    assert main(["--n", "412", "--rho", "0.2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("assumed: canonical correlations 0.200; mutual information 0.020")
    assert lines[1] == "attainable AUC 0.546 in a gallery of any size (chance 0.500)"
    needed = int(lines[2].removeprefix("test people needed for power 80%: "))
    assert needed == pytest.approx(242, abs=10)
    row = next(line.split() for line in lines if line.strip().startswith("412 "))
    assert row[1].endswith("%")
    assert (row[4], row[6]) == ("(0.0024)", "(0.0243)")
    assert any("without a closed form" in line for line in lines)


def test_components_training_and_json(capsys) -> None:
    flags = "--rho 0.3 --components 5 --n 100 200 --n-train 2000 --features 32 32 --json"
    assert main(flags.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["correlations"] == [0.3] * 5
    assert [row["n"] for row in found["rows"]] == [100, 200]
    assert 0.5 < found["training"]["auc"] < found["auc"]
    assert found["training"]["n_needed"] > found["n_needed"]
    main([word for word in flags.split() if word != "--json"])
    shown = capsys.readouterr().out
    assert "5 x 0.300" in shown
    assert "after training on 2,000 people with 32 and 32 features" in shown


def test_a_target_auc_stands_for_the_link_that_attains_it(capsys) -> None:
    main(["--auc", "0.55", "--n", "300", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["auc"] == pytest.approx(0.55, abs=1e-4)
    assert found["rows"][0]["power"] == pytest.approx(0.91, abs=0.02)
    main(["--rho", "0", "--n", "100"])
    assert "no number of test people finds it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("", "Give --rho"),
        ("--rho 0.2 --auc 0.6", "one of the two"),
        ("--rho 1.2", "below 1"),
        ("--rho 0.2 0.1 --components 3", "give one --rho"),
        ("--rho 0.2 --n 3", "10 people or more"),
        ("--rho 0.2 --alpha 2", "--alpha 2: expected a number between 0 and 1"),
        ("--rho 0.2 --n-train 100", "belong together"),
        ("--rho 0.2 --n-train 100 --features 0 4", "two numbers of 1 or more"),
        ("--rho 0.2 --n-train 100 --features 64 64", "fewer features than people"),
        ("--auc 0.4", "between 0.5"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_line(flags, says) -> None:
    with pytest.raises(UserError, match=says) as caught:
        main(flags.split())
    assert "\n" not in str(caught.value)
