"""The losses that balance a mixture of experts, beside DeepSpeed's scaling of the loss.

megatron-core adds their gradients in the backward, behind the loss's back (megatron/core/transformer/moe/moe_utils.py:
MoEAuxLossAutoScaler), times a number that its training loop keeps up to date: what the loss itself is multiplied by on its way to
the gradient, here DeepSpeed's loss scale over the accumulation steps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

_MODULE = "megatron.core.transformer.moe.moe_utils"
_silent = False


def scale_balancing_losses(engine: Any) -> RemovableHandle | None:
    """Keep that number up to date for ``engine``, in every forward of its module; None where it has no experts."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    if not any(isinstance(module, MoELayer) for module in engine.module.modules()):
        return None
    scaler = sys.modules[_MODULE].MoEAuxLossAutoScaler

    def set_scale(*_: Any) -> None:
        loss_scale = engine.optimizer.loss_scale if engine.fp16_enabled() else 1.0
        share = 0.0 if _silent else float(loss_scale) / engine.gradient_accumulation_steps()
        scaler.main_loss_backward_scale = torch.tensor(share)

    return engine.module.register_forward_pre_hook(set_scale)  # type: ignore[no-any-return]


@contextmanager
def without_balancing_losses() -> Iterator[None]:
    """Inside, these losses have no gradient: they come to all rows of a microbatch, whichever of them the loss is of."""
    global _silent
    if _MODULE not in sys.modules:
        yield
        return
    scaler = sys.modules[_MODULE].MoEAuxLossAutoScaler
    before, scaler.main_loss_backward_scale, _silent = (
        scaler.main_loss_backward_scale,
        torch.tensor(0.0),
        True,
    )
    try:
        yield
    finally:
        scaler.main_loss_backward_scale, _silent = before, False
