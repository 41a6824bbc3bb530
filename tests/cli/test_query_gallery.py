"""What a query searches: filters, genes shown alone, indexes kept and opened again."""

import shutil

import numpy as np
import polars as pl
import pytest

from brainfusion.alignment import load
from brainfusion.data.cohort import Cohort
from brainfusion.data.features import read_features
from brainfusion.eval.retrieval.index import RetrievalIndex
from tests.cli.asking import answered, assert_same_answer, bold_of, ranked, scores, stored_vector

ALL = ("--top", 5000, "--json")


@pytest.fixture(scope="module")
def cohort(site) -> Cohort:
    return Cohort.open(site.cohort)


@pytest.fixture(scope="module")
def person(cohort) -> str:
    return cohort.splits().test[1]


@pytest.fixture
def ask(site, done):
    """Ask, and read the JSON object."""

    def run(*words):
        return answered(done("retrieve", *words, *ALL, *site.place))

    return run


def vectors(site, side):
    return read_features(site.workspace / "align" / "brainjepa-evo2" / "scores" / f"{side}.parquet")


# -- filters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (("--where", "site=site-1"), lambda own: pl.col("site") == "site-1"),
        (
            ("--where", "site=site-1,site-3", "sex=F", "--among", "test"),
            lambda own: pl.col("site").is_in(["site-1", "site-3"]) & (pl.col("sex") == "F"),
        ),
        (("--where", "mdd=0"), lambda own: pl.col("mdd") == 0),
        (("--same", "site"), lambda own: pl.col("site") == own["site"]),
        (
            ("--same", "site", "group", "--where", "sex=M"),
            lambda own: (
                (pl.col("site") == own["site"])
                & (pl.col("group") == own["group"])
                & (pl.col("sex") == "M")
            ),
        ),
    ],
)
def test_filters_leave_those_who_fit_and_nobody_else(site, ask, cohort, person, words, kept):
    table = cohort.subjects
    own = table.filter(pl.col("subject") == person).to_dicts()[0]
    expected = set(table.filter(kept(own))["subject"])
    if "--among" in words:
        expected &= set(cohort.splits().test)
    answer = ask("--query", person, *words)
    assert set(ranked(answer)) == expected
    assert 0 < len(expected) < 120
    assert answer["gallery"]["n_searched"] == [len(expected)]
    whole = ask("--query", person)
    assert ranked(answer) == [name for name in ranked(whole) if name in expected]


def test_a_stranger_shares_what_is_said_of_them(site, ask, cohort, tmp_path, person):
    np.save(tmp_path / "own.npy", bold_of(cohort, person))
    own = cohort.subjects.filter(pl.col("subject") == person).to_dicts()[0]
    words = ("--recording", tmp_path / "own.npy", "--tr-s", 2, "--same", "site", "age")
    answer = ask(*words, "--about", f"site={own['site']}", f"age={own['age']}")
    assert person in ranked(answer)
    same = cohort.subjects.filter(pl.col("site") == own["site"], pl.col("age") == own["age"])
    assert set(ranked(answer)) == set(same["subject"])
    assert answer["filters"]["same"] == {"site": own["site"], "age": own["age"]}


def test_each_of_several_strangers_has_a_gallery_of_their_own(site, ask, done, cohort, tmp_path):
    from tests.cli.asking import native_evo2

    people = list(cohort.splits().test[:3])
    table = cohort.subjects.filter(pl.col("subject").is_in(people))
    table.select("subject", "site").write_csv(tmp_path / "people.csv")
    path = native_evo2(site.cohort / "sources" / "evo2", people, tmp_path / "three")
    words = ("--dna-vector", path, "--about", tmp_path / "people.csv", "--same", "site")
    answer = ask(*words)
    sites = dict(cohort.subjects.select("subject", "site").iter_rows())
    for name, n in zip(people, answer["gallery"]["n_searched"], strict=True):
        found = {row["id"] for row in answer["rows"] if row["query"] == name}
        assert found == {other for other, place in sites.items() if place == sites[name]}
        assert len(found) == n
    text = done("retrieve", *words, "--top", 1, *site.place).out
    assert f"same site ({sites[people[0]]})" in text


# -- genes -----------------------------------------------------------------------------------------


def gene_scores(site, names, person):
    """Brute force: every gene of these people behind a mask, scored by a person's brain."""
    alignment = load(site.workspace / "align" / "brainjepa-evo2")
    brain = vectors(site, "brain").select([person])[0]
    genes = alignment.conditioners["dna"].genes
    found = {}
    for name in names:
        own = np.repeat(stored_vector(site.cohort, "evo2", name)[None], len(genes), axis=0)
        shown = alignment.search_vectors("dna", own, mask=np.eye(len(genes), dtype=bool))
        found[name] = dict(zip([gene.name for gene in genes], shown @ brain, strict=True))
    return found


def test_own_genes_are_scored_as_behind_a_mask_of_all_others(site, ask, done, person):
    expected = gene_scores(site, [person], person)[person]
    answer = ask("--query", person, "--gallery", "own-genes")
    assert ranked(answer) == sorted(expected, key=lambda name: -expected[name])
    np.testing.assert_allclose(scores(answer), sorted(expected.values(), reverse=True), atol=1e-5)
    assert {row["person"] for row in answer["rows"]} == {person}
    # All rows lie as far above the score of nothing shown, which is one number.
    zeros = [row["score"] - row["above_nothing_shown"] for row in answer["rows"]]
    assert np.ptp(zeros) < 1e-5
    text = done("retrieve", "--query", person, "--gallery", "own-genes", *site.place).out
    assert text.splitlines()[0] == (
        "the 10 genes nearest to this person's brain, each shown alone,"
    )
    assert "tells: the score less that of a person of whom no gene is shown." in text


def test_genes_of_everybody_are_searched_and_narrowed(site, ask, cohort, person):
    people = list(cohort.splits().test[:2])
    sites = dict(cohort.subjects.select("subject", "site").iter_rows())
    answer = ask("--query", person, "--gallery", "genes", "--among", "test", "--same", "site")
    searched = [name for name in cohort.splits().test if sites[name] == sites[person]]
    assert answer["gallery"]["n_searched"] == [24 * len(searched)]
    by_id = {row["id"]: row["score"] for row in answer["rows"]}
    for name, genes in gene_scores(site, searched[:2], person).items():
        for gene, score in genes.items():
            assert by_id[f"{gene}/{name}"] == pytest.approx(score, abs=1e-5)
    only = ask("--query", person, "--gallery", "genes", "--genes", "SIM002", "SIM007")
    assert {row["gene"] for row in only["rows"]} == {"SIM002", "SIM007"}
    assert len(only["rows"]) == 240
    of = ask("--query", person, "--gallery", "own-genes", "--genes-of", people[0])
    assert {row["person"] for row in of["rows"]} == {people[0]}


def test_a_recording_asks_for_genes_as_its_person_does(site, ask, cohort, tmp_path, person):
    np.save(tmp_path / "own.npy", bold_of(cohort, person))
    words = ("--gallery", "own-genes", "--genes-of", person)
    new = ask("--recording", tmp_path / "own.npy", "--tr-s", 2, *words)
    assert_same_answer(new, ask("--query", person, "--gallery", "own-genes"))


# -- indexes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gallery", ["people", "genes"])
def test_a_kept_index_answers_as_the_one_that_was_built(site, ask, person, tmp_path, gallery):
    asks = ("--query", person, "--query-from", "brain", "--gallery", gallery)
    narrow = ("--where", "sex=F", "--among", "test")
    kept = tmp_path / "index"
    first = ask(*asks, *narrow, "--save-index", kept)
    assert_same_answer(ask(*asks, *narrow, "--index-from", kept), first)
    # It is of everybody, whatever the query was that kept it.
    again = ask(*asks, "--index-from", kept)
    assert_same_answer(again, ask(*asks))
    assert again["index"]["from"] == str(kept)


def test_an_approximate_index_says_its_recall_and_is_exact_where_narrowed(
    site, ask, done, person, tmp_path
):
    asks, kept = ("--query", person, "--query-from", "brain"), tmp_path / "index"
    answer = ask(*asks, "--index", "hnsw", "--save-index", kept)
    assert answer["index"]["kind"] == "hnsw"
    assert answer["index"]["recall_at_10"] > 0.9
    assert not answer["index"]["searched_exactly"]
    narrowed = ask(*asks, "--index-from", kept, "--where", "sex=F")
    assert narrowed["index"]["searched_exactly"]
    assert_same_answer(narrowed, ask(*asks, "--where", "sex=F"))
    text = done("retrieve", *asks, "--index-from", kept, "--where", "sex=F", *site.place).out
    recall = f"{answer['index']['recall_at_10']:.3f}"
    assert f"sex=F; hnsw search, recall@10 {recall}, exact where narrowed" in text


def test_people_added_from_python_are_found(site, ask, person, tmp_path):
    asks, kept = ("--query", person), tmp_path / "index"
    ask(*asks, "--save-index", kept)
    index = RetrievalIndex.load(kept)
    assert set(index.about.columns) == {"split", "site", "sex", "group"}
    asking = vectors(site, "dna").select([person])
    about = {name: ["new"] for name in index.about.columns}
    index.add(10 * asking[:, ::-1].copy(), ["stranger"], about=about)
    index.save(kept)
    answer = ask(*asks, "--index-from", kept)
    assert "stranger" in ranked(answer)
    assert answer["gallery"]["n_searched"] == [121]
    # Nobody knows where a stranger was scanned, so a filter leaves them out.
    assert "stranger" not in ranked(ask(*asks, "--index-from", kept, "--where", "sex=F,M"))


def test_an_index_of_another_run_or_question_is_refused(site, call, ask, person, tmp_path):
    kept = tmp_path / "index"
    ask("--query", person, "--save-index", kept)
    asks = ("retrieve", "--query", person, "--index-from")
    said = call(*asks, kept, "--query-from", "brain", *site.place)
    assert "is an index for other questions (searched brain, this is dna)" in said.error
    said = call(*asks, kept, "--gallery", "genes", *site.place)
    assert "is an index for other questions (gallery people, this is genes)" in said.error
    other = tmp_path / "other"
    shutil.copytree(site.workspace / "align" / "brainjepa-evo2", other)
    shutil.copytree(other / "control" / "model", other / "model", dirs_exist_ok=True)
    said = call(*asks, kept, "--run", other, *site.place)
    assert "is an index for another alignment (model hash " in said.error
    RetrievalIndex.build(np.eye(3), ["a", "b", "c"]).save(tmp_path / "mine")
    said = call(*asks, tmp_path / "mine", *site.place)
    assert "does not say which alignment it is of" in said.error
