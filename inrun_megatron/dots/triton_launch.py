"""What the Triton kernels have in common: how buffers, directions and segments are handed to them, and their sums.

A kernel's programs write their parts of the dots side by side, ``[programs, segments, K]``; a sum over programs in a fixed
order follows (``Parts``), without atomics: two runs give the same bits. The parts of many layers are summed together.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..host import to_device
from . import segments

# Triton's interpreter runs kernels on the CPU, for tests. Its tl.dot takes bf16 numbers for the integers they are
# stored as (triton 3.9, runtime/interpreter.py: create_dot), so kernels widen them there: exact, only slower.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# Numbers that parts may hold until they are added up.
TOGETHER = 2**23

Bounds = Sequence[tuple[int, int, int]] | None
"""(row, first token, token after the last) of every segment; None: every row is one segment."""


def segment_table(bounds: Bounds, rows: int, tokens: int, device: torch.device) -> Tensor:
    """Segments as int32 ``[segments, 3]`` on the device, in a copy that the host does not wait for.

    All layers of a microbatch get the same one.
    """
    if bounds is None:
        return _whole_rows(rows, tokens, device)
    if not isinstance(bounds, segments.Bounds):
        return _on(bounds, device)
    if device not in bounds.on:
        bounds.on[device] = _on(bounds, device)
    return bounds.on[device]


@lru_cache(maxsize=16)
def _whole_rows(rows: int, tokens: int, device: torch.device) -> Tensor:
    return _on([(row, 0, tokens) for row in range(rows)], device)


def _on(bounds: Sequence[tuple[int, int, int]], device: torch.device) -> Tensor:
    return to_device(torch.tensor(bounds, dtype=torch.int32), device)


def lengths(bounds: Bounds, tokens: int) -> Collection[int]:
    """Which lengths segments have."""
    if bounds is None:
        return (tokens,)
    return (
        bounds.lengths if isinstance(bounds, segments.Bounds) else {stop - start for _, start, stop in bounds}
    )


class Parts:
    """Parts of the dots that many layers' kernels left, added up together: one call instead of one per layer.

    Args:
        dots: ``[n, K]`` fp64; parts are added to it, in fp64, by ``settle()`` or when there are too many.
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
            self.settle()

    def settle(self) -> None:
        """Add those that are left."""
        if self._parts:
            self._dots += torch.cat(self._parts).sum(0, dtype=self._dots.dtype)
        self._parts, self._size = [], 0


def features_together(buffer: Tensor) -> Tensor:
    """The buffer with its features next to each other, as kernels read them."""
    return buffer if buffer.stride(-1) == 1 else buffer.contiguous()


def equally_spaced(directions: Sequence[Tensor]) -> tuple[Tensor, int]:
    """The first direction, and how many elements further the next ones are; copied only if they are not so laid out.

    Directions are rows of one buffer (directions/), so that the kernels reach all of them from one address.
    """
    first, size = directions[0], directions[0].element_size()
    gap = directions[1].data_ptr() - first.data_ptr() if len(directions) > 1 else 0
    if gap >= 0 and all(
        d.is_contiguous() and d.data_ptr() == first.data_ptr() + k * gap for k, d in enumerate(directions)
    ):
        return first, gap // size
    stacked = torch.stack(list(directions))
    return stacked, stacked.stride(0)
