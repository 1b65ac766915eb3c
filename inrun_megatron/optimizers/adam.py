"""Adam's step Phi(g), elementwise: its Jacobian, where it leads, and its slope along the batch's path.

    Adam    J_k = lr (1 - b1) / bc1 / den_k,     den_k = sqrt((b2 v + (1 - b2) h_k^2) / bc2) + eps
            bc1 = 1 - b1^t, bc2 = 1 - b2^t, v from before the step (optimizer-aware form after arXiv 2602.00329)
            h_k = a tenth of grad L_k, clipped as the optimizer clips (all of it at t = 1)

``h_k = 0`` would be the derivative of the step at zero gradient. That is ``lr / eps`` where the second moment
is still zero: at the first step, and later in every embedding row that a token touches for the first time. With
h_k the direction is bounded by a few of the optimizer's own steps, and it is the derivative up to a hundredth of
(1 - b2) once v has settled. docs/algorithm.md has the measurements. With coupled decay u = decay * w (Adam's, not AdamW's) u^2 joins h_k^2 and
the step's dependence on u through the second moment is kept: ``- lr m0 (1 - b2) u / (bc2 sqrt(v0) den^2)``.

The path estimators know the batch's gradient G: along a -> Phi(a G) a coordinate moves by ``Phi(0) - Phi(G)``, and a
sample with the share ``g_i / G`` of its gradient has that share of the move. The quotient ``(Phi(0) - Phi(G)) / G`` is
the Jacobian's mean over the path, in closed form, without cancellation where G is small. Where the second moment has
seen nothing, the move is ``lr sign(G)``, and samples that cancel each other in G would get shares of any size: there
the stand-in h_k bounds the quotient as it bounds the first-order Jacobian.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# How much of the validation gradient stands in for a second moment that has seen nothing yet; chosen by fidelity
# to Monte Carlo Shapley values (docs/algorithm.md): more of it damps what v knows, none of it explodes.
STAND_IN = 0.1


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

    @property
    def gain(self) -> float:
        """lr (1 - b1) / (1 - b1^t): coupled decay's part of J has the same factor."""
        return self.lr * (1.0 - self.beta1) / self.corrections()[0]

    @property
    def couples(self) -> bool:
        """Does decay go through the gradient?"""
        return not self.decoupled and self.weight_decay != 0.0

    @property
    def stand_in(self) -> float:
        """h_k over the clipped grad L_k."""
        return 1.0 if self.t == 1 else STAND_IN

    def block(self, part: slice) -> AdamStep:
        return replace(
            self,
            weights=self.weights[part],
            exp_avg=self.exp_avg[part],
            exp_avg_sq=self.exp_avg_sq[part],
        )

    def corrections(self) -> tuple[float, float]:
        """bc1 and bc2."""
        if not self.bias_correction:
            return 1.0, 1.0
        return 1.0 - self.beta1**self.t, 1.0 - self.beta2**self.t

    def _coupled(self) -> Tensor | None:
        return self.weights * self.weight_decay if self.couples else None

    def _second_moment(self, gradient: Tensor | None, clip: float | Tensor = 1.0) -> Tensor:
        """v0 ``[n]``: the bias-corrected second moment, with the stand-in for what it has not seen (None: without)."""
        _, bc2 = self.corrections()
        v0 = self.exp_avg_sq * (self.beta2 / bc2)
        fresh = (1.0 - self.beta2) / bc2
        if gradient is not None:
            share = clip * self.stand_in
            v0.addcmul_(gradient, gradient * (fresh * share * share))
        coupled = self._coupled()
        return v0 if coupled is None else v0.addcmul_(coupled, coupled, value=fresh)

    def _root(self, work: Tensor, gradient: Tensor | None = None, clip: float | Tensor = 1.0) -> float:
        """Write ``sqrt(v0)`` into ``work``, but for a factor, which is returned."""
        seen = self.beta2 / self.corrections()[1]
        if self.couples or not seen:
            work.copy_(self._second_moment(gradient, clip).sqrt_())
            return 1.0
        # v0 = seen (v + (s h)^2): the factor is left to a number, which saves a pass.
        if gradient is None:
            torch.sqrt(self.exp_avg_sq, out=work)
        else:
            share = clip * (self.stand_in * math.sqrt((1.0 - self.beta2) / self.beta2))
            torch.mul(gradient, share, out=work)
            torch.addcmul(self.exp_avg_sq, work, work, out=work).sqrt_()
        return math.sqrt(seen)

    def precondition(self, gradient: Tensor, clip: float | Tensor, work: Tensor) -> None:
        bc1, bc2 = self.corrections()
        factor = self._root(work, gradient, clip)
        gain = self.gain
        coupled = self._coupled()
        if coupled is None:
            gradient.mul_(gain / factor).div_(work.add_(self.eps / factor))
            return
        root, den = work, work + self.eps
        m0 = (self.exp_avg * self.beta1 + coupled * (1.0 - self.beta1)) / bc1
        # Where v0 is 0, so is u: its elements take no decay.
        ratio = torch.where(root > 0, coupled / root, torch.zeros_like(root))
        bend = self.lr * m0 * ratio * ((1.0 - self.beta2) / bc2) / den.square()
        gradient.mul_(gain / den - bend)

    def drift(self, work: Tensor) -> tuple[tuple[Tensor, float] | None, tuple[Tensor, float] | None]:
        bc1, _ = self.corrections()
        factor = self._root(work)
        work.add_(self.eps / factor)
        decay: tuple[Tensor, float] | None = None
        if self.weight_decay and self.decoupled:
            decay = (self.weights, self.lr * self.weight_decay)
        elif self.weight_decay:
            decay = (self.weights / work, self.lr * self.weight_decay * (1.0 - self.beta1) / bc1 / factor)
        return (torch.div(self.exp_avg, work, out=work), self.lr * self.beta1 / bc1 / factor), decay

    def idle(self, out: Tensor, work: Tensor) -> None:
        bc1, _ = self.corrections()
        factor = self._root(work)
        work.add_(self.eps / factor)
        # Decoupled decay pulls at the weights, coupled decay through the moment.
        pull = self.lr * self.weight_decay
        torch.mul(self.weights, 1.0 - pull if self.decoupled else 1.0, out=out)
        if pull and not self.decoupled:
            out.addcdiv_(self.weights, work, value=-pull * (1.0 - self.beta1) / bc1 / factor)
        out.addcdiv_(self.exp_avg, work, value=-self.lr * self.beta1 / bc1 / factor)

    def slope(self, gradient: Tensor, target: Tensor | None = None, clip: float | Tensor = 1.0) -> Tensor:
        bc1, bc2 = self.corrections()
        still = self._second_moment(target, clip)
        coupled = self._coupled()
        # u^2 -> (u + g)^2: the second moment grows by (1 - b2) / bc2 * g * bend.
        bend = gradient if coupled is None else gradient + 2.0 * coupled
        fresh = (1.0 - self.beta2) / bc2
        # A sum of squares: where u + g is 0, rounding must not make it negative.
        root = still.addcmul(gradient, bend, value=fresh).clamp_(min=0.0).sqrt_()
        root_still = still.sqrt_()
        den, den_still = root + self.eps, root_still + self.eps
        first = self.exp_avg * (self.beta1 / bc1)
        if coupled is not None:
            first += coupled * ((1.0 - self.beta1) / bc1)
        grown = root.add_(root_still)
        # m0 (1/den0 - 1/den) / g. Where both moments are zero there is no momentum to damp.
        damped = first.mul_(bend).mul_(fresh).div_(den_still).div_(grown)
        damped.masked_fill_(grown == 0, 0.0)
        return damped.neg_().add_((1.0 - self.beta1) / bc1).div_(den).mul_(self.lr)

    def reach(self) -> Callable[[int], float]:
        def corrected(j: int) -> float:
            if not self.bias_correction:
                return 1.0
            return (1.0 - self.beta1**self.t) / (1.0 - self.beta1 ** (self.t + j))

        return lambda j: self.beta1**j * corrected(j)
