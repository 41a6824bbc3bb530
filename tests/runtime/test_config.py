"""Configs in YAML are strict: no typo, no wrong type, no shared state."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from brainfusion.encoders.brainjepa import BrainJEPAConfig
from brainfusion.encoders.brainlm import BrainLMConfig
from brainfusion.encoders.brainlm_image import BrainLMImageConfig
from brainfusion.encoders.pretrain_config import OptimConfig, PretrainConfig, RunConfig, WatchConfig
from brainfusion.runtime import config
from brainfusion.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Small:
    width: int = 4
    rate: float = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Deep:
    depth: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    name: str
    part: Small | Deep = field(default_factory=Small)
    one: Small = field(default_factory=Small)
    kind: Literal["a", "b"] = "a"
    limit: int | None = None
    either: int | str = 0
    path: Path | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    names: tuple[str, ...] = ()
    parts: tuple[Small, ...] = ()
    on: bool = False


def refused(values: dict[str, Any], cls: type[Any] = Whole) -> str:
    with pytest.raises(UserError) as caught:
        config.from_dict(cls, values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@given(
    st.builds(
        Whole,
        name=st.text(alphabet="abc: #-\u00e9'"),
        part=st.builds(Small, width=st.integers()) | st.builds(Deep, depth=st.integers()),
        kind=st.sampled_from(["a", "b"]),
        limit=st.none() | st.integers(),
        either=st.integers() | st.text(alphabet="0123x"),
        path=st.none() | st.just(Path("a/b")),
        pair=st.tuples(*[st.floats(allow_nan=False)] * 2),
        names=st.lists(st.text(alphabet="ab1.e-")).map(tuple),
        parts=st.lists(st.builds(Small, rate=st.floats(allow_nan=False))).map(tuple),
        on=st.booleans(),
    )
)
def test_nested_configs_survive_yaml(whole):
    text = yaml.safe_dump(config.to_dict(whole), sort_keys=False)
    assert config.from_dict(Whole, yaml.safe_load(text)) == whole


@pytest.mark.parametrize(
    ("model", "encoder"),
    [
        ("brainlm", BrainLMConfig(n_parcels=7, conv_kernel_size=None)),
        ("brainlm", BrainLMImageConfig(n_parcels=7)),
        ("brainjepa", BrainJEPAConfig(n_parcels=7)),
    ],
)
def test_the_config_of_a_run_survives_its_file(tmp_path, model, encoder):
    settings = PretrainConfig(model=model, encoder=encoder, optim=OptimConfig(betas=(0.8, 0.9)))
    config.save(tmp_path / "config.yaml", settings)
    values = config.read_yaml(tmp_path / "config.yaml")
    assert config.from_dict(PretrainConfig, values) == settings
    other = PretrainConfig(model=model, encoder=type(encoder)(), run=RunConfig(seed=5))
    assert config.updated(other, values) == settings
    assert values["watch"]["log_every"] == WatchConfig().log_every  # complete with its defaults


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nam": "x"}, "unknown key 'nam' for Whole. Did you mean 'name'?"),
        ({"name": "x", "one": {"widht": 3}}, "config.one: unknown key 'widht' for Small. Did you"),
        ({}, "missing 1 required keyword-only argument: 'name'"),
        ({"name": 3}, "config.name=3: expected str, got int"),
        ({"name": "x", "one": 3}, "config.one: expected a mapping for Small, got int"),
        ({"name": "x", "one": {"width": 3.0}}, "config.one.width=3.0: expected int, got float"),
        ({"name": "x", "one": {"width": True}}, "expected int, got bool"),
        ({"name": "x", "one": {"rate": True}}, "expected float, got bool"),
        ({"name": "x", "one": {"rate": "fast"}}, "config.one.rate='fast': expected float, got str"),
        ({"name": "x", "on": 1}, "config.on=1: expected bool, got int"),
        ({"name": "x", "kind": "aa"}, "config.kind='aa': Did you mean 'a'? Known: a, b."),
        ({"name": "x", "kind": ["a"]}, "Known: a, b."),
        ({"name": "x", "limit": "3"}, "config.limit='3': expected int, got str"),
        ({"name": "x", "pair": [1.0]}, "config.pair=[1.0]: expected 2 values, got 1"),
        ({"name": "x", "pair": [1.0, "b"]}, "config.pair[1]='b': expected float, got str"),
        ({"name": "x", "pair": 0.5}, "config.pair=0.5: expected a list"),
        ({"name": "x", "names": "abc"}, "config.names='abc': expected a list"),
        ({"name": "x", "names": ["a", 1]}, "config.names[1]=1: expected str, got int"),
        ({"name": "x", "parts": [{"wide": 1}]}, "config.parts[0]: unknown key 'wide' for Small"),
        ({"name": "x", "path": 3}, "config.path=3: expected str, got int"),
        ({"name": "x", "part": {"witdh": 1}}, "config.part: unknown key 'witdh'"),
        ({"name": "x", "part": {}}, "config.part: the keys fit Small and Deep"),
        ({"name": "x", "either": 1.5}, "config.either=1.5: expected int, got float"),
        ([], "config: expected a mapping for Whole, got list"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(values, message):
    assert message in refused(values)


def test_numbers_that_yaml_reads_as_text_or_integers_are_floats():
    values = yaml.safe_load("{rate: 1e-3}")
    assert values == {"rate": "1e-3"}  # YAML 1.1 wants 1.0e-3
    assert config.from_dict(Small, values).rate == 1e-3
    rate = config.from_dict(Small, {"rate": 2}).rate
    assert rate == 2.0
    assert isinstance(rate, float)


def test_a_union_takes_the_class_whose_keys_fit():
    assert config.from_dict(Whole, {"name": "x", "part": {"depth": 5}}).part == Deep(depth=5)
    assert config.from_dict(Whole, {"name": "x", "part": {"rate": "1e-2"}}).part == Small(rate=0.01)


def test_updating_keeps_the_class_that_a_union_holds_and_all_other_values():
    before = Whole(name="x", part=Deep(depth=7), one=Small(width=9, rate=0.25))
    after = config.updated(before, {"part": {"depth": 8}, "one": {"rate": "1e-1"}})
    assert after == replace(before, part=Deep(depth=8), one=Small(width=9, rate=0.1))
    assert config.updated(before, {"part": {}}) == before
    assert before.part == Deep(depth=7)
    for values, message in (
        ({"part": {"width": 1}}, "config.part: unknown key 'width' for Deep"),
        ({"naem": "y"}, "Did you mean 'name'"),
        ({"limit": "many"}, "config.limit='many': expected int"),
        (3, "config: expected a mapping, got int"),
    ):
        with pytest.raises(UserError, match="config") as caught:
            config.updated(before, values)
        assert message in str(caught.value)


def test_defaults_and_plain_values_share_no_state():
    assert Whole(name="a").one is not Whole(name="b").one
    whole = config.from_dict(Whole, {"name": "x", "names": (names := ["a"])})
    names.append("b")
    plain = config.to_dict(whole)
    plain["pair"].append(3)
    plain["one"]["width"] = 99
    assert whole == Whole(name="x", names=("a",))
    assert whole.one.width == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "is not valid YAML"),
        (b"\xff\xfe\x00\x01", "is not valid YAML"),
        (b"- a\n- b\n", "expected a mapping"),
        (b"", "expected a mapping"),
    ],
)
def test_a_broken_yaml_file_is_one_line_with_its_name(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        config.read_yaml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="does not exist"):
        config.read_yaml(tmp_path / "other.yaml")
