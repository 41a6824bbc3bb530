import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from brainfusion.alignment.genes.tower import GeneBatch, GeneTower, gene_shares

POOLS = ("mean", "max", "attention")


def tower(pool: str, n_components=(3, 3, 2, 3, 1), width: int = 7, seed: int = 0) -> GeneTower:
    """A tower whose attention has been somewhere."""
    torch.manual_seed(seed)
    made = GeneTower(n_components, width=width, pool=pool)  # type: ignore[arg-type]
    if pool == "attention":
        torch.nn.init.normal_(made.logits)
        torch.nn.init.normal_(made.query)
    return made.double()


def people(n: int = 6, n_genes: int = 5, k: int = 3, seed: int = 1) -> GeneBatch:
    """Genes of people who each lack some, but not all."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, n_genes, k, generator=generator, dtype=torch.float64)
    mask = torch.rand(n, n_genes, generator=generator) < 0.7
    mask[torch.arange(n), torch.arange(n) % n_genes] = True
    return GeneBatch(x, mask)


def without(made: GeneTower, gene: int) -> GeneTower:
    """The tower of one gene fewer, with the same parameters otherwise."""
    rest = [i for i in range(len(made.maps)) if i != gene]
    return ordered(made, rest)


def ordered(made: GeneTower, genes: list[int]) -> GeneTower:
    fewer = GeneTower([3] * len(genes), width=made.maps.shape[2], pool=made.pool).double()
    state = made.state_dict()
    chosen = {k: v if k == "query" else v[genes] for k, v in state.items()}
    fewer.load_state_dict(chosen)
    return fewer


def by_hand(made: GeneTower, x: Tensor, mask: Tensor) -> np.ndarray:
    """The definition, person by person and gene by gene."""
    width, rows = made.maps.shape[2], []
    maps = [(m * width**0.5 / m.norm()).detach().numpy() for m in made.maps]
    for person in range(len(x)):
        has = [g for g in range(x.shape[1]) if mask[person, g]]
        tokens = np.stack([x[person, g].numpy() @ maps[g] for g in has])
        if made.pool == "max":
            rows.append(tokens.max(axis=0))
            continue
        scores = np.zeros(len(has))
        if made.pool == "attention":
            logits, query = made.logits.detach().numpy(), made.query.detach().numpy()
            scores = logits[has] + tokens @ query / np.sqrt(width)
        weights = np.exp(scores) / np.exp(scores).sum()
        rows.append(np.sqrt(len(has)) * (weights[:, None] * tokens).sum(axis=0))
    return np.stack(rows)


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_is_what_its_definition_says(pool):
    made, batch = tower(pool), people()
    np.testing.assert_allclose(made(*batch).detach(), by_hand(made, *batch), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pool", POOLS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), value=st.sampled_from([0.0, 1e30, -7.0, np.nan, np.inf]))
def test_what_is_masked_has_no_influence_whatever_it_is(pool, seed, value):
    made, (x, mask) = tower(pool), people(seed=seed)
    spoilt = x.masked_fill(~mask[:, :, None], value)
    assert torch.equal(made(spoilt, mask), made(x, mask))
    assert torch.equal(made.attention(spoilt, mask), made.attention(x, mask))
    spoilt.requires_grad_()
    made(spoilt, mask).square().sum().backward()
    assert spoilt.grad is not None
    assert not spoilt.grad[~mask].any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("gene", range(5))
def test_masking_a_gene_is_leaving_it_out(pool, gene):
    made, (x, mask) = tower(pool), people()
    mask[:, [0, 1]] = True  # so that nobody is left without a gene
    rest = [i for i in range(5) if i != gene]
    masked = mask.clone()
    masked[:, gene] = False
    smaller = without(made, gene)(x[:, rest], mask[:, rest])
    torch.testing.assert_close(made(x, masked), smaller, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(made(x, mask)[mask[:, gene]], smaller[mask[:, gene]])


@pytest.mark.parametrize("pool", POOLS)
def test_the_order_of_genes_does_not_matter(pool):
    made, (x, mask) = tower(pool), people()
    order = [3, 0, 4, 2, 1]
    other = ordered(made, order)
    torch.testing.assert_close(other(x[:, order], mask[:, order]), made(x, mask))
    moved = other.attention(x[:, order], mask[:, order])
    torch.testing.assert_close(moved, made.attention(x, mask)[:, order])


@pytest.mark.parametrize("pool", POOLS)
def test_a_person_without_any_gene_is_zeros_and_no_nan(pool):
    made, (x, mask) = tower(pool), people()
    mask[2] = False
    out = made(x, mask)
    assert not out[2].any()
    assert not made.attention(x, mask)[2].any()
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize("pool", POOLS)
def test_attention_adds_up_to_one_and_contributions_to_the_vector(pool):
    made, batch = tower(pool), people()
    torch.testing.assert_close(made.attention(*batch).sum(1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(made.contributions(*batch).sum(1), made(*batch))
    assert not made.contributions(*batch)[~batch.mask].any()


def test_attention_starts_even_and_follows_its_logits():
    made, (x, mask) = GeneTower((3,) * 5, width=7, pool="attention").double(), people()
    even = mask / mask.sum(1, keepdim=True)
    torch.testing.assert_close(made.attention(x, mask), even.double())
    made.logits.data[3] = 2.0
    everyone = torch.ones_like(mask)
    grown = made.attention(x, everyone)[:, 3]
    expected = torch.full((6,), np.exp(2.0) / (np.exp(2.0) + 4), dtype=torch.float64)
    torch.testing.assert_close(grown, expected)


def test_tokens_of_all_genes_differ_as_much_between_people():
    """Otherwise a gene could hide behind a small attention with large numbers."""
    made = tower("attention", n_components=(3, 3, 2, 3, 1), width=64)
    made.maps.data[1] *= 40.0
    x = torch.randn(20_000, 5, 3, dtype=torch.float64)
    mask = torch.ones(20_000, 5, dtype=torch.bool)
    made.logits.data.zero_()
    made.query.data.zero_()
    spread = made.contributions(x, mask).std(dim=0).square().sum(dim=1)
    torch.testing.assert_close(spread, spread.mean().expand(5), rtol=0.05, atol=0.0)


def test_shares_count_what_differs_between_people_and_add_up_to_one():
    made, (x, mask) = tower("attention"), people(n=40)
    mask[:] = True
    x[:, 2] = x[0, 2]
    made.query.data.zero_()
    shares = gene_shares(made, GeneBatch(x, mask))
    assert shares.sum().item() == pytest.approx(1.0)
    assert shares[2].item() < 1e-6  # looked at, but the same in everyone
    added = made.contributions(x, mask).detach().numpy()
    spread = np.sqrt(added.var(axis=0).sum(axis=1))
    np.testing.assert_allclose(shares, spread / spread.sum(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gene_shares(made, GeneBatch(x, mask), rows_at_once=7), shares)


def test_inputs_beyond_a_genes_components_stay_out_of_its_norm_in_training():
    made, (x, mask) = tower("mean"), people()
    x[:, 4, 1:], x[:, 2, 2:] = 0.0, 0.0
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        made(x, mask).square().sum().backward()
        optimizer.step()
    assert not made.maps[4, 1:].any()
    assert not made.maps[2, 2:].any()
