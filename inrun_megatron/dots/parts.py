"""Adds up the partial dots that Triton kernels write.

A kernel's programs write their parts of the dots side by side, ``[programs, segments, K]``; a sum over programs in a fixed
order follows, without atomics: two runs give the same bits. The parts of many layers are summed together.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers that parts may hold until they are added up.
TOGETHER = 2**23


class Parts:
    """Parts of the dots that many layers' kernels left, added up together: one call instead of one per layer.

    Args:
        dots: ``[n, K]`` fp64; parts are added to it, in fp64, by ``flush()`` or when there are too many.
    """

    def __init__(self, dots: Tensor) -> None:
        self._dots = dots
        self._parts: list[Tensor] = []
        self._size = 0

    def append(self, part: Tensor) -> None:
        """A further one, ``[programs, n, K or more]``."""
        self._parts.append(part[..., : self._dots.shape[1]])
        self._size += part.numel()
        if self._size > TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Add those that are left."""
        if self._parts:
            self._dots += torch.cat(self._parts).sum(0, dtype=self._dots.dtype)
        self._parts, self._size = [], 0
