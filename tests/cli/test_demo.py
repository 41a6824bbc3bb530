import pytest

from brainfusion.cli import demo, main
from brainfusion.runtime.files import read_json
from tests.cli.conftest import BRIEF, SMALL

SIZES = {
    "simulate": ("--n-parcels", 14, "--n-trs", 64),
    "pretrain": SMALL,
    "align": ("--max-steps", 5),
    "retrieve": BRIEF,
    "probe": ("--targets", "age", *BRIEF),
    "attribute": ("--what", "genes", "--bootstrap", 9),
}
"""What makes the demo's own commands small."""
ORDER = [
    "simulate",
    "pretrain brainjepa",
    "pretrain brainlm",
    "embed brainjepa",
    "embed brainlm",
    "embed brainjepa-untrained",
    "align",
    "retrieve",
    "probe",
    "attribute",
    "report",
]


class Runner:
    """Runs the stages in this process, small, or pretends to; notes which."""

    def __init__(self):
        self.names, self.restarted, self.pretend = [], [], False

    def __call__(self, stages):
        rows = []
        for stage in stages:
            if self.pretend:
                stage.product.parent.mkdir(parents=True, exist_ok=True)
                stage.product.touch()
            else:
                small = SIZES.get(stage.command[0], ())
                assert main([str(word) for word in (*stage.command, *small)]) == 0
            assert stage.product.exists()
            self.names.append(stage.name)
            self.restarted += [stage.name] if "--restart" in stage.command else []
            row = {"name": stage.name, "key": stage.key, "seconds": 1.0, "peak_mib": 100.0}
            rows.append(row | {"cached": False})
        return rows, []

    def take(self):
        """The names of the stages since the last look."""
        names, self.names = self.names, []
        return names


@pytest.fixture
def runner(monkeypatch):
    runner = Runner()
    monkeypatch.setattr(demo, "_run_side_by_side", runner)
    return runner


@pytest.mark.slow
def test_a_second_demo_does_not_redo_what_is_finished(runner, done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = done("demo", "--n-people", 100)
    assert runner.take() == ORDER
    assert "report:  runs/demo/report.html" in said.out
    assert [line.split("  ")[0] for line in said.out.splitlines() if line.endswith(" 100")] == ORDER
    root = tmp_path / "runs" / "demo"
    results = read_json(root / "results.json")
    assert results["cohort"]["n_people"] == 100
    assert set(results["retrieval"]) >= {"brain_to_dna", "dna_to_brain", "shuffled_control"}

    page = (root / "report.html").stat().st_mtime_ns
    said = done("demo", "--n-people", 100)
    assert runner.take() == []
    assert said.err.count("done before") == len(ORDER)
    assert said.out.count("done before") == len(ORDER)
    assert (root / "report.html").stat().st_mtime_ns == page

    # The demo's place is what commands without --cohort use.
    done("retrieve", "--query", "sim-000001", "--top", 3)

    # What is lost is made again, with all that came of it, and nothing before it.
    runner.pretend = True
    (root / "features" / "brainlm.parquet").unlink()
    done("demo", "--n-people", 100)
    again = ["embed brainlm", "align", "retrieve", "probe", "attribute", "report"]
    assert runner.take() == again

    # Another version trains anew: it would refuse to go on from the run of another recipe.
    monkeypatch.setattr(demo, "__version__", "99")
    done("demo", "--n-people", 100)
    assert runner.take() == ORDER
    assert runner.restarted == ["pretrain brainjepa", "pretrain brainlm"]
    done("demo", "--n-people", 100)
    assert runner.take() == []

    # Another number of people is another cohort: nothing is kept.
    said = done("demo", "--n-people", 90)
    assert "runs/demo is made anew" in said.err
    assert runner.take() == ORDER
    assert len(runner.restarted) == 2


def test_stages_run_side_by_side_and_are_timed(tmp_path, capfd):
    stages = [demo.Stage(name, ["--version"], tmp_path / name) for name in ("one", "two")]
    rows, failed = demo._run_side_by_side(stages)
    assert failed == []
    assert [row["name"] for row in rows] == ["one", "two"]
    assert [row["key"] for row in rows] == [stage.key for stage in stages]
    assert all(0 < row["seconds"] < 30 and row["peak_mib"] > 1 for row in rows)
    assert capfd.readouterr().err.count("brainfusion --version") == 2


def test_a_stage_that_fails_is_named_and_the_others_are_waited_for(tmp_path, capfd):
    stages = [
        demo.Stage("good", ["--version"], tmp_path / "good"),
        demo.Stage("bad", ["simulat"], tmp_path / "bad"),
    ]
    rows, failed = demo._run_side_by_side(stages)
    assert [row["name"] for row in rows] == ["good"]
    assert failed == ["'bad' (exit code 2)"]
    assert "error: unknown command 'simulat'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--preset nul", "unknown preset 'nul'. Did you mean 'null'?"),
        ("--brain brainjep", "Did you mean 'brainjepa'?"),
        ("--dna evo", "unknown DNA model 'evo'. Did you mean 'evo2'?"),
        ("--n-people 0", "--n-people 0: expected"),
        ("--n-peple 3", "Did you mean --n-people?"),
    ],
)
def test_a_wrong_word_is_refused_before_anything_is_run(
    runner, call, tmp_path, monkeypatch, words, says
):
    monkeypatch.chdir(tmp_path)
    assert says in call("demo", *words.split()).error
    assert runner.take() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", ["", "--fresh"])
def test_a_folder_with_other_things_is_left_alone(runner, call, tmp_path, words):
    runner.pretend = True
    (tmp_path / "thesis.txt").write_text("years of work")
    said = call("demo", "--n-people", 100, "--out", tmp_path, *words.split())
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert "thesis" not in said.out
