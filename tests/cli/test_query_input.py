"""Queries that cannot be answered end in one line, which says what to do."""

import numpy as np
import pytest

from brainfusion.data.cohort import Cohort
from tests.cli.asking import bold_of, native_caduceus, native_evo2, stored_vector, write_table


@pytest.fixture(scope="module")
def files(site, tmp_path_factory):
    """Files with something wrong, in a folder."""
    folder = tmp_path_factory.mktemp("files")
    cohort = Cohort.open(site.cohort)
    person = cohort.splits().test[0]
    bold, dna = bold_of(cohort, person), stored_vector(site.cohort, "evo2", person)
    single, infinite = bold.copy(), bold.copy()
    single[3, 5], infinite[2, 2] = np.nan, np.inf
    arrays = {
        "own": bold, "few": bold[:-2], "nan": single, "inf": infinite, "short": bold[:, :12],
        "square": bold[:, : len(bold)], "stacked": np.stack([bold, bold]), "flat": bold[0],
        "vector": dna, "turned": dna.T, "wide": np.concatenate([dna, dna], axis=1),
        "holes": np.where(np.arange(len(dna))[:, None] == 2, np.nan, dna),
    }  # fmt: skip
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    write_table(folder / "strange.tsv", bold, [f"other-{i}" for i in range(len(bold))])
    half = [n if i < 10 else f"x{i}" for i, n in enumerate(cohort.atlas.parcels)]
    write_table(folder / "half.tsv", bold, half)
    (folder / "notes.docx").write_text("BOLD")
    native_caduceus(site.cohort / "sources" / "caduceus", [person], folder / "caduceus")
    other = native_evo2(site.cohort / "sources" / "evo2", [person], folder / "other-layer")
    said = (other / "provenance.json").read_text()
    (other / "provenance.json").write_text(said.replace("blocks.26", "blocks.20"))
    for path in other.glob("*.pt"):
        rename_layer(path)
    unknown = native_evo2(site.cohort / "sources" / "evo2", [person], folder / "other-genes")
    for path in unknown.glob("*.pt"):
        path.rename(path.with_name(path.name.replace("SIM", "ENSG")))
    return folder


def rename_layer(path):
    import torch

    layers = torch.load(path, weights_only=True)
    torch.save({"blocks.20": next(iter(layers.values()))}, path)


BRAIN = [
    ("few.npy", "has shape [18, 64] but the atlas 'simulated-20' has 20 parcels. Parcel order"),
    ("own.npy --orientation trs-first", "has 64 parcels but the atlas 'simulated-20' has 20"),
    ("square.npy", "both axes fit 20 parcels: give --orientation"),
    ("nan.npy", "'nan.npy' has 1 single NaN values in 1 parcels"),
    ("inf.npy", "'inf.npy' has 1 infinite values"),
    ("short.npy", "short.npy has 12 TRs at its TR of 2 s, and this brainjepa needs 32 or more"),
    ("stacked.npy", "stacked.npy holds 2 recordings: choose with --row 0 to 1"),
    ("stacked.npy --row 2", "stacked.npy holds 2 recordings: choose with --row 0 to 1"),
    ("own.npy --row 0", "own.npy holds one recording: leave --row out"),
    ("flat.npy", "flat.npy has shape [64]"),
    ("strange.tsv", "none of the 20 parcel names ('other-0', ...) is in atlas 'simulated-20'"),
    ("half.tsv", "has data in 50.0% of the 20 parcels that this brainjepa reads"),
    ("notes.docx", "notes.docx is no recording by its name: expected one of .npy"),
    ("nothing.npy", "nothing.npy does not exist: expected a recording (.npy"),
    ("own.npy --tr-s 2000", "tr_s=2000 is no repetition time in seconds"),
    ("own.npy --checkpoint WORK/pretrain/brainlm", "but the features were made by brainjepa with"),
    ("own.npy --checkpoint other=WORK/pretrain/brainlm", "expected NAME=PATH, once each of this"),
    ("own.npy --checkpoint nowhere", "nowhere does not exist: expected a run of"),
    ("own.npy --gradient g.csv", "--gradient goes with an authors' checkpoint file"),
    ("own.npy --same site", "--same site: it is not known of who asks; give --about site=..."),
    ("own.npy --about site", "--about site: expected NAME=VALUE, or a table"),
    ("own.npy --gallery own-genes", "with a recording: whose genes? Give --genes-of ID"),
    ("own.npy --query-from brain", "--query-from goes with --query"),
]
DNA = [
    ("FILES/turned.npy", "of shape [64, 24] (it looks transposed): expected floats [24 genes, 64]"),
    (
        "FILES/wide.npy",
        "of shape [24, 128]: expected floats [24 genes, 64], the genes in the order",
    ),
    ("FILES/holes.npy", "holes.npy has NaN or infinite values in 1 of 24 genes"),
    ("FILES/caduceus", "says model 'caduceus', but 'evo2' is asked for"),
    ("FILES/other-layer", "says layer 'blocks.20', but this run was trained on evo2 vectors of"),
    ("FILES/other-genes", "none of its 24 genes ('ENSG001', ...) is among the 24 that this run"),
    ("FILES/nothing", "nothing does not exist: expected evo2's embeddings, or a store of them"),
    ("caduceus=FILES/vector.npy", "no DNA model of this run. Known: evo2"),
    ("FILES/vector.npy evo2=FILES/vector.npy", "names evo2 twice: expected one file or folder"),
    ("FILES/vector.npy --gallery genes", "genes are searched by a brain: ask with --recording"),
    ("FILES/vector.npy --tr-s 2", "--tr-s goes with --recording"),
]
PERSON = [
    ("nobody", "there is no person 'nobody' among the 120 pairs"),
    ("WHO --where sit=site-1", "--where sit: no such column in subjects.parquet. Did you mean"),
    ("WHO --where site=site-9", "nobody in the gallery has site 'site-9'. Did you mean 'site-"),
    ("WHO --where age=old", "--where age=old: expected a number"),
    ("WHO --where age=12", "nobody in the gallery has age '12'. It goes from "),
    ("WHO --where site", "--where site: expected NAME=VALUE, for example site=A"),
    ("WHO --where sex=F sex=M", "--where names 'sex' twice: give one, of several values site=A,B"),
    ("WHO --where subject=x", "--where subject: no such column"),
    ("WHO --same sit", "--same sit: no such column in subjects.parquet. Did you mean 'site'"),
    ("WHO --among test --where family=x", "nobody in the gallery has family 'x'. There are "),
    ("WHO --about site=site-1", "--about is for files: the cohort knows this person"),
    ("WHO --recording own.npy", "--query and --recording both ask: give one of them"),
    ("WHO --top 0", "--top 0: expected 1 or more"),
    ("WHO --gallery own-genes --genes SIM02", "no gene of that name varies in this run. Did you"),
    ("WHO --gallery own-genes --genes-of no", "the cohort has no DNA of 'no': give ids of people"),
    ("WHO --gallery own-genes --same site", "--same has no effect on the genes of one person"),
    ("WHO --gallery genes --query-from dna", "genes are searched by a brain: ask with"),
    ("WHO --gallery genes --genes-of WHO", "--genes-of goes with --gallery own-genes"),
    ("WHO --genes SIM001", "--genes goes with --gallery"),
    ("WHO --index ivfpq", "an ivfpq index needs 10,000 vectors or more to train, got 120"),
    ("WHO --index exactly", "Expected one of ('auto', 'exact', 'hnsw', 'ivfpq')"),
    ("WHO --index-from nowhere", "nowhere is no retrieval index (meta.json is missing)"),
    ("WHO --index-from x --index hnsw", "--index-from takes an index as it was saved"),
    ("WHO --save-index FILES", "exists and is no index, so it is not replaced"),
]


@pytest.fixture
def refused(site, call, files):
    """The one line that words get."""

    def run(words: list[str]) -> str:
        who = Cohort.open(site.cohort).splits().test[0]
        for old, new in (("WHO", who), ("FILES", files), ("WORK", site.workspace)):
            words = [word.replace(old, str(new)) for word in words]
        return call("retrieve", *words, *site.place).error

    return run


@pytest.mark.parametrize(("words", "says"), BRAIN, ids=lambda text: text[:40])
def test_a_recording_that_does_not_fit_is_refused(files, refused, words, says):
    given = words.split()
    if "--tr-s" not in given:
        given += ["--tr-s", "2"]
    assert says in refused(["--recording", str(files / given[0]), *given[1:]])


def test_a_tr_that_nobody_says_is_asked_for(files, refused):
    assert "the TR is not given and own.npy does not say it" in refused(
        ["--recording", str(files / "own.npy")]
    )


@pytest.mark.parametrize(("words", "says"), DNA, ids=lambda text: text[:40])
def test_a_dna_vector_that_does_not_fit_is_refused(refused, words, says):
    assert says in refused(["--dna-vector", *words.split()])


@pytest.mark.parametrize(("words", "says"), PERSON, ids=lambda text: text[:40])
def test_a_question_that_has_no_answer_is_refused(refused, words, says):
    assert says in refused(["--query", *words.split()])


@pytest.mark.parametrize("words", ["--where site=site-1", "--tr-s 2", "--index hnsw", "--top 3"])
def test_options_of_a_query_without_a_query_are_refused(refused, words):
    flag = words.split()[0]
    said = refused(words.split())
    assert f"{flag} goes with a query: give --query, --recording or --dna-vector." in said


def test_another_tr_than_the_file_says_is_taken_and_said(site, done, files):
    cohort = Cohort.open(site.cohort)
    bold = bold_of(cohort, cohort.splits().test[0])
    path = write_table(files / "stated.tsv", bold, list(cohort.atlas.parcels))
    (files / "stated.json").write_text('{"RepetitionTime": 2.0}')
    said = done("retrieve", "--recording", path, "--tr-s", 1.5, *site.place)
    assert "warning: stated.tsv says another TR than the 1.5 s that was given." in said.err


def test_what_is_said_of_who_asks_and_not_used_is_said(site, done, files):
    words = ("--recording", files / "own.npy", "--tr-s", 2, "--about", "shoe=42")
    said = done("retrieve", *words, *site.place)
    assert "warning: --about shoe has no effect: this alignment does not use it." in said.err
