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

Rows = Tensor | list[Tensor]
"""K directions of a weight, flat: a matrix [K, out * in], or one tensor each."""


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
    if form == "projection":
        products = token_dots(activation, output_grad, [widened(direction) for direction in directions])
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
    rows = _flat(directions)
    if len(dots) == 1:
        only = weight_gradient(activation, output_grad)
        dots[0] += torch.stack(_products(only.reshape(-1).to(rows[0].dtype), rows))
        return only
    dtype = activation.dtype
    low = dtype in LOW_PRECISION
    if low and not activation.is_cuda:
        activation, output_grad = activation.float(), output_grad.float()
    a = _blocks(activation, batch_dim, segments)
    b = [block.t() for block in _blocks(output_grad, batch_dim, segments)]
    if low and activation.is_cuda:
        return _separate_blocks(a, b, rows, dots).to(dtype)
    grad: Tensor | None = None
    for start in range(0, len(a), ROWS_PER_ACCUMULATOR):
        part = slice(start, start + ROWS_PER_ACCUMULATOR)
        summed = _running_dots(a[part], b[part], rows, dots[part])
        grad = summed if grad is None else grad.add_(summed)
    assert grad is not None
    return grad.to(dtype)


def _blocks(buffer: Tensor, batch_dim: int, segments: Segments | None) -> Sequence[Tensor]:
    """The rows of a buffer as matrices ``[tokens, features]``, or their parts."""
    rows = buffer.unbind(batch_dim)
    if buffer.dim() != 3:
        rows = tuple(row.flatten(0, -2) for row in rows)
    return rows if segments is None else [rows[i][begin:end] for i, begin, end in segments.bounds]


def _flat(directions: Sequence[Tensor]) -> Rows:
    """The directions to compute with; on a CPU many of them as a view where they lie evenly in one buffer."""
    flat = [direction.reshape(-1) for direction in directions]
    first = flat[0]
    together_from = (cost.CUDA if first.is_cuda else cost.CPU).together_from
    if together_from is not None and len(flat) >= together_from:
        step = flat[1].storage_offset() - first.storage_offset()
        places = [(d.untyped_storage().data_ptr(), d.storage_offset()) for d in flat]
        storage, start = places[0]
        if step > 0 and places == [(storage, start + k * step) for k in range(len(flat))]:
            return widened(first.as_strided((len(flat), first.numel()), (step, 1)))
    return [widened(direction) for direction in flat]


def _products(vector: Tensor, rows: Rows) -> list[Tensor]:
    """``<D_k, vector>`` for all k, as K scalars."""
    if isinstance(rows, Tensor):
        return list(torch.mv(rows, vector).unbind())
    return [torch.dot(vector, row) for row in rows]


def _running_dots(a: Sequence[Tensor], b: Sequence[Tensor], rows: Rows, dots: Tensor) -> Tensor:
    """``sum_i B_i^T A_i`` in one accumulator whose dot is taken after every row: a pass over memory less.

    Each product is added in the GEMM itself, so a row costs one read of accumulator and direction more than
    training without scoring.
    """
    grad = torch.mm(b[0], a[0])
    flat = grad.view(-1)
    running = _products(flat, rows)
    for a_i, b_i in zip(a[1:], b[1:], strict=True):
        grad.addmm_(b_i, a_i)
        running += _products(flat, rows)
    sums = torch.stack(running).view(len(a), -1).to(dots.dtype)
    dots += sums
    dots[1:] -= sums[:-1]
    return grad


def _separate_blocks(a: Sequence[Tensor], b: Sequence[Tensor], rows: Rows, dots: Tensor) -> Tensor:
    """The same from buffers of lower precision: every row's product in fp32, then summed in fp32."""
    grad: Tensor | None = None
    products: list[Tensor] = []
    for a_i, b_i in zip(a, b, strict=True):
        block = _product_fp32(b_i, a_i)
        products += _products(block.view(-1), rows)
        grad = block if grad is None else grad.add_(block)
    assert grad is not None
    dots += torch.stack(products).view(dots.shape)
    return grad


def _product_fp32(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in fp32 from operands of lower precision, without rounding the result."""
    if left.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(left, right, out_dtype=torch.float32)  # torch >= 2.8
    return left.float() @ right.float()
