"""Pooling: from the tokens of a window to one vector a recording."""

import pytest
import torch

from brainfusion.encoders.pooling import check_pooling, pool
from brainfusion.runtime.errors import UserError

TOKENS = torch.arange(2 * 6 * 3, dtype=torch.float32).reshape(2, 6, 3)  # 2 parcels x 3 patches


def test_mean_is_over_all_tokens():
    torch.testing.assert_close(pool(TOKENS, "mean", n_parcels=2), TOKENS.mean(1))


def test_parcel_pooling_joins_the_parcels_in_order():
    first, second = TOKENS[:, :3], TOKENS[:, 3:]
    for pooling, reduce in (("parcel-mean", torch.mean), ("parcel-std", torch.std)):
        expected = torch.cat([reduce(first, 1), reduce(second, 1)], dim=1)
        torch.testing.assert_close(pool(TOKENS, pooling, n_parcels=2), expected)


def test_parcel_std_sees_amplitude_that_the_mean_cannot():
    wave = torch.sin(torch.arange(8) * torch.pi / 4).reshape(1, 8, 1)
    small, large = wave, 3 * wave
    torch.testing.assert_close(pool(small, "mean", n_parcels=1), pool(large, "mean", n_parcels=1))
    spread = [pool(x, "parcel-std", n_parcels=1) for x in (small, large)]
    torch.testing.assert_close(3 * spread[0], spread[1])


def test_a_standard_deviation_of_one_patch_is_refused():
    with pytest.raises(UserError, match="needs at least 2 time patches"):
        pool(TOKENS[:, :2], "parcel-std", n_parcels=2)


def test_unknown_and_unoffered_poolings_name_what_there_is():
    with pytest.raises(UserError, match="Did you mean 'parcel-std'"):
        check_pooling("parcels-std")
    with pytest.raises(UserError, match="has no CLS token; use one of mean"):
        check_pooling("cls", ("mean",))
