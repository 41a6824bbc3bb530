import json

import numpy as np
import pytest
import torch

from brainfusion import genetics
from brainfusion.genetics.strands import average, both_strands, fold_ps
from brainfusion.runtime.errors import UserError

WIDTH = 8
COMPLEMENT = np.array([3, 2, 1, 0])  # A C G T


class ToyCaduceusPS:
    """Two convolutions with reverse-complement parameter sharing, written out in numpy.

    Each layer applies one function to the forward half, and the same function to the reverse half
    turned the right way round (length and channels), which is turned back afterwards. Equivariance
    comes out of the composition; nothing here folds anything.
    """

    def __init__(self, seed: int, width: int = WIDTH) -> None:
        rng = np.random.default_rng(seed)
        self.embedding = rng.normal(size=(4, width)) + 0.3
        scale = 0.4 * np.sqrt(WIDTH / width)
        self.kernels = [rng.normal(size=(3, width, width)) * scale for _ in range(2)]
        self.bias = rng.normal(size=width)

    def __call__(self, bases: np.ndarray) -> np.ndarray:
        """Bases [L] -> raw output [L, 2 * width]."""
        width = len(self.bias)
        reverse = COMPLEMENT[bases[::-1]]
        hidden = np.concatenate(
            [self.embedding[bases], self.embedding[reverse][::-1, ::-1]], axis=1
        )
        for kernel in self.kernels:
            forward, other = hidden[:, :width], hidden[:, width:][::-1, ::-1]
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


# -- models without symmetry -----------------------------------------------------------------------


def bases_of(sequence: str) -> np.ndarray:
    return np.array(["ACGT".index(base) for base in sequence])


class ToyOneWay:
    """A causal convolution over bases: Evo 2 and Caduceus-Ph, which promise nothing of strands."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.embedding = rng.normal(size=(4, WIDTH)) + 0.3
        self.kernel = rng.normal(size=(3, WIDTH, WIDTH)) * 0.4

    def __call__(self, sequence: str) -> np.ndarray:
        """Bases [L] -> output [L, WIDTH]."""
        hidden = self.embedding[bases_of(sequence)]
        padded = np.pad(hidden, ((2, 0), (0, 0)))
        return np.tanh(sum(padded[k : k + len(hidden)] @ self.kernel[k] for k in range(3)))


class ToySixMers:
    """A causal network over 6-mers that do not overlap: GENERator."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.embedding = rng.normal(size=(4**6, WIDTH)) + 0.3
        self.mix = rng.normal(size=(WIDTH, WIDTH)) * 0.4

    def __call__(self, sequence: str) -> np.ndarray:
        """Bases [L], L a multiple of 6 -> output [L / 6, WIDTH]."""
        tokens = bases_of(sequence).reshape(-1, 6) @ (4 ** np.arange(6)[::-1])
        hidden = self.embedding[tokens]
        before = np.cumsum(hidden, axis=0) / np.arange(1, len(hidden) + 1)[:, None]
        return np.tanh(hidden + before @ self.mix)


def random_sequence(length: int, seed: int) -> str:
    rng = np.random.default_rng(seed + 200)
    return "".join(rng.choice(list("ACGT"), size=length, p=[0.4, 0.3, 0.2, 0.1]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("toy", "unit_bp"), [(ToyOneWay, 1), (ToySixMers, 6)])
@pytest.mark.parametrize("pooling", ["mean", "max", "last"])
def test_averages_of_both_strands_do_not_change_with_the_strand_that_is_given(
    seed, toy, unit_bp, pooling
):
    model = toy(seed)
    reduce = {"mean": np.mean, "max": np.max, "last": lambda x, axis: x[-1]}[pooling]

    def embedded(sequence: str) -> np.ndarray:
        forward, reverse = both_strands(sequence, unit_bp=unit_bp)
        return average(reduce(model(forward), axis=0), reduce(model(reverse), axis=0))

    window, other = both_strands(random_sequence(125, seed), unit_bp=unit_bp)
    assert change(embedded(window), embedded(other)) == 0.0
    alone = [reduce(model(strand), axis=0) for strand in (window, other)]
    assert change(*alone) > 0.01  # one strand is off by ten times what people differ by


@pytest.mark.parametrize("seed", range(5))
def test_a_generator_sequence_that_is_reversed_before_it_is_cut_gives_other_vectors(seed):
    model, sequence = ToySixMers(seed), random_sequence(124, seed)
    forward, reverse = both_strands(sequence, unit_bp=6)
    right = average(model(forward).mean(axis=0), model(reverse).mean(axis=0))
    _, untrimmed = both_strands(sequence)
    wrong = average(model(forward).mean(axis=0), model(untrimmed[4:]).mean(axis=0))
    assert change(right, wrong) > 0.02


def test_6_mers_of_the_reverse_complement_are_those_of_the_sequence_after_cutting():
    def k_mers(sequence: str) -> list[str]:
        return [sequence[i : i + 6] for i in range(0, len(sequence), 6)]

    for length in range(60, 66):
        sequence = random_sequence(length, length)
        forward, reverse = both_strands(sequence, unit_bp=6)
        mirrored = [both_strands(word)[1] for word in k_mers(forward)][::-1]
        assert k_mers(reverse) == mirrored
        if length % 6:
            whole = [both_strands(word)[1] for word in k_mers(sequence)][::-1]
            assert k_mers(both_strands(sequence)[1]) != whole


def test_sequences_are_cut_on_the_side_that_is_asked_for_and_keep_their_case():
    assert both_strands("aCGTTGCAnn", unit_bp=6) == ("TGCAnn", "nnTGCA")
    assert both_strands("aCGTTGCAnn", unit_bp=6, trim="right") == ("aCGTTG", "CAACGt")
    with pytest.raises(UserError, match="letters -, X"):
        both_strands("ACG-X")
    with pytest.raises(UserError, match="5 bp is shorter than a token of 6"):
        both_strands("ACGTA", unit_bp=6)


# -- through the reader ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "pooling"),
    # (the last position of a half that runs backwards is lost once it is pooled)
    [
        ("tokens", "mean"),
        ("tokens", "max"),
        ("tokens", "last"),
        ("pooled", "mean"),
        ("pooled", "max"),
    ],
)
def test_caduceus_ps_files_of_either_strand_read_the_same(tmp_path, pooling, form):
    width = 64
    n, length = 6, 90
    rng = np.random.default_rng(7)
    people = rng.choice(4, size=(n, length), p=[0.4, 0.3, 0.2, 0.1])
    model = ToyCaduceusPS(3, width)
    vectors = {}
    for strand, sequences in (("given", people), ("other", COMPLEMENT[people[:, ::-1]])):
        folder = tmp_path / strand
        folder.mkdir()
        values = {"model": "caduceus", "checkpoint": "simulated", "simulated": True}
        values |= {"strands": "ps_raw", "pooling": pooling}
        raw = np.stack([model(bases) for bases in sequences]).astype(np.float32)
        if form == "tokens":
            values |= {"level": "token", "special_tokens": [0, 0], "length_bp": length}
            values |= {"trim_left": 4}
        else:
            raw = raw.mean(axis=1) if pooling == "mean" else raw.max(axis=1)
        (folder / "provenance.json").write_text(json.dumps(values))
        (folder / "subjects.txt").write_text("".join(f"s{i}\n" for i in range(n)))
        torch.save({"last": torch.from_numpy(raw)}, folder / "OXT.pt")
        vectors[strand] = genetics.read("caduceus", folder)
    given, other = (np.asarray(features.vectors[:, 0]) for features in vectors.values())
    # float32 of the same sums in another order
    np.testing.assert_allclose(given, other, rtol=1e-5, atol=1e-6)
    assert vectors["given"].provenance.strands == "ps_folded"
    halves = raw.mean(axis=1) if form == "tokens" else raw
    no_flip = average(halves[:, :width], halves[:, width:])
    assert change(no_flip, given) > 0.1
