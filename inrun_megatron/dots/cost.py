"""Which way to compute a linear layer's dots: a rule by shape, with the machine's measured rates.

Beside the weight gradient, which training computes anyway (T tokens, G segments, K targets, weight [out, in]):

    blocks       per segment a pass over accumulator and K directions:    G (K + 1) * out * in   elements moved
    fused        the same in one kernel: the directions alone are read:   G K * out * in         elements moved
    projection   A D^T for every target, then a dot per token:            2 K T * out * in       operations

Blocks cost per segment, projection per token: they meet at a number of tokens per segment that is the machine's
operations per element moved, whatever the weight. ``python -m benchmarks.dots`` measures rates and crossover
(docs/dots.md). Gram matrices need the direction as a product of the target's activations and output gradients, which the
optimizer's Jacobian destroys: they are a baseline only (benchmarks/baselines.py).

The rule knows shapes and the kind of device only, so that all ranks and all runs choose alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Form = Literal["blocks", "projection", "fused"]


@dataclass(frozen=True)
class Rates:
    """What a machine does per second.

    Attributes:
        operations: of a matrix product of directions' precision (fp32).
        moved: bytes read or written; of a weight's size, so from a cache where that is large enough.
        call: seconds that one operation costs at least.
        together_from: from so many directions on one matrix-vector product reads the gradient once instead of once per
            direction; None: a dot each, always.
    """

    operations: float
    moved: float
    call: float
    together_from: int | None = None


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
        return self.features_in * self.features_out


# One core of an AMD EPYC, fitted to `python -m benchmarks.dots`. With fewer than 4 directions a dot each is as fast; one
# product is 1.3 to 2 times faster at 4 and 16.
CPU = Rates(operations=8e10, moved=4.5e10, call=2.5e-6, together_from=4)
# NVIDIA H200, from its data sheet (fp32 67 TFLOPS, memory 4.8 TB/s) at 70%; not measured.
CUDA = Rates(operations=4.7e13, moved=3.4e12, call=1e-5)


def seconds(form: Form, shape: Shape, rates: Rates) -> float:
    """What a form costs beside the plain weight gradient."""
    weights, targets = shape.weights, shape.targets
    if form == "blocks":
        # The product adds to an accumulator in memory (read and written); then the dots read it and the directions.
        together = rates.together_from is not None and targets >= rates.together_from
        passes = 2 + targets + (1 if together else targets)
        return shape.segments * (4 * passes * weights / rates.moved + (1 + targets) * rates.call)
    if form == "fused":
        return rates.call + 4 * shape.segments * targets * weights / rates.moved
    narrow = min(shape.features_in, shape.features_out)
    operations = 2 * shape.tokens * weights / rates.operations
    return targets * (operations + 4 * 3 * shape.tokens * narrow / rates.moved + 3 * rates.call)


@lru_cache
def cheapest(shape: Shape, rates: Rates, *forms: Form) -> Form:
    """The cheapest of the forms; of equals the first."""
    return min(forms, key=lambda form: seconds(form, shape, rates))
