"""Per-segment dots of biases, norms and embeddings, each in one Triton pass over the output gradient.

    bias       dots[g, k] = sum_{t in g} B_t . D_k
    norm       dots[g, k] = sum_{t in g} B_t . (D_k * xhat_t) (+ B_t . Dshift_k),   xhat = (x - mean) * rstd
    embedding  dots[g, k] = sum_{t in g} B_t . D_k[id_t]

Shape legend: B ``[s, b, h]`` or ``[b, s, h]`` (rows along ``batch_dim``), D_k ``[h]`` or ``[vocabulary, h]``. A program sums
a block of features over ``STRETCH`` of a segment's tokens in fp32; neither the products nor xhat are ever written.
Every function returns parts of the dots, ``[programs, segments, K]`` (``late.LateDots``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .segments import Bounds, whole_rows
from .triton_launch import blocks_of, equally_spaced, features_together, of_target

BLOCK_TOKENS, BLOCK_FEATURES = 32, 128
# Tokens of one program: few enough for a long row to keep all processors busy.
STRETCH = 64


@triton.jit
def _stretch(segments_ptr, segment, stretch, STRETCH: tl.constexpr):
    """(row, first token, token after the last) of a program's part of a segment."""
    row = tl.load(segments_ptr + 3 * segment).to(tl.int64)
    start = tl.load(segments_ptr + 3 * segment + 1) + stretch * STRETCH
    stop = tl.minimum(tl.load(segments_ptr + 3 * segment + 2), start + STRETCH)
    return row, start, stop


@triton.jit
def _vector_kernel(
    b_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    shift_ptr,
    segments_ptr,
    partial_ptr,
    features,
    num_targets,
    b_token,
    b_row,
    x_token,
    x_row,
    stat_token,
    stat_row,
    scale_target,
    shift_target,
    SCALE: tl.constexpr,  # is there a D_k for B * xhat?
    SHIFT: tl.constexpr,  # is there a D_k for B?
    MEAN: tl.constexpr,
    STATISTICS: tl.constexpr,  # False: x is xhat
    STRETCH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    segment, block, stretch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns = block * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    inside = columns < features
    row, start, stop = _stretch(segments_ptr, segment, stretch, STRETCH)
    scaled = tl.zeros((BLOCK_FEATURES,), dtype=tl.float32)
    shifted = tl.zeros((BLOCK_FEATURES,), dtype=tl.float32)
    for token in range(start, stop, BLOCK_TOKENS):
        tokens = token + tl.arange(0, BLOCK_TOKENS)
        there = tokens < stop
        tokens = tokens.to(tl.int64)
        mask = there[:, None] & inside[None, :]
        b = tl.load(
            b_ptr + row * b_row + tokens[:, None] * b_token + columns[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        if SHIFT:
            shifted += tl.sum(b, axis=0)
        if SCALE:
            x = tl.load(
                x_ptr + row * x_row + tokens[:, None] * x_token + columns[None, :], mask=mask, other=0.0
            ).to(tl.float32)
            if STATISTICS:
                place = row * stat_row + tokens * stat_token
                if MEAN:
                    x -= tl.load(mean_ptr + place, mask=there, other=0.0)[:, None]
                x *= tl.load(rstd_ptr + place, mask=there, other=0.0)[:, None]
            scaled += tl.sum(b * x, axis=0)
    program = block * tl.num_programs(2) + stretch
    out = partial_ptr + (program * tl.num_programs(0) + segment) * num_targets
    for k in range(num_targets):
        total = tl.zeros((BLOCK_FEATURES,), dtype=tl.float32)
        if SCALE:
            total += scaled * tl.load(
                of_target(scale_ptr, k, scale_target) + columns, mask=inside, other=0.0
            ).to(tl.float32)
        if SHIFT:
            total += shifted * tl.load(
                of_target(shift_ptr, k, shift_target) + columns, mask=inside, other=0.0
            ).to(tl.float32)
        tl.store(out + k, tl.sum(total, axis=0))


@triton.jit
def _embedding_kernel(
    b_ptr,
    ids_ptr,
    direction_ptr,
    segments_ptr,
    partial_ptr,
    features,
    num_targets,
    b_token,
    b_row,
    id_token,
    id_row,
    direction_target,
    STRETCH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    segment, block, stretch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns = block * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    inside = columns < features
    row, start, stop = _stretch(segments_ptr, segment, stretch, STRETCH)
    program = block * tl.num_programs(2) + stretch
    out = partial_ptr + (program * tl.num_programs(0) + segment) * num_targets
    for k in range(num_targets):
        total = tl.zeros((BLOCK_FEATURES,), dtype=tl.float32)
        for token in range(start, stop, BLOCK_TOKENS):
            tokens = token + tl.arange(0, BLOCK_TOKENS)
            there = tokens < stop
            tokens = tokens.to(tl.int64)
            mask = there[:, None] & inside[None, :]
            # int32 ids would not count a large vocabulary's elements.
            ids = tl.load(ids_ptr + row * id_row + tokens * id_token, mask=there, other=0).to(tl.int64)
            b = tl.load(
                b_ptr + row * b_row + tokens[:, None] * b_token + columns[None, :], mask=mask, other=0.0
            ).to(tl.float32)
            d = tl.load(
                of_target(direction_ptr, k, direction_target) + ids[:, None] * features + columns[None, :],
                mask=mask,
                other=0.0,
            ).to(tl.float32)
            total += tl.sum(b * d, axis=0)
        tl.store(out + k, tl.sum(total, axis=0))


def bias_dots(
    output_grad: Tensor, batch_dim: int, directions: Sequence[Tensor], bounds: Bounds | None = None
) -> Tensor:
    """``sum_{t in g} B_t . D_k``; ``bounds`` as in ``triton_linear``."""
    return _vector_dots(output_grad, None, None, None, batch_dim, None, directions, bounds)


def norm_dots(
    output_grad: Tensor,
    x: Tensor,
    batch_dim: int,
    directions: Sequence[Tensor],
    shifts: Sequence[Tensor] | None,
    bounds: Bounds | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> Tensor:
    """``sum_{t in g} B_t . (D_k * xhat_t) (+ B_t . Dshift_k)``.

    Args:
        output_grad: B.
        x: the norm's input; its normalised input where ``rstd`` is None.
        batch_dim: dimension that counts the rows.
        directions, shifts: K tensors ``[h]`` of the scale and of the shift (None: there is none).
        bounds: the segments.
        mean, rstd: the tokens' statistics, fp32, shaped like B but with one feature; no mean: RMSNorm.
    """
    return _vector_dots(output_grad, x, mean, rstd, batch_dim, directions, shifts, bounds)


def _vector_dots(
    output_grad: Tensor,
    x: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    batch_dim: int,
    scales: Sequence[Tensor] | None,
    shifts: Sequence[Tensor] | None,
    bounds: Bounds | None,
) -> Tensor:
    b = features_together(output_grad)
    a = b if x is None else features_together(x)
    statistics = b if rstd is None else rstd
    assert mean is None or (rstd is not None and mean.stride() == rstd.stride())
    token_dim = 1 - batch_dim
    scale, scale_target = equally_spaced(scales) if scales is not None else (b, 0)
    shift, shift_target = equally_spaced(shifts) if shifts is not None else (b, 0)
    targets = len(scales if scales is not None else shifts or ())
    grid, segments, partial = _programs(b, batch_dim, bounds, targets)
    _vector_kernel[grid](
        b,
        a,
        b if mean is None else mean,
        statistics,
        scale,
        shift,
        segments,
        partial,
        b.shape[-1],
        targets,
        b.stride(token_dim),
        b.stride(batch_dim),
        a.stride(token_dim),
        a.stride(batch_dim),
        statistics.stride(token_dim),
        statistics.stride(batch_dim),
        scale_target,
        shift_target,
        SCALE=scales is not None,
        SHIFT=shifts is not None,
        MEAN=mean is not None,
        STATISTICS=rstd is not None,
        STRETCH=STRETCH,
        BLOCK_TOKENS=BLOCK_TOKENS,
        BLOCK_FEATURES=BLOCK_FEATURES,
    )
    return partial


def _programs(
    b: Tensor, batch_dim: int, bounds: Bounds | None, targets: int
) -> tuple[tuple[int, int, int], Tensor, Tensor]:
    """The grid (segments, feature blocks, stretches), the segments, and room for the programs' sums."""
    parts = whole_rows(b.shape[batch_dim], b.shape[1 - batch_dim]) if bounds is None else bounds
    grid = (
        len(parts),
        blocks_of(b.shape[-1], BLOCK_FEATURES),
        blocks_of(max(1, *parts.lengths), STRETCH),
    )
    partial = torch.empty(grid[1] * grid[2], grid[0], targets, dtype=torch.float32, device=b.device)
    return grid, parts.on(b.device), partial


def embedding_dots(
    output_grad: Tensor,
    ids: Tensor,
    batch_dim: int,
    directions: Sequence[Tensor],
    bounds: Bounds | None = None,
) -> Tensor:
    """``sum_{t in g} B_t . D_k[id_t]``; ids shaped like B without its features."""
    b, token_dim = features_together(output_grad), 1 - batch_dim
    direction, direction_target = equally_spaced(directions)
    grid, segments, partial = _programs(b, batch_dim, bounds, len(directions))
    _embedding_kernel[grid](
        b,
        ids,
        direction,
        segments,
        partial,
        b.shape[-1],
        len(directions),
        b.stride(token_dim),
        b.stride(batch_dim),
        ids.stride(token_dim),
        ids.stride(batch_dim),
        direction_target,
        STRETCH=STRETCH,
        BLOCK_TOKENS=BLOCK_TOKENS,
        BLOCK_FEATURES=BLOCK_FEATURES,
    )
    return partial
