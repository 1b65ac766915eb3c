"""Adam's elementwise work of a scored step, in one Triton pass each over what it reads and writes.

    condition   d_k       <-  J_k * grad L_k, and <grad L_k, w - Phi(0)> on the way      (jacobian.condition)
    idle        out       <-  Phi(0)                                                    (AdamStep.idle)
    inner       <d_k, vector>                                                           (Directions.inner_products)

The formulas are those of adam.py; Adam's coupled decay and the path estimators stay with torch's operations. A
program owns a block of elements; it reads the optimizer's state once for all targets. Blocks write their parts of a sum
side by side, which are added in fp64 in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dots.triton_launch import equally_spaced, of_target
from .adam import AdamStep

BLOCK = 2048


@triton.jit
def _condition_kernel(
    gradient_ptr,
    weights_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    clips_ptr,
    out_ptr,
    partial_ptr,
    start,
    stop,
    gradient_target,
    out_target,
    num_targets,
    gain,
    eps,
    seen,
    fresh,
    share,
    momentum,
    decay,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    places = start + program * BLOCK + tl.arange(0, BLOCK)
    inside = places < stop
    v = tl.load(exp_avg_sq_ptr + places, mask=inside, other=0.0) * seen
    if TERMS:
        still = tl.sqrt(v) + eps
        by_momentum = tl.load(exp_avg_ptr + places, mask=inside, other=0.0) * momentum / still
        by_decay = tl.load(weights_ptr + places, mask=inside, other=0.0) * decay
    for k in range(num_targets):
        g = tl.load(of_target(gradient_ptr, k, gradient_target) + places, mask=inside, other=0.0)
        if TERMS:
            partial = partial_ptr + (program * num_targets + k) * 2
            tl.store(partial, tl.sum(g * by_momentum, axis=0))
            tl.store(partial + 1, tl.sum(g * by_decay, axis=0))
        h = g * (tl.load(clips_ptr + k).to(tl.float32) * share)
        d = g * gain / (tl.sqrt(v + fresh * h * h) + eps)
        tl.store(of_target(out_ptr, k, out_target) + places, d.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _idle_kernel(
    weights_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    out_ptr,
    stop,
    eps,
    seen,
    momentum,
    decay,
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < stop
    w = tl.load(weights_ptr + places, mask=inside, other=0.0)
    m = tl.load(exp_avg_ptr + places, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq_ptr + places, mask=inside, other=0.0)
    moved = w - w * decay - m * momentum / (tl.sqrt(v * seen) + eps)
    tl.store(out_ptr + places, moved.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _inner_kernel(
    direction_ptr,
    vector_ptr,
    partial_ptr,
    stop,
    direction_target,
    num_targets,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    places = program * BLOCK + tl.arange(0, BLOCK)
    inside = places < stop
    vector = tl.load(vector_ptr + places, mask=inside, other=0.0).to(tl.float32)
    for k in range(num_targets):
        d = tl.load(of_target(direction_ptr, k, direction_target) + places, mask=inside, other=0.0).to(
            tl.float32
        )
        tl.store(partial_ptr + program * num_targets + k, tl.sum(d * vector, axis=0))


def condition(
    step: AdamStep,
    gradients: Sequence[Tensor],
    clips: Tensor,
    counted: Sequence[tuple[int, int]],
    out: Sequence[Tensor] | None = None,
) -> Tensor:
    """``jacobian.condition`` for Adam without coupled decay, first order.

    Args:
        step: whose vectors are fp32, on the gradients' device.
        gradients: K rows ``[n]`` of one buffer, fp32.
        clips: ``[K]``.
        counted: ranges of ``[0, n)``, in order, that count in the terms.
        out: K rows ``[n]`` of one buffer for the directions, in any precision; None: the gradients'.

    Returns:
        the terms, ``[2, K]`` fp64: momentum and decay part.
    """
    first, stride = equally_spaced(gradients)
    written, out_stride = equally_spaced(gradients if out is None else out)
    assert written.data_ptr() == (gradients if out is None else out)[0].data_ptr(), "not rows of one buffer"
    bc1, bc2 = step.corrections()
    terms = torch.zeros(2, len(gradients), dtype=torch.float64, device=first.device)
    for start, stop, counts in _ranges(counted, first.numel()):
        programs = triton.cdiv(stop - start, BLOCK)
        size = programs if counts else 1
        partial = torch.empty(size, len(gradients), 2, dtype=torch.float32, device=first.device)
        _condition_kernel[(programs,)](
            first,
            step.weights,
            step.exp_avg,
            step.exp_avg_sq,
            clips,
            written,
            partial,
            start,
            stop,
            stride,
            out_stride,
            len(gradients),
            step.gain,
            step.eps,
            step.beta2 / bc2,
            (1.0 - step.beta2) / bc2,
            step.stand_in,
            step.lr * step.beta1 / bc1,
            step.lr * step.weight_decay,
            TERMS=counts,
            BLOCK=BLOCK,
        )
        if counts:
            terms += partial.sum(0, dtype=torch.float64).t()
    return terms


def idle(step: AdamStep, out: Tensor) -> None:
    """``step.idle`` into ``out [n]``, in its precision; without coupled decay. ``out`` may be the weights."""
    bc1, bc2 = step.corrections()
    _idle_kernel[(triton.cdiv(out.numel(), BLOCK),)](
        step.weights,
        step.exp_avg,
        step.exp_avg_sq,
        out,
        out.numel(),
        step.eps,
        step.beta2 / bc2,
        step.lr * step.beta1 / bc1,
        step.lr * step.weight_decay,
        BLOCK=BLOCK,
    )


def inner_products(directions: Sequence[Tensor], vector: Tensor) -> Tensor:
    """``<d_k, vector>`` of K directions ``[n]``, ``[K]`` fp64; products and the sums of blocks are fp32."""
    first, stride = equally_spaced(directions)
    programs = triton.cdiv(vector.numel(), BLOCK)
    partial = torch.empty(programs, len(directions), dtype=torch.float32, device=vector.device)
    _inner_kernel[(programs,)](first, vector, partial, vector.numel(), stride, len(directions), BLOCK=BLOCK)
    return partial.sum(0, dtype=torch.float64)


def _ranges(counted: Sequence[tuple[int, int]], n: int) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, whether it counts) of all of ``[0, n)``."""
    place = 0
    for start, stop in counted:
        if start > place:
            yield place, start, False
        if stop > start:
            yield start, stop, True
        place = stop
    if place < n:
        yield place, n, False
