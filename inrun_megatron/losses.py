"""Token losses to one number. Shapes: losses and mask ``[b, s]``; sums and means are scalars in fp32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(losses: Tensor, mask: Tensor) -> Tensor:
    """Sum of the losses of tokens with a mask of 1."""
    losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
    return (losses * mask.to(losses)).sum()


def masked_mean(losses: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens with a mask of 1: Megatron's default convention. 0 where there is none."""
    total = masked_sum(losses, mask)
    return total / mask.to(total).sum().clamp(min=1.0)
