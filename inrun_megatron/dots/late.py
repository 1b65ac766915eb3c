"""Dots that are added up late, those of many layers together: a call for each would cost more than its arithmetic.

What layers leave until then:

    parts      of a GPU's kernels, whose programs write theirs side by side, ``[programs, n, K]``: a sum over programs in a
               fixed order follows, without atomics, so that two runs give the same bits
    running    of a CPU's accumulators: ``<D_k, W_1 + .. + W_i>`` after every row i, whose differences are the rows' dots
    vectors    rows' gradients of biases and norms ``[n, h]``, which are multiplied with their directions at once

Shape legend: n rows (or parts of rows) of the microbatch, K targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .elementwise import vector_dots

# Numbers that parts may hold until they are added up.
TOGETHER = 2**23
# Running dots, which are scalars of some hundred bytes.
RUNNING_TOGETHER = 4096
# Layers whose rows' gradients of vector parameters are kept.
VECTORS_TOGETHER = 64


class LateDots:
    """``dots [n, K]`` (fp64), complete after ``flush()``.

    Args:
        dots: everything is added to it, in its precision.
    """

    def __init__(self, dots: Tensor) -> None:
        self.dots = dots
        self._parts: list[Tensor] = []
        self._size = 0  # of the parts
        self._running: dict[tuple[int, int], list[Tensor]] = {}  # by first row and rows
        self._scalars = 0
        self._vectors: list[tuple[Tensor, Sequence[Tensor]]] = []

    @property
    def targets(self) -> int:
        """K."""
        return self.dots.shape[1]

    def add_parts(self, parts: Tensor) -> None:
        """A kernel's, ``[programs, n, K or more]``."""
        self._parts.append(parts[..., : self.targets])
        self._size += parts.numel()
        if self._size > TOGETHER:
            self._add_parts()

    def add_running(self, first: int, running: Sequence[Tensor]) -> None:
        """An accumulator's dots with all targets after row ``first``, after the next one, and so on: that many scalars."""
        self._running.setdefault((first, len(running) // self.targets), []).extend(running)
        self._scalars += len(running)
        if self._scalars > RUNNING_TOGETHER:
            self._add_running()

    def add_vectors(self, gradients: Tensor, directions: Sequence[Tensor]) -> None:
        """Rows' gradients ``[n, h]`` of a vector parameter with K directions ``[h]``.

        Of a single row they may be the parameter's own, ``[h]``: held here, autograd copies it where it would take it, and
        what is added to the parameter's gradient later is no part of it.
        """
        self._vectors.append((gradients, directions))
        if len(self._vectors) == VECTORS_TOGETHER:
            self._add_vectors()

    def flush(self) -> None:
        """Add what is left."""
        self._add_parts()
        self._add_running()
        self._add_vectors()

    def _add_parts(self) -> None:
        if self._parts:
            self.dots += torch.cat(self._parts).sum(0, dtype=self.dots.dtype)
        self._parts, self._size = [], 0

    def _add_running(self) -> None:
        for (first, rows), scalars in self._running.items():
            sums = torch.stack(scalars).view(-1, rows, self.targets).sum(0, dtype=self.dots.dtype)
            own = self.dots[first : first + rows]
            own += sums
            own[1:] -= sums[:-1]
        self._running.clear()
        self._scalars = 0

    def _add_vectors(self) -> None:
        if self._vectors:
            rows = len(self.dots)
            gradients = torch.cat([gradients.reshape(rows, -1) for gradients, _ in self._vectors], dim=1)
            of_layers = zip(*(directions for _, directions in self._vectors), strict=True)
            vector_dots(gradients, [torch.cat(target) for target in of_layers], self.dots)
        self._vectors.clear()
