"""Dots of single tokens by projection: for segments so short that a pass over the weight for each would cost more.

    dots[t, k] = <D_k, B_t A_t^T> = B_t . (D_k A_t)

Shape legend: A activation ``[*, in]``, B output gradient ``[*, out]``, D_k direction ``[out, in]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def token_dots(activation: Tensor, output_grad: Tensor, directions: Sequence[Tensor]) -> Tensor:
    """``B_t . (D_k A_t)`` of every token, ``[*, K]`` fp64.

    The projection goes to the narrower side, so that it is never larger than a buffer that is there already.
    """
    a, b = activation.to(directions[0].dtype), output_grad.to(directions[0].dtype)
    narrow_in = a.shape[-1] < b.shape[-1]
    columns = [
        torch.linalg.vecdot(b @ d, a) if narrow_in else torch.linalg.vecdot(a @ d.t(), b) for d in directions
    ]
    return torch.stack(columns, dim=-1).double()
