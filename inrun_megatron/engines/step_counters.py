"""How many steps an optimizer has taken, known on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Seen:
    """A counter as it was when it was last known to say ``steps``."""

    counter: Tensor
    version: int
    steps: int

    def holds(self, counter: Any) -> bool:
        return counter is self.counter and self.version == self.counter._version


class StepCounters:
    """How many steps an optimizer has taken on its tensors, without waiting for a device that counts them.

    torch counts on the GPU where Adam is fused or capturable. Such a counter is read when it is first seen; from then
    on the steps are counted here. It is read again where it is another tensor (load_state_dict makes new ones), or
    where it was written to between two steps, which torch's version of a tensor shows. A write through ``.data`` would
    not show. DeepSpeed 0.19 writes optimizer states in this way from elastic checkpoints only, which it refuses where
    steps are not counted in the parameter groups, as FusedAdam's are.

    Args:
        optimizer: the inner optimizer; ZeRO may show it one group at a time.
        always: also count for counters on the CPU, which are otherwise read each time.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, always: bool = False) -> None:
        self.always = always
        self._seen: dict[Tensor, _Seen] = {}
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def done(self, tensor: Tensor, counter: Any) -> int:
        """Steps taken on ``tensor``, which ``counter`` counts: a number or a tensor."""
        if not isinstance(counter, Tensor) or (counter.device.type == "cpu" and not self.always):
            return int(counter)
        seen = self._seen.get(tensor)
        if seen is None or not seen.holds(counter):
            seen = self._seen[tensor] = _Seen(counter, counter._version, int(counter))
        return seen.steps

    def remove(self) -> None:
        """Take the hooks out of the optimizer."""
        for hook in self._hooks:
            hook.remove()
        self._seen.clear()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # What the step then does to a version is its own affair: one or more, for all that is known here.
        for tensor, seen in self._shown(optimizer):
            if not seen.holds(optimizer.state.get(tensor, {}).get("step")):
                del self._seen[tensor]

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        may_be_undone = getattr(optimizer, "found_inf", None) is not None  # by a GradScaler, on the device
        for tensor, seen in self._shown(optimizer):
            if may_be_undone:
                del self._seen[tensor]
            elif tensor.grad is not None:
                seen.version, seen.steps = seen.counter._version, seen.steps + 1

    def _shown(self, optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, _Seen]]:
        if not self._seen:
            return []
        shown = (tensor for group in optimizer.param_groups for tensor in group["params"])
        return [(tensor, self._seen[tensor]) for tensor in shown if tensor in self._seen]
