"""How the tokens of a microbatch are cut into the parts that get values of their own: documents or single tokens.

A sample's dot with a direction is a sum over its tokens; cut into parts, the parts' dots add up to it:

    <D, B_i^T A_i> = sum_{t in row i} B_it . (D A_it) = sum_{parts p of i} <D, B_p^T A_p>

Shape legend: b rows, s positions of a whole row (s/tp in a shard of sequence parallelism), n parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..host import to_device


@dataclass(frozen=True, eq=False)
class Bounds:
    """(row, first token, token after the last) of every part, int32 ``[n, 3]`` on the CPU; iterates over them as tuples.

    Kernels read the table, so that tens of thousands of parts cost the host no loop.
    """

    table: Tensor
    _on: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, parts: Iterable[tuple[int, int, int]]) -> Bounds:
        """Of parts that are counted out."""
        return cls(torch.tensor(list(parts), dtype=torch.int32).view(-1, 3))

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return iter(self.tuples)

    @cached_property
    def tuples(self) -> list[tuple[int, int, int]]:
        """The table as a list."""
        return [(row, start, stop) for row, start, stop in self.table.tolist()]

    @cached_property
    def lengths(self) -> frozenset[int]:
        """Which lengths there are."""
        return frozenset((self.table[:, 2] - self.table[:, 1]).unique().tolist())

    def on(self, device: torch.device) -> Tensor:
        """The table there, in a copy that the host does not wait for; all layers of a microbatch get the same one."""
        if device not in self._on:
            self._on[device] = to_device(self.table, device)
        return self._on[device]


@lru_cache(maxsize=16)
def whole_rows(rows: int, tokens: int) -> Bounds:
    """Every row is one part."""
    return Bounds.of((row, 0, tokens) for row in range(rows))


@dataclass(frozen=True, eq=False)
class Segments:
    """Consecutive parts of the rows of one microbatch.

    Attributes:
        rows, positions: b and s.
        offsets: int64 ``[n + 1]`` on the CPU. Part j is positions ``offsets[j]`` to ``offsets[j + 1]`` of the b * s
            positions counted row after row; none crosses a row, and none is empty (but of ``stretches``).
    """

    rows: int
    positions: int
    offsets: Tensor
    _lengths: dict[tuple[torch.device, int, int], Tensor] = field(default_factory=dict, repr=False)
    _parts: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)
    _shards: dict[tuple[int, int], Bounds] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, parts: Tensor) -> Segments:
        """Cut where neighbours differ.

        Args:
            parts: integers ``[b, s]``, on any device: equal neighbours of a row belong together.
        """
        if parts.dim() != 2 or parts.numel() == 0:
            raise ValueError(f"parts have shape {list(parts.shape)}, not [rows, positions]")
        parts = parts.cpu()
        starts = torch.ones(parts.shape, dtype=torch.bool)
        starts[:, 1:] = parts[:, 1:] != parts[:, :-1]
        end = torch.tensor([parts.numel()])
        rows, positions = parts.shape
        return cls(rows, positions, torch.cat((starts.flatten().nonzero().flatten(), end)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def row(self) -> Tensor:
        """The row of every part, int64 ``[n]`` on the CPU."""
        return self.offsets[:-1] // self.positions

    def part_of(self, row: Tensor, position: Tensor) -> Tensor:
        """The parts of single tokens, int64 like their rows and positions, on whose device it works."""
        if row.device not in self._parts:
            parts = torch.arange(len(self)).repeat_interleave(self.offsets.diff())
            self._parts[row.device] = to_device(parts, row.device)
        return self._parts[row.device][row * self.positions + position]

    @cached_property
    def ordinal(self) -> Tensor:
        """The number of every part within its row, int64 ``[n]`` on the CPU."""
        first = torch.searchsorted(self.row, torch.arange(self.rows))
        return torch.arange(len(self)) - first[self.row]

    @cached_property
    def bounds(self) -> Bounds:
        """(row, first position, position after the last) of every part."""
        return self.shard_bounds(0, 1)

    def shard_bounds(self, rank: int, size: int) -> Bounds:
        """``bounds`` within sequence shard ``rank`` of ``size``; parts that lie elsewhere are empty."""
        if (rank, size) not in self._shards:
            shard = self.positions // size
            first = self.row * self.positions + rank * shard
            edges = ((edge - first).clamp(0, shard) for edge in (self.offsets[:-1], self.offsets[1:]))
            self._shards[rank, size] = Bounds(torch.stack((self.row, *edges), dim=1).int())
        return self._shards[rank, size]

    def lengths(self, device: torch.device, rank: int = 0, size: int = 1) -> Tensor:
        """How many of every part's positions lie in sequence shard ``rank`` of ``size``, int64 ``[n]``.

        Sequence parallelism gives rank r the positions ``[r s / size, (r + 1) s / size)`` of every row.
        """
        key = (device, rank, size)
        if key not in self._lengths:
            table = self.shard_bounds(rank, size).table
            self._lengths[key] = to_device((table[:, 2] - table[:, 1]).long(), device)
        return self._lengths[key]

    @cached_property
    def _are_positions(self) -> bool:
        """Is every position a part of its own?"""
        return len(self) == self.rows * self.positions and bool((self.offsets.diff().numpy() == 1).all())

    def sums(self, tokens: Tensor, batch_dim: int = 0, rank: int = 0, size: int = 1) -> Tensor:
        """Sums of every part's positions.

        Args:
            tokens: ``[b, s]`` or ``[b, s, k]``; ``[s, b]`` and ``[s, b, k]`` with ``batch_dim`` 1; s/size positions
                of a sequence shard.
            rank, size: which shard.

        Returns:
            ``[n]`` or ``[n, k]``, in the precision of ``tokens``.
        """
        flat = tokens.movedim(batch_dim, 0).flatten(0, 1)
        if size == 1 and self._are_positions:
            return flat
        lengths = self.lengths(flat.device, rank, size)

        def of_vector(column: Tensor) -> Tensor:
            # Unlike index_add_ it adds in a fixed order on a GPU too.
            return torch.segment_reduce(column, "sum", lengths=lengths, axis=0, unsafe=True)

        if flat.dim() == 1:
            return of_vector(flat)
        # One at a time: a vector's part is added up by a block of threads on a GPU, a matrix's by a single thread.
        return torch.stack([of_vector(column) for column in flat.unbind(1)], dim=1)


def stretches(lengths: Tensor, device: torch.device) -> list[Segments]:
    """Matrices of tokens, each a row, cut into stretches; a copy brings all their tables to the device.

    Args:
        lengths: int64 ``[m, n]`` on the CPU: of m matrices, and n stretches of each, some of them perhaps empty.
    """
    stops = lengths.cumsum(1)
    tables = torch.stack((torch.zeros_like(stops), stops - lengths, stops), dim=2).int()
    there, sizes = to_device(tables, device), to_device(lengths, device)
    offsets = torch.cat((torch.zeros_like(stops[:, :1]), stops), dim=1)
    return [
        Segments(
            1,
            total,
            own,
            _lengths={(device, 0, 1): size},
            _shards={(0, 1): Bounds(host, {device: table})},
        )
        for total, own, host, table, size in zip(
            lengths.sum(1).numpy().tolist(), offsets, tables, there, sizes, strict=True
        )
    ]
