"""Contrastive losses the slow, obvious way: the whole matrix, float64, autograd."""

import torch

from brainfusion.alignment.losses.pair_ids import PairIds


def info_nce_oracle(
    a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor | float, ids: PairIds | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and its gradients for a [n, d], b [n, d] and the scale."""
    a, b = (x.detach().double().requires_grad_() for x in (a, b))
    s = torch.as_tensor(scale, dtype=torch.float64).detach().clone().requires_grad_()
    loss = info_nce_of_matrix(s * a @ b.T, ids)
    return loss.detach(), *torch.autograd.grad(loss, (a, b, s))


def info_nce_of_matrix(logits: torch.Tensor, ids: PairIds | None = None) -> torch.Tensor:
    """1/2n sum_i of both directions' logsumexp over candidates minus mean over positives."""
    positives, candidates = relations(len(logits), ids)
    share = positives.double() / positives.sum(1, keepdim=True)
    total = logits.new_zeros(())
    for s in (logits, logits.T):  # both relations are symmetric
        pushed = s.masked_fill(~candidates, -torch.inf).logsumexp(1)
        total = total + (pushed - (s * share).sum(1)).sum()
    return total / (2 * len(logits))


def relations(n: int, ids: PairIds | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Who is a positive of whom, and who is a positive or a negative: two masks [n, n]."""
    ids = PairIds() if ids is None else ids
    positives = torch.eye(n, dtype=torch.bool)
    apart = torch.zeros(n, n, dtype=torch.bool)
    if ids.person is not None:
        positives |= (ids.person[:, None] == ids.person[None, :]) & (ids.person[:, None] >= 0)
    if ids.excluded is not None:
        same = ids.excluded[:, None, :] == ids.excluded[None, :, :]
        apart |= (same & (ids.excluded[:, None, :] >= 0)).any(2)
    if ids.within is not None:
        apart |= ids.within[:, None] != ids.within[None, :]
    return positives, positives | ~apart


def siglip_oracle(
    a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor | float, bias: torch.Tensor | float
) -> torch.Tensor:
    """-1/n sum_ij log sigmoid(y_ij (s a_i.b_j + bias)), y = +1 for pairs and -1 otherwise."""
    logits = torch.as_tensor(scale, dtype=torch.float64) * a.double() @ b.double().T + bias
    sign = 2 * torch.eye(len(a), dtype=torch.float64) - 1
    return -torch.log(torch.sigmoid(sign * logits)).sum() / len(a)
