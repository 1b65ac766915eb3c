"""Where parameters lie in the optimizer's flat groups, independent of DeepSpeed's classes.

A :class:`FlatGroup` is a range of memory that DeepSpeed (or we, at stage 0) lay parameters out in. This
rank's *local* part of it, ``[start, stop)``, is what its inner optimizer steps; directions are laid out the
same way, so that preconditioning is elementwise and needs no lookup.

    stage 0      the whole group on every rank; gradients are all-reduced
    stage 1, 2   one flat buffer, rank r owns the r-th of dp equal parts
    stage 3      every parameter is cut into dp equal parts; this rank's parts, one after another
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor
from torch.nn import Parameter


class Residence(Enum):
    """Which part of a direction a rank keeps, and how it is summed over data-parallel ranks."""

    REPLICATED = "replicated"  # stage 0: all-reduce
    FLAT = "flat"  # stages 1 and 2: reduce-scatter, scale the shard, all-gather
    PARTITIONED = "partitioned"  # stage 3: only shards are kept; gathered with the layer


@dataclass(frozen=True)
class Span:
    """Parameter ``parameter`` occupies ``[start, start + numel)`` of its group."""

    parameter: Parameter
    start: int
    numel: int


@dataclass(frozen=True)
class Piece:
    """A tensor of the inner optimizer: ``numel`` elements from ``start`` of the local part."""

    tensor: Tensor
    param_group: int  # index into the inner optimizer's param_groups
    start: int
    numel: int


@dataclass
class FlatGroup:
    """One flat group; for PARTITIONED, spans and numel count this rank's parts only."""

    residence: Residence
    numel: int
    start: int  # of the local part
    stop: int
    spans: list[Span]
    device: torch.device
    pieces: list[Piece] = field(default_factory=list)
    flat: Tensor | None = None  # the buffer that the parameters are views into, in the model's precision

    def local_spans(self) -> Iterator[Span]:
        """Spans cut to the local part, their starts counted from its beginning."""
        for span in self.spans:
            lo, hi = max(span.start, self.start), min(span.start + span.numel, self.stop)
            if lo < hi:
                yield Span(span.parameter, lo - self.start, hi - lo)

    def gaps(self) -> list[tuple[int, int]]:
        """What lies between and behind the parameters."""
        return _between(merged(iter(self.spans)), self.numel)

    def unstepped(self) -> list[tuple[int, int]]:
        """What the optimizer's tensors leave out of the local part, counted from its beginning."""
        stepped = sorted((piece.start, piece.start + piece.numel) for piece in self.pieces)
        return _between(stepped, self.stop - self.start)


def _between(ranges: list[tuple[int, int]], end: int) -> list[tuple[int, int]]:
    """The rest of ``[0, end)``; ranges in order."""
    edges = [0, *(edge for one in ranges for edge in one), end]
    return [(lo, hi) for lo, hi in zip(edges[::2], edges[1::2], strict=True) if lo < hi]


def merged(spans: Iterator[Span]) -> list[tuple[int, int]]:
    """Adjacent spans as few ``(start, stop)`` ranges."""
    ranges: list[tuple[int, int]] = []
    for span in sorted(spans, key=lambda s: s.start):
        if ranges and ranges[-1][1] == span.start:
            ranges[-1] = (ranges[-1][0], span.start + span.numel)
        else:
            ranges.append((span.start, span.start + span.numel))
    return ranges
