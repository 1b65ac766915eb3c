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

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cost
from .backend import by_triton
from .late import LateDots
from .precision import LOW_PRECISION, widened
from .products import weight_gradient
from .projection import token_dots
from .segments import Segments

# Rows that share an accumulator: a row's dot is the difference of two dots of the accumulator, so its
# rounding error grows with the square root of the rows before it.
ROWS_PER_ACCUMULATOR = 8

Rows = Tensor | list[Tensor]
"""K directions of a weight, flat: a matrix [K, out * in], or one tensor each."""


def weight_gradient_and_dots(
    activation: Tensor,
    output_grad: Tensor,
    directions: Sequence[Tensor],
    batch_dim: int,
    late: LateDots,
    segments: Segments | None = None,
) -> Tensor:
    """The batch's weight gradient, and the dots of every row (of every part, with segments) on the way.

    Args:
        activation: A, ``[s, b, in]`` or with rows along another ``batch_dim``.
        output_grad: B, ``[s, b, out]``.
        directions: K tensors ``[out, in]``, fp32 or bf16 (fp64 in fp64 runs).
        batch_dim: dimension of A and B that counts the rows.
        late: of ``[b, K]``, ``[n, K]`` with segments; the dots are added to it.
        segments: n parts of the rows, with A ``[s, b, in]`` or ``[b, s, in]``.

    Returns:
        dW ``[out, in]`` in the buffers' precision. With one row (or part), and where tokens are projected, it is
        bitwise what training without scoring computes; with several, blocks of lower precision are accumulated in
        fp32.
    """
    arguments = (activation, output_grad, directions, batch_dim, late, segments)
    if by_triton(activation) and activation.dtype in LOW_PRECISION:
        from . import kernels  # where there is no GPU, Triton need not be installed

        return kernels.weight_gradient_and_dots(*arguments)
    if _form(activation, output_grad, len(late.dots), len(directions)) == "projection":
        products = token_dots(activation, output_grad, [widened(direction) for direction in directions])
        late.dots += products.sum(1 - batch_dim) if segments is None else segments.sums(products, batch_dim)
        return weight_gradient(activation, output_grad)
    return blocks_and_dots(*arguments)


def _form(activation: Tensor, output_grad: Tensor, segments: int, targets: int) -> cost.Form:
    """The cheapest form for these buffers (cost.py); a single one is scored from the product that training uses."""
    if segments == 1 or activation.dim() != 3:
        return "blocks"
    features_in, features_out = activation.shape[-1], output_grad.shape[-1]
    shape = cost.Shape(activation.numel() // features_in, segments, features_in, features_out, targets)
    return cost.cheapest(shape, cost.cpu, "blocks", "projection")


def blocks_and_dots(
    activation: Tensor,
    output_grad: Tensor,
    directions: Sequence[Tensor],
    batch_dim: int,
    late: LateDots,
    segments: Segments | None = None,
) -> Tensor:
    """``weight_gradient_and_dots`` from the segments' blocks of the weight gradient."""
    rows = _flat(directions)
    if len(late.dots) == 1:
        only = weight_gradient(activation, output_grad)
        late.add_running(0, _products(only.reshape(-1).to(rows[0].dtype), rows))
        return only
    dtype = activation.dtype
    if dtype in LOW_PRECISION:
        activation, output_grad = activation.float(), output_grad.float()
    a = _blocks(activation, batch_dim, segments)
    b = [block.t() for block in _blocks(output_grad, batch_dim, segments)]
    grad: Tensor | None = None
    for start in range(0, len(a), ROWS_PER_ACCUMULATOR):
        part = slice(start, start + ROWS_PER_ACCUMULATOR)
        summed, running = _running_dots(a[part], b[part], rows)
        late.add_running(start, running)
        grad = summed if grad is None else grad.add_(summed)
    assert grad is not None
    return grad.to(dtype)


def _blocks(buffer: Tensor, batch_dim: int, segments: Segments | None) -> Sequence[Tensor]:
    """The rows of a buffer as matrices ``[tokens, features]``, or their parts."""
    rows = buffer.unbind(batch_dim)
    if buffer.dim() != 3:
        rows = tuple(row.reshape(-1, row.shape[-1]) for row in rows)  # of [b, features], too
    return rows if segments is None else [rows[i][begin:end] for i, begin, end in segments.bounds]


def _flat(directions: Sequence[Tensor]) -> Rows:
    """The directions to compute with; on a CPU many of them as a view where they lie evenly in one buffer."""
    flat = [direction.reshape(-1) for direction in directions]
    first = flat[0]
    if not first.is_cuda and len(flat) >= cost.TOGETHER_FROM:
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


def _running_dots(a: Sequence[Tensor], b: Sequence[Tensor], rows: Rows) -> tuple[Tensor, list[Tensor]]:
    """``sum_i B_i^T A_i`` in one accumulator whose dots are taken after every row: a pass over memory less.

    Each product is added in the GEMM itself, so a row costs one read of accumulator and direction more than
    training without scoring.
    """
    grad = torch.mm(b[0], a[0])
    flat = grad.view(-1)
    running = _products(flat, rows)
    for a_i, b_i in zip(a[1:], b[1:], strict=True):
        grad.addmm_(b_i, a_i)
        running += _products(flat, rows)
    return grad, running
