"""Containers and derivatives, each written by its own form's writer."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from brainfusion.data.cohort import Cohort
from brainfusion.data.importers import ImportConfig, import_cohort
from tests.data.cohorts import noise, refused, small_atlas

nibabel = pytest.importorskip("nibabel")
h5py = pytest.importorskip("h5py")

PEOPLE = ("007", "010", "023")
NAMES = ["p0", "p1", "p2", "p3"]


@pytest.fixture
def bold():
    rng = np.random.default_rng(0)
    return {subject: noise(rng, 4, 12) for subject in PEOPLE}


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


@pytest.fixture
def atlas(tmp_path):
    small_atlas().save(tmp_path / "atlas.json")
    return tmp_path / "atlas.json"


def config(source, **options):
    return ImportConfig(**{"source": source, "out": source.parent / "cohort", **options})


def assert_holds(path, bold, *, prefix="", tr_s=None):
    cohort = Cohort.open(path)
    index = cohort.recordings.index
    assert sorted(index["subject"]) == sorted(prefix + subject for subject in bold)
    for i, subject in enumerate(index["subject"]):
        held = cohort.recordings.read(i)
        np.testing.assert_allclose(held, bold[subject.removeprefix(prefix)], rtol=1e-5, atol=1e-6)
    if tr_s is not None:
        np.testing.assert_allclose(index["tr_s"].to_numpy(), tr_s)
    return cohort


# -- BIDS derivatives -----------------------------------------------------------------------


def write_xcpd(root, bold, *, seg="seg-4S156Parcels", names=NAMES, sidecar=True):
    """What XCP-D leaves of a run: the time series, and much beside."""
    for subject, values in bold.items():
        func = root / f"sub-{subject}" / "ses-1" / "func"
        func.mkdir(parents=True, exist_ok=True)
        run = f"sub-{subject}_ses-1_task-rest"
        series = f"{run}_space-MNI152NLin2009cAsym_{seg}_stat-mean_timeseries"
        pd.DataFrame(values.T, columns=names).to_csv(
            func / f"{series}.tsv", sep="\t", index=False, na_rep="n/a"
        )
        if sidecar:
            (func / f"{series}.json").write_text(json.dumps({"SamplingFrequency": 1 / 0.8}))
        motion = pd.DataFrame({"framewise_displacement": np.zeros(12)})
        motion.to_csv(func / f"{run}_motion.tsv", sep="\t", index=False)
        motion.to_csv(func / f"{run}_desc-confounds_timeseries.tsv", sep="\t", index=False)
        coverage = pd.DataFrame([[1.0] * 4], columns=names)
        coverage.to_csv(func / f"{run}_{seg}_stat-coverage_bold.tsv", sep="\t", index=False)
    (root / "participants.tsv").write_text("participant_id\nsub-007\n")


@pytest.mark.parametrize("seg", ["seg-4S156Parcels", "atlas-4S156Parcels"])
def test_only_time_series_of_xcpd_are_taken_with_the_tr_beside_them(source, atlas, bold, seg):
    bold["010"][2] = np.nan  # XCP-D's n/a for a parcel outside the field of view
    write_xcpd(source, bold, seg=seg)
    report = import_cohort(config(source, atlas=atlas, min_coverage=0.7))
    cohort = assert_holds(source.parent / "cohort", bold, prefix="sub-", tr_s=0.8)
    assert cohort.recordings.index["session"].unique().to_list() == ["1"]
    assert (report.names, report.n_other_files, report.n_with_missing) == ("BIDS", 10, 1)
    assert any(
        line.startswith("10 other files of this kind were left out") for line in report.lines()
    )


def test_two_atlases_of_a_run_ask_which(source, bold):
    write_xcpd(source, bold)
    write_xcpd(source, {s: b[::-1] for s, b in bold.items()}, seg="seg-Glasser", names=NAMES[::-1])
    message = (
        r"3 of 3 runs are there 2 times \(seg-4S156Parcels, seg-Glasser\).*--entities seg-4S156"
    )
    refused(config(source), message)
    refused(config(source, entities=("seg-Glaser",)), "no file has it; their names have seg-4S156")
    refused(config(source, entities=("Glasser",)), "expected a key and a value of BIDS names")
    import_cohort(config(source, entities=("seg-Glasser", "task-rest")))
    cohort = assert_holds(
        source.parent / "cohort", {s: b[::-1] for s, b in bold.items()}, prefix="sub-"
    )
    assert cohort.atlas.parcels == tuple(NAMES[::-1])


def test_a_tr_that_nobody_says_is_asked_for_and_another_one_is_counted(source, atlas, bold):
    write_xcpd(source, bold, sidecar=False)
    refused(config(source, atlas=atlas), "the TR is not given and sub-007_.* does not say it")
    write_xcpd(source, bold)
    report = import_cohort(config(source, atlas=atlas, tr_s=2.0))
    assert_holds(source.parent / "cohort", bold, prefix="sub-", tr_s=2.0)
    assert "3 recordings say another TR than --tr-s, which was used" in report.lines()


# -- CIFTI ----------------------------------------------------------------------------------


def brain_axis(n_left=20, n_right=15, n_voxels=9):
    cortex = [
        nibabel.cifti2.BrainModelAxis.from_surface(np.arange(n, dtype=int) * 2, 64, name)
        for n, name in ((n_left, "CortexLeft"), (n_right, "CortexRight"))
    ]
    mask = np.zeros((5, 5, 5), dtype=bool)
    mask.ravel()[10 : 10 + n_voxels] = True
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    return (
        cortex[0]
        + cortex[1]
        + nibabel.cifti2.BrainModelAxis.from_mask(mask, "thalamus_left", affine)
    )


def parcels_axis(names, axis):
    parts = np.array_split(np.arange(20), len(names))
    return nibabel.cifti2.ParcelsAxis.from_brain_models(
        [(name, axis[part]) for name, part in zip(names, parts, strict=True)]
    )


def save_cifti(path, values, *axes):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Cifti2Image(values.astype(np.float32), axes).to_filename(path)


def series(n_trs, tr_s=0.72):
    return nibabel.cifti2.SeriesAxis(0, tr_s, n_trs)


def test_ptseries_are_matched_by_name_with_their_own_tr(source, atlas, bold):
    for i, (subject, values) in enumerate(bold.items()):
        order = np.roll(np.arange(4), i)
        parcels = parcels_axis([NAMES[k] for k in order], brain_axis())
        name = f"sub-{subject}_task-rest_space-fsLR_seg-X_den-91k_stat-mean_timeseries.ptseries.nii"
        save_cifti(source / name, values[order].T, series(12), parcels)
    report = import_cohort(config(source, atlas=atlas))
    cohort = assert_holds(source.parent / "cohort", bold, prefix="sub-", tr_s=0.72)
    assert (report.kind, report.n_permuted) == ("cifti", 2)
    assert cohort.recordings.index["recording"][0].endswith("_timeseries")


def label_axis(names, keys):
    table = {0: ("???", (0, 0, 0, 0))}
    table |= {key: (name, (1, 0, 0, 1)) for key, name in zip(keys, names, strict=True)}
    return nibabel.cifti2.LabelAxis(["atlas"], [table])


def test_dtseries_become_means_over_a_dlabel(source, bold, atlas):
    # The atlas lacks the last voxels and has them in another order; label 9 lies nowhere.
    brain = brain_axis()
    rng = np.random.default_rng(1)
    keys = rng.choice([0, 3, 4, 5, 7], size=len(brain))
    keys[:5] = [0, 3, 4, 5, 7]
    order = rng.permutation(len(brain) - 3)
    labels = source.parent / "atlas.dlabel.nii"
    axis = label_axis([*NAMES, "nowhere"], [3, 4, 5, 7, 9])
    save_cifti(labels, keys[order][None], axis, brain[order])
    known = keys.copy()
    known[-3:] = 0
    expected = {}
    for subject in bold:
        values = rng.normal(size=(12, len(brain))).astype(np.float32)
        values[:, np.flatnonzero(known == 3)[0]] = 0.0  # not covered
        means = [values[:, known == key].mean(axis=1) for key in (4, 5, 7)]
        inside = np.flatnonzero(known == 3)[1:]
        expected[subject] = np.stack([values[:, inside].mean(axis=1), *means])
        name = f"sub-{subject}_task-rest_space-fsLR_den-91k_desc-denoised_bold.dtseries.nii"
        save_cifti(source / name, values, series(12), brain)
    refused(config(source), "holds grayordinates, not parcels: give an atlas with --labels")
    import_cohort(config(source, atlas=atlas, labels=labels))
    assert_holds(source.parent / "cohort", expected, prefix="sub-", tr_s=0.72)
    report = import_cohort(config(source, out=source.parent / "own", labels=labels))
    held = Cohort.open(source.parent / "own")
    assert held.atlas.parcels == (*NAMES, "nowhere")  # an empty label is kept as missing
    assert np.isnan(held.recordings.read(0)[4]).all()
    assert report.n_with_missing == 3
    other = source.parent / "other.dlabel.nii"
    shifted = nibabel.cifti2.BrainModelAxis.from_surface(np.arange(4), 32, "CortexLeft")
    save_cifti(other, np.array([[3, 4, 5, 7]]), axis, shifted)
    refused(
        config(source, out=source.parent / "x", labels=other),
        "has 64 vertices in CIFTI_STRUCTURE_CORTEX_LEFT but .* has 32: expected one mesh",
    )


def test_other_cifti_files_are_named(source, bold):
    save_cifti(
        source / "007.dtseries.nii",
        np.ones((1, 44)),
        nibabel.cifti2.ScalarAxis(["thickness"]),
        brain_axis(),
    )
    refused(config(source), "holds no time series but scalars: expected frames along its first")
    (source / "007.dtseries.nii").write_bytes(b"nonsense" * 100)
    refused(config(source), "007.dtseries.nii is no readable image")


# -- NIfTI ----------------------------------------------------------------------------------

AFFINE = np.array([[3.0, 0, 0, -9], [0, 3, 0, -12], [0, 0, 3, -6], [0, 0, 0, 1]])


def label_volume():
    labels = np.zeros((6, 7, 5), dtype=np.int16)
    for i, number in enumerate((1, 2, 5, 8)):
        labels[i + 1, 1:6, 1:4] = number
    return labels


def save_nifti(path, values, affine=AFFINE, tr=None, unit="sec"):
    image = nibabel.Nifti1Image(values, affine)
    if tr is not None:
        image.header.set_zooms((*image.header.get_zooms()[:3], tr))
        image.header.set_xyzt_units("mm", unit)
    image.to_filename(path)


@pytest.fixture
def volumes(source):
    """4-D images of three people, and what nilearn makes of them."""
    rng = np.random.default_rng(2)
    save_nifti(source.parent / "labels.nii.gz", label_volume())
    found = {}
    for subject in PEOPLE:
        values = rng.normal(size=(6, 7, 5, 12)).astype(np.float32)
        name = f"sub-{subject}_task-rest_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz"
        save_nifti(source / name, values, tr=800.0, unit="msec")
        save_nifti(source / name.replace("preproc_bold", "brain_mask"), values[..., 0])
        found[subject] = values
    return found


def test_nifti_images_become_the_means_that_nilearn_makes(source, volumes):
    maskers = pytest.importorskip("nilearn.maskers")
    masker = maskers.NiftiLabelsMasker(source.parent / "labels.nii.gz", standardize=None)
    expected = {
        subject: masker.fit_transform(nibabel.Nifti1Image(values, AFFINE)).T
        for subject, values in volumes.items()
    }
    report = import_cohort(config(source, labels=source.parent / "labels.nii.gz"))
    cohort = assert_holds(source.parent / "cohort", expected, prefix="sub-", tr_s=0.8)
    assert cohort.atlas.parcels == ("label-1", "label-2", "label-5", "label-8")
    # Voxel (1, 3, 2) is the middle of the first label.
    np.testing.assert_allclose(cohort.atlas.xyz_mm[0], [-6.0, -3.0, 0.0])
    assert report.n_other_files == 3  # the masks


def test_labels_are_named_and_an_uncovered_one_is_missing_not_shifted(source, volumes):
    table = source.parent / "dseg.tsv"
    table.write_text("index\tname\n1\tp0\n2\tp1\n5\tp2\n8\tp3\n9\tabsent\n")
    for subject, values in volumes.items():
        values[2, 1:6, 1:4] = 0.0  # label 2: outside the field of view
        values[3, 1, 1:4] = 0.0  # a fifth of label 5
        name = f"sub-{subject}_task-rest_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz"
        save_nifti(source / name, values, tr=0.8)
    labels = source.parent / "labels.nii.gz"
    given = config(source, labels=labels, parcels=table, min_coverage=0.6)
    import_cohort(given)
    cohort = Cohort.open(given.out)
    assert cohort.atlas.parcels == ("p0", "p1", "p2", "p3", "absent")
    bold, values = cohort.recordings.read(0), volumes["007"]
    assert np.isnan(bold).all(axis=1).tolist() == [False, True, False, False, True]
    expected = values[3, 2:6, 1:4].reshape(-1, 12).mean(axis=0)
    np.testing.assert_allclose(bold[2], expected, rtol=1e-5)
    (source.parent / "three.txt").write_text("a\nb\nc\n")
    three = replace(given, out=source.parent / "x", parcels=source.parent / "three.txt")
    refused(three, "lists 3 names but labels.nii.gz has 4 labels")


def test_labels_on_another_grid_are_put_onto_the_images(source, volumes):
    # The same labels at twice the resolution: each voxel becomes 2 x 2 x 2.
    fine = label_volume().repeat(2, 0).repeat(2, 1).repeat(2, 2)
    affine = AFFINE.copy()
    affine[:3, :3] /= 2
    affine[:3, 3] -= 0.75
    save_nifti(source.parent / "fine.nii.gz", fine, affine)
    import_cohort(config(source, labels=source.parent / "labels.nii.gz"))
    finer = config(source, out=source.parent / "fine", labels=source.parent / "fine.nii.gz")
    import_cohort(finer)
    one, other = (Cohort.open(path).recordings for path in (source.parent / "cohort", finer.out))
    np.testing.assert_array_equal(one.read(1), other.read(1))


def test_bad_images_and_labels_get_one_line(source, volumes):
    refused(config(source), "holds voxels, not parcels: give an atlas in the same space")
    save_nifti(source.parent / "soft.nii.gz", np.full((6, 7, 5), 0.3, dtype=np.float32))
    soft = config(source, labels=source.parent / "soft.nii.gz")
    refused(soft, "expected a 3-D image of whole numbers, 0 outside: a probabilistic")
    far = AFFINE.copy()
    far[:3, 3] += 500
    save_nifti(source.parent / "far.nii.gz", label_volume(), far)
    refused(config(source, labels=source.parent / "far.nii.gz"), "no voxel lies in a label of")
    labels = source.parent / "labels.nii.gz"
    name = "sub-010_task-rest_space-MNI152NLin2009cAsym_desc-preproc_bold"
    values = volumes["010"].copy()
    values[2, 2, 2, 5] = np.nan
    save_nifti(source / f"{name}.nii.gz", values, tr=0.8)
    refused(config(source, labels=labels), "has 1 voxels that are NaN in some frames only")
    save_nifti(source / f"{name}.nii.gz", volumes["010"], tr=0.8)
    (source / f"{name}.json").write_text('{"RepetitionTime": 2.0}')
    refused(config(source, labels=labels), "a TR of 0.8 s in its header but 2 s in the JSON")
    whole = (source / f"{name}.nii.gz").read_bytes()
    (source / f"{name}.nii.gz").write_bytes(whole[: len(whole) // 2])
    refused(config(source, labels=labels), f"{name}.nii.gz is no readable image")
    (source / f"{name}.json").unlink()
    save_nifti(source / f"{name}.nii.gz", volumes["010"], tr=800.0)
    refused(config(source, labels=labels), "tr_s=800 is no repetition time in seconds")


# -- HDF5 -----------------------------------------------------------------------------------


def test_hdf5_with_a_data_set_a_recording(source, atlas, bold):
    with h5py.File(source / "all.h5", "w") as file:
        for subject, values in bold.items():
            data = file.create_dataset(f"sub-{subject}_ses-2/rest", data=values[::-1].T)
            data.attrs["RepetitionTime"] = 0.735
        file["parcels"] = NAMES[::-1]
    report = import_cohort(config(source / "all.h5", out=source.parent / "cohort", atlas=atlas))
    cohort = assert_holds(source.parent / "cohort", bold, prefix="sub-", tr_s=0.735)
    assert cohort.recordings.index["session"].unique().to_list() == ["2"]
    assert (report.kind, report.n_permuted) == ("hdf5", 3)


def test_hdf5_with_one_array_of_all(source, atlas, bold):
    path = source / "all.hdf5"
    with h5py.File(path, "w") as file:
        file["bold"] = np.stack(list(bold.values()))
        file["eid"] = [int(subject) + 1_000_000 for subject in PEOPLE]
    given = config(path, out=source / "c", atlas=atlas, tr_s=0.7)
    import_cohort(given)
    assert_holds(given.out, {f"10000{subject[1:]}": values for subject, values in bold.items()})
    (source / "ids.txt").write_text("\n".join(PEOPLE))
    given = replace(given, out=source / "d", ids=source / "ids.txt")
    import_cohort(given)
    assert_holds(given.out, bold, tr_s=0.7)


def test_hdf5_files_one_a_recording_and_bad_ones(source, atlas, bold):
    for subject, values in bold.items():
        with h5py.File(source / f"{subject}_rest.h5", "w") as file:
            file["tc"] = values
            file["motion"] = np.ones((12, 6))
    refused(config(source, atlas=atlas, variable="t", tr_s=1), "no data set 't'.*Did you mean 'tc'")
    import_cohort(config(source, atlas=atlas, variable="tc", tr_s=1.0))
    assert_holds(source.parent / "cohort", bold)
    other = config(source, out=source.parent / "x", atlas=atlas, variable="tc", tr_s=1.0)
    path = source / "010_rest.h5"
    path.write_bytes(path.read_bytes()[:900])
    refused(other, "010_rest.h5 is not a whole HDF5 file")
    with h5py.File(path, "w") as file:
        file["tc"] = np.stack([bold["010"]] * 2)
    refused(replace(other, source=path), "no data set of ids: give --ids, or --id-column")


# -- Arrow ----------------------------------------------------------------------------------


def write_arrow(folder, columns, n_files=2):
    """A data set as Hugging Face's datasets saves it to disk: Arrow streams and JSON beside."""
    folder.mkdir(parents=True)
    table = pa.table(columns)
    step = -(-len(table) // n_files)
    for i in range(n_files):
        part = table.slice(i * step, step)
        path = folder / f"data-{i:05d}-of-{n_files:05d}.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(part)
    for name in ("dataset_info.json", "state.json"):
        (folder / name).write_text("{}")


def nested(values):
    return pa.array([array.tolist() for array in values], type=pa.list_(pa.list_(pa.float32())))


def brainlm_columns(bold):
    """As BrainLM's toolkit writes them: transposed between columns, `Patient ID` empty."""
    return {
        "Raw_Recording": nested(bold.values()),
        "Voxelwise_RobustScaler_Normalized_Recording": nested(x.T / 7 for x in bold.values()),
        "Filename": [f"{subject}_20227_2_0.dat" for subject in bold],
        "Patient ID": ["" for _ in bold],
    }


def test_brainlms_arrow_folders_are_read_with_the_column_that_is_named(source, atlas, bold):
    write_arrow(source / "train", brainlm_columns(bold))
    coordinates = {"Index": [1, 2], "X": [0.0, 1.0], "Y": [0.0, 1.0], "Z": [0.0, 1.0]}
    write_arrow(source / "Brain_Region_Coordinates", coordinates, n_files=1)
    refused(
        config(source, atlas=atlas, tr_s=0.735), r"2 columns of recordings \(Raw_Recording, Vox"
    )
    wrong = config(source, atlas=atlas, tr_s=0.735, variable="Raw_Recordings")
    refused(wrong, "no column of recordings 'Raw_Recordings'. Did you mean 'Raw_Recording'")
    given = replace(wrong, variable="Raw_Recording")
    report = import_cohort(given)
    assert_holds(given.out, bold)
    assert (report.n_other_files, report.names) == (1, "column Filename")
    assert set(Cohort.open(given.out).recordings.index["session"]) == {"2"}
    scaled = "Voxelwise_RobustScaler_Normalized_Recording"
    given = replace(given, out=source.parent / "scaled", variable=scaled)
    assert import_cohort(given).orientation == "trs-first"
    assert_holds(given.out, {subject: values / 7 for subject, values in bold.items()})


def test_arrow_ids_and_damage_get_one_line(source, atlas, bold):
    columns = brainlm_columns(bold)
    columns["Patient ID"] = ["007", "", "023"]
    write_arrow(source / "train", columns, n_files=1)
    given = config(source, atlas=atlas, tr_s=0.735, variable="Raw_Recording")
    refused(given, "column 'Patient ID' is empty in 1 of 3 rows")
    import_cohort(replace(given, id_column="Filename"))
    assert_holds(given.out, bold)
    path = next((source / "train").glob("*.arrow"))
    whole = path.read_bytes()
    for n_bytes in (len(whole) - 8, 200):  # the first cut loses the end mark alone
        path.unlink()
        path.write_bytes(whole[:n_bytes])
        refused(replace(given, out=source.parent / "x"), "is not a whole Arrow file")


def test_uneven_inner_lists_are_refused(source, atlas, bold):
    ragged = [[row.tolist() for row in values] for values in bold.values()]
    ragged[1][2] = ragged[1][2][:-1]
    write_arrow(source / "train", {"bold": ragged, "eid": [7, 10, 23]}, n_files=1)
    refused(config(source, atlas=atlas, tr_s=1.0), "row 1 of 'bold' has inner lists of several len")


# -- UK Biobank -----------------------------------------------------------------------------


def test_names_of_uk_biobank_give_subject_and_instance(source, atlas, bold):
    for instance in (2, 3):
        for subject, values in bold.items():
            np.savetxt(source / f"1000{subject}_25751_{instance}_0.txt", values.T)
    report = import_cohort(config(source, atlas=atlas, tr_s=0.735))
    index = Cohort.open(source.parent / "cohort").recordings.index
    assert index["subject"].to_list() == [f"1000{s}" for s in PEOPLE for _ in range(2)]
    assert index["session"].to_list() == ["2", "3"] * 3
    assert (report.names, report.n_people) == ("UK Biobank", 3)
    np.savetxt(source / "1000007_25750_2_0.txt", bold["007"].T)
    other = config(source, out=source.parent / "x", atlas=atlas, tr_s=0.735)
    refused(other, r"2 data fields of UK Biobank \(25750, 25751\).*--glob '\*_25750_\*'")
    refused(replace(other, glob="*_25752_*"), "it holds none of them")


@pytest.mark.parametrize("whole", [False, True])
def test_connectivity_matrices_are_no_recordings(source, atlas, whole):
    matrix = np.corrcoef(np.random.default_rng(0).normal(size=(21, 50)))
    values = matrix if whole else matrix[np.triu_indices(21, 1)][None]
    np.savetxt(source / "1000007_25751_2_0.txt", values)
    message = r"is a connectivity matrix of 21 nodes .* expected time series"
    refused(config(source, atlas=atlas, tr_s=0.735), message)


@pytest.mark.parametrize(
    ("package", "name", "message"),
    [
        ("nibabel", "a.ptseries.nii", r"need nibabel, .* pip install 'brainfusion\[nifti\]'"),
        ("h5py", "a.h5", r"need h5py, .* pip install 'brainfusion\[hdf5\]'"),
    ],
)
def test_a_missing_package_says_what_to_install(source, monkeypatch, package, name, message):
    (source / name).write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, package, None)
    refused(config(source, tr_s=1.0), message)
