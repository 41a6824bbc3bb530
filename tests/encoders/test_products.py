"""Products through oneDNN: the same numbers and gradients as torch's own."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from brainfusion.encoders import products
from brainfusion.encoders.products import Linear, attention, linear

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """OneDNN on any CPU and at any size; the list tells which of its functions ran."""
    ran: list[str] = []
    for name in ("_product", "_tiled_attention"):
        function = getattr(products, name)

        def counted(*args: Tensor, name: str = name, function: object = function) -> Tensor:
            ran.append(name)
            return function(*args)  # type: ignore[operator]

        monkeypatch.setattr(products, name, counted)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    for name in ("MIN_LINEAR", "MIN_TRAINED", "MIN_ATTENTION", "MIN_QUERIES", "MIN_HEAD_WIDTH"):
        monkeypatch.setattr(products, name, 0)
    torch.manual_seed(0)
    return ran


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def check_gradients(ours, exact, inputs: list[Tensor]) -> None:
    """Outputs and gradients against float64, to float32 rounding of the largest entry."""
    singles, doubles = leaves(*inputs), leaves(*(x.double() for x in inputs))
    out, truth = ours(*singles), exact(*doubles)
    probe = torch.randn(out.shape)
    out.backward(probe)
    truth.backward(probe.double())
    for a, b in [(out, truth), *((x.grad, y.grad) for x, y in zip(singles, doubles, strict=True))]:
        assert a.shape == b.shape
        largest = float(b.detach().abs().max())
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-6 * max(largest, 1.0))


@pytest.mark.parametrize(
    ("rows", "n_in", "n_out"), [((7,), 5, 3), ((2, 33), 16, 48), ((3, 5, 2), 40, 8), ((1,), 1, 1)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_float64_in_outputs_and_gradients(
    rows: tuple[int, ...], n_in: int, n_out: int, bias: bool, chosen: list[str]
) -> None:
    inputs = [torch.randn(*rows, n_in), torch.randn(n_out, n_in), torch.randn(n_out)][: 2 + bias]

    def ours(x: Tensor, weight: Tensor, b: Tensor | None = None) -> Tensor:
        return linear(x, weight, b)

    check_gradients(ours, F.linear, inputs)
    assert chosen == ["_product"] * 3


def test_linear_takes_views_and_weights_that_are_slices() -> None:
    tokens, weight, bias = torch.randn(2, 9, 8), torch.randn(24, 8), torch.randn(24)

    def sliced(x: Tensor, w: Tensor, b: Tensor, *, function: object) -> Tensor:
        return function(x.transpose(0, 1)[2:], w[8:], b[8:])  # type: ignore[operator]

    check_gradients(
        lambda *args: sliced(*args, function=linear),
        lambda *args: sliced(*args, function=F.linear),
        [tokens, weight, bias],
    )


@pytest.mark.parametrize(
    ("n_rows", "n_heads", "n_queries", "n_keys", "width"),
    [(2, 3, 17, 17, 8), (1, 1, 150, 40, 16), (1, 2, 5, 200, 4), (1, 2, 1, 1, 4)],
)
def test_attention_equals_float64_in_outputs_and_gradients(
    n_rows: int,
    n_heads: int,
    n_queries: int,
    n_keys: int,
    width: int,
    monkeypatch: pytest.MonkeyPatch,
    chosen: list[str],
) -> None:
    monkeypatch.setattr(products, "TILE_SCORES", 64 * n_keys)  # several tiles, the last one short
    # As the encoders make them: heads side by side in each token.
    q = torch.randn(n_rows, n_queries, n_heads, width)
    k, v = torch.randn(2, n_rows, n_keys, n_heads, width)

    def by_heads(function):
        return lambda *parts: function(*(x.transpose(1, 2) for x in parts)).transpose(1, 2)

    check_gradients(by_heads(attention), by_heads(F.scaled_dot_product_attention), [q, k, v])
    assert "_tiled_attention" in chosen
    with torch.no_grad():
        free = by_heads(attention)(q, k, v)
        torch.testing.assert_close(free, by_heads(F.scaled_dot_product_attention)(q, k, v))
        assert free.is_contiguous()


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (x.unsqueeze(1) * 300 for x in torch.randn(3, 1, 50, 8))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).float()
    assert expected.isfinite().all()
    torch.testing.assert_close(attention(q, k, v), expected, rtol=1e-2, atol=1.0)


def test_only_gradients_that_are_wanted_are_computed(chosen: list[str]) -> None:
    x, weight = torch.randn(4, 6), torch.randn(3, 6, requires_grad=True)
    linear(x, weight, None).sum().backward()
    assert chosen == ["_product"] * 2
    assert weight.grad is not None


def test_other_number_types_compilation_and_the_switch_go_to_torch(
    chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(64, 16), torch.randn(8, 16)
    q = torch.randn(1, 2, 40, 8)

    def both(x: Tensor, weight: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        return linear(x, weight, None), attention(q, q, q)

    expected = F.linear(x, weight), F.scaled_dot_product_attention(q, q, q)
    both(x.double(), weight.double(), q.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert {y.dtype for y in both(x, weight, q)} == {torch.bfloat16}
    with torch.device("meta"):
        both(torch.randn(64, 16), torch.randn(8, 16), torch.randn(1, 2, 40, 8))
    torch.backends.mkldnn.set_flags(False)
    try:
        torch.testing.assert_close(both(x, weight, q), expected, rtol=0, atol=0)
    finally:
        torch.backends.mkldnn.set_flags(True)
    compiled = torch.compile(both, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, q), expected)
    assert chosen == []
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    torch.testing.assert_close(both(x, weight, q), expected, rtol=0, atol=0)
    assert chosen == []
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    torch.testing.assert_close(both(x, weight, q), expected)
    assert set(chosen) == {"_product", "_tiled_attention"}


def test_small_products_are_left_to_torch(
    chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "MIN_LINEAR", 100)
    monkeypatch.setattr(products, "MIN_ATTENTION", 400)
    linear(torch.randn(3, 8), torch.randn(4, 8), None)
    attention(*torch.randn(3, 1, 1, 9, 4).unbind(0))
    assert chosen == []
    linear(torch.randn(4, 8), torch.randn(4, 8), None)
    attention(*torch.randn(3, 1, 1, 10, 4).unbind(0))
    assert chosen == ["_product", "_tiled_attention", "_product", "_product"]


def test_small_products_with_gradients_are_left_to_torch_whose_code_knows_any_shape(
    chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "MIN_TRAINED", 100)
    weight = torch.randn(4, 8, requires_grad=True)
    linear(torch.randn(3, 8), weight, None).sum().backward()
    assert chosen == []
    linear(torch.randn(4, 8), weight, None).sum().backward()
    assert chosen == ["_product"] * 2  # of the output, and of the weight's gradient


def test_the_layer_has_the_keys_the_hooks_and_the_start_of_torchs() -> None:
    torch.manual_seed(3)
    theirs = torch.nn.Linear(6, 4)
    torch.manual_seed(3)
    ours = Linear(6, 4)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    seen = []
    ours.register_forward_hook(lambda *_: seen.append(True))
    x = torch.randn(5, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    assert seen == [True]
