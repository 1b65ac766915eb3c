"""Flat groups cut into buckets, each of which one collective sums or gathers over data-parallel ranks.

Rank r owns the r-th of d equal parts of a flat group, its shard. A collective over a bucket of the group gives, or takes,
another part at each rank: the r-th of d equal parts of the bucket. One all-to-all of 1/d of the group brings parts
to their owners, or shards to where buckets are gathered from, so that buckets travel one by one and their length does not
depend on d (a collective per owner would be d short ones). A group of one bucket needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from ..defaults import BUCKET_SIZE
from ..parallel import Layout
from .shards import FlatGroup, Residence, Span


@dataclass(frozen=True)
class _Common:
    """What a rank's part of bucket ``index`` shares with a rank's shard."""

    index: int
    in_part: int
    in_shard: int
    numel: int


class Buckets:
    """One flat group over the data-parallel ranks of ``layout``.

    Attributes:
        bounds: ``(lo, hi)`` of every bucket, the last one first: the order in which a backward meets them.
    """

    def __init__(self, group: FlatGroup, layout: Layout) -> None:
        self._layout, size, rank = layout, layout.dp_size, layout.dp_rank
        length = max(BUCKET_SIZE // size, 1) * size
        edges = [*range(0, group.numel, length), group.numel]
        self.bounds = list(pairwise(edges))[::-1]
        self._shard = group.numel // size
        if len(self.bounds) > 1 and group.residence is Residence.FLAT:
            self._owned_by = [self._common(rank, owner) for owner in range(size)]
            self._held_by = [self._common(holder, rank) for holder in range(size)]

    def meets(self, span: Span) -> list[int]:
        """Which buckets, by their place in ``bounds``, a parameter lies in."""
        end = span.start + span.numel
        return [place for place, (lo, hi) in enumerate(self.bounds) if span.start < hi and end > lo]

    def _common(self, holder: int, owner: int) -> list[_Common]:
        """``holder``'s parts of buckets within ``owner``'s shard."""
        found = []
        for index, (lo, hi) in enumerate(self.bounds):
            part = (hi - lo) // self._layout.dp_size
            begin, shard = lo + holder * part, owner * self._shard
            first, last = max(begin, shard), min(begin + part, shard + self._shard)
            if first < last:
                found.append(_Common(index, first - begin, first - shard, last - first))
        return found

    def to_owners(self, parts: Sequence[Tensor], shard: Tensor) -> None:
        """Write into ``shard [n]`` what the ranks hold of it; collective over data-parallel ranks.

        Args:
            parts: this rank's part of every bucket, in the order of ``bounds``.
        """
        if len(parts) == 1:
            shard.copy_(parts[0])
            return
        leaving = [parts[c.index][c.in_part : c.in_part + c.numel] for own in self._owned_by for c in own]
        pieces = self._exchange(leaving, self._owned_by, self._held_by)
        for common, piece in zip((c for own in self._held_by for c in own), pieces, strict=True):
            shard[common.in_shard : common.in_shard + common.numel].copy_(piece)

    def from_owners(self, shard: Tensor) -> list[Tensor]:
        """This rank's part of every bucket, of all ranks' shards; collective over data-parallel ranks."""
        if len(self.bounds) == 1:
            return [shard]
        leaving = [shard[c.in_shard : c.in_shard + c.numel] for own in self._held_by for c in own]
        pieces = self._exchange(leaving, self._held_by, self._owned_by)
        parts = [shard.new_empty((hi - lo) // self._layout.dp_size) for lo, hi in self.bounds]
        for common, piece in zip((c for own in self._owned_by for c in own), pieces, strict=True):
            parts[common.index][common.in_part : common.in_part + common.numel].copy_(piece)
        return parts

    def _exchange(
        self, leaving: list[Tensor], to: list[list[_Common]], of: list[list[_Common]]
    ) -> Sequence[Tensor]:
        """All-to-all of the pieces, by rank; returns those that came, by rank."""
        sent = torch.cat(leaving)
        arriving = [c.numel for own in of for c in own]
        arrived = sent.new_empty(sum(arriving))
        dist.all_to_all_single(
            arrived,
            sent,
            [sum(c.numel for c in own) for own in of],
            [sum(c.numel for c in own) for own in to],
            group=self._layout.dp_group,
        )
        return arrived.split(arriving)


class FlatGathers:
    """All-gathers of flat groups, bucket by bucket in the order in which they are read: each reader waits for its own.

    Args:
        groups: flat groups of the engine's adapter.
        buckets: of those that are gathered, by index.
        layout: process groups.
    """

    def __init__(self, groups: Sequence[FlatGroup], buckets: dict[int, Buckets], layout: Layout) -> None:
        self._buckets, self._layout = buckets, layout
        # Small groups first: a forward soon comes to a norm, and a backward begins with one.
        self.order = sorted(buckets, key=lambda index: groups[index].numel)
        # By parameter: the buckets that it lies in, as (group, place).
        self._in = {
            id(span.parameter): [(index, place) for place in own.meets(span)]
            for index, own in buckets.items()
            for span in groups[index].spans
        }
        self._running: dict[tuple[int, int], list[tuple[dist.Work, Tensor]]] = {}  # with what is sent

    @property
    def running(self) -> int:
        """Buckets that nobody has waited for."""
        return len(self._running)

    def start(self, index: int, shards: Tensor, rows: Tensor, *, forward: bool = False) -> None:
        """Bring the ranks' ``shards [K, n]`` to ``rows [K, d n]``; ``shards`` must not change any more.

        ``forward``: a forward reads them, from the group's beginning; else a backward, from its end.
        """
        own, group = self._buckets[index], self._layout.dp_group
        vectors = [own.from_owners(shard) for shard in shards]
        in_order = list(enumerate(zip(own.bounds, *vectors, strict=True)))
        for place, ((lo, hi), *parts) in reversed(in_order) if forward else in_order:
            self._running[index, place] = [
                (dist.all_gather_into_tensor(row[lo:hi], part, group=group, async_op=True), part)
                for row, part in zip(rows, parts, strict=True)
            ]

    def wait(self, key: int | None = None) -> None:
        """Until a parameter's buckets have come, or all (on a GPU: this stream's further work waits, not the host)."""
        for place in list(self._running) if key is None else self._in.get(key, ()):
            for work, _ in self._running.pop(place, ()):
                work.wait()
