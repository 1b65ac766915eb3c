"""Estimators: where the validation gradient is taken, and what it is multiplied by.

The value of a set of samples S is ``U_k(S) = L_k(Phi_t(0)) - L_k(Phi_t(g_S))``. Every estimator is

    phi_i = c_t <d_k, g_i>,     d_k = J * sum_n q_n grad L_k(w_n)     (elementwise on the optimizer's shards)

    first_order   one node, w_t (base current) or Phi(0) (base drift: momentum and decay alone); J the step's Jacobian
    midpoint      one node, halfway between Phi(0) and Phi(c G); J = (Phi(0) - Phi(c G)) / (c G)
    simpson       Phi(0), halfway, Phi(c G) with weights 1/6, 4/6, 1/6; the same J

The path estimators are the Aumann-Shapley value of the step, the Shapley value of a game of many small players: a
coordinate's move ``Phi(0) - Phi(c G)`` is shared in proportion to ``g_i / G``, whatever the optimizer does on the way,
and what the move is worth is the integral of grad L_k along it. The integral of a gradient is the same over every path,
so the nodes lie on the straight line between the ends, where the quadrature is at its best. The values' sum is then the
quadrature of the true utility. Under SGD the midpoint is the paper's second-order value (arXiv 2406.11011, Theorem 4)
up to O(lr^3), without a Hessian-vector product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from .dots.backend import by_triton
from .errors import UserError
from .optimizers import AdamStep, Step, block_size

ESTIMATORS = ("first_order", "midpoint", "simpson")
BASES = ("current", "drift")
CREDITS = ("step", "trajectory")


@dataclass(frozen=True)
class Node:
    """A point at which the validation gradient is taken.

    Attributes:
        share: how far along the straight line from Phi(0) to Phi(c G); None: at w_t itself.
        weight: of its gradient.
    """

    share: float | None
    weight: float


@dataclass(frozen=True)
class Estimator:
    """Nodes of one estimator.

    Attributes:
        name, base: as given.
        nodes: points and weights; the weights add up to 1.
        follows_batch: whether G_t must be known first, by a second forward and backward of the batch.
    """

    name: str
    base: str
    nodes: tuple[Node, ...]
    follows_batch: bool

    @classmethod
    def of(cls, name: str, base: str = "current") -> Estimator:
        """Raises UserError on a name or base that does not exist."""
        if name not in ESTIMATORS:
            raise UserError(f"estimator {name!r} is none of {', '.join(ESTIMATORS)}")
        if base not in BASES:
            raise UserError(f"base {base!r} is none of {', '.join(BASES)}")
        if name == "midpoint":
            return cls(name, base, (Node(0.5, 1.0),), True)
        if name == "simpson":
            return cls(name, base, (Node(0.0, 1 / 6), Node(0.5, 4 / 6), Node(1.0, 1 / 6)), True)
        return cls(name, base, (Node(None if base == "current" else 0.0, 1.0),), False)

    @property
    def moves(self) -> bool:
        """Are the weights moved to take the gradient?"""
        return any(node.share is not None for node in self.nodes)

    @property
    def start(self) -> Node | None:
        """The node whose loss is the target's loss before the batch's step; None: evaluate at w_t."""
        return next((node for node in self.nodes if not node.share), None)


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


def place(step: Step, share: float, path: Tensor | None, out: Tensor) -> None:
    """``out [n] = Phi(0) + share (Phi(path) - Phi(0))``, in out's precision; ``path = c G``, None only at share 0."""
    moved: Tensor | None = None
    weights = step.weights
    if path is None and _fused(step, out):
        from .optimizers import triton_adam

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
        counted: stretches of the tensor that this rank counts in sums over all parameters.
        path: c G ``[n]`` for the path estimators; None: first order.
        out: K rows ``[n]`` that get the directions, in their precision; None: the gradients become them.

    Returns:
        ``<grad L_k, w - Phi(0)>`` over the counted stretches, momentum and decay part, ``[K]`` fp64 each.
    """
    device, home = gradients[0].device, step.weights.device
    if path is None and isinstance(clips, Tensor) and _fused(step, gradients[0]):
        from .optimizers import triton_adam

        momentum, decay = triton_adam.condition(step, gradients, clips, counted, out)
        return momentum, decay
    terms = torch.zeros(2, len(gradients), dtype=torch.float64, device=device)
    each_clip = list(clips.to(home)) if isinstance(clips, Tensor) else clips
    for here, part, work in blocks(step):
        start, stop = part.start, part.stop
        parts = [gradient[part] for gradient in gradients]
        # The optimizer's shard may lie on the CPU (offload) while directions lie where the layers are.
        near = [gradient.to(home) for gradient in parts]
        stretches = [
            (max(lo, start) - start, min(hi, stop) - start) for lo, hi in counted if lo < stop and hi > start
        ]
        for which, moved in enumerate(here.drift(work) if stretches else ()):
            if moved is None:
                continue
            vector, factor = moved
            for k, gradient in enumerate(near):
                for lo, hi in stretches:
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


def credit_factor(reach: Callable[[int], float], remaining: int | None) -> float:
    """A gradient's whole weight over its weight in its own step: ``sum_j reach(j)`` over the remaining steps.

    Args:
        reach: of the coming step (optimizers.Step.reach).
        remaining: steps of the run from the coming one on; None: no end.

    Returns:
        The sum; infinite where a momentum of 1 or more, which forgets nothing, meets a run without an end.
    """
    total, j, before = 0.0, 0, math.inf
    while remaining is None or j < remaining:
        weight = reach(j)
        # from the second step on it falls, or never does
        if remaining is None and j > 1 and weight >= before > 0.0:
            return math.inf
        total, j, before = total + weight, j + 1, weight
        if weight < 1e-9:
            break
    return total
