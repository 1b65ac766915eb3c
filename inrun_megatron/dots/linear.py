"""Per-row dot products of a linear layer's weight gradients with directions. No distributed code.

Shape legend: A activation ``[s, b, in]``, B output gradient ``[s, b, out]`` (rows along ``batch_dim``),
D_k direction of target k ``[out, in]``, W_i = B_i^T A_i the weight gradient of row i.

The per-row weight gradients are the blocks of the batch's weight gradient, ``dW = sum_i W_i``, which
training computes anyway; scoring adds one multiply-add per weight, row and target:

    dots[i, k] = <D_k, W_i> = sum_{o,j} D_k[o, j] W_i[o, j]          (arXiv 2406.11011, section 4.2)

Parts of rows (segments.py) are blocks of the same sum; where they are short, projecting every token is cheaper:

    dots[p, k] = sum_{t in p} B_t . (D_k A_t)
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from . import cost
from .precision import LOW_PRECISION, widened
from .projection import token_dots
from .segments import Segments

HAS_TRITON = importlib.util.find_spec("triton") is not None

# Rows that share an accumulator: a row's dot is the difference of two dots of the accumulator, so its
# rounding error grows with the square root of the rows before it.
ROWS_PER_ACCUMULATOR = 8


def weight_gradient(activation: Tensor, output_grad: Tensor) -> Tensor:
    """``dW = B^T A [out, in]``: the product that training without scoring computes."""
    return output_grad.flatten(0, -2).t().matmul(activation.flatten(0, -2))


def weight_gradient_fp32(activation: Tensor, output_grad: Tensor, out: Tensor) -> None:
    """``out += B^T A`` with fp32 accumulation and output, whatever the buffers' precision."""
    a, b = activation.flatten(0, -2), output_grad.flatten(0, -2)
    if a.dtype == out.dtype:
        out.addmm_(b.t(), a)
    else:
        out.add_(_product_fp32(b.t(), a))


def weight_gradient_and_dots(
    activation: Tensor,
    output_grad: Tensor,
    directions: Sequence[Tensor],
    batch_dim: int,
    dots: Tensor,
    segments: Segments | None = None,
) -> Tensor:
    """The batch's weight gradient, and the dots of every row (of every part, with segments) on the way.

    Args:
        activation: A, ``[s, b, in]`` or with rows along another ``batch_dim``.
        output_grad: B, ``[s, b, out]``.
        directions: K tensors ``[out, in]``, fp32 or bf16 (fp64 in fp64 runs).
        batch_dim: dimension of A and B that counts the rows.
        dots: ``[b, K]``, ``[n, K]`` with segments; the dots are added to it.
        segments: n parts of the rows, with A ``[s, b, in]`` or ``[b, s, in]``.

    Returns:
        dW ``[out, in]`` in the buffers' precision. With one row (or part), and where tokens are projected, it is
        bitwise what training without scoring computes; with several, blocks of lower precision are accumulated in
        fp32.
    """
    form = _form(activation, output_grad, len(dots), len(directions))
    if form != "fused":
        directions = [widened(direction) for direction in directions]
    if form == "projection":
        products = token_dots(activation, output_grad, directions)
        dots += products.sum(1 - batch_dim) if segments is None else segments.sums(products, batch_dim)
        return weight_gradient(activation, output_grad)
    if form == "fused":
        from . import triton_linear  # where there is no GPU, Triton need not be installed

        bounds = None if segments is None else segments.bounds
        return triton_linear.weight_gradient_and_dots(
            activation, output_grad, directions, batch_dim, dots, bounds
        )
    return blocks_and_dots(activation, output_grad, directions, batch_dim, dots, segments)


def _form(activation: Tensor, output_grad: Tensor, segments: int, targets: int) -> cost.Form:
    """The cheapest form for these buffers (cost.py); a single one is scored from the product that training uses."""
    if segments == 1 or activation.dim() != 3:
        return "blocks"
    features_in, features_out = activation.shape[-1], output_grad.shape[-1]
    shape = cost.Shape(activation.numel() // features_in, segments, features_in, features_out, targets)
    if not activation.is_cuda:
        return cost.cheapest(shape, cost.CPU, "blocks", "projection")
    forms: tuple[cost.Form, ...] = ("blocks", "projection")
    if activation.dtype in LOW_PRECISION and HAS_TRITON:
        forms = ("fused", *forms)
    return cost.cheapest(shape, cost.CUDA, *forms)


def blocks_and_dots(
    activation: Tensor,
    output_grad: Tensor,
    directions: Sequence[Tensor],
    batch_dim: int,
    dots: Tensor,
    segments: Segments | None = None,
) -> Tensor:
    """``weight_gradient_and_dots`` from the segments' blocks of the weight gradient."""
    if len(dots) == 1:
        grad = weight_gradient(activation, output_grad)
        flat = grad.reshape(-1).to(directions[0].dtype)
        for k, direction in enumerate(directions):
            dots[0, k] += torch.dot(flat, direction.reshape(-1))
        return grad
    dtype = activation.dtype
    low = dtype in LOW_PRECISION
    if low and not activation.is_cuda:
        activation, output_grad = activation.float(), output_grad.float()
    a = _blocks(activation, batch_dim, segments)
    b = [block.t() for block in _blocks(output_grad, batch_dim, segments)]
    flat_directions = [direction.reshape(-1) for direction in directions]
    if low and activation.is_cuda:
        return _separate_blocks(a, b, flat_directions, dots).to(dtype)
    grad = _running_dots(a[:ROWS_PER_ACCUMULATOR], b[:ROWS_PER_ACCUMULATOR], flat_directions, dots)
    for start in range(ROWS_PER_ACCUMULATOR, len(a), ROWS_PER_ACCUMULATOR):
        stop = start + ROWS_PER_ACCUMULATOR
        grad.add_(_running_dots(a[start:stop], b[start:stop], flat_directions, dots[start:stop]))
    return grad.to(dtype)


def _blocks(buffer: Tensor, batch_dim: int, segments: Segments | None) -> list[Tensor]:
    """The rows of a buffer as matrices ``[tokens, features]``, or their parts."""
    rows = [buffer.select(batch_dim, i).flatten(0, -2) for i in range(buffer.shape[batch_dim])]
    return rows if segments is None else [rows[i][begin:end] for i, begin, end in segments.bounds]


def _running_dots(
    a: Sequence[Tensor], b: Sequence[Tensor], directions: Sequence[Tensor], dots: Tensor
) -> Tensor:
    """``sum_i B_i^T A_i`` in one accumulator whose dot is taken after every row: a pass over memory less.

    Each product is added in the GEMM itself, so a row costs one read of accumulator and direction more than
    training without scoring.
    """
    grad = torch.mm(b[0], a[0])
    before: list[Tensor | float] = [0.0] * len(directions)
    for i in range(len(a)):
        if i > 0:
            grad.addmm_(b[i], a[i])
        for k, direction in enumerate(directions):
            now = torch.dot(grad.view(-1), direction).to(dots.dtype)
            dots[i, k] += now - before[k]
            before[k] = now
    return grad


def _separate_blocks(
    a: Sequence[Tensor], b: Sequence[Tensor], directions: Sequence[Tensor], dots: Tensor
) -> Tensor:
    """The same from buffers of lower precision: every row's product in fp32, then summed in fp32."""
    grad: Tensor | None = None
    for i, (a_i, b_i) in enumerate(zip(a, b, strict=True)):
        block = _product_fp32(b_i, a_i)
        for k, direction in enumerate(directions):
            dots[i, k] += torch.dot(block.view(-1), direction)
        grad = block if grad is None else grad.add_(block)
    assert grad is not None
    return grad


def _product_fp32(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in fp32 from operands of lower precision, without rounding the result."""
    if left.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(left, right, out_dtype=torch.float32)  # torch >= 2.8
    return left.float() @ right.float()
