"""The tap of experts' linear layers whose weights are one parameter: Y_e = A_e W_e^T, tokens in the order of their experts.

Shape legend: E experts, n tokens of all of them together, A ``[n, in]``, B ``[n, out]``, W ``[E, out, in]`` or, transposed,
``[E, in, out]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dots.products import weight_gradient
from .emission import Call
from .routing import Routed, Routing


@dataclass(kw_only=True)
class StackedCall(Call):
    """A call of all experts at once."""

    routing: Routing

    def matrices(self) -> list[Tensor]:
        """The weights as ``[out, in]``."""
        return list((self.weight.mT if self.site.transposed else self.weight).unbind())


class StackedTap(torch.autograd.Function):
    """``apply(input [n, in], weight | None, anchor | None, call) -> [n, out]``."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, anchor: Tensor | None, call: StackedCall
    ) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(input)
        return _products(input, call.matrices(), call.routing)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (output_grad,) = grad_outputs
        call: StackedCall = ctx.call
        (input,) = ctx.saved_tensors
        input_grad = _products(output_grad, [matrix.t() for matrix in call.matrices()], call.routing)
        weight_grad = None
        if call.emits:
            weight_grad = call.emit(output_grad, activation=input, routed=Routed(call.routing)).weight_grad
        if ctx.needs_input_grad[1] and weight_grad is None:
            factors = (output_grad, input) if call.site.transposed else (input, output_grad)
            split = (factor.split(call.routing.sizes) for factor in factors)
            weight_grad = torch.stack([weight_gradient(a, b) for a, b in zip(*split, strict=True)])
        return input_grad, (weight_grad if ctx.needs_input_grad[1] else None), None, None


def _products(tokens: Tensor, matrices: list[Tensor], routing: Routing) -> Tensor:
    """``tokens_e @ matrix_e.T`` of every expert, one after the other."""
    own = zip(tokens.split(routing.sizes), matrices, strict=True)
    return torch.cat([part @ matrix.t() for part, matrix in own])


def stacked(input: Tensor, call: StackedCall) -> Tensor:
    """Every expert's linear layer on its own tokens."""
    call.refuse_autocast()
    return StackedTap.apply(input, call.attached(call.weight), call.anchor(input), call)
