"""Optimizer steps as functions, elementwise on tensors of any shape, and the diagonal J that makes directions.

Phi(g): the weights after a step with gradient g from a fixed state. Two kinds of J, which differ under Adam only:

at zero gradient   J = -dPhi/dg at g = 0: the first-order term of the game; undefined at Adam's first step
at the target      the second moment counts the clipped validation gradient h as well: J h is then the step that
                   Adam would take on h alone
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from tests.oracle_gpt import Parameters

# The share of the validation gradient that stands in for a second moment which has seen nothing yet (docs/algorithm.md).
STAND_IN = 0.1


@dataclass(frozen=True)
class OptimizerSpec:
    """Hyperparameters as torch.optim names them; `clip` is the largest gradient norm, 0 for no clipping.

    `adamw` decays the weights themselves, `adam` and `sgd` through the gradient. Biases and other one-dimensional
    parameters are never decayed (Megatron's weight-decay groups).
    """

    kind: Literal["sgd", "adam", "adamw"]
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    bias_correction: bool = True
    weight_decay: float = 0.0
    clip: float = 0.0

    @property
    def adaptive(self) -> bool:
        return self.kind != "sgd"

    def decay_of(self, name: str, value: Tensor) -> float:
        """Weight decay of one parameter."""
        return 0.0 if value.ndim == 1 or name.endswith(".bias") else self.weight_decay

    def clip_coefficient(self, norm: float) -> float:
        """What the gradient is multiplied by: 1 / max(1, (norm + 1e-6) / clip)."""
        return 1.0 if self.clip == 0.0 else 1.0 / max(1.0, (norm + 1e-6) / self.clip)


@dataclass(frozen=True)
class Moments:
    """Optimizer state of one tensor: momentum buffer (SGD) or first and second moment (Adam)."""

    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class OptimizerState:
    """`steps` taken so far, and the moments of every parameter (all zero before the first step)."""

    steps: int = 0
    moments: dict[str, Moments] = field(default_factory=dict)

    @classmethod
    def initial(cls, parameters: Parameters) -> OptimizerState:
        zeros = {n: Moments(torch.zeros_like(p), torch.zeros_like(p)) for n, p in parameters.items()}
        return cls(0, zeros)


def step_tensor(
    spec: OptimizerSpec,
    lr: float,
    steps: int,
    weight: Tensor,
    gradient: Tensor,
    moments: Moments,
    decay: Tensor | float,
) -> tuple[Tensor, Moments]:
    """One step of one tensor: new weight and moments. `gradient` is already clipped, `steps` were taken before."""
    if spec.kind != "adamw":
        gradient = gradient + decay * weight
    if spec.kind == "sgd":
        if spec.momentum == 0.0:
            return weight - lr * gradient, moments
        gain = 1.0 if steps == 0 else 1.0 - spec.dampening  # torch's first buffer is the gradient itself
        buffer = spec.momentum * moments.first + gain * gradient
        update = gradient + spec.momentum * buffer if spec.nesterov else buffer
        return weight - lr * update, Moments(buffer, moments.second)
    first = spec.beta1 * moments.first + (1 - spec.beta1) * gradient
    second = spec.beta2 * moments.second + (1 - spec.beta2) * gradient * gradient
    correction1, correction2 = _corrections(spec, steps + 1)
    update = first / correction1 / ((second / correction2).sqrt() + spec.eps)
    if spec.kind == "adamw":
        update = update + decay * weight
    return weight - lr * update, Moments(first, second)


def jacobian_tensor(
    spec: OptimizerSpec,
    lr: float,
    steps: int,
    weight: Tensor,
    moments: Moments,
    decay: Tensor | float,
    slope: Tensor | None = None,
) -> Tensor:
    """J of one tensor, shaped like it: at the clipped validation gradient `slope`, or at zero gradient (None).

    SGD: lr, times the share of the gradient that the momentum lets through. AdamW, at step t = steps + 1:
    lr (1-b1)/(1-b1^t) / (sqrt(vhat) + eps) with vhat = (b2 v + (1-b2) slope^2) / (1-b2^t). Adam decays through the
    gradient: e = decay * w is seen as well, and moving g moves vhat through it (second term).
    """
    if spec.kind == "sgd":
        if spec.momentum == 0.0:
            return torch.full_like(weight, lr)
        gain = 1.0 if steps == 0 else 1.0 - spec.dampening
        return torch.full_like(weight, lr * (1.0 + spec.momentum * gain if spec.nesterov else gain))
    correction1, correction2 = _corrections(spec, steps + 1)
    seen = decay * weight if spec.kind == "adam" else torch.zeros_like(weight)
    new = seen * seen + (0.0 if slope is None else slope * slope)
    root = ((spec.beta2 * moments.second + (1 - spec.beta2) * new) / correction2).sqrt()
    first = (spec.beta1 * moments.first + (1 - spec.beta1) * seen) / correction1
    bend = (1 - spec.beta2) / correction2 * torch.where(seen == 0, 0.0, seen / root)  # d root / d g
    return lr * ((1 - spec.beta1) / correction1 / (root + spec.eps) - first * bend / (root + spec.eps) ** 2)


def scalar_part(spec: OptimizerSpec, lr: float, steps: int) -> float:
    """What J is proportional to at the coming step beside vectors of the state: lr, under Adam lr / (1 - b1^t)."""
    if spec.kind == "sgd":
        gain = 1.0 if steps == 0 else 1.0 - spec.dampening
        return lr if spec.momentum == 0.0 else lr * (1.0 + spec.momentum * gain if spec.nesterov else gain)
    return lr / _corrections(spec, steps + 1)[0]


def step_all(
    spec: OptimizerSpec, lr: float, parameters: Parameters, gradients: Parameters, state: OptimizerState
) -> tuple[Parameters, OptimizerState]:
    """One step of all parameters with clipped gradients."""
    weights, moments = {}, {}
    for name, value in parameters.items():
        weights[name], moments[name] = step_tensor(
            spec, lr, state.steps, value, gradients[name], state.moments[name], spec.decay_of(name, value)
        )
    return weights, replace(state, steps=state.steps + 1, moments=moments)


def jacobian_all(
    spec: OptimizerSpec, lr: float, parameters: Parameters, state: OptimizerState, slopes: Parameters | None
) -> Parameters | None:
    """J of all parameters at a validation gradient, clipped here as a gradient would be, or at zero gradient (None).

    None at zero gradient where Adam has no state yet (its first step): it has no derivative there.
    """
    if slopes is None and spec.adaptive and state.steps == 0:
        return None
    share = 1.0 if state.steps == 0 else STAND_IN
    clip = 1.0 if slopes is None else share * spec.clip_coefficient(global_norm(slopes))
    jacobians = {}
    for name, value in parameters.items():
        slope = None if slopes is None else clip * slopes[name]
        decay = spec.decay_of(name, value)
        jacobians[name] = jacobian_tensor(spec, lr, state.steps, value, state.moments[name], decay, slope)
    return jacobians


def with_stand_in(spec: OptimizerSpec, state: OptimizerState, slopes: Parameters) -> OptimizerState:
    """The state whose next second moment is that of `state` plus (1 - b2) h^2, h the clipped stand-in."""
    share = (1.0 if state.steps == 0 else STAND_IN) * spec.clip_coefficient(global_norm(slopes))
    fresh = (1 - spec.beta2) / spec.beta2
    moments = {
        name: replace(old, second=old.second + fresh * (share * slopes[name]).square())
        for name, old in state.moments.items()
    }
    return replace(state, moments=moments)


def global_norm(gradients: Parameters) -> float:
    """2-norm over all distinct parameters (a tied weight is one parameter)."""
    return math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))


def _corrections(spec: OptimizerSpec, t: int) -> tuple[float, float]:
    return (1 - spec.beta1**t, 1 - spec.beta2**t) if spec.bias_correction else (1.0, 1.0)
