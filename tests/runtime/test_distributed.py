"""One process without torchrun; what several do together is in the tests of training."""

import pytest
import torch
import torch.distributed as dist

from brainfusion.runtime import distributed
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import CheckpointError, NonFiniteError, UserError, nearest


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_without_torchrun_there_is_one_rank_and_no_process_group():
    with distributed.session("cpu") as ranks:
        assert ranks == Ranks()
        assert ranks.is_main
        assert not dist.is_initialized()
        distributed.barrier()
        value = torch.tensor([1.0, 2.0], requires_grad=True)
        mean = distributed.mean_over_ranks(value)
        assert mean.tolist() == [1.0, 2.0]
        assert not mean.requires_grad
        assert mean.data_ptr() != value.data_ptr()


@pytest.mark.parametrize(("rank", "order"), [(0, ["made", "waits"]), (1, ["waits", "made"])])
def test_the_main_rank_makes_what_the_others_wait_for(monkeypatch, rank, order):
    seen: list[str] = []
    monkeypatch.setattr(distributed, "barrier", lambda: seen.append("waits"))
    with distributed.main_first(Ranks(rank=rank, world_size=2)):
        seen.append("made")
    assert seen == order


def test_an_unknown_device_is_one_line():
    message = "device 'gpu' is unknown: use auto, cpu or cuda"
    with pytest.raises(UserError, match=message), distributed.session("gpu"):
        pass


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_cuda_device_that_is_not_there_is_one_line(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    message = "wants CUDA device 1 but this machine has 0"
    with pytest.raises(UserError, match=message), distributed.session(name):
        pass


def test_each_local_rank_has_its_own_cuda_device(monkeypatch):
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for name in ("auto", "cuda"):
        with distributed.session(name) as ranks:
            assert ranks.device == torch.device("cuda", 3)
    with distributed.session("cuda:2") as ranks:
        assert ranks.device == torch.device("cuda", 2)
    assert chosen == [3, 3, 2]


def test_errors_for_users_are_value_errors_and_non_finite_losses_are_arithmetic_ones():
    assert issubclass(UserError, ValueError)
    assert issubclass(CheckpointError, UserError)
    assert issubclass(NonFiniteError, UserError)
    assert issubclass(NonFiniteError, FloatingPointError)


def test_the_nearest_word_is_named_if_any_is_near():
    assert nearest("brainlmm", ["brainjepa", "brainlm"]).startswith("Did you mean 'brainlm'? ")
    assert nearest("xyz", iter(["brainjepa", "brainlm"])) == "Known: brainjepa, brainlm."
