"""Dots of single tokens by projection: for segments so short that a pass over the weight for each would cost more.

    dots[t, k] = <D_k, B_t A_t^T> = B_t . (D_k A_t)

Shape legend: A activation ``[*, in]``, B output gradient ``[*, out]``, D_k direction ``[out, in]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .precision import LOW_PRECISION, wide, widened
from .products import mm_fp32


def token_dots(activation: Tensor, output_grad: Tensor, directions: Sequence[Tensor]) -> Tensor:
    """``B_t . (D_k A_t)`` of every token, ``[*, K]`` fp64.

    The projection goes to the narrower side, so that it is never larger than a buffer that is there already. Buffers and
    directions of one low precision are multiplied in it and added up in fp32; else all are widened to the directions'.
    """
    dtype = wide(directions[0].dtype)
    if activation.shape[-1] < output_grad.shape[-1]:
        kept = activation.to(dtype)
        columns = [torch.linalg.vecdot(_product(output_grad, d), kept) for d in directions]
    else:
        kept = output_grad.to(dtype)
        columns = [torch.linalg.vecdot(_product(activation, d.t()), kept) for d in directions]
    return torch.stack(columns, dim=-1).double()


def _product(buffer: Tensor, direction: Tensor) -> Tensor:
    if buffer.dtype == direction.dtype and buffer.dtype in LOW_PRECISION:
        return mm_fp32(buffer.flatten(0, -2), direction).view(*buffer.shape[:-1], -1)
    return buffer.to(wide(direction.dtype)) @ widened(direction)
