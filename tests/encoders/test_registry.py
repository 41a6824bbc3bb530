"""The registry: names, presets and overrides, and how lightly it is imported."""

import subprocess
import sys

import pytest
import torch

from brainfusion.encoders import ENCODERS, build, create, from_upstream, to_upstream
from brainfusion.runtime.errors import UserError


def test_importing_the_registry_does_not_import_torch() -> None:
    code = (
        "import sys; from brainfusion.encoders import ENCODERS, create; "
        "assert list(ENCODERS) == ['brainjepa', 'brainlm']; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_presets_are_those_of_the_papers_and_a_tiny_one() -> None:
    assert list(ENCODERS["brainjepa"].presets) == ["tiny", "small", "base", "large"]
    assert list(ENCODERS["brainlm"].presets) == ["tiny", "5m", "13m", "111m", "650m"]


@pytest.mark.parametrize("name", list(ENCODERS))
def test_every_preset_builds_the_module_of_its_family(name: str) -> None:
    spec = ENCODERS[name]
    for preset, config in spec.presets.items():
        with torch.device("meta"):
            module = create(name, preset)
        assert type(module) is spec.module_class_for(config)
        sizes = [getattr(module, name) for name in ("n_parcels", "window_trs", "n_tokens")]
        assert all(isinstance(size, int) and size > 0 for size in sizes)


def test_an_override_changes_the_preset() -> None:
    module = create("brainjepa", "tiny", n_parcels=12, n_trs=32)
    assert (module.n_parcels, module.window_trs) == (12, 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create("brainjeppa"), "no encoder 'brainjeppa'. Did you mean 'brainjepa'"),
        (lambda: create("brainjepa", "tinny"), "no preset 'tinny'. Did you mean 'tiny'"),
        (lambda: create("brainjepa", widht=8), "unknown key 'widht'.*Did you mean 'width'"),
        (lambda: create("brainjepa", width="8"), "expected int"),
        (lambda: create("brainlm", gradient=torch.zeros(1, 1)), "takes no gradient table"),
        (lambda: build("brainlm", ENCODERS["brainjepa"].presets["tiny"]), "expected BrainLMConfig"),
        (lambda: from_upstream("brainlm", {}), "needs config="),
        (lambda: from_upstream("brainml", {}), "Did you mean 'brainlm'"),
        (lambda: to_upstream(torch.nn.Linear(1, 1)), "got a Linear"),
    ],
)
def test_a_wrong_name_is_an_error_that_names_the_nearest(call: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        call()  # type: ignore[operator]
    assert "\n" not in str(error.value)
