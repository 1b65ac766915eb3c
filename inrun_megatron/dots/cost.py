"""Which way to compute a linear layer's dots: a rule by shape, with the machine's measured rates.

Beside the weight gradient, which training computes anyway (T tokens, G segments, K targets, weight [out, in]):

    blocks       the accumulator written and read; per direction both read:   G (2 + 2 K) * out * in   elements moved
    fused        the same in one kernel: the directions alone are read:       G K * out * in           elements moved
    projection   A D^T for every target, then a dot per token:                2 K T * out * in         operations

Blocks and the kernel cost per segment, projection per token: they meet at a number of tokens per segment that is the
machine's operations per element moved, whatever the weight. ``python -m benchmarks.dots`` measures rates and crossover
(docs/dots.md). Gram matrices need the direction as a product of the target's activations and output gradients, which the
optimizer's Jacobian destroys: they are a baseline only (benchmarks/baselines.py).

The rule knows shapes and the kind of device only, so that all ranks and all runs choose alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Form = Literal["blocks", "projection", "fused"]


@dataclass(frozen=True)
class Shape:
    """One layer's buffers in one backward call."""

    tokens: int  # of all rows
    segments: int
    features_in: int
    features_out: int
    targets: int

    @property
    def weights(self) -> int:
        """Elements of the layer's weight."""
        return self.features_in * self.features_out


Rule = Callable[[Form, Shape], float]
"""Seconds that a form takes beside the plain weight gradient."""

# With this many directions or more one matrix-vector product reads a CPU's accumulator once instead of once per direction;
# 1.3 to 2 times faster at 4 and 16, no faster with fewer.
TOGETHER_FROM = 4


# One core of an AMD EPYC, fitted to ``python -m benchmarks.dots``: fp32 operations and bytes (of a weight's size, so from a
# cache) per second.
CPU_OPERATIONS, CPU_MOVED = 8e10, 4.5e10


def cpu(form: Form, shape: Shape) -> float:
    """One core of an AMD EPYC, fp32."""
    operations, moved, call = CPU_OPERATIONS, CPU_MOVED, 2.5e-6
    weights, targets = shape.weights, shape.targets
    if form == "blocks":
        # The product adds to an accumulator in memory (read and written); then the dots read it and the directions.
        passes = 2 + targets + (1 if targets >= TOGETHER_FROM else targets)
        return shape.segments * (4 * passes * weights / moved + (1 + targets) * call)
    narrow = min(shape.features_in, shape.features_out)
    products = 2 * shape.tokens * weights / operations
    return targets * (products + 4 * 3 * shape.tokens * narrow / moved + 3 * call)


def gpu(form: Form, shape: Shape) -> float:
    """An NVIDIA H200, fitted to measured times of bf16 buffers and directions (docs/dots.md)."""
    operations, moved, call = 7.9e14, 4.2e12, GPU_CALL
    weights, targets, segments = shape.weights, shape.targets, shape.segments
    if form == "blocks":  # fp32 blocks are written and read, the directions read once per block
        return segments * weights * (8 / moved + (targets - 1) * 5e-13) + 3 * call
    if form == "fused":  # the product is slower than cuBLAS's; directions are read once per segment
        slower = 0.22 * 2 * shape.tokens * weights / operations
        # A weight of few tiles leaves processors idle.
        idle = 1.5 * 2 * shape.tokens * max(0, FULL - weights) / operations
        return slower + idle + segments * weights * (1e-13 + targets * 5.5e-13) + call
    narrow = min(shape.features_in, shape.features_out)
    products = 2 * shape.tokens * weights / operations
    return targets * (products + 4 * 3 * shape.tokens * narrow / moved + 3 * call)


GPU_CALL = 5e-6
# Weights whose tiles of 128 x 128 keep an H200's 132 processors busy, two on each.
FULL = 264 * 128 * 128


def gpu_wide(form: Form, shape: Shape) -> float:
    """The same with fp32 directions: a projection is a product in fp32."""
    return gpu(form, shape) * (16.0 if form == "projection" else 1.0)


@lru_cache
def cheapest(shape: Shape, rule: Rule, *forms: Form) -> Form:
    """The cheapest of the forms; of equals the first."""
    return min(forms, key=lambda form: rule(form, shape))
