"""The arithmetic of shapley/estimators.py on one optimizer tensor: points between Phi(0) and Phi(c G), and the Jacobian's product.

On a GPU Adam's is in Triton (triton_adam.py), everything else is elementwise torch, in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from ..dots.backend import by_triton
from .adam import AdamStep
from .step import Step, block_size


def blocks(step: Step) -> Iterator[tuple[Step, slice, Tensor]]:
    """The step in parts, small enough on a CPU for a dozen elementwise passes to stay in its cache.

    Yields each part's step, where it is, and a vector of its length to compute in (the same memory every time).
    """
    n, device = step.weights.numel(), step.weights.device
    size = block_size(n, device)
    work = torch.empty(size, dtype=torch.promote_types(step.weights.dtype, torch.float32), device=device)
    for start in range(0, n, size):
        part = slice(start, min(start + size, n))
        yield step.block(part), part, work[: part.stop - start]


def _fused(step: Step, vector: Tensor) -> TypeGuard[AdamStep]:
    """Whether the kernels of triton_adam.py serve this step and the vector that it writes."""
    return (
        isinstance(step, AdamStep)
        and not step.couples
        and step.weights.dtype == torch.float32
        and by_triton(step.weights, vector)
    )


def write_point(step: Step, share: float, path: Tensor | None, out: Tensor) -> None:
    """``out [n] = Phi(0) + share (Phi(path) - Phi(0))``, in out's precision; ``path = c G``, None only at share 0."""
    moved: Tensor | None = None
    weights = step.weights
    if path is None and _fused(step, out):
        from . import triton_adam

        triton_adam.idle(step, out)
        return
    for here, part, work in blocks(step):
        own = out[part]
        # Where layers use the optimizer's own weights, slope() still reads what they were.
        if own.dtype == work.dtype and own.device == work.device and out.data_ptr() != weights.data_ptr():
            moved = own
        elif moved is None or len(moved) != len(work):
            moved = torch.empty_like(work)
        here.idle(moved, work)
        if path is not None and share:
            along = path[part].to(device=moved.device, dtype=moved.dtype)
            moved.sub_(along * here.slope(along), alpha=share)
        if moved is not own:
            own.copy_(moved)


def condition(
    step: Step,
    gradients: Sequence[Tensor],
    clips: Sequence[float] | Tensor,
    counted: Sequence[tuple[int, int]],
    path: Tensor | None = None,
    out: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn K gradients ``[n]`` of one optimizer tensor into directions.

    Args:
        step: the coming step.
        gradients: grad L_k, fp32; not kept.
        clips: what the optimizer would multiply each of them by.
        counted: ranges of the tensor that this rank counts in sums over all parameters.
        path: c G ``[n]`` for the path estimators; None: first order.
        out: K rows ``[n]`` that get the directions, in their precision; None: the gradients become them.

    Returns:
        ``<grad L_k, w - Phi(0)>`` over the counted ranges, momentum and decay part, ``[K]`` fp64 each.
    """
    device, home = gradients[0].device, step.weights.device
    if path is None and isinstance(clips, Tensor) and _fused(step, gradients[0]):
        from . import triton_adam

        momentum, decay = triton_adam.condition(step, gradients, clips, counted, out)
        return momentum, decay
    terms = torch.zeros(2, len(gradients), dtype=torch.float64, device=device)
    each_clip = list(clips.to(home)) if isinstance(clips, Tensor) else clips
    for here, part, work in blocks(step):
        start, stop = part.start, part.stop
        parts = [gradient[part] for gradient in gradients]
        # The optimizer's shard may lie on the CPU (offload) while directions lie where the layers are.
        near = [gradient.to(home) for gradient in parts]
        ranges = [
            (max(lo, start) - start, min(hi, stop) - start) for lo, hi in counted if lo < stop and hi > start
        ]
        for which, moved in enumerate(here.drift(work) if ranges else ()):
            if moved is None:
                continue
            vector, factor = moved
            for k, gradient in enumerate(near):
                for lo, hi in ranges:
                    dot = torch.dot(gradient[lo:hi], vector[lo:hi].to(gradient.dtype)) * factor
                    terms[which, k] += dot
        _multiply(here, near, each_clip, None if path is None else path[part], work)
        for written, own in zip(parts if out is None else [row[part] for row in out], near, strict=True):
            if written is not own:
                written.copy_(own)
    return terms[0], terms[1]


def _multiply(
    step: Step,
    gradients: Sequence[Tensor],
    clips: Sequence[float | Tensor],
    path: Tensor | None,
    work: Tensor,
) -> None:
    if path is None:
        for gradient, clip in zip(gradients, clips, strict=True):
            step.precondition(gradient, clip, work)
        return
    along = path.to(device=gradients[0].device, dtype=gradients[0].dtype)
    for gradient, clip in zip(gradients, clips, strict=True):
        gradient.mul_(step.slope(along, gradient, clip))
