"""The DNA tower over genes: each gene's vector becomes a token, and a pool makes one of them.

`mean` and `max` treat the genes of a person alike; `attention` learns which to look at and says so.
A gene that is masked has exactly no influence, so leaving one gene out (LOGO) is masking it. For
the fourth way, all genes side by side and one PCA, see `gene_conditioning`.

Source: the attention is that of Ilse et al. 2018 (arXiv 1802.04712) with one head, scored by which
gene it is and by what its token holds.

Shape legend: n people, g genes, k components of a gene, d width of a token.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
from jaxtyping import Bool, Float
from torch import Tensor

GenePool = Literal["mean", "max", "attention"]


class GeneBatch(NamedTuple):
    """Conditioned genes of some people."""

    x: Float[Tensor, "n g k"]
    mask: Bool[Tensor, "n g"]

    def take(self, rows: Tensor | slice) -> "GeneBatch":
        """Some of the people."""
        return GeneBatch(self.x[rows], self.mask[rows])

    def to(self, device: torch.device | str) -> "GeneBatch":
        """The same on another device."""
        return GeneBatch(self.x.to(device), self.mask.to(device))


class GeneTower(nn.Module):
    """Genes [n, g, k] and their mask [n, g] to one vector a person [n, d].

    A gene's token is its components times a matrix of its own, scaled to the Frobenius norm
    sqrt(d). Components have about unit variance, so the tokens of all genes differ as much between
    people, and nothing but the attention says how much of a gene comes through. The pool is scaled
    by the square root of the number of genes that a person has: uncorrelated tokens then give a
    vector of about unit variance.
    """

    def __init__(self, n_components: Sequence[int], *, width: int, pool: GenePool) -> None:
        """Make the tower.

        Args:
            n_components: Components of each gene; inputs beyond them are zeros.
            width: Numbers in a token, and in the vector of a person.
            pool: How tokens become that vector.
        """
        super().__init__()
        self.pool: GenePool = pool
        maps = torch.randn(len(n_components), max(n_components), width) / max(n_components) ** 0.5
        # Rows that meet zeros only get no gradient: from zero they stay out of the norm.
        for gene, count in enumerate(n_components):
            maps[gene, count:] = 0.0
        self.maps = nn.Parameter(maps)
        if pool == "attention":
            self.logits = nn.Parameter(torch.zeros(len(n_components)))
            self.query = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "n g k"], mask: Bool[Tensor, "n g"]) -> Float[Tensor, "n d"]:
        """Pool the genes of each person; zeros for a person without any."""
        x, maps = _known(x, mask), self._scaled_maps()
        if self.pool == "max":
            values = _tokens(x, maps).masked_fill(~mask[:, :, None], -torch.inf).amax(dim=1)
            return values.masked_fill(~mask.any(dim=1, keepdim=True), 0.0)
        # The weighted sum of tokens as one product: [n, g, d] is never held.
        weighted = x * self._weights(x, mask, maps)[:, :, None]
        return weighted.flatten(1) @ maps.flatten(0, 1)

    def attention(
        self, x: Float[Tensor, "n g k"], mask: Bool[Tensor, "n g"]
    ) -> Float[Tensor, "n g"]:
        """How much each gene of a person is looked at; rows add up to 1, or to 0 without a gene.

        Of `max`, the share of the vector's numbers that come from the gene.
        """
        x, maps = _known(x, mask), self._scaled_maps()
        if self.pool != "max":
            return self._attention(x, mask, maps)
        winners = _winners(_tokens(x, maps), mask)
        shares = nn.functional.one_hot(winners, mask.shape[1]).to(x.dtype).mean(dim=1)
        return shares.masked_fill(~mask, 0.0)

    def contributions(
        self, x: Float[Tensor, "n g k"], mask: Bool[Tensor, "n g"]
    ) -> Float[Tensor, "n g d"]:
        """What each gene adds to the vector of a person: the sum over genes is that vector."""
        x, maps = _known(x, mask), self._scaled_maps()
        tokens = _tokens(x, maps)
        if self.pool != "max":
            return self._weights(x, mask, maps)[:, :, None] * tokens
        winners = _winners(tokens, mask)[:, None]
        return torch.zeros_like(tokens).scatter(1, winners, tokens.gather(1, winners))

    def _scaled_maps(self) -> Float[Tensor, "g k d"]:
        norms = self.maps.flatten(1).norm(dim=1).clamp_min(1e-12)
        return self.maps * (self.maps.shape[2] ** 0.5 / norms)[:, None, None]

    def _attention(self, x: Tensor, mask: Tensor, maps: Tensor) -> Float[Tensor, "n g"]:
        if self.pool == "mean":
            return mask / mask.sum(dim=1, keepdim=True).clamp_min(1).to(x.dtype)
        content = torch.einsum("ngk,gk->ng", x, maps @ self.query)  # (token, query)
        scores = self.logits + content / self.query.numel() ** 0.5
        # A person without any gene would be 0 / 0: the lowest finite number, then zeros.
        lowest = torch.finfo(scores.dtype).min
        return scores.masked_fill(~mask, lowest).softmax(dim=1).masked_fill(~mask, 0.0)

    def _weights(self, x: Tensor, mask: Tensor, maps: Tensor) -> Float[Tensor, "n g"]:
        n_known = mask.sum(dim=1, keepdim=True).to(x.dtype)
        return self._attention(x, mask, maps) * n_known.sqrt()


def _known(x: Tensor, mask: Tensor) -> Tensor:
    """Zeros where masked. Not `x * mask`: what is masked may be NaN."""
    return x.masked_fill(~mask[:, :, None], 0.0)


def _tokens(x: Tensor, maps: Tensor) -> Float[Tensor, "n g d"]:
    return torch.einsum("ngk,gkd->ngd", x, maps)


def _winners(tokens: Tensor, mask: Tensor) -> Tensor:
    """The gene whose token is greatest, for each number of the vector [n, d]."""
    return tokens.masked_fill(~mask[:, :, None], -torch.inf).argmax(dim=1)


@torch.no_grad()
def gene_shares(
    tower: GeneTower, genes: GeneBatch, *, rows_at_once: int = 1024
) -> Float[Tensor, " g"]:
    """Share of each gene in what tells people apart behind the pool; the shares add up to 1.

    The standard deviation of a gene's contribution between people, over all its numbers. Unlike
    the attention it also counts how much the gene varies among these people: a gene that is looked
    at but is the same in everyone gets nothing.
    """
    first, second, n = 0.0, 0.0, len(genes.x)
    for start in range(0, n, rows_at_once):
        added = tower.contributions(*genes.take(slice(start, start + rows_at_once))).double()
        first, second = first + added.sum(dim=0), second + added.square().sum(dim=0)
    assert isinstance(first, Tensor)
    variance = (second / n - (first / n).square()).clamp_min(0.0)  # (g, d)
    spread = variance.sum(dim=1).sqrt()
    return (spread / spread.sum().clamp_min(1e-12)).float()
