"""Directions of one layer at a time under ZeRO-3, each on its way while the layer before it is computed.

A microbatch's backward reads in the order that the last one read in: reading one layer's starts the next one's all-gather.
Where the order has changed, what came is dropped, on all ranks alike: they run the same model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class _Coming:
    key: int
    work: dist.Work
    whole: Tensor
    part: Tensor  # what this rank sends; it must live until the gather is done


class LayerGathers:
    """All-gathers over ``group`` in the order in which a pass reads.

    Args:
        group: data-parallel ranks.
        size: how many they are.
        part_of: this rank's part of what a key stands for, contiguous.
    """

    def __init__(self, group: dist.ProcessGroup | None, size: int, part_of: Callable[[int], Tensor]) -> None:
        self._group, self._size, self._part_of = group, size, part_of
        self._order: list[int] = []
        self._position = 0
        self._coming: _Coming | None = None

    def rewind(self) -> None:
        """A pass begins; what the last one left on its way is stale."""
        self._position = 0
        if self._coming is not None:
            self._coming.work.wait()
            self._coming = None

    def read(self, key: int) -> Tensor:
        """The parts of all ranks, one after another, flat."""
        if self._coming is not None and self._coming.key != key:
            self._coming.work.wait()
            self._coming = None
        if self._order[self._position : self._position + 1] != [key]:
            self._order[self._position :] = [key]
        coming = self._coming or self._start(key)
        self._position += 1
        following = self._order[self._position : self._position + 1]
        self._coming = self._start(following[0]) if following else None
        coming.work.wait()
        return coming.whole

    def _start(self, key: int) -> _Coming:
        part = self._part_of(key)
        whole = torch.empty(self._size * part.numel(), dtype=part.dtype, device=part.device)
        work = dist.all_gather_into_tensor(whole, part, group=self._group, async_op=True)
        return _Coming(key, work, whole, part)
