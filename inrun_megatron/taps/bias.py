"""The bias tap: a bias as an expanded view whose backward sees every token's gradient.

Megatron returns biases from its linear layers to be added in a fused kernel elsewhere
(``skip_bias_add``); broadcasting would then sum over tokens before anyone can look. The expanded view
costs no memory and its gradient arrives unreduced, ``[s, b, out]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dots.products import bias_gradient
from .emission import Call


class BiasTap(torch.autograd.Function):
    """``apply(bias [out] | None, anchor | None, call, size) -> [s, b, out]`` (a view)."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor | None, anchor: Tensor | None, call: Call, size: torch.Size) -> Tensor:
        ctx.call = call
        return call.weight.data.expand(size)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (output_grad,) = grad_outputs
        grad = ctx.call.emit(output_grad).weight_grad if ctx.call.emits else None
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return bias_gradient(output_grad) if grad is None else grad, None, None, None


def bias(call: Call, output: Tensor) -> Tensor:
    """``call.weight`` expanded to the shape of ``output [s, b, out]``."""
    return BiasTap.apply(call.attached(call.weight), call.anchor(output), call, output.shape)
