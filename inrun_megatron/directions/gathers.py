"""Directions on their way to where layers read them, while layers are computed.

    stages 1, 2  once a step, stretch by stretch in the order in which a backward reads: a layer waits for its own
    stage 3      in every microbatch, one layer at a time: reading one starts the next one's all-gather

At stage 3 a microbatch's backward reads in the order that the last one read in. Where the order has changed, what came is
dropped, on all ranks alike: they run the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..engines.shards import FlatGroup
from ..parallel import Layout
from .stretches import Cut


class FlatGathers:
    """All-gathers of flat groups.

    Args:
        groups: flat groups of the engine's adapter.
        cuts: of those that are gathered, by index.
        layout: process groups.
    """

    def __init__(self, groups: Sequence[FlatGroup], cuts: dict[int, Cut], layout: Layout) -> None:
        self._cuts, self._layout = cuts, layout
        # A backward begins with a norm: small groups first.
        self.order = sorted(cuts, key=lambda index: groups[index].numel)
        self._in: dict[
            int, list[tuple[int, int]]
        ] = {}  # by parameter: group and lower bound of its stretches
        for index, cut in cuts.items():
            for span in groups[index].spans:
                inside = [lo for lo, hi in cut.bounds if span.start < hi and span.start + span.numel > lo]
                self._in[id(span.parameter)] = [(index, lo) for lo in inside]
        self._running: dict[tuple[int, int], list[tuple[dist.Work, Tensor]]] = {}  # with what is sent

    @property
    def running(self) -> int:
        """Stretches that nobody has waited for."""
        return len(self._running)

    def start(self, index: int, shards: Tensor, rows: Tensor) -> None:
        """Bring the ranks' ``shards [K, n]`` to ``rows [K, d n]``; ``shards`` must not change any more."""
        cut, group = self._cuts[index], self._layout.dp_group
        vectors = [cut.from_owners(shard) for shard in shards]
        for (lo, hi), *parts in zip(cut.bounds, *vectors, strict=True):
            self._running[index, lo] = [
                (dist.all_gather_into_tensor(row[lo:hi], part, group=group, async_op=True), part)
                for row, part in zip(rows, parts, strict=True)
            ]

    def wait(self, key: int | None = None) -> None:
        """Until a parameter's stretches have come, or all (on a GPU: this stream's further work waits, not the host)."""
        for place in list(self._running) if key is None else self._in.get(key, ()):
            for work, _ in self._running.pop(place, ()):
                work.wait()


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
