"""DeepSpeed's optimizer for bf16 at ZeRO stage 0 with anything but FusedAdam: a step that nobody asked for.

Upstream (deepspeed 0.19): `initialize_optimizer_states` of runtime/fp16/unfused_optimizer.py, called when it is built.
"""

from __future__ import annotations

from typing import Any

import torch


def forget_first_step(wrapper: Any) -> None:
    """Undo the step that an FP16_UnfusedOptimizer takes with zero gradients when it is built, to have its state allocated.

    That step decays the masters by the whole learning rate, whatever the warm-up, and is counted: Adam's bias correction
    would begin at t = 2, and SGD's momentum with the weight decay. The layers' own weights have not moved; the masters are
    theirs again, and the state is made anew in the first real step.
    """
    with torch.no_grad():
        for weights, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for weight, master in zip(weights, masters, strict=True):
                master.copy_(weight)
    wrapper.optimizer.state.clear()
