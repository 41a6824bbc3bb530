"""Files and folders are whole or absent, whatever stops the writing."""

import errno
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainfusion.runtime import files
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import atomic_file, atomic_folder

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def make_old(target: Path, kind: str) -> None:
    if kind == "folder":
        target.mkdir()
        (target / "old").write_text("old")
        (target / "gone").write_text("gone")
    else:
        target.write_text("old")


def fill(aside: Path, kind: str, text: str) -> None:
    (aside / "new" if kind == "folder" else aside).write_text(text)


@pytest.fixture(params=["file", "folder"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def atomic(kind: str):
    return atomic_folder if kind == "folder" else atomic_file


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), ValueError("a bug")])
def test_an_error_leaves_nothing_behind_and_the_old_untouched(tmp_path, kind, error):
    for old in (False, True):
        folder = tmp_path / str(old)
        folder.mkdir()
        target = folder / "target"
        if old:
            make_old(target, kind)
        before = sorted(folder.rglob("*"))

        def write(target: Path = target) -> None:
            with atomic(kind)(target) as aside:
                fill(aside, kind, "half")
                raise error

        with pytest.raises(type(error)):
            write()
        assert sorted(folder.rglob("*")) == before
        if old:
            assert (target / "old" if kind == "folder" else target).read_text() == "old"


def test_a_new_version_replaces_the_old_one_wholly(tmp_path, kind):
    target = tmp_path / "deep" / "target"
    for old in (False, True):
        with atomic(kind)(target) as aside:
            fill(aside, kind, f"new {old}")
        assert list(target.parent.iterdir()) == [target]
        found = target / "new" if kind == "folder" else target
        assert found.read_text() == f"new {old}"
        if kind == "folder":
            assert list(target.iterdir()) == [target / "new"]
            (target / "left").write_text("of the version before")


def test_a_folder_that_cannot_be_renamed_into_place_leaves_the_old_one(tmp_path, monkeypatch):
    target = tmp_path / "target"
    make_old(target, "folder")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if Path(to) == target and self.parent == tmp_path:
            raise FULL
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="No space"), atomic_folder(target) as aside:
        fill(aside, "folder", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target"]
    assert sorted(path.name for path in target.iterdir()) == ["gone", "old"]


def test_what_is_written_has_the_permissions_of_any_new_file(tmp_path, kind):
    mask = os.umask(0o027)
    try:
        with atomic(kind)(tmp_path / "target") as aside:
            fill(aside, kind, "x")
    finally:
        os.umask(mask)
    mode = stat.S_IMODE((tmp_path / "target").stat().st_mode)
    assert mode == (0o750 if kind == "folder" else 0o640)


def test_json_with_nan_is_refused_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_json_round_trips_and_a_broken_file_is_one_line_with_its_name(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"b": [1, 2.5, None], "a": "\u00e9"})
    assert files.read_json(path) == {"b": [1, 2.5, None], "a": "\u00e9"}
    for broken in (path.read_bytes()[:-4], b"\xff\xfe\x00"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"x\.json is not JSON") as caught:
            files.read_json(path)
        assert "\n" not in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES, max_size=5))
def test_hashes_do_not_depend_on_the_order_of_keys(values):
    turned = dict(reversed(list(values.items())))
    assert files.hash_json(values) == files.hash_json(turned)
    assert files.hash_json({**values, "one more": 1}) != files.hash_json(values)


def test_hashes_of_json_are_stable_from_version_to_version():
    """Stored in checkpoints and splits: another hash would orphan them."""
    # The first 16 digits of: printf '{"a":[1,2],"b":"x"}' | sha256sum
    assert files.hash_json({"b": "x", "a": [1, 2]}) == "d0f56dda38d34376"


def test_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert files.hash_file(tmp_path / "x") == "ba7816bf8f01cfea"  # SHA-256, FIPS 180-2 B.1


def test_an_unwritable_folder_is_one_line_and_a_writable_one_stays_empty(tmp_path):
    files.check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/run") as caught:
        files.check_writable(tmp_path / "file" / "run")
    assert "Not a directory" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_space_is_one_line(tmp_path, monkeypatch):
    def full(**_: object) -> None:
        raise FULL

    monkeypatch.setattr(files.tempfile, "NamedTemporaryFile", full)
    with pytest.raises(UserError, match=r"No space left on device.*free space"):
        files.check_writable(tmp_path)
