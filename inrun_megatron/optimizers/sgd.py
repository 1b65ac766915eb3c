"""SGD's step Phi(g), with momentum, and the paper's proxy for any optimizer:

SGD     J = lr * (1 - dampening) (* (1 + momentum (1 - dampening)) with Nesterov)     arXiv 2406.11011, Theorem 3
proxy   J = lr
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor


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

    @property
    def gain(self) -> float:
        return self.jacobian()

    def block(self, part: slice) -> SGDStep:
        buffer = self.momentum_buffer
        return replace(
            self, weights=self.weights[part], momentum_buffer=None if buffer is None else buffer[part]
        )

    def jacobian(self) -> float:
        """J, a number."""
        return self.lr * self._passed()

    def _passed(self) -> float:
        """J without the learning rate: what momentum lets through of a gradient in its own step."""
        if self.momentum == 0.0:
            return 1.0
        gain = 1.0 if self.momentum_buffer is None else 1.0 - self.dampening
        return 1.0 + self.momentum * gain if self.nesterov else gain

    def precondition(self, gradient: Tensor, clip: float | Tensor, work: Tensor) -> None:
        gradient.mul_(self.jacobian())

    def idle(self, out: Tensor, work: Tensor) -> None:
        out.copy_(self.weights)
        for term in self.drift(work):
            if term is not None:
                out.sub_(term[0], alpha=term[1])

    def drift(self, work: Tensor) -> tuple[tuple[Tensor, float] | None, tuple[Tensor, float] | None]:
        momentum = decay = None
        if self.momentum and self.momentum_buffer is not None:
            look = self.momentum * self.momentum if self.nesterov else self.momentum
            momentum = (self.momentum_buffer, self.lr * look)
        if self.weight_decay:
            decay = (self.weights, self.weight_decay * self.jacobian())
        return momentum, decay

    def slope(self, gradient: Tensor, target: Tensor | None = None, clip: float | Tensor = 1.0) -> float:
        return self.jacobian()

    def reach(self) -> Callable[[int], float]:
        own = self._passed() or 1.0  # dampening 1 lets nothing through, later neither
        gain = 1.0 if self.momentum_buffer is None else 1.0 - self.dampening
        later = gain * self.momentum if self.nesterov else gain
        return lambda j: 1.0 if j == 0 else later * self.momentum**j / own


@dataclass(frozen=True)
class ProxyStep:
    """The paper's SGD proxy under any optimizer: J = lr, no state, no drift."""

    lr: float
    weights: Tensor

    @property
    def gain(self) -> float:
        return self.lr

    def block(self, part: slice) -> ProxyStep:
        return ProxyStep(self.lr, self.weights[part])

    def precondition(self, gradient: Tensor, clip: float | Tensor, work: Tensor) -> None:
        gradient.mul_(self.lr)

    def drift(self, work: Tensor) -> tuple[None, None]:
        return None, None

    def idle(self, out: Tensor, work: Tensor) -> None:
        out.copy_(self.weights)

    def slope(self, gradient: Tensor, target: Tensor | None = None, clip: float | Tensor = 1.0) -> float:
        return self.lr

    def reach(self) -> Callable[[int], float]:
        return lambda j: 1.0 if j == 0 else 0.0
