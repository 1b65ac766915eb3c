"""The two consumers of the taps: one fills directions, one scores rows, or their parts, against them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Parameter

from ..directions import Directions
from ..dots.backend import by_triton
from ..dots.elementwise import (
    embedding_dots,
    embedding_gradient,
    row_gradients,
    sum_of_tokens,
    token_embedding_dots,
    token_vector_dots,
)
from ..dots.late import LateDots
from ..dots.linear import weight_gradient_and_dots
from ..dots.precision import wide
from ..dots.products import bias_gradient, weight_gradient_fp32
from ..dots.projection import token_dots
from ..dots.routed import RoutedParts
from ..dots.segments import Bounds, Segments
from ..errors import UserError
from ..taps import Emission, Routing


class DirectionFiller:
    """Adds the gradient of each layer's parameter to one target's direction: ``B^T A`` of a linear layer, and so on.

    ``last``: this backward is the last one to add to it.
    """

    def __init__(self, directions: Directions, target: int, *, last: bool = False) -> None:
        self.directions = directions
        self.target = target
        self.last = last

    def __call__(self, e: Emission) -> None:
        b = e.output_grad
        match e.site.kind:
            case "linear":
                factors = e.factors
                self._add(
                    e, e.weight, lambda out, fresh: weight_gradient_fp32(*factors, out, overwrite=fresh)
                )
            case "experts":
                self._add(e, e.weight, lambda out, fresh: _add_experts(e, out, fresh))
            case "bias":
                self._add_sum(e, e.weight, sum_of_tokens(b))
            case "embedding":
                ids = e.input
                self._add(
                    e, e.weight, lambda out, fresh: embedding_gradient(b, ids, out.zero_() if fresh else out)
                )
            case "norm":
                scale, shift = norm_gradients(e, fused=by_triton(b) and b.dtype != torch.float64)
                self._add_sum(e, e.weight, scale)
                if e.bias is not None and e.bias.requires_grad:
                    self._add_sum(e, e.bias, shift)
            case kind:
                raise AssertionError(f"no direction for sites of kind {kind}")

    def _add(self, e: Emission, parameter: Parameter, add_to: Callable[[Tensor, bool], None]) -> None:
        self.directions.accumulate(self.target, parameter, add_to, last=self.last, layer=e.site.name)

    def _add_sum(self, e: Emission, parameter: Parameter, total: Tensor) -> None:
        def add_to(out: Tensor, fresh: bool) -> None:
            out.copy_(total) if fresh else out.add_(total)

        self._add(e, parameter, add_to)


def _add_experts(e: Emission, out: Tensor, fresh: bool) -> None:
    for own, (a, b) in zip(out, _by_expert(e), strict=True):
        weight_gradient_fp32(a, b, own, overwrite=fresh)


def _by_expert(e: Emission) -> Iterator[tuple[Tensor, Tensor]]:
    """(A, B) of every expert whose weight is a part of the parameter."""
    assert e.routed is not None
    sizes = e.routed.routing.sizes
    yield from zip(*(factor.split(sizes) for factor in e.factors), strict=True)


def norm_gradients(e: Emission, *, fused: bool) -> tuple[Tensor, Tensor]:
    """Of a norm's scale and shift over all tokens, each ``[h]`` in fp32 or wider; ``fused``: by the Triton kernel."""
    if fused and e.rstd is not None and e.rstd.dtype == torch.float32:
        from ..dots import triton_norms  # see backend.py

        return triton_norms.gradients(e.output_grad, e.input, e.mean, e.rstd)
    return sum_of_tokens(e.output_grad * e.normalised()), sum_of_tokens(e.output_grad)


class RowScorer:
    """Adds each layer's partial dots of one microbatch's rows to ``dots [b, K]`` (fp64); of their parts
    ``[n, K]`` with segments. They are complete after ``flush()``."""

    def __init__(self, directions: Directions, dots: Tensor, segments: Segments | None = None) -> None:
        self.directions = directions
        self.dots = dots
        self.segments = segments
        # Vectors and embeddings in one Triton pass; on CPUs, and in fp64, by torch's operations.
        self.fused = by_triton(dots)
        self.seen = False  # has any layer emitted?
        self._rows = len(dots) if segments is None else segments.rows
        self._one_row = segments is None and len(dots) == 1  # so that the microbatch's gradient is its own
        self._late = LateDots(dots)
        # Of layers of experts, until their backward has let go of the routing.
        self._routed: WeakKeyDictionary[Routing, RoutedParts] = WeakKeyDictionary()

    def __call__(self, e: Emission) -> None:
        self.seen = True
        # Under ZeRO-3 reading a direction is a collective, and every rank of the data-parallel group (same
        # tensor-parallel rank, so same answer here) makes the same choice.
        if not e.site.counts_here:
            return
        require_rows(e, self._rows, self.segments)
        match e.site.kind:
            case "linear":
                self._linear(e)
            case "experts":
                self._experts(e)
            case "bias":
                self._bias(e)
            case "embedding":
                self._embedding(e)
            case "norm":
                self._norm(e)
            case kind:
                raise AssertionError(f"no dots for sites of kind {kind}")

    def route(self, routing: Routing) -> None:
        """Experts are about to see these tokens."""
        require_tokens(routing, self._rows, self.segments)
        parts = routing.rows(self._rows)
        if self.segments is not None:
            parts = self.segments.part_of(parts, routing.positions(self._rows))
        self._routed[routing] = RoutedParts(parts, routing.owners, routing.sizes, len(self.dots))

    def flush(self) -> None:
        """Add up what layers have left."""
        self._late.flush()

    def _linear(self, e: Emission) -> None:
        directions = self.directions.of(e.weight)
        if e.routed is not None:
            parts, expert = self._routed[e.routed.routing], e.routed.expert
            assert expert is not None
            e.weight_grad = parts.weight_gradient_and_dots(expert, *e.factors, directions, self._late)
            return
        if self.segments is not None and e.site.sequence_shard[1] > 1:
            # A plain layer among Megatron's sees a shard of the sequence, where a row's parts are no whole blocks.
            self._add_tokens(e, token_dots(*e.factors, directions))
            return
        grad = weight_gradient_and_dots(*e.factors, directions, e.site.batch_dim, self._late, self.segments)
        if not e.site.replicated:
            e.weight_grad = grad

    def _experts(self, e: Emission) -> None:
        assert e.routed is not None
        parts = self._routed[e.routed.routing]
        of_experts = zip(*self.directions.of(e.weight), strict=True)
        gradients = [
            parts.weight_gradient_and_dots(expert, a, b, directions, self._late)
            for expert, ((a, b), directions) in enumerate(zip(_by_expert(e), of_experts, strict=True))
        ]
        if not e.site.replicated:
            e.weight_grad = torch.stack(gradients)

    def _bias(self, e: Emission) -> None:
        directions = self.directions.of(e.weight)
        # Whole rows go through torch everywhere: their sums make the bias's gradient, too, and one call takes many layers' dots.
        if self.segments is not None and self._by_kernel(e):
            self._late.add_parts(
                _kernels().bias_dots(e.output_grad, e.site.batch_dim, directions, self._bounds(e))
            )
            return
        if self._one_row:  # its gradient is that of the bias, bit for bit
            e.weight_grad = bias_gradient(e.output_grad)
            self._late.add_vectors(e.weight_grad, directions)
            return
        rows = self._add_vectors(e, e.output_grad, directions)
        if rows is not None and not e.site.replicated:
            e.weight_grad = rows.sum(0).to(e.weight.dtype)

    def _embedding(self, e: Emission) -> None:
        b, ids, dim = e.output_grad, e.input, e.site.batch_dim
        directions = self.directions.of(e.weight)
        if e.routed is not None:
            self.dots += self._routed[e.routed.routing].sums(token_embedding_dots(b, ids, directions))
        elif self._by_kernel(e):
            self._late.add_parts(_kernels().embedding_dots(b, ids, dim, directions, self._bounds(e)))
        elif self.segments is None:
            embedding_dots(b, ids, dim, directions, self.dots)
        else:
            self._add_tokens(e, token_embedding_dots(b, ids, directions))

    def _norm(self, e: Emission) -> None:
        b, scales = e.output_grad, self.directions.of(e.weight)
        shifts = self.directions.of(e.bias) if e.bias is not None and e.bias.requires_grad else None
        if self._by_kernel(e):
            self._late.add_parts(
                _kernels().norm_dots(
                    b, e.input, e.site.batch_dim, scales, shifts, self._bounds(e), e.mean, e.rstd
                )
            )
            return
        if self._one_row and e.weight_grad is not None:  # as of a bias
            self._late.add_vectors(e.weight_grad, scales)
            if shifts is not None:
                assert e.bias_grad is not None
                self._late.add_vectors(e.bias_grad, shifts)
            return
        self._add_vectors(e, b * e.normalised(), scales)
        if shifts is not None:
            self._add_vectors(e, b, shifts)

    def _by_kernel(self, e: Emission) -> bool:
        return self.fused and e.output_grad.dim() == 3 and e.output_grad.dtype != torch.float64

    def _bounds(self, e: Emission) -> Bounds | None:
        return None if self.segments is None else self.segments.shard_bounds(*e.site.sequence_shard)

    def _add_vectors(self, e: Emission, tokens: Tensor, directions: Sequence[Tensor]) -> Tensor | None:
        """Dots of a vector parameter whose gradient is the sum of ``tokens [s, b, h]``; returns the rows' ``[b, h]``."""
        if self.segments is not None:
            self._add_tokens(e, token_vector_dots(tokens, directions))
            return None
        gradients = row_gradients(tokens, e.site.batch_dim, wide(directions[0].dtype))
        self._late.add_vectors(gradients, directions)
        return gradients

    def _add_tokens(self, e: Emission, products: Tensor) -> None:
        """Dots of single tokens ``[s, b, K]`` (of a token's heads ``[s, b, heads, K]``), added up by part."""
        assert self.segments is not None
        if products.dim() > 3:
            products = products.flatten(2, -2).sum(2)
        self.dots += self.segments.sums(products, e.site.batch_dim, *e.site.sequence_shard)


def _kernels() -> Any:
    from ..dots import triton_elementwise  # see backend.py

    return triton_elementwise


def require_tokens(routing: Routing, rows: int, segments: Segments | None = None) -> None:
    """Experts must be given the tokens of all rows of the microbatch."""
    wanted = rows if segments is None else segments.rows * segments.positions
    if routing.total % wanted if segments is None else routing.total != wanted:
        raise UserError(
            f"a mixture-of-experts layer routes {routing.total} tokens of a microbatch of {rows} rows: values need layers that "
            f"see every token of each"
        )


def require_rows(e: Emission, rows: int, segments: Segments | None = None) -> None:
    """The layer must see all rows of the microbatch; where they are cut, the tokens that are cut."""
    if e.routed is not None:
        return  # see require_tokens
    shape, dim = list(e.output_grad.shape[:-1]), e.site.batch_dim
    if segments is None:
        ids = len(shape) == 1 and e.site.kind == "embedding"
        if len(shape) <= dim or shape[dim] != rows or (ids and e.run.may_be_positions(rows)):
            raise UserError(
                f"layer {e.site.name} sees tokens of shape {shape} with rows along dimension {dim}, but the microbatch has "
                f"{rows} rows: values of samples need layers that see each of them (expand a broadcast input first; where the "
                f"model broadcasts ids [s] or joins rows and positions, give samples() the loss mask [b, s] as tokens)"
            )
        return
    expected = [segments.positions // e.site.sequence_shard[1]]
    expected.insert(dim, segments.rows)
    # A norm of queries or keys sees heads, too; where batch comes first they may come before the positions.
    seen = shape if e.site.kind == "linear" or (dim == 0 and shape[1:2] == shape[2:3]) else shape[:2]
    if seen != expected:
        raise UserError(
            f"layer {e.site.name} sees tokens of shape {shape}, but the samples are cut as {expected}: parts of "
            f"samples need layers that keep rows and positions; score whole samples (granularity sample)"
        )
