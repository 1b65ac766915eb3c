"""Dots of blocks of a weight gradient that cuBLAS computed, in one Triton pass over them, and their sum on the way.

For a single segment the block is the weight gradient of training itself. Several are fp32 products, so many at a time that
they take no more memory than ``CHUNK`` elements (at least one), and their sum is the weight gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .products import bmm_fp32, mm_fp32
from .segments import Bounds
from .triton_launch import blocks_of, equally_spaced, of_target, padded

BLOCK = 4096
CHUNK = 2**24


@triton.jit(do_not_specialize=["num_blocks"])  # documents: another number in every microbatch
def _kernel(
    block_ptr,
    direction_ptr,
    grad_ptr,
    partial_ptr,
    size,
    num_blocks,
    direction_target,
    num_targets,
    TARGETS: tl.constexpr,  # num_targets rounded up to a power of 2
    SUM: tl.constexpr,  # write the sum of the blocks
    ADD: tl.constexpr,  # to what is there already
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    places = program * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    if ADD:
        total += tl.load(grad_ptr + places, mask=inside, other=0.0)
    for block in range(num_blocks):
        own = tl.load(block_ptr + tl.cast(block, tl.int64) * size + places, mask=inside, other=0.0).to(
            tl.float32
        )
        if SUM:
            total += own
        for k in range(num_targets):
            direction = tl.load(
                of_target(direction_ptr, k, direction_target) + places, mask=inside, other=0.0
            )
            dot = tl.sum(own * direction.to(tl.float32), axis=0)
            tl.store(partial_ptr + (program * num_blocks + block) * TARGETS + k, dot)
    if SUM:
        tl.store(grad_ptr + places, total.to(grad_ptr.dtype.element_ty), mask=inside)


def block_dots(
    blocks: Tensor, directions: Sequence[Tensor], sum_into: Tensor | None = None, add: bool = False
) -> Tensor:
    """``<D_k, W_g>`` of every block and target, as parts ``[programs, G, K or more]`` (``late.LateDots``).

    Args:
        blocks: ``[G, out, in]``, contiguous.
        directions: K tensors ``[out, in]``.
        sum_into: gets the blocks' sum, ``[out, in]``; with ``add`` (fp32) what is there already counts.
    """
    direction, gap = equally_spaced(directions)
    count, size = len(blocks), blocks[0].numel()
    targets, programs = padded(len(directions)), blocks_of(size, BLOCK)
    partial = torch.empty(programs, count, targets, dtype=torch.float32, device=blocks.device)
    _kernel[(programs,)](
        blocks,
        direction,
        blocks if sum_into is None else sum_into,
        partial,
        size,
        count,
        gap,
        len(directions),
        TARGETS=targets,
        SUM=sum_into is not None,
        ADD=add,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return partial


def blocks_and_dots(
    activation: Tensor,
    output_grad: Tensor,
    directions: Sequence[Tensor],
    batch_dim: int,
    bounds: Bounds | None = None,
) -> tuple[Tensor, Tensor]:
    """The weight gradient ``[out, in]`` in the buffers' precision, and the dots' parts; as ``triton_linear``'s."""
    shape = output_grad.shape[-1], activation.shape[-1]
    at_once = max(1, CHUNK // (shape[0] * shape[1]))
    count = activation.shape[batch_dim] if bounds is None else len(bounds)
    # One chunk's sum is rounded as it is written; several are added up in fp32 first.
    dtype = activation.dtype if count <= at_once else torch.float32
    grad = torch.empty(shape, dtype=dtype, device=activation.device)
    parts = [
        block_dots(chunk, directions, grad, add=number > 0)
        for number, chunk in enumerate(_products(activation, output_grad, batch_dim, bounds, at_once))
    ]
    return grad.to(activation.dtype), _side_by_side(parts)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """Parts of several chunks of segments as those of all of them."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _products(a: Tensor, b: Tensor, batch_dim: int, bounds: Bounds | None, at_once: int) -> Iterator[Tensor]:
    """``B_g^T A_g`` in fp32, ``[at_once or fewer, out, in]``."""
    a, b = a.movedim(batch_dim, 0), b.movedim(batch_dim, 0).mT
    if bounds is None:
        for a_rows, b_rows in zip(a.split(at_once), b.split(at_once), strict=True):
            yield bmm_fp32(b_rows, a_rows)
        return
    for first in range(0, len(bounds), at_once):
        own = bounds.tuples[first : first + at_once]
        blocks = torch.empty(len(own), b.shape[1], a.shape[2], dtype=torch.float32, device=a.device)
        for block, (row, start, stop) in zip(blocks, own, strict=True):
            mm_fp32(b[row, :, start:stop], a[row, start:stop], out=block)
        yield blocks
