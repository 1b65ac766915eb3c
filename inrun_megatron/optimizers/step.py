"""What a scored step asks of an optimizer's step, and how vectors are cut for elementwise work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..defaults import CUDA_BLOCK

# Elementwise work goes block by block, so that a dozen passes over a CPU's shard stay in its cache. Blocks write into
# one vector that is there already: new ones of this size would be fetched from the system, page by page, each time.
CPU_BLOCK = 1 << 18


def block_size(numel: int, device: torch.device) -> int:
    """Elements of a block of a vector of ``numel``."""
    return max(1, min(numel, CPU_BLOCK if device.type == "cpu" else CUDA_BLOCK))


class Step(Protocol):
    """The coming step of one optimizer tensor; all vectors are flat ``[n]``, ``work`` is one to compute in."""

    @property
    def weights(self) -> Tensor:
        """fp32 shard that the step moves."""
        ...

    @property
    def gain(self) -> float:
        """The scalar part of J: what it is proportional to beside vectors of the optimizer's state."""
        ...

    def block(self, part: slice) -> Step:
        """The step of a part of the tensor."""
        ...

    def precondition(self, gradient: Tensor, clip: float | Tensor, work: Tensor) -> None:
        """Multiply grad L_k by J in place; ``clip`` (a number, or a scalar on the device, which is not waited for) is
        what the optimizer would multiply such a gradient by. ``work`` is overwritten."""
        ...

    def drift(self, work: Tensor) -> tuple[tuple[Tensor, float] | None, tuple[Tensor, float] | None]:
        """``w - Phi(0)`` as (momentum part, decay part), each a vector (``work``, perhaps) and a factor."""
        ...

    def idle(self, out: Tensor, work: Tensor) -> None:
        """Write ``Phi(0)``, where the step leads without a gradient, into ``out`` (not the weights themselves).

        ``work`` is overwritten.
        """
        ...

    def slope(
        self, gradient: Tensor, target: Tensor | None = None, clip: float | Tensor = 1.0
    ) -> Tensor | float:
        """``(Phi(0) - Phi(g)) / g``, the Jacobian's mean over the path from 0 to ``g``.

        With ``target`` (grad L_k, and its clip coefficient) the stand-in h_k joins both ends' second moments.
        """
        ...

    def reach(self) -> Callable[[int], float]:
        """A gradient's weight in the ``j``-th step after the coming one over its weight in the coming one, by ``j``."""
        ...
