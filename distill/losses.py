"""The equations of adversarial diffusion distillation (Sauer et al., arXiv 2311.17042), pure.

`logits` is a list with one tensor per discriminator head, [batch, height, width]: a verdict for
each place of that head's feature map. Heads are summed, places and the batch averaged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from distill.schedule import Schedule


def hinge_generator(fake: Sequence[Tensor]) -> Tensor:
    """-E sum_k D_k(F_k(x_hat))."""
    return -torch.stack([logits.mean() for logits in fake]).sum()


def hinge_discriminator(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """E sum_k max(0, 1 - D_k(F_k(x_0))) + max(0, 1 + D_k(F_k(x_hat)))."""
    terms = [
        functional.relu(1 - good).mean() + functional.relu(1 + bad).mean()
        for good, bad in zip(real, fake, strict=True)
    ]
    return torch.stack(terms).sum()


def r1_penalty(real: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """E sum_k || d D_k / d F_k(x_0) ||^2, taken on the heads' inputs and not on pixels.

    `inputs` are the feature maps that gave `real`; they must require a gradient.
    """
    total = torch.stack([logits.sum() for logits in real]).sum()
    gradients = torch.autograd.grad(total, list(inputs), create_graph=True)
    return torch.stack([g.square().sum((1, 2, 3)).mean() for g in gradients]).sum()


def weight(kind: str, schedule: Schedule, t: Tensor) -> Tensor:
    """c(t), [batch].

    `exp`: alpha_t. `sds` and `nfsd`: alpha w / (2 sigma) with w = sigma^2, which makes the
    gradient of c * (sum of squared differences) the one of score distillation, w (eps_psi - eps').
    """
    alpha, sigma = schedule.alpha[t], schedule.sigma[t]
    return alpha if kind == "exp" else alpha * sigma / 2


def distillation_loss(student: Tensor, target: Tensor, c: Tensor, reduction: str) -> Tensor:
    """E c(t) d(x_hat, target); no gradient reaches the target.

    d is the `sum` or the `mean` of squared differences over a picture's elements: lambda presumes
    one of them. student, target: [batch, channels, height, width]; c: [batch].
    """
    squares = (student - target.detach()).square().flatten(1)
    distance = squares.sum(1) if reduction == "sum" else squares.mean(1)
    return (c * distance).mean()
