"""Reading the coming step of the inner optimizer (torch's or DeepSpeed's SGD, Adam and AdamW)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..optimizers import AdamStep, ProxyStep, SGDStep, Step

ADAM_NAMES = {"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"}
SGD_NAMES = {"SGD"}
# Why there is none, by what their classes are called (torch, DeepSpeed, Megatron).
_NO_JACOBIAN = {
    "lion": ": its step is the sign of a moving average, whose derivative is 0 wherever it exists",
    "onebit": ": its step depends on what earlier steps left in the error feedback of their compression",
    "muon": ": its step orthogonalises whole matrices, so that no coordinate moves by its own gradient alone",
    "lamb": ": a norm of the whole layer's step scales each coordinate",
}


def require_known(optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError where the optimizer's step has no known Jacobian."""
    name = type(optimizer).__name__
    if name not in ADAM_NAMES | SGD_NAMES:
        reason = next((why for part, why in _NO_JACOBIAN.items() if part in name.lower()), "")
        raise UserError(
            f"optimizer {name} has no known Jacobian{reason} (known: {', '.join(sorted(ADAM_NAMES | SGD_NAMES))}); "
            f"use one of these, or the paper's SGD proxy with --shapley-optimizer sgd"
        )
    for group in optimizer.param_groups:
        for flag in ("amsgrad", "maximize"):
            if group.get(flag):
                raise UserError(f"optimizer {name} with {flag}=True has no known Jacobian; set {flag}=False")


def is_adam(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__name__ in ADAM_NAMES


def _decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """AdamW's decay? torch's Adam says so per group, DeepSpeed's by a mode of the optimizer."""
    if "decoupled_weight_decay" in group:
        return bool(group["decoupled_weight_decay"])
    mode = getattr(optimizer, "adam_w_mode", None)  # FusedAdam: 0 or 1; DeepSpeedCPUAdam: bool
    return type(optimizer).__name__ == "AdamW" if mode is None else bool(mode)


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
        for hook in self._hooks:
            hook.remove()
        self._seen.clear()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # What the step then does to a version is its own affair: one or more, for all that is known here.
        for tensor, seen in self._shown(optimizer):
            if not seen.holds(optimizer.state.get(tensor, {}).get("step")):
                del self._seen[tensor]

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        on_device = (
            getattr(optimizer, "found_inf", None) is not None
        )  # a GradScaler's: may have undone the step
        for tensor, seen in self._shown(optimizer):
            if on_device:
                del self._seen[tensor]
            elif tensor.grad is not None:
                seen.version, seen.steps = seen.counter._version, seen.steps + 1

    def _shown(self, optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, _Seen]]:
        if not self._seen:
            return []
        shown = (tensor for group in optimizer.param_groups for tensor in group["params"])
        return [(tensor, self._seen[tensor]) for tensor in shown if tensor in self._seen]


def coming_step(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    tensor: Tensor,
    proxy: bool = False,
    counters: StepCounters | None = None,
) -> Step:
    """The step that the inner optimizer will take on ``tensor`` (a flat fp32 shard or a parameter).

    Args:
        optimizer: the inner optimizer, not DeepSpeed's wrapper.
        group: the parameter group that holds the hyperparameters of ``tensor``.
        tensor: the key of the optimizer's state.
        proxy: the paper's SGD proxy instead of what the optimizer does.
        counters: of the optimizer; None: ask the device.
    """
    lr = float(group["lr"])
    weights = tensor.detach().reshape(-1)
    if proxy:
        return ProxyStep(lr, weights)
    state = optimizer.state.get(tensor, {})
    if not is_adam(optimizer):
        return SGDStep(
            lr=lr,
            weights=weights,
            momentum=float(group.get("momentum", 0.0)),
            dampening=float(group.get("dampening", 0.0)),
            nesterov=bool(group.get("nesterov", False)),
            weight_decay=float(group.get("weight_decay", 0.0)),
            momentum_buffer=None
            if state.get("momentum_buffer") is None
            else state["momentum_buffer"].reshape(-1),
        )
    # torch and DeepSpeedCPUAdam count steps per tensor, FusedAdam per group.
    done = state.get("step", group.get("step", 0))
    beta1, beta2 = group["betas"]
    return AdamStep(
        lr=lr,
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group.get("weight_decay", 0.0)),
        decoupled=_decoupled(optimizer, group),
        bias_correction=bool(group.get("bias_correction", True)),
        t=1 + (int(done) if counters is None else counters.done(tensor, done)),
        weights=weights,
        exp_avg=_moment(state, "exp_avg", weights),
        exp_avg_sq=_moment(state, "exp_avg_sq", weights),
    )


def _moment(state: dict[str, Any], name: str, weights: Tensor) -> Tensor:
    """A moment in fp32 (fp64 in fp64 runs); zeros before the first step, when there is no state yet."""
    if name not in state:
        return torch.zeros_like(weights)
    moment: Tensor = state[name].reshape(-1)
    return moment if moment.dtype == torch.float64 else moment.float()


def set_steps(
    optimizer: torch.optim.Optimizer,
    groups: list[dict[str, Any]],
    states: dict[int, dict[str, Any]],
    steps: dict[int, int],
) -> None:
    """Write the steps done (by parameter group) where this optimizer counts them: into parts of a state_dict.

    groups: its `param_groups`; states: its `state`, tensors by number.
    """
    kind = type(optimizer).__name__
    for number, group in enumerate(groups):
        if number not in steps:
            continue
        if kind == "FusedAdam":
            group["step"] = steps[number]
            continue
        done = steps[number]
        for parameter in group["params"]:
            if states.get(parameter):
                # A tensor for each: load_state_dict keeps them, and a common one would count every parameter's step.
                counted = done if kind == "DeepSpeedCPUAdam" else torch.tensor(float(done))
                states[parameter] = {"step": counted, **states[parameter]}
