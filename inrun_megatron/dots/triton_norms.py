"""The gradients of a norm's scale and shift over all tokens, in one Triton pass over its buffers.

    scale   sum_t B_t * xhat_t,   xhat = (x - mean) * rstd
    shift   sum_t B_t

Directions need them in fp32, and torch's own backward rounds them to the weights' precision. Programs sum ``STRETCH`` tokens
of a block of features; a sum over programs in a fixed order follows. Neither the products nor xhat are written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import blocks_of

BLOCK_TOKENS, BLOCK_FEATURES = 32, 128
STRETCH = 64


@triton.jit
def _kernel(
    b_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    partial_ptr,
    tokens,
    features,
    MEAN: tl.constexpr,
    STRETCH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    stretch = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    inside = columns < features
    scale = tl.zeros((BLOCK_FEATURES,), dtype=tl.float32)
    shift = tl.zeros((BLOCK_FEATURES,), dtype=tl.float32)
    for first in range(0, STRETCH, BLOCK_TOKENS):
        places = stretch * STRETCH + first + tl.arange(0, BLOCK_TOKENS)
        there = places < tokens
        mask = there[:, None] & inside[None, :]
        at = places[:, None] * features + columns[None, :]
        b = tl.load(b_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if MEAN:
            x -= tl.load(mean_ptr + places, mask=there, other=0.0)[:, None]
        x *= tl.load(rstd_ptr + places, mask=there, other=0.0)[:, None]
        scale += tl.sum(b * x, axis=0)
        shift += tl.sum(b, axis=0)
    out = partial_ptr + stretch * 2 * features + columns
    tl.store(out, scale, mask=inside)
    tl.store(out + features, shift, mask=inside)


def gradients(output_grad: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Of scale and shift, each ``[h]`` fp32.

    Args:
        output_grad, x: B and the norm's input, ``[*, h]`` in any precision but fp64.
        mean, rstd: the tokens' statistics ``[*, 1]``, fp32; no mean: RMSNorm.
    """
    features = x.shape[-1]
    tokens = x.numel() // features
    stretches = blocks_of(tokens, STRETCH)
    partial = torch.empty(stretches, 2, features, dtype=torch.float32, device=x.device)
    # Stretches come first: of queries and keys by head there may be more than 65535, which is all that other dimensions take.
    _kernel[(stretches, blocks_of(features, BLOCK_FEATURES))](
        output_grad.contiguous(),
        x.contiguous(),
        rstd if mean is None else mean.contiguous(),
        rstd.contiguous(),
        partial,
        tokens,
        features,
        MEAN=mean is not None,
        STRETCH=STRETCH,
        BLOCK_TOKENS=BLOCK_TOKENS,
        BLOCK_FEATURES=BLOCK_FEATURES,
    )
    scale, shift = partial.sum(0)
    return scale, shift
