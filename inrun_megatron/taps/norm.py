"""The norm taps: LayerNorm and RMSNorm with per-token gradients of scale and shift.

    LayerNorm:  y = w * xhat + c,   xhat = (x - mean) * rstd
    RMSNorm:    y = w * xhat,       xhat = x * rstd

Only x and the per-token statistics are saved, as torch does. On a GPU both norms are torch's fused kernels, those of the
plain modules; on a CPU torch has none for RMSNorm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dots.precision import widened
from .emission import Call


@dataclass
class NormCall(Call):
    """A norm over the last dimension; ``rms`` chooses RMSNorm. ``weight`` is the scale, ``bias`` the shift.

    ``eps``: None, as torch.nn.RMSNorm has it by default, is that of the type it is computed in.
    """

    eps: float | None = 1e-5
    rms: bool = False


class NormTap(torch.autograd.Function):
    """``apply(x [s, b, h], weight | None, bias | None, anchor | None, call) -> [s, b, h]``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, anchor: Tensor | None, call: NormCall
    ) -> Tensor:
        ctx.call = call
        scale = call.weight.data
        if call.rms and _has_fused_rms(x, scale):
            output, rstd = torch.ops.aten._fused_rms_norm(x, list(scale.shape), scale, call.eps)
            ctx.save_for_backward(x, rstd)
            return output
        if call.rms:
            wide = widened(x)
            eps = torch.finfo(wide.dtype).eps if call.eps is None else call.eps
            rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
            ctx.save_for_backward(x, rstd)
            return (wide * rstd * scale).to(x.dtype)
        shift = None if call.bias is None else call.bias.data
        assert call.eps is not None
        output, mean, rstd = torch.native_layer_norm(x, scale.shape, scale, shift, call.eps)
        ctx.save_for_backward(x, rstd, mean)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (output_grad,) = grad_outputs
        call: NormCall = ctx.call
        x, rstd, *mean = ctx.saved_tensors
        needs_weight, needs_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        scale = call.weight.data
        weight_grad: Tensor | None = None
        bias_grad: Tensor | None = None
        normalised: Tensor | None = None
        if call.rms and _has_fused_rms(x, scale):
            input_grad, weight_grad = torch.ops.aten._fused_rms_norm_backward(
                output_grad.contiguous(), x, list(scale.shape), rstd, scale, [True, needs_weight]
            )
        elif call.rms:
            normalised = widened(x) * rstd
            upstream = output_grad.to(normalised.dtype)
            scaled = upstream * scale
            projection = (scaled * normalised).mean(-1, keepdim=True)
            input_grad = ((scaled - normalised * projection) * rstd).to(x.dtype)
            if needs_weight:
                weight_grad = (upstream * normalised).flatten(0, -2).sum(0).to(scale.dtype)
        else:
            shift = None if call.bias is None else call.bias.data
            input_grad, weight_grad, bias_grad = torch.ops.aten.native_layer_norm_backward(
                output_grad.contiguous(),
                x,
                list(scale.shape),
                mean[0],
                rstd,
                scale,
                shift,
                [True, needs_weight, needs_bias],
            )
        weight_grad, bias_grad = weight_grad if needs_weight else None, bias_grad if needs_bias else None
        if call.emits:
            call.emit(
                output_grad,
                x,
                bias=call.bias,
                mean=mean[0] if mean else None,
                rstd=rstd,
                weight_grad=weight_grad,
                bias_grad=bias_grad,
                _normalised=normalised,
            )
        return input_grad, weight_grad, bias_grad, None, None


def _has_fused_rms(x: Tensor, scale: Tensor) -> bool:
    return x.is_cuda and x.dtype == scale.dtype and hasattr(torch.ops.aten, "_fused_rms_norm_backward")


def norm(x: Tensor, call: NormCall) -> Tensor:
    """The norm of ``x`` over its last dimension, scaled by ``call.weight`` and shifted by ``call.bias``."""
    call.refuse_autocast()
    return NormTap.apply(x, call.attached(call.weight), call.attached(call.bias), call.anchor(x), call)
