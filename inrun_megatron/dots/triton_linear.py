"""The weight gradient and its per-segment dots in one Triton kernel.

Same algebra and shape legend as ``dots/linear.py``. A program owns one tile ``[BLOCK_OUT, BLOCK_IN]`` of the weight
gradient and walks over the segments' tokens:

    for segment g:   acc += B_g^T A_g      (tensor cores, fp32)
                     partial[tile, g, k] = <D_k, acc> - <D_k, acc before g>

so that a segment's gradient never leaves the registers, activations are read once for gradient and dots, and a dot
costs one read of the direction's tile. Tiles are fetched by the GPU's copy engine (tensor descriptors), which leaves
registers for two programs on a processor: one's dots run beside the other's products.

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

from .triton_launch import INTERPRETED, Bounds, equally_spaced, lengths, segment_table

# Segments whose dots may be differences of running ones; the same bound as the torch form's.
SEGMENTS_PER_ACCUMULATOR = 8
# Rows of tiles that are taken together, so that neighbours find activations in the second-level cache.
TILE_ROWS = 8
# Steps of tokens that are fetched ahead: with three, two programs fit into a processor's shared memory.
STAGES = 3


@dataclass(frozen=True)
class Tile:
    """What one program computes, and by how many warps."""

    out: int
    into: int
    tokens: int
    warps: int


def tile(features_out: int, features_in: int, two_accumulators: bool) -> Tile:
    """By shape, as measured on an H200 (docs/dots.md)."""
    if two_accumulators:  # larger ones would spill registers
        return Tile(128, 64, 64, 8)
    # Half as many, larger tiles read activations less often, but leave processors idle where there are few.
    return Tile(128, 256, 64, 8) if features_out * features_in >= LARGE else Tile(128, 128, 64, 4)


LARGE = 2**24


@triton.jit
def _load(
    buffer,
    row,
    token,
    feature,
    BATCH_FIRST: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Tile ``[TOKENS, FEATURES]`` of a buffer; zero beyond its edges."""
    tile = buffer.load([row, token, feature]) if BATCH_FIRST else buffer.load([token, row, feature])
    tile = tile.reshape(TOKENS, FEATURES)
    return tile.to(tl.float32) if WIDEN else tile


@triton.jit
def _kernel(
    a_desc,
    b_desc,
    direction_desc,
    segments_ptr,
    grad_ptr,
    partial_ptr,
    features_in,
    features_out,
    num_segments,
    num_targets,
    TARGETS: tl.constexpr,  # num_targets rounded up to a power of 2
    BATCH_FIRST: tl.constexpr,
    RAGGED: tl.constexpr,  # segments that are no multiples of BLOCK_TOKENS
    TWO_ACCUMULATORS: tl.constexpr,
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

    total = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    before = tl.zeros((TARGETS,), dtype=tl.float32)
    targets = tl.arange(0, TARGETS)
    for segment in range(num_segments):
        row = tl.load(segments_ptr + 3 * segment)
        start = tl.load(segments_ptr + 3 * segment + 1)
        stop = tl.load(segments_ptr + 3 * segment + 2)
        whole = start + (stop - start) // BLOCK_TOKENS * BLOCK_TOKENS
        acc = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32) if TWO_ACCUMULATORS else total
        for token in tl.range(start, whole, BLOCK_TOKENS, num_stages=STAGES):
            a = _load(a_desc, row, token, into, BATCH_FIRST, BLOCK_TOKENS, BLOCK_IN, WIDEN)
            b = _load(b_desc, row, token, out, BATCH_FIRST, BLOCK_TOKENS, BLOCK_OUT, WIDEN)
            acc = tl.dot(tl.trans(b), a, acc)
        if RAGGED:  # noqa: SIM102  (known when compiled, unlike the next one)
            if whole < stop:  # the rest of the segment; what follows it is another's
                there = (whole + tl.arange(0, BLOCK_TOKENS) < stop)[:, None]
                a = _load(a_desc, row, whole, into, BATCH_FIRST, BLOCK_TOKENS, BLOCK_IN, WIDEN)
                b = _load(b_desc, row, whole, out, BATCH_FIRST, BLOCK_TOKENS, BLOCK_OUT, WIDEN)
                acc = tl.dot(tl.trans(tl.where(there, b, 0.0)), tl.where(there, a, 0.0), acc)
        now = tl.zeros((TARGETS,), dtype=tl.float32)
        for k in range(num_targets):
            direction = direction_desc.load([k, out, into]).reshape(BLOCK_OUT, BLOCK_IN)
            dot = tl.sum(tl.sum(acc * direction.to(tl.float32), axis=1), axis=0)
            now = tl.where(targets == k, dot, now)
        mine = partial_ptr + (tile.to(tl.int64) * num_segments + segment) * TARGETS
        if TWO_ACCUMULATORS:
            tl.store(mine + targets, now)
            total += acc
        else:
            tl.store(mine + targets, now - before)
            before = now
            total = acc
    outs, ins = out + tl.arange(0, BLOCK_OUT), into + tl.arange(0, BLOCK_IN)
    inside = (outs < features_out)[:, None] & (ins < features_in)[None, :]
    # Weights of more than 2^31 elements exist (large vocabularies): offsets in int64.
    grad = grad_ptr + outs.to(tl.int64)[:, None] * features_in + ins[None, :]
    tl.store(grad, total.to(grad_ptr.dtype.element_ty), mask=inside)


def fits(activation: Tensor, output_grad: Tensor, directions: Sequence[Tensor]) -> bool:
    """Whether the copy engine can read the buffers: 16-byte steps in every dimension but the last, which is contiguous."""
    first = directions[0]
    width = first.shape[-1] * first.element_size()
    gap = directions[1].data_ptr() - first.data_ptr() if len(directions) > 1 else 0
    return (
        first.is_contiguous()
        and not (first.data_ptr() % 16 or width % 16 or gap % 16)
        and all(_describable(buffer) for buffer in (activation, output_grad))
    )


def _describable(buffer: Tensor) -> bool:
    return (
        buffer.dim() == 3
        and buffer.stride(-1) == 1
        and not buffer.data_ptr() % 16
        and not any(step * buffer.element_size() % 16 for step in buffer.stride()[:-1])
    )


def _describe(buffer: Tensor, batch_dim: int, tokens: int, features: int) -> TensorDescriptor:
    block = [1, tokens, features] if batch_dim == 0 else [tokens, 1, features]
    return TensorDescriptor(buffer, list(buffer.shape), list(buffer.stride()), block)


def weight_gradient_and_dots(
    activation: Tensor,
    output_grad: Tensor,
    directions: Sequence[Tensor],
    batch_dim: int,
    bounds: Bounds = None,
    by: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """The batch's weight gradient, and every segment's dots on the way.

    Args:
        activation: A, ``[s, b, in]`` or with rows along another ``batch_dim``; bf16 or fp16, and such that it ``fits``.
        output_grad: B, ``[s, b, out]``.
        directions: K tensors ``[out, in]``, fp32 or bf16.
        batch_dim: dimension of A and B that counts the rows.
        bounds: (row, first token, token after the last) of every segment, which cover all tokens once; None: rows
            are the segments.
        by: the tile; default: by shape.

    Returns:
        dW ``[out, in]`` in the buffers' precision, from fp32 accumulation; and parts of the dots
        ``[tiles, segments, K or more]`` (``triton_launch.Parts``).
    """
    rows, tokens = activation.shape[batch_dim], activation.shape[1 - batch_dim]
    features_in, features_out = activation.shape[-1], output_grad.shape[-1]
    direction, gap = equally_spaced(directions)
    segments = segment_table(bounds, rows, tokens, activation.device)
    count, padded = len(segments), triton.next_power_of_2(len(directions))
    two = count > SEGMENTS_PER_ACCUMULATOR
    by = by or tile(features_out, features_in, two)
    tiles = triton.cdiv(features_in, by.into) * triton.cdiv(features_out, by.out)
    stacked = direction.as_strided(
        (len(directions), features_out, features_in), (gap or direction.numel(), features_in, 1)
    )
    grad = torch.empty(features_out, features_in, dtype=activation.dtype, device=activation.device)
    partial = torch.empty(tiles, count, padded, dtype=torch.float32, device=activation.device)
    _kernel[(tiles,)](
        _describe(activation, batch_dim, by.tokens, by.into),
        _describe(output_grad, batch_dim, by.tokens, by.out),
        TensorDescriptor(stacked, list(stacked.shape), list(stacked.stride()), [1, by.out, by.into]),
        segments,
        grad,
        partial,
        features_in,
        features_out,
        count,
        len(directions),
        TARGETS=padded,
        BATCH_FIRST=batch_dim == 0,
        RAGGED=any(length % by.tokens for length in lengths(bounds, tokens)),
        TWO_ACCUMULATORS=two,
        WIDEN=INTERPRETED and activation.dtype == torch.bfloat16,
        BLOCK_OUT=by.out,
        BLOCK_IN=by.into,
        BLOCK_TOKENS=by.tokens,
        TILE_ROWS=TILE_ROWS,
        STAGES=STAGES,
        num_warps=by.warps,
    )
    return grad, partial
