"""What DeepSpeed has to be told about gradients under tensor parallelism.

Under sequence parallelism each rank's gradient of a norm's weight or of a row-parallel bias comes from its part of the
sequence only; that of a norm of queries or keys by head comes from the rank's own heads, always. Megatron-LM's own
data-parallel wrapper sums them over the tensor-parallel group (megatron/core/distributed/finalize_model_grads.py,
`_allreduce_non_tensor_model_parallel_grads`); DeepSpeed does not, and the replicas would drift apart silently.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle


def sum_partial_gradients(module: torch.nn.Module, group: dist.ProcessGroup) -> list[RemovableHandle]:
    """Sum the gradient of every parameter marked `sequence_parallel` or `own_heads`, of which each rank of `group` has a part.

    A tensor hook on the leaf: autograd calls it with the gradient of one backward pass before `AccumulateGrad`, so
    that all of DeepSpeed's stages, which hook in after the accumulation, see the whole gradient. The sum is taken in
    fp32. All ranks of `group` run the same graph and so call the hooks in the same order.
    """

    def summed(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient.clone()
        dist.all_reduce(total, group=group)
        return total.to(gradient.dtype)

    if group.size() == 1:
        return []
    return [
        parameter.register_hook(summed)
        for parameter in module.parameters()
        if parameter.requires_grad
        and (getattr(parameter, "sequence_parallel", False) or getattr(parameter, "own_heads", False))
    ]


def mark_tensor_parallel_gradients(module: torch.nn.Module) -> list[RemovableHandle]:
    """Put Megatron's mark of a tensor-parallel shard on the gradients of those parameters, too.

    DeepSpeed's optimizer for bf16 and fp16 at ZeRO stage 0 with anything but FusedAdam
    (deepspeed/runtime/fp16/unfused_optimizer.py) takes the gradient norm over a list of gradients and looks for the
    mark there, where nobody put it: it counts the shards of tensor-parallel rank 0 only, and clips by that norm.
    """

    def mark(parameter: torch.Tensor) -> None:
        parameter.grad.tensor_model_parallel = True  # type: ignore[union-attr]

    return [
        parameter.register_post_accumulate_grad_hook(mark)
        for parameter in module.parameters()
        if getattr(parameter, "tensor_model_parallel", False) and parameter.requires_grad
    ]


def keep_fp32_norm(engine: Any) -> None:
    """Let `engine.get_global_grad_norm()` answer in fp32 at ZeRO stage 0 too, where gradients are clipped.

    Replaces `engine.clip_fp32_gradients` by the same clipping. DeepSpeed drops the norm there, and under a pipeline it is
    wrong: `clip_grad_norm_` (deepspeed/runtime/utils.py) counts what is not tensor-parallel on model-parallel rank 0 alone,
    so that the norms and biases of all later stages are missing, and tied weights twice. Its ZeRO optimizers count them right.
    """
    from deepspeed.runtime.utils import clip_grad_norm_

    def clip_fp32_gradients() -> None:
        maximum = float(engine.gradient_clipping())
        if engine.pipeline_parallelism:
            norm = _clip_pipeline(engine, maximum)
        else:
            norm = float(
                clip_grad_norm_(parameters=engine.module.parameters(), max_norm=maximum, mpu=engine.mpu)
            )
        engine._global_grad_norm = norm

    engine.clip_fp32_gradients = clip_fp32_gradients


def _clip_pipeline(engine: Any, maximum: float) -> float:
    """Clip this stage's gradients by the norm over all stages and tensor-parallel ranks."""
    first = engine.mpu.get_slice_parallel_rank() == 0
    own = [p for p in engine.module.parameters() if p.grad is not None]
    counted = [
        p.grad
        for p in own
        if not getattr(p, "ds_pipe_replicated", False)
        and (first or getattr(p, "tensor_model_parallel", False))
    ]
    nothing = torch.zeros((), device=engine.device)  # of a stage whose gradients all count elsewhere
    squares = torch.stack([nothing, *(torch.linalg.vector_norm(g.float()).square() for g in counted)]).sum()
    dist.all_reduce(squares, group=engine.mpu.get_model_parallel_group())
    norm = float(squares.sqrt())
    factor = min(1.0, maximum / (norm + 1e-6))
    if factor < 1.0:
        for parameter in own:
            parameter.grad.mul_(factor)  # type: ignore[union-attr]
    return norm
