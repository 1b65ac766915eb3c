"""The two consumers of the taps: one fills directions, one scores rows against them."""

from __future__ import annotations

from torch import Tensor

from .direction import Directions
from .dots.elementwise import embedding_dots, embedding_gradient, row_gradients, vector_dots
from .dots.linear import weight_gradient_and_dots, weight_gradient_fp32
from .taps import Emission


class DirectionFiller:
    """Adds each layer's ``B^T A`` (and its bias's, norm's, embedding's kin) to one target's direction."""

    def __init__(self, directions: Directions, target: int) -> None:
        self.directions = directions
        self.target = target

    def __call__(self, e: Emission) -> None:
        def add(parameter, function) -> None:  # type: ignore[no-untyped-def]
            self.directions.accumulate(self.target, parameter, function)

        b, a = e.output_grad, e.activation
        if e.site.kind == "linear":
            assert a is not None
            add(e.weight, lambda out: weight_gradient_fp32(a, b, out))
        elif e.site.kind == "bias":
            add(e.weight, lambda out: out.add_(b.flatten(0, -2).sum(0, dtype=out.dtype)))
        elif e.site.kind == "embedding":
            assert a is not None
            add(e.weight, lambda out: embedding_gradient(b, a, out))
        elif e.site.kind == "norm":
            assert a is not None
            add(e.weight, lambda out: out.add_((b * a).flatten(0, -2).sum(0, dtype=out.dtype)))
            if e.bias is not None and e.bias.requires_grad:
                add(e.bias, lambda out: out.add_(b.flatten(0, -2).sum(0, dtype=out.dtype)))
        else:
            raise AssertionError(f"no direction for sites of kind {e.site.kind}")


class RowScorer:
    """Adds each layer's partial dots of one microbatch's rows to ``dots [b, K]`` (fp64)."""

    def __init__(self, directions: Directions, dots: Tensor) -> None:
        self.directions = directions
        self.dots = dots

    def __call__(self, e: Emission) -> None:
        # Under ZeRO-3 reading a direction is a collective, and every rank of the data-parallel group (same
        # tensor-parallel rank, so same answer here) makes the same choice.
        if not e.site.counts_here:
            return
        b, a, dim = e.output_grad, e.activation, e.site.batch_dim
        directions = self.directions.of(e.weight)
        if e.site.kind == "linear":
            assert a is not None
            e.weight_grad = weight_gradient_and_dots(a, b, directions, dim, self.dots)
        elif e.site.kind == "bias":
            vector_dots(row_gradients(b, dim, directions[0].dtype), directions, self.dots)
        elif e.site.kind == "embedding":
            assert a is not None
            embedding_dots(b, a, dim, directions, self.dots)
        elif e.site.kind == "norm":
            assert a is not None
            vector_dots(row_gradients(b * a, dim, directions[0].dtype), directions, self.dots)
            if e.bias is not None and e.bias.requires_grad:
                shifts = self.directions.of(e.bias)
                vector_dots(row_gradients(b, dim, directions[0].dtype), shifts, self.dots)
        else:
            raise AssertionError(f"no dots for sites of kind {e.site.kind}")
