"""The linear tap: Y = A W^T, with the communication that Megatron fuses into it.

Same algebra as megatron.core.tensor_parallel.layers.LinearWithGradAccumulationAndAsyncCommunication:

    sequence parallel:  A_full = all-gather(A) forward and again backward; dA = reduce-scatter(B W)
    all-reduce dgrad:   dA = all-reduce(B W)   (started before, finished after the weight gradient)
    weight gradient:    dW = B^T A, or what a consumer computed on its way

Buffers are allocated on the input's device, so it also runs without CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..dots.products import weight_gradient
from ..errors import UserError
from .emission import Call
from .routing import Routed


@dataclass
class LinearCall(Call):
    """A linear layer's call.

    Attributes:
        group: the tensor-parallel group of its collectives.
        dtype: of product and output, where it is another one than the input's (a router's).
        routed: of an expert: which tokens it sees.
    """

    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False
    allreduce_dgrad: bool = False
    dtype: torch.dtype | None = None
    routed: Routed | None = None

    @property
    def matrix(self) -> Tensor:
        """The weight as ``[out, in]``, in the type of the product."""
        return self.cast(self.weight.t() if self.site.transposed else self.weight)

    def cast(self, tensor: Tensor) -> Tensor:
        """In the type of the product."""
        return tensor if self.dtype is None else tensor.to(self.dtype)


class LinearTap(torch.autograd.Function):
    """``apply(input [s(/tp), b, in], weight | None, anchor | None, call) -> [s, b, out]``."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, anchor: Tensor | None, call: LinearCall
    ) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(input)
        total = _gather(input, call.group)[0] if call.sequence_parallel else input
        return torch.matmul(call.cast(total), call.matrix.t())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (output_grad,) = grad_outputs
        call: LinearCall = ctx.call
        (input,) = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1]
        needs_activation = needs_weight or call.emits

        gathering = None
        total = input
        if call.sequence_parallel and needs_activation:
            total, gathering = _gather(input, call.group, async_op=True)

        total = call.cast(total)
        input_grad = output_grad.matmul(call.matrix).to(input.dtype)
        if gathering is not None:
            gathering.wait()

        reducing = None
        if call.allreduce_dgrad:
            reducing = dist.all_reduce(input_grad, group=call.group, async_op=True)
        elif call.sequence_parallel:
            # Contiguous whatever the input is: NCCL writes one element after the other and asks for no strides.
            full_grad, input_grad = input_grad, input.new_empty(input.shape)
            reducing = dist.reduce_scatter_tensor(input_grad, full_grad, group=call.group, async_op=True)

        weight_grad = None
        if call.emits:
            weight_grad = call.emit(output_grad, activation=total, routed=call.routed).weight_grad
        if needs_weight and weight_grad is None:
            factors = (output_grad, total) if call.site.transposed else (total, output_grad)
            weight_grad = weight_gradient(*factors)
        if weight_grad is not None:
            weight_grad = weight_grad.to(call.weight.dtype)

        if reducing is not None:
            reducing.wait()
        return input_grad, (weight_grad if needs_weight else None), None, None


def linear(input: Tensor, call: LinearCall) -> Tensor:
    """``input @ call.weight.T`` through the tap. A bias has a tap of its own (``taps.bias.bias``). UserError: a call with one."""
    if call.bias is not None:
        raise UserError(
            f"layer {call.site.name}: linear() adds no bias; add taps.bias.bias(Call(site, run, bias), output) to its output"
        )
    call.refuse_autocast()
    return LinearTap.apply(input, call.attached(call.weight), call.anchor(input), call)


def _gather(
    input: Tensor, group: dist.ProcessGroup | None, async_op: bool = False
) -> tuple[Tensor, dist.Work | None]:
    """All-gather of sequence shards ``[s/tp, b, in] -> [s, b, in]``."""
    size = list(input.shape)
    size[0] *= dist.get_world_size(group)
    total = torch.empty(size, dtype=input.dtype, device=input.device)
    work = dist.all_gather_into_tensor(total, input.contiguous(), group=group, async_op=async_op)
    return total, work
