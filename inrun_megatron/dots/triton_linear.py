"""The weight gradient and its per-segment dots in one Triton kernel.

Same algebra and shape legend as ``dots/linear.py``. A program owns one tile ``[BLOCK_OUT, BLOCK_IN]`` of the weight
gradient and walks over the segments' tokens:

    for segment g:   acc += B_g^T A_g      (tensor cores, fp32)
                     partial[tile, g, k] = <D_k, acc> - <D_k, acc before g>

so that a segment's gradient never leaves the registers, activations are read once for gradient and dots, and a dot
costs one read of the direction's tile. Tiles write their parts side by side; a sum over tiles in a fixed order
follows, without atomics: two runs give the same bits.

The difference of two running dots loses digits as segments pass. With many of them the kernel keeps a second
accumulator instead: a segment's own, added to the gradient at its end. Small weights have fewer tiles than the
device has processors: then the segments are split among ``splits`` programs per tile, whose gradients are summed
in the second stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import INTERPRETED, Bounds, equally_spaced, features_together, segment_table

# Segments whose dots may be differences of running ones; the same bound as the torch form's.
SEGMENTS_PER_ACCUMULATOR = 8


@triton.jit
def _kernel(
    a_ptr,
    b_ptr,
    direction_ptr,
    segments_ptr,
    grad_ptr,
    partial_ptr,
    features_in,
    features_out,
    num_segments,
    segments_per_split,
    a_token,
    a_row,
    b_token,
    b_row,
    direction_target,
    num_targets,
    TARGETS: tl.constexpr,  # num_targets rounded up to a power of 2
    TWO_ACCUMULATORS: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    tile_in, tile_out, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tile = tile_out * tl.num_programs(0) + tile_in
    outs = tile_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    ins = tile_in * BLOCK_IN + tl.arange(0, BLOCK_IN)
    inside = (outs < features_out)[:, None] & (ins < features_in)[None, :]
    # Weights of more than 2^31 elements exist (large vocabularies): offsets in int64.
    offsets = outs.to(tl.int64)[:, None] * features_in + ins[None, :]

    total = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    before = tl.zeros((TARGETS,), dtype=tl.float32)
    targets = tl.arange(0, TARGETS)
    first = split * segments_per_split
    last = tl.minimum(first + segments_per_split, num_segments)
    for segment in range(first, last):
        row = tl.load(segments_ptr + 3 * segment).to(tl.int64)
        start = tl.load(segments_ptr + 3 * segment + 1)
        stop = tl.load(segments_ptr + 3 * segment + 2)
        acc = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32) if TWO_ACCUMULATORS else total
        for token in range(start, stop, BLOCK_TOKENS):
            tokens = token + tl.arange(0, BLOCK_TOKENS)
            there = (tokens < stop)[:, None]
            tokens = tokens.to(tl.int64)[:, None]
            a = tl.load(
                a_ptr + row * a_row + tokens * a_token + ins[None, :],
                mask=there & (ins < features_in)[None, :],
                other=0.0,
            )
            b = tl.load(
                b_ptr + row * b_row + tokens * b_token + outs[None, :],
                mask=there & (outs < features_out)[None, :],
                other=0.0,
            )
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(tl.trans(b), a, acc, input_precision=PRECISION)
        now = tl.zeros((TARGETS,), dtype=tl.float32)
        for k in range(num_targets):
            direction = tl.load(direction_ptr + k * direction_target + offsets, mask=inside, other=0.0)
            dot = tl.sum(tl.sum(acc * direction.to(tl.float32), axis=1), axis=0)
            now = tl.where(targets == k, dot, now)
        place = partial_ptr + (tile.to(tl.int64) * num_segments + segment) * TARGETS
        if TWO_ACCUMULATORS:
            tl.store(place + targets, now)
            total += acc
        else:
            tl.store(place + targets, now - before)
            before = now
            total = acc
    grad = grad_ptr + split.to(tl.int64) * features_out * features_in + offsets
    if ADD:
        total += tl.load(grad, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad, total.to(grad_ptr.dtype.element_ty), mask=inside)


def weight_gradient_and_dots(
    activation: Tensor,
    output_grad: Tensor,
    directions: Sequence[Tensor],
    batch_dim: int,
    dots: Tensor,
    bounds: Bounds = None,
    into: Tensor | None = None,
    blocks: tuple[int, int, int] | None = None,
    splits: int | None = None,
) -> Tensor:
    """The batch's weight gradient, and every segment's dots on the way.

    Args:
        activation: A, ``[s, b, in]`` or with rows along another ``batch_dim``; bf16, fp16 or fp32.
        output_grad: B, ``[s, b, out]``.
        directions: K tensors ``[out, in]``, fp32 or bf16.
        batch_dim: dimension of A and B that counts the rows.
        dots: ``[segments, K]``; the dots are added to it.
        bounds: (row, first token, token after the last) of every segment, which cover all tokens once; None: rows
            are the segments.
        into: ``[out, in]``, contiguous: the gradient is added to it, in fp32, and it is returned.
        blocks: (out, in, tokens) of a tile; default: by shape.
        splits: programs per tile; default: by shape.

    Returns:
        dW ``[out, in]`` in the buffers' precision, from fp32 accumulation; or ``into``.
    """
    token_dim = 1 - batch_dim
    rows, tokens = activation.shape[batch_dim], activation.shape[token_dim]
    features_in, features_out = activation.shape[-1], output_grad.shape[-1]
    a, b = features_together(activation), features_together(output_grad)
    direction, direction_stride = equally_spaced(directions)
    segments = segment_table(bounds, rows, tokens, a.device)
    count, padded = len(segments), triton.next_power_of_2(len(directions))
    assert dots.shape == (count, len(directions)), f"dots {tuple(dots.shape)} for {count} segments"
    block_out, block_in, block_tokens = blocks or tile(
        features_out, features_in, a.dtype, count > SEGMENTS_PER_ACCUMULATOR
    )
    tiles = triton.cdiv(features_in, block_in), triton.cdiv(features_out, block_out)
    splits = min(count, splits or _splits(tiles[0] * tiles[1], a.device))
    per_split = triton.cdiv(count, splits)
    splits = triton.cdiv(count, per_split)
    if splits == 1:
        grad = (
            torch.empty(features_out, features_in, dtype=a.dtype, device=a.device) if into is None else into
        )
    else:
        grad = torch.empty(splits, features_out, features_in, dtype=torch.float32, device=a.device)
    partial = torch.empty(tiles[0] * tiles[1], count, padded, dtype=torch.float32, device=a.device)
    _kernel[(*tiles, splits)](
        a,
        b,
        direction,
        segments,
        grad,
        partial,
        features_in,
        features_out,
        count,
        per_split,
        a.stride(token_dim),
        a.stride(batch_dim),
        b.stride(token_dim),
        b.stride(batch_dim),
        direction_stride,
        len(directions),
        TARGETS=padded,
        TWO_ACCUMULATORS=per_split > SEGMENTS_PER_ACCUMULATOR,
        ADD=splits == 1 and into is not None,
        PRECISION="ieee" if a.dtype == torch.float32 else "tf32",  # tf32 means nothing for bf16 and fp16
        WIDEN=INTERPRETED and a.dtype == torch.bfloat16,
        BLOCK_OUT=block_out,
        BLOCK_IN=block_in,
        BLOCK_TOKENS=block_tokens,
        num_warps=8 if block_out * block_in >= 128 * 128 else 4,
    )
    dots += partial.sum(0, dtype=dots.dtype)[:, : len(directions)]
    if splits == 1:
        return grad
    summed = grad.sum(0)
    return summed.to(a.dtype) if into is None else into.add_(summed)


def tile(
    features_out: int, features_in: int, dtype: torch.dtype, two_accumulators: bool
) -> tuple[int, int, int]:
    """Block sizes (out, in, tokens) for a weight of this shape.

    128 x 128 with one accumulator takes 250 of a Hopper processor's 255 registers per thread and spills none; a second
    accumulator of that size would.
    """
    if dtype == torch.float32:  # no tensor cores in full precision: registers are the limit
        return 64, 64, 16
    if features_out * features_in < 64 * 128 * 128:  # fewer than 64 large tiles would leave processors idle
        return 64, 64, 64
    return (128, 64, 64) if two_accumulators else (128, 128, 64)


def _splits(tiles: int, device: torch.device) -> int:
    """Programs per tile that fill the device's processors."""
    if device.type != "cuda":
        return 1
    return max(1, torch.cuda.get_device_properties(device).multi_processor_count // tiles)
