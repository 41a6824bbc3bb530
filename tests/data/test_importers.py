import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scipy import io

from brainfusion import cli
from brainfusion.data.atlas import Atlas
from brainfusion.data.cohort import Cohort
from brainfusion.data.importers import (
    ImportConfig,
    import_array,
    import_cohort,
    import_mat,
    import_npy_folder,
    import_tables,
)
from brainfusion.runtime.errors import UserError
from tests.data.cohorts import noise, refused, small_atlas

PEOPLE = ("007", "010", "023")


@pytest.fixture
def bold():
    """One recording [4, 12] a person, in the order of the atlas p0..p3."""
    rng = np.random.default_rng(0)
    return {subject: noise(rng, 4, 12) for subject in PEOPLE}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def atlas(tmp_path):
    small_atlas().save(tmp_path / "atlas.json")
    return tmp_path / "atlas.json"


def config(source, **options):
    options = {"source": source, "out": source.parent / "cohort", "tr_s": 0.72, **options}
    return ImportConfig(**options)


def write_npy(source, bold):
    for subject, values in bold.items():
        np.save(source / f"{subject}_rest.npy", values)


def write_tsv(path, values, names):
    header = "\t".join(names)
    np.savetxt(path, values.T, delimiter="\t", header=header, comments="", fmt="%.9g")


def assert_holds(cohort_path, bold):
    cohort = Cohort.open(cohort_path)
    index = cohort.recordings.index
    assert sorted(index["subject"]) == sorted(bold)
    for i, subject in enumerate(index["subject"]):
        np.testing.assert_allclose(cohort.recordings.read(i), bold[subject], rtol=1e-6)
    return cohort


# -- the four kinds -------------------------------------------------------------------------


def test_npy_folder_is_imported_with_ids_as_text(source, atlas, bold):
    write_npy(source, bold)
    report = import_npy_folder(config(source, atlas=atlas))
    cohort = assert_holds(source.parent / "cohort", bold)
    assert cohort.subjects["subject"].to_list() == list(PEOPLE)
    assert cohort.recordings.index["recording"].to_list() == [f"{s}_rest" for s in PEOPLE]
    assert cohort.recordings.index["tr_s"].unique().to_list() == [0.72]
    assert (cohort.name, cohort.origin) == ("cohort", "imported")
    assert (report.n_recordings, report.n_people, report.orientation) == (3, 3, "parcels-first")
    assert any("carry no parcel names" in line for line in report.lines())
    assert json.loads((cohort.path / "import.json").read_text()) == report.to_dict()


def test_orientation_is_found_by_the_number_of_parcels(source, atlas, bold):
    write_npy(source, {subject: values.T for subject, values in bold.items()})
    report = import_cohort(config(source, atlas=atlas))
    assert_holds(source.parent / "cohort", bold)
    assert report.orientation == "trs-first"


@pytest.mark.parametrize(("suffix", "separator"), [(".tsv", "\t"), (".csv", ","), (".txt", " ")])
def test_tables_without_header_are_imported(source, atlas, bold, suffix, separator):
    for subject, values in bold.items():
        np.savetxt(source / f"{subject}{suffix}", values.T, delimiter=separator)
    import_tables(config(source, atlas=atlas))
    assert_holds(source.parent / "cohort", bold)


def test_tables_with_a_header_are_matched_by_name(source, atlas, bold):
    names = ["p0", "p1", "p2", "p3"]
    write_tsv(source / "007.tsv", bold["007"], names)
    order = [2, 0, 3, 1]
    write_tsv(source / "010.tsv", bold["010"][order], [names[i] for i in order])
    # Another extra column, and p1 is absent: neither may shift the others.
    extra = np.vstack([bold["023"][3], np.zeros(12), bold["023"][[0, 2]]])
    write_tsv(source / "023.tsv", extra, ["p3", "GlobSig", "p0", "p2"])
    report = import_cohort(config(source, atlas=atlas, min_coverage=0.75))
    expected = {subject: values.copy() for subject, values in bold.items()}
    expected["023"][1] = np.nan
    cohort = assert_holds(source.parent / "cohort", expected)
    assert cohort.recordings.index["coverage"].to_list() == [1.0, 1.0, 0.75]
    assert (report.n_permuted, report.n_extra_parcels, report.n_with_missing) == (2, 1, 1)
    assert "2 recordings put into the atlas's parcel order by name" in report.lines()


def test_the_header_of_the_first_file_is_the_atlas_of_the_others(source, bold):
    names = ["a", "b", "c", "d"]
    write_tsv(source / "007.tsv", bold["007"], names)
    write_tsv(source / "010.tsv", bold["010"][::-1], names[::-1])
    report = import_cohort(config(source))
    cohort = assert_holds(source.parent / "cohort", {s: bold[s] for s in ("007", "010")})
    assert cohort.atlas.parcels == ("a", "b", "c", "d")
    assert report.n_permuted == 1


def test_repeated_names_are_numbered_only_while_the_order_is_the_same(source, bold):
    names = ["a", "b", "a", "c"]
    for subject in ("007", "010"):
        write_tsv(source / f"{subject}.tsv", bold[subject], names)
    report = import_cohort(config(source))
    cohort = assert_holds(source.parent / "cohort", {s: bold[s] for s in ("007", "010")})
    assert cohort.atlas.parcels == ("a", "b", "a.2", "c")
    assert any("1 columns repeat a parcel name ('a', ...)" in line for line in report.lines())
    write_tsv(source / "023.tsv", bold["023"], ["a", "b", "c", "a"])
    refused(config(source, out=source.parent / "other"), r"023.tsv: .* 1 parcel names repeat")


def test_columns_are_dropped_only_when_asked(source, bold):
    values = np.vstack([np.arange(12), bold["007"]])
    write_tsv(source / "007.tsv", values, ["", "a", "b", "c", "d"])
    refused(config(source), r"column 0 has no name \(a row index\?\).*--drop-columns 0")
    report = import_cohort(config(source, drop_columns=("0", "d")))
    assert_holds(source.parent / "cohort", {"007": bold["007"][:3]})
    assert report.n_dropped_columns == 2
    other = config(source, out=source.parent / "other", drop_columns=("0", "dd"))
    refused(other, "has no column 'dd' to drop. Did you mean 'd'")


def test_a_header_of_positions_is_not_taken_for_data(source, atlas, bold):
    for subject, values in bold.items():
        pl.DataFrame(values.T, schema=["0", "1", "2", "3"]).write_csv(source / f"{subject}.csv")
    report = import_cohort(config(source, atlas=atlas))
    assert (report.min_trs, report.max_trs) == (12, 12)
    assert_holds(source.parent / "cohort", bold)


def test_rows_of_named_parcels_are_matched_too(source, atlas, bold):
    for subject, values in bold.items():
        table = pl.DataFrame(values[::-1], schema=[f"t{i}" for i in range(12)])
        names = pl.Series("parcel", ["p3", "p2", "p1", "p0"])
        table.insert_column(0, names).write_csv(source / f"{subject}.csv")
    refused(config(source, atlas=atlas), r"column 0 \('parcel'\) holds text .* parcels-first")
    report = import_cohort(config(source, atlas=atlas, orientation="parcels-first"))
    assert_holds(source.parent / "cohort", bold)
    assert report.n_permuted == 3


def test_mat_files_are_imported_with_subjects_from_folders(source, atlas, bold):
    for subject, values in bold.items():
        folder = source / "subjects" / subject
        folder.mkdir(parents=True)
        io.savemat(folder / "rest.mat", {"tc": values, "tr": 0.72, "label": "x"})
    refused(config(source, atlas=atlas), "1 file names stand in several folders")
    import_mat(config(source, atlas=atlas, pattern="subjects/(?P<subject>[^/]+)/"))
    cohort = assert_holds(source.parent / "cohort", bold)
    assert cohort.recordings.index["recording"][0] == "subjects/007/rest"


def test_a_mat_file_with_two_tables_asks_which(source, atlas, bold):
    io.savemat(source / "007.mat", {"tc": bold["007"], "motion": np.ones((12, 6))})
    refused(config(source, atlas=atlas), r"2 two-dimensional numeric variables \(tc \[4, 12\], mot")
    refused(config(source, atlas=atlas, variable="TC"), "has no numeric table 'TC': it has tc")
    import_cohort(config(source, atlas=atlas, variable="tc"))
    assert_holds(source.parent / "cohort", {"007": bold["007"]})


def test_hdf5_and_broken_mat_files_get_one_line(source, atlas):
    hdf5 = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF" + bytes(400)
    (source / "007.mat").write_bytes(hdf5)
    refused(config(source, atlas=atlas), r"is a MATLAB v7.3 \(HDF5\) file, expected v7")
    (source / "007.mat").write_bytes(b"not a mat file" * 30)
    refused(config(source, atlas=atlas), "is not a readable MATLAB file")


@pytest.mark.parametrize("transposed", [False, True])
def test_one_array_of_all_is_imported(source, atlas, bold, transposed):
    array = np.stack([bold[s] for s in ("007", "010", "007")])
    array[2] *= 2
    path = source / "all.npy"
    np.save(path, array.transpose(0, 2, 1) if transposed else array)
    (source / "ids.txt").write_text("007\n010\n007\n")
    report = import_array(config(path, out=source / "c", atlas=atlas, ids=source / "ids.txt"))
    cohort = Cohort.open(source / "c")
    assert cohort.recordings.index["subject"].to_list() == ["007", "010", "007"]
    assert cohort.recordings.index["session"].to_list() == ["1", "1", "2"]
    np.testing.assert_array_equal(cohort.recordings.read(2), array[2])
    assert (report.n_recordings, report.n_people) == (3, 2)


def test_an_array_and_its_ids_must_agree(source, atlas, bold):
    path = source / "all.npy"
    np.save(path, np.stack(list(bold.values())))
    ids = source / "ids.txt"
    refused(config(path, out=source / "c", atlas=atlas), "is one array of all .* give --ids")
    ids.write_text("007\n010\n")
    refused(config(path, out=source / "c", atlas=atlas, ids=ids), "lists 2 recordings but .* 3")
    np.save(path, bold["007"])
    refused(config(path, out=source / "c", atlas=atlas, ids=ids), r"has shape \[4, 12\], expected")


# -- parcels --------------------------------------------------------------------------------


def test_names_of_unnamed_arrays_come_from_a_file(source, atlas, bold):
    order = [3, 1, 0, 2]
    write_npy(source, {subject: values[order] for subject, values in bold.items()})
    (source.parent / "names.txt").write_text("p3\np1\np0\np2\n")
    report = import_cohort(config(source, atlas=atlas, parcels=source.parent / "names.txt"))
    assert_holds(source.parent / "cohort", bold)
    assert report.n_permuted == 3


def test_without_atlas_and_names_parcels_are_numbered_and_said(source, bold):
    write_npy(source, bold)
    refused(config(source), r"007_rest.npy has shape \[4, 12\] and nothing says which axis")
    report = import_cohort(config(source, orientation="parcels-first"))
    cohort = assert_holds(source.parent / "cohort", bold)
    assert cohort.atlas.parcels == ("parcel-001", "parcel-002", "parcel-003", "parcel-004")
    assert any("called parcel-001 to parcel-004" in line for line in report.lines())


def test_a_wrong_number_of_parcels_is_neither_padded_nor_cut(source, atlas, bold):
    write_npy(source, bold)
    np.save(source / "010_rest.npy", np.vstack([bold["010"], bold["010"][:1]]))
    message = (
        r"010_rest.npy has shape \[5, 12\] but the atlas 'small' has 4 parcels. Parcel order "
        "carries meaning, so recordings are not padded or cut: give the parcels' names"
    )
    refused(config(source, atlas=atlas), message)
    refused(
        config(source, orientation="parcels-first"),
        "010_rest.npy has 5 parcels but the first recording has 4 parcels",
    )


def test_a_square_recording_asks_for_its_orientation(source, atlas, bold):
    np.save(source / "007.npy", bold["007"][:, :4])
    refused(config(source, atlas=atlas), r"both axes fit 4 parcels: give --orientation")
    import_cohort(config(source, atlas=atlas, orientation="trs-first"))
    assert_holds(source.parent / "cohort", {"007": bold["007"][:, :4].T})


def test_constant_parcels_are_missing_unless_asked_otherwise(source, atlas, bold):
    bold["010"][2] = 5.0
    write_npy(source, bold)
    report = import_cohort(config(source, atlas=atlas, min_coverage=0.7))
    expected = {**bold, "010": np.where(np.arange(4)[:, None] == 2, np.nan, bold["010"])}
    assert_holds(source.parent / "cohort", expected)
    assert (report.n_with_constant, report.n_constant_parcels, report.min_coverage) == (1, 1, 0.75)
    kept = config(source, out=source.parent / "kept", atlas=atlas, constant_as_missing=False)
    assert import_cohort(kept).n_with_constant == 0
    assert_holds(kept.out, bold)


def test_low_coverage_is_refused_or_skipped_and_counted(source, atlas, bold):
    bold["010"][:2] = np.nan
    write_npy(source, bold)
    refused(config(source, atlas=atlas), r"010_rest.npy .* has data in 50.0% of the parcels")
    report = import_cohort(config(source, atlas=atlas, low_coverage="skip"))
    assert (report.n_skipped_coverage, report.n_recordings) == (1, 2)
    assert_holds(source.parent / "cohort", {s: bold[s] for s in ("007", "023")})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "recording '010_rest' has 2 single NaN values in 1 parcels"),
        (np.inf, "recording '010_rest' has 2 infinite values"),
        (1e300, "recording '010_rest' has 2 infinite values"),
    ],
)
def test_single_nan_and_infinity_are_refused(source, atlas, bold, value, message):
    bold["010"] = bold["010"].astype(np.float64)
    bold["010"][1, 2:4] = value
    write_npy(source, bold)
    refused(config(source, atlas=atlas), message)


def test_empty_cells_of_a_table_are_refused(source, atlas, bold):
    np.savetxt(source / "007.csv", bold["007"].T, delimiter=",")
    text = (source / "007.csv").read_text().splitlines()
    text[3] = "n/a," + text[3].split(",", 1)[1]
    (source / "007.csv").write_text("\n".join(text))
    refused(config(source, atlas=atlas), "recording '007' has 1 single NaN values in 1 parcels")
    text[3] = "oops," + text[3].split(",", 1)[1]
    (source / "007.csv").write_text("\n".join(text))
    refused(config(source, atlas=atlas), "column 0 holds text in 1 rows, expected numbers")


# -- people ---------------------------------------------------------------------------------


def test_a_table_of_people_is_joined_with_ids_as_text(source, atlas, bold):
    write_npy(source, bold)
    (source.parent / "people.csv").write_text(
        "participant_id,age,sex,site,fluid\n"
        "007,30.5,Female,1,10\n010,41,m,2,n/a\n023,,F,1,12\n099,50,M,3,9\n"
    )
    report = import_cohort(config(source, atlas=atlas, subjects=source.parent / "people.csv"))
    table = Cohort.open(source.parent / "cohort").subjects
    assert table["subject"].to_list() == ["007", "010", "023", "099"]
    assert table["sex"].to_list() == ["F", "M", "F", "M"]
    assert table["site"].to_list() == ["1", "2", "1", "3"]
    assert table["age"].to_list() == [30.5, 41.0, None, 50.0]
    assert table["fluid"].to_list() == [10, None, 12, 9]
    assert (report.n_people, report.n_people_without_recordings) == (3, 1)
    assert "1 people in the table have no recording: kept" in report.lines()


def test_people_who_are_not_in_the_table_are_refused_or_dropped(source, atlas, bold):
    write_npy(source, bold)
    table = source.parent / "people.tsv"
    table.write_text("subject\tage\n007\t30\n")
    given = config(source, atlas=atlas, subjects=table)
    refused(given, r"2 of 3 people with recordings are not in .* \(for example 010, 023\): add")
    report = import_cohort(replace(given, missing_subjects="drop"))
    assert (report.n_dropped_people, report.n_dropped_recordings) == (2, 2)
    assert_holds(given.out, {"007": bold["007"]})
    table.write_text("subject\tage\n1\t30\n")
    other = replace(given, out=source.parent / "other", missing_subjects="drop")
    refused(other, "3 of 3 people with recordings are not in")


def test_a_bids_prefix_on_one_side_only_is_explained(source, atlas, bold):
    write_npy(source, {f"sub-{subject}_ses-2": values for subject, values in bold.items()})
    table = source.parent / "people.csv"
    table.write_text("subject,age\n007,30\n010,40\n023,50\n")
    refused(config(source, atlas=atlas, subjects=table), r"add --pattern 'sub-\(\?P<subject>")
    pattern = "sub-(?P<subject>[^_/]+)_ses-(?P<session>[^_/]+)"
    import_cohort(config(source, atlas=atlas, subjects=table, pattern=pattern))
    cohort = assert_holds(source.parent / "cohort", bold)
    assert cohort.recordings.index["session"].to_list() == ["2", "2", "2"]


def test_sessions_follow_bids_without_a_pattern(source, atlas, bold):
    np.save(source / "sub-1_ses-a_task-rest_bold.npy", bold["007"])
    np.save(source / "sub-1_ses-b_task-rest_bold.npy", bold["010"])
    report = import_cohort(config(source, atlas=atlas))
    index = Cohort.open(source.parent / "cohort").recordings.index
    assert index["subject"].to_list() == ["sub-1", "sub-1"]
    assert index["session"].to_list() == ["a", "b"]
    assert report.n_people == 1


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("subject\n007\n007\n", {}, r"1 subject ids repeat \(for example 007\)"),
        ("name,age\n007,1\n", {}, "has no column of subject ids: expected one of subject"),
        ("who,age\n007,1\n", {"subject_column": "whom"}, "no column 'whom'. Did you mean 'who'"),
        ("subject,sex\n007,1\n010,2\n023,1\n", {}, "column 'sex' holds '1', '2', expected 'F'"),
        ("subject,age\n007,1\n010,2,3\n", {}, "cannot be read as a table"),
    ],
)
def test_a_bad_table_of_people_gets_one_line(source, atlas, bold, text, options, message):
    write_npy(source, bold)
    (source.parent / "people.csv").write_text(text)
    given = config(source, atlas=atlas, subjects=source.parent / "people.csv", **options)
    refused(given, message)


# -- the source, the output, the command ----------------------------------------------------


def test_bad_sources_get_one_line(source, atlas, bold):
    refused(config(source.parent / "none", atlas=atlas), "none does not exist: expected a folder")
    refused(config(source, atlas=atlas), r"cannot tell what to read \(it holds none of them\)")
    write_npy(source, bold)
    np.savetxt(source / "x.tsv", bold["007"])
    refused(config(source, atlas=atlas), r"holds 3 npy, 1 tables\): choose with --kind")
    refused(config(source, atlas=atlas, kind="mat"), r"holds no .mat file that fits '\*'")
    refused(config(source, atlas=atlas, kind="npy", pattern="("), "is no regular expression")
    refused(config(source, atlas=atlas, kind="npy", pattern="00."), "has no group")
    unfit = config(source, atlas=atlas, kind="npy", pattern="s(?P<subject>.)_")
    refused(unfit, r"3 of 3 files do not fit --pattern .* \(for example 007_rest.npy\)")
    refused(config(source, atlas=atlas, kind="npy", tr_s=None), "the TR is not given: expected")
    with pytest.raises(UserError, match="a TR in milliseconds is divided by 1000"):
        config(source, tr_s=720.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 4, 12)), r"has shape \[2, 4, 12\], expected one recording"),
        (np.zeros((4, 12), dtype=complex), "holds complex128, expected real numbers"),
        (np.zeros((4, 0)), r"has shape \[4, 0\], expected one recording"),
    ],
)
def test_an_array_that_is_no_recording_is_refused(source, atlas, values, message):
    np.save(source / "007.npy", values)
    refused(config(source, atlas=atlas), message)


def test_a_truncated_array_is_named(source, atlas, bold):
    write_npy(source, bold)
    path = source / "023_rest.npy"
    path.write_bytes(path.read_bytes()[:-8])
    refused(config(source, atlas=atlas), "023_rest.npy is not a whole .npy array of numbers")


def test_an_existing_cohort_is_kept_unless_asked(source, atlas, bold):
    write_npy(source, bold)
    given = config(source, atlas=atlas)
    import_cohort(given)
    before = Cohort.open(given.out).hash
    refused(given, "cohort exists: give another --out, or --overwrite")
    bold["007"] += 1
    write_npy(source, {**bold, "010": bold["010"] * np.nan})
    refused(replace(given, overwrite=True), "has data in 0.0% of the parcels")
    assert Cohort.open(given.out).hash == before
    write_npy(source, bold)
    import_cohort(replace(given, overwrite=True))
    assert_holds(given.out, bold)


def test_a_full_disk_leaves_nothing(source, atlas, bold, monkeypatch):
    write_npy(source, bold)

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("brainfusion.data.recordings.RecordingWriter.add", full)
    refused(config(source, atlas=atlas), r"cannot write .*cohort \(No space left on device\)")


def test_the_command_imports_and_names_the_next_one(source, atlas, bold, capsys):
    write_npy(source, bold)
    out = source.parent / "cohort"
    words = ["import", str(source), "--out", str(out), "--tr-s", "0.72", "--atlas", str(atlas)]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "kept 3 recordings of 3 people: 4 parcels (small) x 12 TRs, TR 0.72 s" in printed
    assert f"next: brainfusion pretrain --model brainjepa --cohort {out}" in printed
    assert not any(subject in printed for subject in PEOPLE)
    assert_holds(out, bold)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SRC", "--out", "OUT"], "the TR is not given"),
        (["--out", "OUT", "--tr-s", "2"], "missing: SOURCE A folder of recordings"),
        (["SRC", "--tr-s", "2"], "missing: --out PATH The cohort folder to make"),
        (["SRC", "--out", "OUT", "--tr-s", "2", "--knd", "npy"], "--knd"),
        (["SRC", "--out", "OUT", "--tr-s", "2", "--kind", "nii"], "nii"),
    ],
)
def test_the_command_answers_bad_words_in_one_line(source, words, message, capsys):
    places = {"SRC": str(source), "OUT": str(source.parent / "cohort")}
    np.save(source / "007.npy", np.ones((4, 12)))
    assert cli.main(["import", *(places.get(word, word) for word in words)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said
    assert not (source.parent / "cohort").exists()


def test_an_atlas_file_travels_into_the_cohort(source, bold):
    full = Atlas(name="full", parcels=("a", "b", "c", "d"), xyz_mm=np.arange(12).reshape(4, 3))
    full.save(source.parent / "full.json")
    write_npy(source, bold)
    import_cohort(config(source, atlas=source.parent / "full.json"))
    assert Cohort.open(source.parent / "cohort").atlas.to_dict() == full.to_dict()


def test_a_parcel_that_is_infinite_throughout_is_refused_and_not_taken_for_constant(
    source, atlas, bold
):
    write_npy(source, {**bold, "010": np.where(np.arange(4)[:, None] == 2, np.inf, bold["010"])})
    refused(config(source, atlas=atlas), "recording '010.*' has 12 infinite values")
