"""open_clip's losses, in the modes in which the gradient over several ranks is exact."""

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch.distributed as dist
from torch import Tensor

from brainfusion.alignment.losses.peers import default_group, meet
from brainfusion.runtime.errors import UserError


@cache
def open_clip_losses() -> ModuleType:
    """open_clip's loss module alone; importing the package would pull torchvision and timm.

    Raises:
        UserError: open_clip is not installed.
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "open_clip is not installed, which --loss clip and --loss siglip take their losses "
            "from: pip install --no-deps open_clip_torch, or use --loss info_nce."
        )
    path = Path(spec.submodule_search_locations[0]) / "loss.py"
    loss_spec = importlib.util.spec_from_file_location("brainfusion._open_clip_loss", path)
    assert loss_spec is not None
    assert loss_spec.loader is not None
    module = importlib.util.module_from_spec(loss_spec)
    loss_spec.loader.exec_module(module)
    return module


def open_clip_loss(
    name: Literal["clip", "siglip"],
) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """ClipLoss or SigLipLoss as a function of (a, b, logit_scale, logit_bias).

    The flags are those under which the mean of the gradients over ranks is exact. In a process
    group the value is this rank's part: its mean over ranks is the loss of the union.
    """
    world = default_group(None)
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()} if world else {}
    if name == "clip":
        loss = open_clip_losses().ClipLoss(local_loss=True, gather_with_grad=True, **place)
    else:
        loss = open_clip_losses().SigLipLoss(**place)

    def evaluate(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        # On unequal counts open_clip's collectives end the process without a message.
        peers, _ = meet(a, b, world)
        if len(set(peers.counts)) > 1:
            raise UserError(
                f"--loss {name} needs as many pairs on each rank, got {peers.counts}: use a batch "
                "size that the number of processes divides, or --loss info_nce."
            )
        with warnings.catch_warnings():
            # torch 2.13 deprecates the gather that open_clip calls; its result is still exact.
            warnings.simplefilter("ignore", FutureWarning)
            return loss(a, b, scale, bias)

    return evaluate
