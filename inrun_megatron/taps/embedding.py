"""The embedding tap: rows of a (possibly vocabulary-sharded) table.

The local id of a token that another rank owns is masked: its output row is zero and its gradient is
dropped, as in megatron.core.tensor_parallel.layers.VocabParallelEmbedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .emission import Call
from .routing import Routed


@dataclass
class EmbeddingCall(Call):
    """``padding_idx`` as in torch.nn.Embedding: that row gets no gradient. ``routed``: of experts' biases, their tokens."""

    padding_idx: int | None = None
    routed: Routed | None = None


class EmbeddingTap(torch.autograd.Function):
    """``apply(weight | None, anchor | None, ids [b, s], foreign [b, s] bool | None, call) -> [b, s, h]``."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor | None,
        anchor: Tensor | None,
        ids: Tensor,
        foreign: Tensor | None,
        call: EmbeddingCall,
    ) -> Tensor:
        ctx.call = call
        ctx.shape = call.weight.shape
        ctx.save_for_backward(ids, foreign)
        output = F.embedding(ids, call.weight.data)
        if foreign is not None:
            output.masked_fill_(foreign.unsqueeze(-1), 0.0)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (output_grad,) = grad_outputs
        call: EmbeddingCall = ctx.call
        ids, foreign = ctx.saved_tensors
        dropped = foreign
        if call.padding_idx is not None:
            padding = ids == call.padding_idx
            dropped = padding if foreign is None else padding | foreign
        if dropped is not None:
            output_grad = output_grad.masked_fill(dropped.unsqueeze(-1), 0.0)
        if call.emits:
            call.emit(output_grad, activation=ids, routed=call.routed)
        grad = None
        if ctx.needs_input_grad[0]:
            grad = _gradient(output_grad, ids, ctx.shape)
        return grad, None, None, None, None


def _gradient(output_grad: Tensor, ids: Tensor, shape: torch.Size) -> Tensor:
    if output_grad.is_cuda:  # adds up a token's gradients in fp32, where index_add_ would round each sum
        return torch.ops.aten.embedding_dense_backward(output_grad, ids, shape[0], -1, False)
    grad = torch.zeros(shape, dtype=output_grad.dtype)
    return grad.index_add_(0, ids.flatten(), output_grad.flatten(0, -2))


def embedding(ids: Tensor, foreign: Tensor | None, call: EmbeddingCall) -> Tensor:
    """Rows ``ids`` of ``call.weight``; zero where ``foreign``."""
    anchor = None if call.run is None else call.run.anchor_on(ids.device)
    return EmbeddingTap.apply(call.attached(call.weight), anchor, ids, foreign, call)
