import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainfusion.data.atlas import Atlas, match_parcels
from brainfusion.runtime.errors import UserError


def test_atlas_survives_saving_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    atlas = Atlas(
        name="three",
        parcels=("a", "b", "c"),
        xyz_mm=rng.normal(size=(3, 3)) * 50,
        gradient=rng.normal(size=(3, 5)),
        networks=("Vis", "Vis", "DMN"),
    )
    atlas.save(tmp_path / "atlas.json")
    back = Atlas.load(tmp_path / "atlas.json")
    assert back.parcels == atlas.parcels
    assert back.networks == atlas.networks
    np.testing.assert_array_equal(back.xyz_mm, atlas.xyz_mm)
    np.testing.assert_array_equal(back.gradient, atlas.gradient)
    assert back.to_dict() == atlas.to_dict()


@given(st.permutations(list("abcdef")), st.integers(1, 6), st.integers(0, 2))
def test_matching_by_name_restores_the_atlas_order(shuffled, n_kept, n_extra):
    atlas = Atlas(name="six", parcels=tuple("abcdef"))
    names = [*shuffled[:n_kept], *(f"x{i}" for i in range(n_extra))]
    value = {name: i + 1.0 for i, name in enumerate(atlas.parcels)}
    bold = np.array([[value.get(name, -1.0)] for name in names])
    match = match_parcels(names, atlas)
    matched = match.apply(bold)[:, 0]
    expected = [value[name] if name in names else np.nan for name in atlas.parcels]
    np.testing.assert_array_equal(matched, np.array(expected, dtype=np.float32))
    assert set(match.missing) == set(atlas.parcels) - set(names)
    assert len(match.extra) == n_extra
    kept = [name for name in names if name in value]
    assert match.permuted == (kept != sorted(kept))


def test_names_of_another_atlas_are_refused():
    with pytest.raises(UserError, match="none of the 2 parcel names"):
        match_parcels(["x", "y"], Atlas(name="a", parcels=("a", "b")))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a", "parcels": ["p", "p"]}, "1 parcel names repeat"),
        ({"name": "a", "parcels": ["p", ""]}, "parcel 1 has no name"),
        ({"name": "a", "parcels": []}, "has no parcels"),
        ({"name": "a", "parcels": [1, 2]}, "parcel 0 has no name"),
        ({"name": "a", "parcels": ["p"], "xyz_mm": [[1, 2]]}, r"expected \[1, 3\]"),
        ({"name": "a", "parcels": ["p"], "xyz_mm": [[1, 2], [3]]}, "equally long rows"),
        ({"name": "a", "parcels": ["p"], "gradient": [[None]]}, "NaN or infinity"),
        ({"name": "a", "parcels": ["p"], "networks": ["v", "d"]}, "2 network labels"),
        ({"name": "a", "parcels": ["p"], "xyz": []}, "Did you mean 'xyz_mm'"),
        ({"name": "a"}, "'parcels' must be a list"),
        ([], "expected an object"),
    ],
)
def test_a_broken_atlas_gets_one_line(values, message):
    with pytest.raises(UserError, match=message) as error:
        Atlas.from_dict(values)
    assert "\n" not in str(error.value)


def test_an_absent_atlas_names_the_file(tmp_path):
    with pytest.raises(UserError, match=r"atlas.json does not exist: expected a JSON file"):
        Atlas.load(tmp_path / "atlas.json")
