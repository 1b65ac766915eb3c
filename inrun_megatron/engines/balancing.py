"""What balances a mixture of experts and lies outside the loss: losses of the routers, and biases of their choices.

Auxiliary losses: megatron-core adds their gradients in the backward, behind the loss's back (megatron/core/transformer/moe/moe_utils.py:
MoEAuxLossAutoScaler), times a number that its training loop keeps up to date: what the loss itself is multiplied by on its way to
the gradient, here DeepSpeed's loss scale over the accumulation steps.

Biases (arXiv 2408.15664): added to an expert's score where experts are chosen, and moved after every step towards the experts that
were given fewer tokens than the average. Megatron-LM moves them where it reduces gradients (megatron/core/distributed/
finalize_model_grads.py: _update_router_expert_bias), which DeepSpeed does itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

_MODULE = "megatron.core.transformer.moe.moe_utils"
_silent = False


def scale_balancing_losses(engine: Any) -> RemovableHandle | None:
    """Keep that number up to date for ``engine``, in every forward of its module that has a backward; None where it has no experts.

    There is one number in a process: of two engines with experts, each's backward must follow its own forward.
    """
    from megatron.core.transformer.moe.moe_layer import MoELayer

    if not any(isinstance(module, MoELayer) for module in engine.module.modules()):
        return None
    scaler = sys.modules[_MODULE].MoEAuxLossAutoScaler

    def set_scale(*_: Any) -> None:
        if not torch.is_grad_enabled():
            return
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


class ExpertBiases:
    """Those of this rank's routers; without any every method does nothing, on this rank.

    Args:
        module: the model, or this stage of it.
        name_of: what the whole model calls a router, from its name in ``module``.
    """

    def __init__(self, module: nn.Module, name_of: Callable[[str], str] = str) -> None:
        from megatron.core.transformer.moe.router import TopKRouter

        self._routers = {
            name_of(name): router
            for name, router in module.named_modules()
            if isinstance(router, TopKRouter) and router.enable_expert_bias
        }
        for router in self._routers.values():  # engines cast buffers, and bf16 counts to 256
            router.local_tokens_per_expert = router.local_tokens_per_expert.float()
            router._maintain_float32_expert_bias()

    def update(self) -> None:
        """After a step: by what its microbatches' tokens were given. Collective over the ranks that share these layers."""
        if not self._routers:
            return
        from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias

        routers = list(self._routers.values())
        counts = torch.stack([router.local_tokens_per_expert for router in routers])
        biases = torch.stack([router.expert_bias for router in routers])
        rate = routers[0].config.moe_router_bias_update_rate
        for router, bias in zip(routers, get_updated_expert_bias(counts, biases, rate), strict=True):
            router.expert_bias.copy_(bias)
            router.local_tokens_per_expert.zero_()

    def state(self) -> dict[str, list[float]]:
        """Of all routers of the whole model. Collective over the world."""
        own = {name: router.expert_bias.tolist() for name, router in self._routers.items()}
        stages: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(stages, own)
        return {name: bias for stage in stages for name, bias in stage.items()}

    def restore(self, state: dict[str, list[float]]) -> None:
        """What ``state`` returned, in any layout; a router that it does not know begins at zero."""
        for name, router in self._routers.items():
            if name in state:
                router.expert_bias.copy_(torch.tensor(state[name]))
