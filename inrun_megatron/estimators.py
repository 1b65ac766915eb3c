"""The direction of an estimator: what the optimizer's step makes of a gradient.

The value of a set of samples S is ``U_k(S) = L_k(Phi_t(0)) - L_k(Phi_t(g_S))``. To first order,

    phi_i = c_t <d_k, g_i>,     d_k = J_k grad L_k(w_t)     (J diagonal, elementwise on the optimizer's shards)

    SGD     J = lr * (1 - dampening) (* (1 + momentum (1 - dampening)) with Nesterov)     arXiv 2406.11011, Theorem 3
    Adam    J_k = lr (1 - b1) / bc1 / den_k,     den_k = sqrt((b2 v + (1 - b2) h_k^2) / bc2) + eps
            bc1 = 1 - b1^t, bc2 = 1 - b2^t, v from before the step (optimizer-aware form after arXiv 2602.00329)
            h_k = a tenth of grad L_k(w_t), clipped as the optimizer clips (all of it at t = 1)

``h_k = 0`` would be the derivative of the step at zero gradient. That is ``lr / eps`` where the second moment
is still zero: at the first step, and later in every embedding row that a token touches for the first time. With
h_k the direction is bounded by a few of the optimizer's own steps, and it is the derivative up to a hundredth of
(1 - b2) once v has settled. docs/algorithm.md has the measurements. With coupled decay u = decay * w (Adam's, not AdamW's) u^2 joins h_k^2 and
the step's dependence on u through the second moment is kept: ``- lr m0 (1 - b2) u / (bc2 sqrt(v0) den^2)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

# How much of the validation gradient stands in for a second moment that has seen nothing yet; chosen by fidelity
# to Monte Carlo Shapley values (docs/algorithm.md): more of it damps what v knows, none of it explodes.
STAND_IN = 0.1

# Elementwise work goes block by block, so that a dozen passes over a CPU's shard stay in its cache.
CPU_BLOCK = 1 << 16


class Step(Protocol):
    """The coming step of one optimizer tensor; all vectors are flat ``[n]``."""

    @property
    def weights(self) -> Tensor:
        """fp32 shard that the step moves."""
        ...

    def block(self, part: slice) -> Step:
        """The step of a part of the tensor."""
        ...

    def precondition(self, gradient: Tensor, clip: float) -> None:
        """Multiply grad L_k by J in place; ``clip`` is what the optimizer would multiply such a gradient by."""
        ...

    def drift(self) -> tuple[tuple[Tensor, float] | None, tuple[Tensor, float] | None]:
        """``w - Phi(0)`` as (momentum part, decay part), each a vector and a factor."""
        ...


def precondition(
    step: Step, gradients: Sequence[Tensor], clips: Sequence[float], counted: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Turn K gradients ``[n]`` of one optimizer tensor into directions, in place.

    Args:
        step: the coming step.
        gradients: grad L_k, fp32.
        clips: what the optimizer would multiply each of them by.
        counted: stretches of the tensor that this rank counts in sums over all parameters.

    Returns:
        ``<grad L_k, w - Phi(0)>`` over the counted stretches, momentum and decay part, ``[K]`` fp64 each.
    """
    n, device = step.weights.numel(), gradients[0].device
    size = CPU_BLOCK if device.type == "cpu" else n
    terms = torch.zeros(2, len(gradients), dtype=torch.float64, device=device)
    for start in range(0, n, size):
        stop = min(start + size, n)
        here = step.block(slice(start, stop))
        parts = [gradient[start:stop] for gradient in gradients]
        # The optimizer's shard may lie on the CPU (offload) while directions lie where the layers are.
        near = [part.to(here.weights.device) for part in parts]
        stretches = [
            (max(lo, start) - start, min(hi, stop) - start) for lo, hi in counted if lo < stop and hi > start
        ]
        for which, moved in enumerate(here.drift()):
            if moved is None:
                continue
            vector, factor = moved
            for k, part in enumerate(near):
                for lo, hi in stretches:
                    terms[which, k] += torch.dot(part[lo:hi], vector[lo:hi].to(part.dtype)) * factor
        for part, own, clip in zip(parts, near, clips, strict=True):
            here.precondition(own, clip)
            if own.device != part.device:
                part.copy_(own)
    return terms[0], terms[1]


@dataclass(frozen=True)
class SGDStep:
    """One SGD step of one optimizer tensor, as torch.optim.SGD computes it.

    Attributes:
        lr, momentum, dampening, weight_decay: hyperparameters of the coming step.
        nesterov: whether momentum looks ahead.
        weights: fp32 shard ``[n]``.
        momentum_buffer: ``[n]`` from before the step; None before the first one, when torch takes the
            gradient itself as the buffer (no dampening).
    """

    lr: float
    weights: Tensor
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    momentum_buffer: Tensor | None = None

    def block(self, part: slice) -> SGDStep:
        buffer = self.momentum_buffer
        return replace(
            self, weights=self.weights[part], momentum_buffer=None if buffer is None else buffer[part]
        )

    def jacobian(self) -> float:
        """J, a number."""
        if self.momentum == 0.0:
            return self.lr
        gain = 1.0 if self.momentum_buffer is None else 1.0 - self.dampening
        return self.lr * (1.0 + self.momentum * gain if self.nesterov else gain)

    def precondition(self, gradient: Tensor, clip: float) -> None:
        gradient.mul_(self.jacobian())

    def drift(self) -> tuple[tuple[Tensor, float] | None, tuple[Tensor, float] | None]:
        momentum = decay = None
        if self.momentum and self.momentum_buffer is not None:
            look = self.momentum * self.momentum if self.nesterov else self.momentum
            momentum = (self.momentum_buffer, self.lr * look)
        if self.weight_decay:
            decay = (self.weights, self.weight_decay * self.jacobian())
        return momentum, decay


@dataclass(frozen=True)
class AdamStep:
    """One Adam or AdamW step of one optimizer tensor.

    Attributes:
        lr, beta1, beta2, eps, weight_decay: hyperparameters of the coming step.
        decoupled: AdamW's decay of the weights (True) or decay through the gradient (False).
        bias_correction: whether moments are divided by ``1 - beta^t``.
        t: number of the coming step, counted from 1.
        weights, exp_avg, exp_avg_sq: fp32 shards ``[n]`` from before the step.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    bias_correction: bool
    t: int
    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def block(self, part: slice) -> AdamStep:
        return replace(
            self,
            weights=self.weights[part],
            exp_avg=self.exp_avg[part],
            exp_avg_sq=self.exp_avg_sq[part],
        )

    def _corrections(self) -> tuple[float, float]:
        if not self.bias_correction:
            return 1.0, 1.0
        return 1.0 - self.beta1**self.t, 1.0 - self.beta2**self.t

    def _coupled(self) -> Tensor | None:
        return None if self.decoupled or not self.weight_decay else self.weights * self.weight_decay

    def _second_moment(self, gradient: Tensor | None, clip: float = 1.0) -> Tensor:
        """v0 ``[n]``: the bias-corrected second moment, with the stand-in for what it has not seen (None: without)."""
        _, bc2 = self._corrections()
        v0 = self.exp_avg_sq * (self.beta2 / bc2)
        fresh = (1.0 - self.beta2) / bc2
        if gradient is not None:
            share = clip if self.t == 1 else clip * STAND_IN
            v0.addcmul_(gradient, gradient, value=fresh * share * share)
        coupled = self._coupled()
        return v0 if coupled is None else v0.addcmul_(coupled, coupled, value=fresh)

    def precondition(self, gradient: Tensor, clip: float) -> None:
        bc1, bc2 = self._corrections()
        root = self._second_moment(gradient, clip).sqrt_()
        gain = self.lr * (1.0 - self.beta1) / bc1
        coupled = self._coupled()
        if coupled is None:
            gradient.mul_(gain).div_(root.add_(self.eps))
            return
        den = root + self.eps
        m0 = (self.exp_avg * self.beta1 + coupled * (1.0 - self.beta1)) / bc1
        # Where v0 is 0, so is u: its elements take no decay.
        ratio = torch.where(root > 0, coupled / root, torch.zeros_like(root))
        bend = self.lr * m0 * ratio * ((1.0 - self.beta2) / bc2) / den.square()
        gradient.mul_(gain / den - bend)

    def drift(self) -> tuple[tuple[Tensor, float] | None, tuple[Tensor, float] | None]:
        bc1, _ = self._corrections()
        den = self._second_moment(None).sqrt_().add_(self.eps)
        decay: tuple[Tensor, float] | None = None
        if self.weight_decay and self.decoupled:
            decay = (self.weights, self.lr * self.weight_decay)
        elif self.weight_decay:
            decay = (self.weights / den, self.lr * self.weight_decay * (1.0 - self.beta1) / bc1)
        return (torch.div(self.exp_avg, den, out=den), self.lr * self.beta1 / bc1), decay


@dataclass(frozen=True)
class ProxyStep:
    """The paper's SGD proxy under any optimizer: J = lr, no state, no drift."""

    lr: float
    weights: Tensor

    def block(self, part: slice) -> ProxyStep:
        return ProxyStep(self.lr, self.weights[part])

    def precondition(self, gradient: Tensor, clip: float) -> None:
        gradient.mul_(self.lr)

    def drift(self) -> tuple[None, None]:
        return None, None
