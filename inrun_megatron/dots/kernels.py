"""Which way a linear layer is scored on a GPU, in bf16 or fp16.

A single segment is scored from the weight gradient that training computes. Of several the cheapest form is taken
(cost.py): all in one kernel (triton_linear.py), fp32 blocks of cuBLAS and a pass over them (triton_blocks.py), or a
projection of every token (projection.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import copy_engine, cost, triton_blocks, triton_linear
from .late import LateDots
from .products import weight_gradient
from .projection import token_dots
from .segments import Segments


def weight_gradient_and_dots(
    activation: Tensor,
    output_grad: Tensor,
    directions: Sequence[Tensor],
    batch_dim: int,
    late: LateDots,
    segments: Segments | None,
) -> Tensor:
    """As ``linear.weight_gradient_and_dots``, from kernels' parts of the dots."""
    count = len(late.dots)
    if count == 1:
        only = weight_gradient(activation, output_grad)
        late.add_parts(triton_blocks.block_dots(only.unsqueeze(0), directions))
        return only
    if activation.dim() != 3:
        activation, output_grad = (_by_rows(buffer, batch_dim) for buffer in (activation, output_grad))
        batch_dim = 0
    form = _form(activation, output_grad, directions, batch_dim, count)
    if form == "projection":
        products = token_dots(activation, output_grad, directions)
        late.dots += products.sum(1 - batch_dim) if segments is None else segments.sums(products, batch_dim)
        return weight_gradient(activation, output_grad)
    compute = triton_linear.weight_gradient_and_dots if form == "fused" else triton_blocks.blocks_and_dots
    grad, own = compute(
        activation, output_grad, directions, batch_dim, None if segments is None else segments.bounds
    )
    late.add_parts(own)
    return grad


def _by_rows(buffer: Tensor, batch_dim: int) -> Tensor:
    rows = buffer.movedim(batch_dim, 0)
    return rows.reshape(len(rows), -1, rows.shape[-1])


def _form(
    activation: Tensor, output_grad: Tensor, directions: Sequence[Tensor], batch_dim: int, segments: int
) -> cost.Form:
    features_in, features_out = activation.shape[-1], output_grad.shape[-1]
    shape = cost.Shape(
        activation.numel() // features_in, segments, features_in, features_out, len(directions)
    )
    forms: tuple[cost.Form, ...] = ("blocks", "projection")
    if copy_engine.fits(activation, output_grad, directions, batch_dim):
        forms = ("fused", *forms)
    narrow = directions[0].dtype == activation.dtype
    return cost.cheapest(shape, cost.gpu if narrow else cost.gpu_wide, *forms)
