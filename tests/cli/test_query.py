"""Queries by new recordings and DNA vectors: somebody's own files must answer as their id does."""

import json
import shutil
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from scipy.io import savemat

from brainfusion.alignment import load
from brainfusion.cli import finetune
from brainfusion.data.cohort import Cohort
from brainfusion.data.features import read_features
from brainfusion.data.importers.recording import read_recording
from brainfusion.encoders import to_upstream
from brainfusion.encoders.checkpoints import load_pretrained
from brainfusion.encoders.person import person_features
from brainfusion.eval.retrieval.index import RetrievalIndex
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import read_json, write_json
from tests.cli.asking import (
    answered,
    assert_same_answer,
    bold_of,
    native_caduceus,
    native_evo2,
    ranked,
    scores,
    stored_vector,
    write_table,
)

ALL = ("--top", 120, "--json")
_SHARED = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "n_heads",
    "intermediate_size": "dim_hidden",
    "decoder_num_hidden_layers": "decoder_depth",
    "decoder_num_attention_heads": "decoder_n_heads",
    "decoder_intermediate_size": "decoder_dim_hidden",
}
_RECORDING = {
    "num_brain_voxels": "n_parcels",
    "num_timepoints_per_voxel": "n_trs",
    "timepoint_patching_size": "patch_trs",
    "conv_kernel_size": "conv_kernel_size",
}
"""BrainLM's own names of its settings."""


@pytest.fixture(scope="module")
def cohort(site) -> Cohort:
    return Cohort.open(site.cohort)


@pytest.fixture(scope="module")
def person(cohort) -> str:
    return cohort.splits().test[1]


@pytest.fixture(scope="module")
def own_brain(cohort, person, tmp_path_factory) -> dict[str, tuple[object, ...]]:
    """The words that ask with a person's own recording, by the form of the file."""
    folder = tmp_path_factory.mktemp("recordings")
    bold = bold_of(cohort, person)
    np.save(folder / "first.npy", bold)
    np.save(folder / "turned.npy", bold.T)
    np.save(folder / "stacked.npy", np.stack([bold[::-1], bold]))
    savemat(folder / "own.mat", {"bold": bold.astype(float), "n": 3})
    order = np.random.default_rng(0).permutation(len(bold))
    names = [cohort.atlas.parcels[i] for i in order]
    tr_s = float(cohort.recordings.index["tr_s"][0])
    write_table(folder / "named.tsv", bold[order], names)
    write_json(folder / "named.json", {"RepetitionTime": tr_s})
    np.save(folder / "mixed.npy", bold[order])
    (folder / "names.txt").write_text("\n".join(names))
    given = ("--tr-s", tr_s)
    return {
        "parcels first": (folder / "first.npy", *given),
        "frames first": (folder / "turned.npy", *given),
        "matlab": (folder / "own.mat", *given),
        "named, in another order": (folder / "named.tsv",),
        "names beside": (folder / "mixed.npy", *given, "--parcels", folder / "names.txt"),
        "row of an array": (folder / "stacked.npy", *given, "--row", 1),
    }


@pytest.mark.parametrize(
    "form",
    [
        "parcels first", "frames first", "matlab", "named, in another order", "names beside",
        "row of an array",
    ],
)  # fmt: skip
def test_a_persons_own_recording_answers_as_their_id(site, done, own_brain, person, form):
    known = answered(
        done("retrieve", "--query", person, "--query-from", "brain", *ALL, *site.place)
    )
    said = done("retrieve", "--recording", *own_brain[form], *ALL, *site.place)
    new = answered(said)
    assert_same_answer(new, known)
    assert len(new["rows"]) == 120
    assert new["query"]["kind"] == "recording"
    assert (new["query"]["from"], new["searched"]) == ("brain", "dna")
    # What was not in the file is said; nothing is guessed in silence.
    named = form in ("named, in another order", "names beside")
    assert ("parcels matched by name" in said.err) == named
    first = "trs-first" if form in ("frames first", "named, in another order") else "parcels-first"
    assert f"read {first}" in said.err
    assert person not in said.err


def test_another_recording_answers_otherwise(site, done, own_brain, cohort, person, tmp_path):
    # The truth test could be passed by an answer that does not depend on the file.
    np.save(tmp_path / "other.npy", bold_of(cohort, cohort.splits().test[2]))
    words = own_brain["parcels first"]
    one, other = (
        answered(done("retrieve", "--recording", path, *words[1:], *ALL, *site.place))
        for path in (words[0], tmp_path / "other.npy")
    )
    assert ranked(one) != ranked(other)
    assert np.abs(scores(one) - scores(other)).max() > 1e-3


def test_two_recordings_of_a_person_are_the_mean_of_their_features(site, cohort):
    encoder = load_pretrained(site.workspace / "pretrain" / "brainjepa")
    made = read_features(site.workspace / "features" / "brainjepa.parquet").provenance
    folder = site.workspace / "two"
    folder.mkdir(exist_ok=True)
    recordings = []
    for name in cohort.splits().test[:2]:
        np.save(folder / f"{name}.npy", bold_of(cohort, name))
        recordings.append(read_recording(folder / f"{name}.npy", encoder.atlas, tr_s=2.0))
    apart = [person_features(encoder, [one], made=made) for one in recordings]
    both = person_features(encoder, recordings, made=made)
    np.testing.assert_allclose(both, (apart[0] + apart[1]) / 2, atol=1e-6)
    table = read_features(site.workspace / "features" / "brainjepa.parquet")
    np.testing.assert_allclose(apart[0][0], table.select(cohort.splits().test[:1])[0], atol=1e-5)


@pytest.mark.parametrize("form", ["native", "array"])
def test_a_persons_own_dna_answers_as_their_id(site, done, person, tmp_path, form):
    if form == "native":
        path = native_evo2(site.cohort / "sources" / "evo2", [person], tmp_path / "own")
    else:
        path = tmp_path / "own.npy"
        np.save(path, stored_vector(site.cohort, "evo2", person))
    known = answered(done("retrieve", "--query", person, *ALL, *site.place))
    said = done("retrieve", "--dna-vector", path, *ALL, *site.place)
    new = answered(said)
    assert_same_answer(new, known)
    assert new["query"]["kind"] == "dna"
    assert "constant genes" not in said.err  # one person does not vary


def test_several_people_of_a_file_get_one_answer_each(site, done, cohort, tmp_path):
    people = list(cohort.splits().test[:3])
    path = native_evo2(site.cohort / "sources" / "evo2", people, tmp_path / "three")
    said = done("retrieve", "--dna-vector", path, "--top", 4, "--json", *site.place)
    new = answered(said)
    assert new["query"]["asks"] == people
    for name in people:
        known = answered(done("retrieve", "--query", name, "--top", 4, "--json", *site.place))
        own = {**new, "rows": [row for row in new["rows"] if row["query"] == name]}
        assert_same_answer(own, known)
    text = done("retrieve", "--dna-vector", path, "--top", 4, *site.place).out
    assert text.count("the 4 people whose brain is nearest to the DNA of ") == 3


def test_a_gene_that_a_file_lacks_is_missing_and_said(site, done, person, tmp_path):
    path = native_evo2(site.cohort / "sources" / "evo2", [person], tmp_path / "own")
    next(iter(sorted(path.glob("*.pt")))).unlink()
    said = done("retrieve", "--dna-vector", path, *ALL, *site.place)
    assert "1 of the 24 genes that this run knows are absent." in said.err
    run = load(site.workspace / "align" / "brainjepa-evo2")
    mask = np.arange(24) > 0
    vector = stored_vector(site.cohort, "evo2", person)
    dna = run.search_vectors("dna", vector[None], mask=mask)
    brain = read_features(site.workspace / "align" / "brainjepa-evo2" / "scores" / "brain.parquet")
    np.testing.assert_allclose(
        scores(answered(said)), np.sort(brain.vectors @ dna[0])[::-1], atol=1e-5
    )


# -- other runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adjusted(site, tmp_path_factory) -> tuple[object, ...]:
    """A run whose features have age, sex and site taken out, by its folder."""
    from brainfusion.cli import main

    out = tmp_path_factory.mktemp("adjusted") / "run"
    words = (
        "--method",
        "rcca",
        "--residualise",
        "age",
        "sex",
        "site",
        "--no-control",
        "--out",
        out,
    )
    assert main([str(word) for word in ("align", *words, *site.place)]) == 0
    return "--run", out, *site.place


def facts_of(cohort: Cohort, person: str) -> list[str]:
    row = cohort.subjects.filter(pl.col("subject") == person).to_dicts()[0]
    return [f"{name}={row[name]}" for name in ("age", "sex", "site")]


def test_covariates_are_taken_out_of_a_stranger_too(
    adjusted, done, own_brain, cohort, person, tmp_path
):
    about = ("--about", *facts_of(cohort, person))
    for side, words in (
        ("brain", ("--recording", *own_brain["named, in another order"])),
        ("dna", ("--dna-vector", tmp_path / "own.npy")),
    ):
        np.save(tmp_path / "own.npy", stored_vector(adjusted[3], "evo2", person))
        asks = ("retrieve", "--query", person, "--query-from", side)
        known = answered(done(*asks, *ALL, *adjusted))
        new = answered(done("retrieve", *words, *about, *ALL, *adjusted))
        assert_same_answer(new, known)
        older = [*about[:1], "age=91", *about[2:]]
        other = answered(done("retrieve", *words, *older, *ALL, *adjusted))
        assert np.abs(scores(other) - scores(known)).max() > 1e-3


def test_a_table_says_what_is_known_of_several_people(adjusted, done, cohort, tmp_path):
    people = list(cohort.splits().test[:2])
    path = native_evo2(adjusted[3] / "sources" / "evo2", people, tmp_path / "two")
    table = cohort.subjects.filter(pl.col("subject").is_in(people)).sort("subject", descending=True)
    table.select("subject", "age", "sex", "site").write_csv(tmp_path / "people.csv")
    words = ("--about", tmp_path / "people.csv", "--top", 5, "--json", *adjusted)
    new = answered(done("retrieve", "--dna-vector", path, *words))
    for name in people:
        known = answered(done("retrieve", "--query", name, "--top", 5, "--json", *adjusted))
        own = {**new, "rows": [row for row in new["rows"] if row["query"] == name]}
        assert_same_answer(own, known)


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ((), "age, sex, site taken out of the features, so they must be known of who asks: "
             "missing age, sex, site (--about age=... sex=... site=...)"),
        (("age=61", "sex=F"), "missing site (--about site=...)"),
        (("age=old", "sex=F", "site=site-1"), "--about age=old: expected a number"),
        (("age=61", "sex=1", "site=site-1"), "column 'sex' has the value '1', which nobody had"),
        (("age=61,62", "sex=F", "site=site-1"), "--about age has several values"),
    ],
)  # fmt: skip
def test_covariates_that_are_missing_or_unknown_are_named(adjusted, call, own_brain, about, says):
    words = ("--about", *about) if about else ()
    said = call("retrieve", "--recording", *own_brain["parcels first"], *words, *adjusted)
    assert says in said.error


@pytest.fixture(scope="module")
def four(site, tmp_path_factory):
    """A run of two brain encoders and two DNA models, in a copy of the site."""
    from brainfusion.cli import main

    root = tmp_path_factory.mktemp("four")
    shutil.copytree(site.cohort, root / "cohort")
    shutil.copytree(site.workspace, root / "work")
    place = type(site)(root / "cohort", root / "work").place
    words = ("--brain", "brainjepa", "brainlm", "--dna", "evo2", "caduceus")
    source = root / "cohort" / "sources" / "caduceus"
    for command in (
        ("import", "--dna", "caduceus", source, "--cohort", root / "cohort"),
        ("align", *words, "--init", "random", "--max-steps", 4, "--no-control", *place),
    ):
        assert main([str(word) for word in command]) == 0
    return (*words, *place)


def test_several_brain_modalities_ask_together(four, done, own_brain, person):
    known = answered(done("retrieve", "--query", person, "--query-from", "brain", *ALL, *four))
    said = done("retrieve", "--recording", *own_brain["parcels first"], *ALL, *four)
    assert_same_answer(answered(said), known)
    assert answered(said)["query"]["modalities"] == ["brainjepa", "brainlm"]
    assert "the brain that asks is the mean of brainjepa and brainlm." in said.err


def test_a_modality_that_a_recording_cannot_give_is_left_out_and_said(four, done, cohort, tmp_path):
    # Brain-JEPA needs two patches for a standard deviation over time, BrainLM one.
    person = cohort.splits().test[0]
    np.save(tmp_path / "short.npy", bold_of(cohort, person)[:, :24])
    said = done("retrieve", "--recording", tmp_path / "short.npy", "--tr-s", 2, *ALL, *four)
    assert answered(said)["query"]["modalities"] == ["brainlm"]
    assert "brainjepa is left out, which this recording cannot give: short.npy has 24" in said.err


def test_several_dna_modalities_ask_by_those_given(four, done, person, tmp_path):
    sources = four[-3] / "sources"
    evo2 = native_evo2(sources / "evo2", [person], tmp_path / "evo2")
    caduceus = native_caduceus(sources / "caduceus", [person], tmp_path / "caduceus")
    known = answered(done("retrieve", "--query", person, *ALL, *four))
    words = (f"evo2={evo2}", f"caduceus={caduceus}")
    assert_same_answer(answered(done("retrieve", "--dna-vector", *words, *ALL, *four)), known)
    said = done("retrieve", "--dna-vector", words[1], *ALL, *four)
    assert "evo2 is left out: no file of it was given." in said.err
    run = four[-1] / "align" / "brainjepa,brainlm-evo2,caduceus"
    own = read_features(run / "embeddings" / "dna_caduceus.parquet").select([person])
    vector = load(run).scored("dna", own)[0]
    gallery = read_features(run / "scores" / "brain.parquet").vectors
    np.testing.assert_allclose(scores(answered(said)), np.sort(gallery @ vector)[::-1], atol=1e-5)


@pytest.mark.slow
def test_a_fine_tuned_run_encodes_with_its_own_encoder(
    site, done, call, own_brain, person, tmp_path
):
    shutil.copytree(site.workspace, tmp_path / "work")
    place = ("--cohort", site.cohort, "--workspace", tmp_path / "work")
    words = ("--how", "last-1", "--lr", 0.02, "--encoder-lr-scale", 1, "--max-steps", 3)
    brief = ("--eval-every", 1, "--micro-batch", 50, "--threads", 1, "--no-control")
    assert finetune.main([str(word) for word in (*words, *brief, *place)]) == 0
    run = ("--brain", "brainjepa-last-1", *place)
    known = answered(done("retrieve", "--query", person, "--query-from", "brain", *ALL, *run))
    asks = ("retrieve", "--recording", *own_brain["parcels first"], *ALL, *run)
    assert_same_answer(answered(done(*asks)), known)
    # So does Python, and refuses the encoder as it was before.
    folder = tmp_path / "work" / "align" / "brainjepa-last-1-evo2"
    made = load(folder).made_of("brain")
    path, *_ = own_brain["parcels first"]
    recordings = [read_recording(path, load_pretrained(folder / "encoder").atlas, tr_s=2.0)]
    features = person_features(load_pretrained(folder / "encoder"), recordings, made=made)
    vector = load(folder).search_vectors("brain", features)[0]
    gallery = read_features(folder / "scores" / "dna.parquet").vectors
    np.testing.assert_allclose(scores(known), np.sort(gallery @ vector)[::-1], atol=1e-5)
    with pytest.raises(UserError, match="which was not fine-tuned, but the features were made"):
        person_features(
            load_pretrained(site.workspace / "pretrain" / "brainjepa"), recordings, made=made
        )
    before = ("--checkpoint", tmp_path / "work" / "pretrain" / "brainjepa")
    if read_json(tmp_path / "work/align/brainjepa-last-1-evo2/summary.json")["best_step"]:
        assert "but the features were made by brainjepa with" in call(*asks, *before).error


@pytest.mark.slow
def test_features_of_an_authors_file_are_asked_with_that_file(
    site, done, call, own_brain, person, tmp_path
):
    own = load_pretrained(site.workspace / "pretrain" / "brainlm")
    theirs, place = tmp_path / "hub", ("--cohort", site.cohort, "--workspace", tmp_path / "work")
    theirs.mkdir()
    torch.save(to_upstream(own.module), theirs / "pytorch_model.bin")
    config: Any = own.module.config
    write_json(
        theirs / "config.json",
        {key: getattr(config, ours) for key, ours in {**_SHARED, **_RECORDING}.items()},
    )
    done("embed", "--model", "brainlm", "--checkpoint", theirs, *place)
    run = ("--brain", "brainlm", *place)
    done("align", "--method", "rcca", "--no-control", *run)
    known = answered(done("retrieve", "--query", person, "--query-from", "brain", *ALL, *run))
    asks = ("retrieve", "--recording", *own_brain["frames first"], *ALL, *run)
    assert_same_answer(answered(done(*asks, "--checkpoint", theirs)), known)
    # The same weights behind other inputs are another encoder.
    other = call(*asks, "--checkpoint", theirs, "--standardiser", "recording-zscore")
    assert "would condition recordings by standardiser 'recording-zscore'" in other.error
    assert "there is no trained brainlm in" in call(*asks).error


# -- from Python -----------------------------------------------------------------------------------


def test_a_notebook_asks_in_five_lines(site, done, own_brain, person):
    run, path = site.workspace / "align" / "brainjepa-evo2", own_brain["parcels first"][0]
    known = answered(
        done("retrieve", "--query", person, "--query-from", "brain", "--json", *site.place)
    )

    alignment = load(run)
    encoder = load_pretrained(site.workspace / "pretrain" / "brainjepa")
    recording = read_recording(path, encoder.atlas, tr_s=2.0)
    features = person_features(encoder, [recording], made=alignment.made_of("brain"))
    gallery = read_features(run / "scores" / "dna.parquet")
    index = RetrievalIndex.build(gallery.vectors, gallery.subjects)
    found = index.query(alignment.search_vectors("brain", features), 10)

    assert [row.id for row in found] == ranked(known)
    np.testing.assert_allclose([row.score for row in found], scores(known), atol=1e-5)
    assert json.dumps(known["score"]) == f'"{alignment.score_name}"'


def test_an_answer_says_what_was_asked_and_searched(site, done, call, person, cohort):
    answer = answered(done("retrieve", "--query", person, "--json", *site.place))
    assert list(answer) == [
        "query", "searched", "gallery", "score", "index", "filters", "rows",
    ]  # fmt: skip
    assert answer["gallery"] == {"kind": "people", "n_entries": 120, "n_searched": [120]}
    assert answer["index"]["kind"] == "exact"
    assert answer["index"]["recall_at_10"] == 1.0
    assert answer["score"] == "density ratio, nats"
    assert list(answer["rows"][0]) == ["query", "rank", "id", "score"]
    text = done("retrieve", "--query", person, *site.place)
    assert "of 120 (all; exact search, recall@10 1.000), by density ratio, nats:" in text.out
    assert "training person" not in text.err
    for words in ((), ("--json",)):
        said = done("retrieve", "--query", cohort.splits().train[0], *words, *site.place)
        assert "this is a training person: the aligner has seen the pair" in said.err


def test_features_of_no_encoder_cannot_take_a_recording(site, call, own_brain, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(site.workspace, work)
    path = work / "align" / "brainjepa-evo2" / "model" / "state.json"
    state = read_json(path)
    state["meta"]["provenance"]["brain"] = {}
    write_json(path, state)
    place = ("--cohort", site.cohort, "--workspace", work)
    said = call("retrieve", "--recording", *own_brain["parcels first"], *place)
    assert "brain features 'brainjepa' of this run do not say which encoder made them" in said.error


def test_files_named_after_people_stay_out_of_the_log(site, done, cohort, person):
    # A query's own answer may name people; what is said while it is made may not.
    said = done("retrieve", "--query", person, "--gallery", "genes", "--top", 3, *site.place)
    assert not any(name in said.err for name in cohort.subjects["subject"])
