import numpy as np
import pytest

from brainfusion.genetics.strands import average, fold_ps
from brainfusion.runtime.errors import UserError

WIDTH = 8
COMPLEMENT = np.array([3, 2, 1, 0])  # A C G T


class ToyCaduceusPS:
    """Two convolutions with reverse-complement parameter sharing, written out in numpy.

    Each layer applies one function to the forward half, and the same function to the reverse half
    turned the right way round (length and channels), which is turned back afterwards. Equivariance
    comes out of the composition; nothing here folds anything.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.embedding = rng.normal(size=(4, WIDTH)) + 0.3
        self.kernels = [rng.normal(size=(3, WIDTH, WIDTH)) * 0.4 for _ in range(2)]
        self.bias = rng.normal(size=WIDTH)

    def __call__(self, bases: np.ndarray) -> np.ndarray:
        """Bases [L] -> raw output [L, 2 * WIDTH]."""
        reverse = COMPLEMENT[bases[::-1]]
        hidden = np.concatenate(
            [self.embedding[bases], self.embedding[reverse][::-1, ::-1]], axis=1
        )
        for kernel in self.kernels:
            forward, other = hidden[:, :WIDTH], hidden[:, WIDTH:][::-1, ::-1]
            hidden = np.concatenate(
                [self._layer(forward, kernel), self._layer(other, kernel)[::-1, ::-1]], axis=1
            )
        return hidden

    def _layer(self, x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        padded = np.pad(x, ((1, 1), (0, 0)))
        mixed = sum(padded[k : k + len(x)] @ kernel[k] for k in range(3))
        return x + np.tanh(mixed + self.bias)


def pooled_both_strands(seed: int) -> tuple[np.ndarray, np.ndarray]:
    model = ToyCaduceusPS(seed)
    bases = np.random.default_rng(seed + 100).choice(4, size=120, p=[0.4, 0.3, 0.2, 0.1])
    raw, flipped = model(bases), model(COMPLEMENT[bases[::-1]])
    # The model is what it says: its output flips, in length and channels, with its input.
    np.testing.assert_allclose(flipped, raw[::-1, ::-1], atol=1e-12)
    return raw.mean(axis=0), flipped.mean(axis=0)


def change(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


@pytest.mark.parametrize("seed", range(5))
def test_folded_vectors_do_not_change_when_the_strand_flips(seed):
    forward, reverse = pooled_both_strands(seed)
    # float32 of nearly the same sums: a few units in the last place
    assert change(fold_ps(forward), fold_ps(reverse)) < 1e-6
    assert fold_ps(forward).shape == (WIDTH,)


@pytest.mark.parametrize("seed", range(5))
def test_without_the_channel_flip_vectors_change_by_more_than_a_tenth(seed):
    forward, reverse = pooled_both_strands(seed)
    assert change(forward, reverse) > 0.1  # raw
    halves = [average(v[:WIDTH], v[WIDTH:]) for v in (forward, reverse)]
    assert change(*halves) > 0.1  # averaged, but not flipped


def test_fold_follows_the_published_formula():
    raw = np.arange(24, dtype=np.float32).reshape(2, 2, 6)
    expected = 0.5 * (raw[..., :3] + raw[..., [5, 4, 3]])
    np.testing.assert_array_equal(fold_ps(raw), expected)


def test_an_odd_width_is_no_pair_of_strands():
    with pytest.raises(UserError, match=r"width 7 is odd"):
        fold_ps(np.zeros((3, 7), dtype=np.float32))


def test_average_is_taken_in_float32_whatever_comes_in():
    forward = np.full((2, 3), 1.0, dtype=np.float16)
    reverse = np.full((2, 3), 1.0 + 2**-10, dtype=np.float16)
    result = average(forward, reverse)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, np.float32(1 + 2**-11))  # float16 would round it away
