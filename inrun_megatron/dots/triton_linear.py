"""The weight gradient and its per-segment dots in one Triton kernel.

Same algebra and shape legend as ``dots/linear.py``. A program owns one tile ``[BLOCK_OUT, BLOCK_IN]`` of the weight
gradient and walks over the segments' tokens:

    for segment g:   acc += B_g^T A_g      (tensor cores, fp32)
                     partial[tile, g, k] = <D_k, acc> - <D_k, acc before g>

so that a segment's gradient never leaves the registers, activations are read once for gradient and dots, and a single
target's direction once. Tiles are fetched by the GPU's copy engine (tensor descriptors) and stay in shared memory, where
the tensor cores read both factors.

The difference of two running dots loses digits as segments pass. With many of them the kernel keeps a second
accumulator instead: a segment's own, added to the gradient at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .copy_engine import as_matrix
from .segments import Bounds, whole_rows
from .triton_launch import INTERPRETED, blocks_of, equally_spaced, padded

# Segments whose dots may be differences of running ones; the same bound as the torch form's.
SEGMENTS_PER_ACCUMULATOR = 8
# Rows of tiles that are taken together, so that neighbours find activations in the second-level cache.
TILE_ROWS = 8


@dataclass(frozen=True)
class Tile:
    """What one program computes, by how many warps, and how many steps of how many tokens it holds at a time."""

    out: int
    into: int
    tokens: int
    stages: int
    warps: int


LARGE = Tile(128, 256, tokens=64, stages=3, warps=8)
SMALL = Tile(128, 128, tokens=32, stages=4, warps=4)  # two programs fit on a processor
OWN_ACCUMULATORS = Tile(128, 128, tokens=32, stages=4, warps=8)  # with four warps registers would spill
LARGE_FROM = 2**24


def tile(weights: int, segments: int, direction_bytes: int) -> Tile:
    """By shape (docs/dots.md): elements of the weight, segments, bytes per element of a direction."""
    if segments > SEGMENTS_PER_ACCUMULATOR:
        return OWN_ACCUMULATORS
    # Half as many, larger tiles read activations less often, but leave processors idle where there are few. One of an
    # fp32 direction would not fit beside the buffers' in shared memory.
    return LARGE if weights >= LARGE_FROM and direction_bytes == 2 else SMALL


@triton.jit
def _load(buffer, row, step, token, feature, BATCH_FIRST: tl.constexpr, WIDEN: tl.constexpr):
    """Tile ``[tokens, features]`` of a buffer as a matrix, whose rows lie ``step`` apart; zero beyond its edges."""
    tile = (
        buffer.load([row * step + token, feature])
        if BATCH_FIRST
        else buffer.load([token, row * step + feature])
    )
    return tile.to(tl.float32) if WIDEN else tile


@triton.jit
def _dots(
    acc,
    held,
    direction_desc,
    out,
    into,
    inside,
    TARGETS: tl.constexpr,
    HELD: tl.constexpr,
    EDGES: tl.constexpr,
):
    """``<D_k, acc>`` of this tile, ``[TARGETS]``."""
    targets = tl.arange(0, TARGETS)
    dots = tl.zeros((TARGETS,), dtype=tl.float32)
    for k in tl.static_range(TARGETS):  # a loop that stays one would stop the tensor cores at every step
        direction = held if HELD else direction_desc.load([k, out, into]).reshape(acc.shape[0], acc.shape[1])
        products = acc * direction.to(tl.float32)
        if EDGES:  # beyond a row's features lie another row's
            products = tl.where(inside, products, 0.0)
        dots = tl.where(targets == k, tl.sum(tl.sum(products, axis=1), axis=0), dots)
    return dots


@triton.jit(do_not_specialize=["num_segments"])  # documents: another number in every microbatch
def _kernel(
    a_desc,
    b_desc,
    direction_desc,
    segments_ptr,
    grad_ptr,
    partial_ptr,
    a_step,
    b_step,
    features_in,
    features_out,
    num_segments,
    tokens,  # of every segment, where they are even
    TARGETS: tl.constexpr,  # rounded up to a power of 2
    BATCH_FIRST: tl.constexpr,
    EVEN: tl.constexpr,  # segments are whole rows of whole steps
    TWO_ACCUMULATORS: tl.constexpr,
    EDGES: tl.constexpr,  # features that are no multiple of the tile's
    WIDEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_in = tl.cdiv(features_in, BLOCK_IN)
    first_row = tile // (TILE_ROWS * tiles_in) * TILE_ROWS
    rows_here = tl.minimum(tl.cdiv(features_out, BLOCK_OUT) - first_row, TILE_ROWS)
    place = tile % (TILE_ROWS * tiles_in)
    out = (first_row + place % rows_here) * BLOCK_OUT
    into = place // rows_here * BLOCK_IN
    outs, ins = out + tl.arange(0, BLOCK_OUT), into + tl.arange(0, BLOCK_IN)
    inside = (outs < features_out)[:, None] & (ins < features_in)[None, :]

    total = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    acc = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    before = tl.zeros((TARGETS,), dtype=tl.float32)
    # Of a single target the tile waits in shared memory. (Between two loops the compiler would take registers for it.)
    HELD: tl.constexpr = EVEN and TARGETS == 1
    held = direction_desc.load([0, out, into]).reshape(BLOCK_OUT, BLOCK_IN) if HELD else 0
    partial = partial_ptr + tile.to(tl.int64) * num_segments * TARGETS + tl.arange(0, TARGETS)
    if EVEN:
        # One loop over the tokens of all rows: the next row's are on their way while a row's dots are taken.
        row = 0
        token = 0
        for _ in tl.range(0, num_segments * (tokens // BLOCK_TOKENS), num_stages=STAGES):
            a = _load(a_desc, row, a_step, token, into, BATCH_FIRST, WIDEN)
            b = _load(b_desc, row, b_step, token, out, BATCH_FIRST, WIDEN)
            acc = tl.dot(tl.trans(b), a, acc)
            token += BLOCK_TOKENS
            if token == tokens:
                now = _dots(acc, held, direction_desc, out, into, inside, TARGETS, HELD, EDGES)
                tl.store(partial + row * TARGETS, now - before)
                if TWO_ACCUMULATORS:
                    total += acc
                    acc = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
                else:
                    before = now
            row = tl.where(token == tokens, row + 1, row)
            token = tl.where(token == tokens, 0, token)
    else:
        for segment in range(num_segments):
            row = tl.load(segments_ptr + 3 * segment)
            start = tl.load(segments_ptr + 3 * segment + 1)
            stop = tl.load(segments_ptr + 3 * segment + 2)
            whole = start + (stop - start) // BLOCK_TOKENS * BLOCK_TOKENS
            for token in tl.range(start, whole, BLOCK_TOKENS, num_stages=STAGES):
                a = _load(a_desc, row, a_step, token, into, BATCH_FIRST, WIDEN)
                b = _load(b_desc, row, b_step, token, out, BATCH_FIRST, WIDEN)
                acc = tl.dot(tl.trans(b), a, acc)
            if whole < stop:  # the rest of the segment; what follows it is another's
                there = (whole + tl.arange(0, BLOCK_TOKENS) < stop)[:, None]
                a = _load(a_desc, row, a_step, whole, into, BATCH_FIRST, WIDEN)
                b = _load(b_desc, row, b_step, whole, out, BATCH_FIRST, WIDEN)
                acc = tl.dot(tl.trans(tl.where(there, b, 0.0)), tl.where(there, a, 0.0), acc)
            now = _dots(acc, held, direction_desc, out, into, inside, TARGETS, HELD, EDGES)
            tl.store(partial + segment * TARGETS, now - before)
            if TWO_ACCUMULATORS:
                total += acc
                acc = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
            else:
                before = now
    if not TWO_ACCUMULATORS:
        total = acc
    # Weights of more than 2^31 elements exist (large vocabularies): offsets in int64.
    grad = grad_ptr + outs.to(tl.int64)[:, None] * features_in + ins[None, :]
    tl.store(grad, total.to(grad_ptr.dtype.element_ty), mask=inside)


def weight_gradient_and_dots(
    activation: Tensor,
    output_grad: Tensor,
    directions: Sequence[Tensor],
    batch_dim: int,
    bounds: Bounds | None = None,
    by: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """The batch's weight gradient, and every segment's dots on the way.

    Args:
        activation: A, ``[s, b, in]`` or with rows along another ``batch_dim``; bf16 or fp16.
        output_grad: B, ``[s, b, out]``.
        directions: K tensors ``[out, in]``, fp32 or bf16.
        batch_dim: dimension of A and B that counts the rows.
        bounds: (row, first token, token after the last) of every segment, which cover all tokens once; None: rows
            are the segments.
        by: the tile; default: by shape.

    Returns:
        dW ``[out, in]`` in the buffers' precision, from fp32 accumulation; and parts of the dots
        ``[tiles, segments, K or more]`` (``late.LateDots``).

    Raises:
        ValueError: a buffer that the copy engine cannot read (``copy_engine.fits``).
    """
    rows, tokens = activation.shape[batch_dim], activation.shape[1 - batch_dim]
    features_in, features_out = activation.shape[-1], output_grad.shape[-1]
    direction, gap = equally_spaced(directions)
    segments = whole_rows(rows, tokens) if bounds is None else bounds
    count, targets = len(segments), padded(len(directions))
    by = by or tile(features_out * features_in, count, direction.element_size())
    tiles = blocks_of(features_in, by.into) * blocks_of(features_out, by.out)
    of_a, of_b = as_matrix(activation, batch_dim), as_matrix(output_grad, batch_dim)
    if of_a is None or of_b is None:
        raise ValueError("a buffer that the copy engine cannot read; ask copy_engine.fits first")
    (a, a_step), (b, b_step) = of_a, of_b
    stacked = direction.as_strided(
        (len(directions), features_out, features_in), (gap or direction.numel(), features_in, 1)
    )
    grad = torch.empty(features_out, features_in, dtype=activation.dtype, device=activation.device)
    partial = torch.empty(tiles, count, targets, dtype=torch.float32, device=activation.device)
    _kernel[(tiles,)](
        TensorDescriptor(a, list(a.shape), list(a.stride()), [by.tokens, by.into]),
        TensorDescriptor(b, list(b.shape), list(b.stride()), [by.tokens, by.out]),
        TensorDescriptor(stacked, list(stacked.shape), list(stacked.stride()), [1, by.out, by.into]),
        segments.on(activation.device),
        grad,
        partial,
        a_step,
        b_step,
        features_in,
        features_out,
        count,
        tokens,
        TARGETS=targets,
        BATCH_FIRST=batch_dim == 0,
        EVEN=count == rows and segments.lengths == {tokens} and not tokens % by.tokens,
        TWO_ACCUMULATORS=count > SEGMENTS_PER_ACCUMULATOR,
        EDGES=bool(features_in % by.into or features_out % by.out),
        WIDEN=INTERPRETED and activation.dtype == torch.bfloat16,
        BLOCK_OUT=by.out,
        BLOCK_IN=by.into,
        BLOCK_TOKENS=by.tokens,
        TILE_ROWS=TILE_ROWS,
        STAGES=by.stages,
        num_warps=by.warps,
    )
    return grad, partial
