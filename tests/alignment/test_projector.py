import subprocess
import sys

import torch
import torch.nn.functional as F

from brainfusion.alignment import Projector


def test_projector_is_linear_gelu_dropout_linear_layernorm():
    torch.manual_seed(0)
    projector = Projector(7)
    expected = {
        "layers.0.weight": (1024, 7),
        "layers.0.bias": (1024,),
        "layers.3.weight": (512, 1024),
        "layers.3.bias": (512,),
        "layers.4.weight": (512,),
        "layers.4.bias": (512,),
    }
    state = projector.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    assert projector.layers[2].p == 0.1
    x = torch.randn(5, 7)
    hidden = F.gelu(x @ state["layers.0.weight"].T + state["layers.0.bias"])
    out = hidden @ state["layers.3.weight"].T + state["layers.3.bias"]
    out = F.layer_norm(out, (512,), state["layers.4.weight"], state["layers.4.bias"])
    torch.testing.assert_close(projector.eval()(x), out)


def test_projector_drops_hidden_units_only_in_training():
    projector = Projector(4, dim_out=8, dim_hidden=64, dropout=0.5)
    x = torch.randn(3, 4)
    assert not torch.equal(projector(x), projector(x))
    projector.eval()
    assert torch.equal(projector(x), projector(x))


def test_importing_the_package_loads_no_torch():
    code = "import sys, brainfusion.alignment; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_train_is_the_function_whichever_import_comes_first():
    code = """
from brainfusion.alignment.train import AlignConfig
from brainfusion.alignment import train
import brainfusion.alignment
assert callable(train) and brainfusion.alignment.train is train
"""
    subprocess.run([sys.executable, "-c", code], check=True)
