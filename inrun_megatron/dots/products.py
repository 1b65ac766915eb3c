"""Matrix products: the one that training takes, and those of bf16 and fp16 operands whose results are fp32 and never rounded.

On a GPU by cuBLAS, which accumulates in fp32 anyway and writes (or adds to) an fp32 result: torch's ``out_dtype``, since
2.8. Elsewhere from widened operands.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weight_gradient(activation: Tensor, output_grad: Tensor) -> Tensor:
    """``dW = B^T A [out, in]``: the product that training without scoring computes."""
    return output_grad.flatten(0, -2).t().matmul(activation.flatten(0, -2))


def bias_gradient(output_grad: Tensor) -> Tensor:
    """The sum over tokens ``[out]``, as training without scoring computes it."""
    return output_grad.flatten(0, -2).sum(0)


def weight_gradient_fp32(
    activation: Tensor, output_grad: Tensor, out: Tensor, *, overwrite: bool = False
) -> None:
    """``out += B^T A`` (``out = `` with ``overwrite``), fp32 accumulation and output whatever the buffers' precision."""
    a, b = activation.flatten(0, -2), output_grad.flatten(0, -2).t()
    if a.dtype == out.dtype:
        torch.mm(b, a, out=out) if overwrite else out.addmm_(b, a)
    elif overwrite:
        mm_fp32(b, a, out)
    else:
        add_mm_fp32(out, b, a)


def _native(operand: Tensor) -> bool:
    return operand.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out")


def mm_fp32(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``left @ right`` in fp32; ``out`` contiguous."""
    if _native(left):
        if out is None:
            return torch.mm(left, right, out_dtype=torch.float32)
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left.float(), right.float(), out=out)


def bmm_fp32(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of matrices ``[n, ., .]`` in fp32."""
    if _native(left):
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


def add_mm_fp32(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left @ right``; ``out`` fp32 and contiguous."""
    if _native(left):
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(left.float(), right.float())
