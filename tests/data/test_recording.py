"""One recording of a file in the parcels of an atlas, in every form that an import reads."""

import numpy as np
import pytest

from brainfusion.data.cohort import Cohort
from brainfusion.data.importers import ImportConfig, import_cohort
from brainfusion.data.importers.recording import read_recording
from brainfusion.runtime.errors import UserError
from tests.data.cohorts import noise, small_atlas
from tests.data.test_import_formats import (
    NAMES,
    brain_axis,
    brainlm_columns,
    h5py,
    label_volume,
    parcels_axis,
    save_cifti,
    save_nifti,
    series,
    write_arrow,
)

ORDER = [2, 0, 3, 1]


@pytest.fixture
def bold():
    return noise(np.random.default_rng(0), 4, 12)


def assert_read(path, bold, *, tr_s, named, **options):
    found = read_recording(path, small_atlas(), **options)
    np.testing.assert_allclose(found.bold, bold, rtol=1e-6, atol=1e-7)
    assert found.bold.dtype == np.float32
    assert found.tr_s == pytest.approx(tr_s)
    assert found.named is named


def test_a_cifti_is_matched_by_name_with_its_own_tr(tmp_path, bold):
    path = tmp_path / "rest.ptseries.nii"
    parcels = parcels_axis([NAMES[i] for i in ORDER], brain_axis())
    save_cifti(path, bold[ORDER].T, series(12), parcels)
    assert_read(path, bold, tr_s=0.72, named=True)


def test_a_nifti_becomes_what_an_import_makes_of_it(tmp_path):
    values = np.random.default_rng(2).normal(size=(6, 7, 5, 12)).astype(np.float32)
    save_nifti(tmp_path / "labels.nii.gz", label_volume())
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "sub-1_bold.nii.gz"
    save_nifti(path, values, tr=800.0, unit="msec")
    given = {"labels": tmp_path / "labels.nii.gz", "parcels": tmp_path / "names.txt"}
    small_atlas().save(tmp_path / "atlas.json")
    out = tmp_path / "cohort"
    import_cohort(ImportConfig(source=path.parent, out=out, atlas=tmp_path / "atlas.json", **given))
    assert_read(path, Cohort.open(out).recordings.read(0), tr_s=0.8, named=True, **given)


def test_a_row_or_a_data_set_of_hdf5_is_chosen(tmp_path, bold):
    path = tmp_path / "all.h5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset("one/rest", data=bold[ORDER].T)
        data.attrs["RepetitionTime"] = 0.735
        file["parcels"] = [NAMES[i] for i in ORDER]
        file["stacked"] = np.stack([bold + 1, bold])
    assert_read(path, bold, tr_s=0.735, named=True, variable="one/rest")
    with pytest.raises(UserError, match=r"holds 2 data sets .one/rest, stacked.: choose"):
        read_recording(path, small_atlas())
    with pytest.raises(UserError, match="holds 2 recordings: choose with --row 0 to 1"):
        read_recording(path, small_atlas(), variable="stacked")


def test_a_row_of_arrow_is_chosen(tmp_path, bold):
    write_arrow(tmp_path / "train", brainlm_columns({"a": bold + 1, "b": bold}), n_files=1)
    [path] = (tmp_path / "train").glob("*.arrow")
    words = {"variable": "Raw_Recording", "tr_s": 0.735}
    for row, values in ((0, bold + 1), (1, bold)):
        found = read_recording(path, small_atlas(), row=row, **words)
        np.testing.assert_allclose(found.bold, values, rtol=1e-6)
    with pytest.raises(UserError, match="2 columns of recordings"):
        read_recording(path, small_atlas(), row=0, tr_s=1)


def test_what_a_file_lacks_or_has_beyond_the_atlas_is_said(tmp_path, bold, capsys):
    path = tmp_path / "rest.tsv"
    table = np.column_stack([*bold[[3, 0, 1]], bold[2] * 0 + 7.0, np.arange(12.0)])
    names = ["p3", "p0", "p1", "p2", "global"]
    lines = ["\t".join(names), *("\t".join(map(repr, row)) for row in table.tolist())]
    path.write_text("\n".join(lines))
    found = read_recording(path, small_atlas(), tr_s=2.0)
    np.testing.assert_allclose(found.bold[[0, 1, 3]], bold[[0, 1, 3]], rtol=1e-6)
    assert np.isnan(found.bold[2]).all()
    said = capsys.readouterr().err
    assert "rest.tsv: parcels that the atlas does not have, left out: 1." in said
    assert "rest.tsv: parcels of the atlas without data: 1." in said
    assert "4 parcels x 12 TRs of 2 s, read trs-first; parcels matched by name." in said
    again = read_recording(path, small_atlas(), tr_s=2.0, drop_columns=["global"])
    np.testing.assert_array_equal(again.bold, found.bold)
    assert "left out" not in capsys.readouterr().err
