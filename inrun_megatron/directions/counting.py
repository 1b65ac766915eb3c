"""Sums over all parameters of the model, to which every element is counted by one rank.

Shape legend: K vectors, n elements of a rank's local part of a flat group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..dots.backend import by_triton
from ..engines.shards import FlatGroup, Residence, Span, merged
from ..optimizers import block_size
from ..parallel import Layout
from ..taps import Sharding


class Counting:
    """What this rank counts: replicated parameters on tensor rank 0 only, tied weights on one pipeline stage.

    Args:
        groups: flat groups of the engine's adapter.
        sharding: of every parameter, by ``id``.
        layout: process groups.
    """

    def __init__(self, groups: Sequence[FlatGroup], sharding: dict[int, Sharding], layout: Layout) -> None:
        self._sharding, self._layout = sharding, layout
        self._ranges = [merged(self._counted(group)) for group in groups]

    def _counted(self, group: FlatGroup) -> Iterator[Span]:
        if group.residence is Residence.REPLICATED and self._layout.dp_rank > 0:
            return
        for span in group.local_spans():
            sharding = self._sharding.get(id(span.parameter))
            if getattr(span.parameter, "ds_pipe_replicated", False):
                continue  # DeepSpeed's mark: another pipeline stage holds this tied weight and counts it
            if sharding is not None and (sharding.splits or self._layout.tp_rank == 0):
                yield span

    def ranges(self, group: int, start: int, numel: int) -> list[tuple[int, int]]:
        """Those within ``[start, start + numel)`` of the group's local part, from 0."""
        return [
            (max(lo, start) - start, min(hi, start + numel) - start)
            for lo, hi in self._ranges[group]
            if lo < start + numel and hi > start
        ]

    def squares(self, shards: Sequence[Tensor]) -> Tensor:
        """This rank's part of the vectors' squared norms, ``[K]`` fp64, from their ``[K, n]`` of every group."""
        squares = torch.zeros(len(shards[0]), dtype=torch.float64, device=shards[0].device)
        for shard, ranges in zip(shards, self._ranges, strict=True):
            for lo, hi in ranges:
                squares += torch.linalg.vector_norm(shard[:, lo:hi], dim=1).double().square()
        return squares

    def inner_products(self, group: int, shard: Tensor, start: int, vector: Tensor) -> Tensor:
        """This rank's part of ``<d_k, vector>``, ``[K]`` fp64.

        Args:
            shard: the d_k's local part of the group, ``[K, n]``.
            start: where in it the vector lies.
            vector: fp32 or wider, flat, on the shard's device.
        """
        total = torch.zeros(len(shard), dtype=torch.float64, device=shard.device)
        if by_triton(shard) and vector.dtype == torch.float32:
            from ..optimizers import triton_adam  # where there is no GPU, Triton need not be installed

            for lo, hi in self.ranges(group, start, vector.numel()):
                rows = list(shard[:, start + lo : start + hi])
                total += triton_adam.inner_products(rows, vector[lo:hi])
            return total
        size = block_size(vector.numel(), shard.device)
        products = torch.empty(len(shard), size, dtype=vector.dtype, device=shard.device)
        for begin, end in self.ranges(group, start, vector.numel()):
            for lo in range(begin, end, size):
                hi = min(lo + size, end)
                part, own = shard[:, start + lo : start + hi], products[:, : hi - lo]
                # Summed in fp64: terms cancel to a thousandth of their absolute sum and less.
                total += torch.mul(part, vector[lo:hi], out=own).sum(1, dtype=torch.float64)
        return total
