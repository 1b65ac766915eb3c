"""Reading the coming step of the inner optimizer (torch's or DeepSpeed's SGD, Adam and AdamW)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..optimizers import AdamStep, ProxyStep, SGDStep, Step
from .step_counters import StepCounters

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
    if name in ADAM_NAMES | SGD_NAMES and not _is_of(optimizer):
        raise UserError(
            f"optimizer {type(optimizer).__module__}.{name} has the name of one with a known Jacobian, and is none of torch's, "
            f"DeepSpeed's or Apex's: its state may be another; use one of these, or the paper's SGD proxy with "
            f"--shapley-optimizer sgd"
        )
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


def _is_of(optimizer: torch.optim.Optimizer) -> bool:
    """Is it torch's Adam, AdamW or SGD, a class of that name made of it, or DeepSpeed's or Apex's? Others (bitsandbytes)
    keep other states under the same name."""
    made_of = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
    return isinstance(optimizer, made_of) or type(optimizer).__module__.partition(".")[0] in (
        "deepspeed",
        "apex",
    )


def settings_of(group: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a parameter group that `coming_step` reads, those on a device left out: they would be waited for."""
    names = ("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov")
    return {name: group[name] for name in names if name in group and not isinstance(group[name], Tensor)}


def is_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Does the optimizer take Adam's or AdamW's step?"""
    return type(optimizer).__name__ in ADAM_NAMES


def _decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """AdamW's decay? torch's Adam says so per group, DeepSpeed's by a mode of the optimizer."""
    if "decoupled_weight_decay" in group:
        return bool(group["decoupled_weight_decay"])
    mode = getattr(optimizer, "adam_w_mode", None)  # FusedAdam: 0 or 1; DeepSpeedCPUAdam: bool
    return type(optimizer).__name__ == "AdamW" if mode is None else bool(mode)


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
    done = _steps_done(optimizer, group, tensor)
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


def _steps_done(optimizer: torch.optim.Optimizer, group: dict[str, Any], tensor: Tensor) -> Any:
    """What counts the steps taken on ``tensor``, a number or a tensor.

    torch and DeepSpeedCPUAdam count per tensor. FusedAdam steps a whole group by the count of its last tensor, and leaves
    those of the others at 0.
    """
    own = optimizer.state.get(tensor, {}).get("step", group.get("step", 0))
    if type(optimizer).__name__ != "FusedAdam":
        return own
    counts = (optimizer.state.get(other, {}).get("step", 0) for other in reversed(group["params"]))
    return next((count for count in counts if count), own)


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
        done = steps[number]
        for parameter in group["params"]:
            if states.get(parameter):
                # A tensor for each: load_state_dict keeps them, and a common one would count every parameter's step.
                counted = done if kind in ("DeepSpeedCPUAdam", "FusedAdam") else torch.tensor(float(done))
                states[parameter] = {"step": counted, **states[parameter]}
