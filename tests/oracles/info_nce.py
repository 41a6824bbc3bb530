"""Contrastive losses the slow, obvious way: the whole matrix, float64, autograd."""

import torch


def info_nce_oracle(
    a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and its gradients for a [n, d], b [n, d] and the scale."""
    a, b = (x.detach().double().requires_grad_() for x in (a, b))
    s = torch.as_tensor(scale, dtype=torch.float64).detach().clone().requires_grad_()
    logits = s * a @ b.T
    right = torch.arange(len(a))
    forward = -logits.log_softmax(dim=1)[right, right].mean()
    backward = -logits.log_softmax(dim=0)[right, right].mean()
    loss = (forward + backward) / 2
    return loss.detach(), *torch.autograd.grad(loss, (a, b, s))


def siglip_oracle(
    a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor | float, bias: torch.Tensor | float
) -> torch.Tensor:
    """-1/n sum_ij log sigmoid(y_ij (s a_i.b_j + bias)), y = +1 for pairs and -1 otherwise."""
    logits = torch.as_tensor(scale, dtype=torch.float64) * a.double() @ b.double().T + bias
    sign = 2 * torch.eye(len(a), dtype=torch.float64) - 1
    return -torch.log(torch.sigmoid(sign * logits)).sum() / len(a)
