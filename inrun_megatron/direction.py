"""Directions: vectors shaped and sharded like the parameters, one per target.

    grad L_k over this rank's share of the validation sequences
      -> sum over data-parallel ranks            (all-reduce / reduce-scatter, as the gradients are)
      -> sum over tensor-parallel ranks          (parameters that see sequence shards)
      -> times the optimizer's Jacobian          (elementwise, on the shard whose state this rank owns)
      -> where the layers can use it             (all-gather once, or with the layer under ZeRO-3)

the traffic of one optimizer step. Storage is fp32: K x the rank's parameters, divided by the data-parallel
size under ZeRO-3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from .engines.shards import FlatGroup, Residence, Span, merged
from .optimizers import CPU_BLOCK
from .parallel import Layout
from .taps import Sharding


@dataclass(frozen=True)
class _Place:
    group: int
    start: int
    numel: int  # elements of the span: the parameter, or this rank's part of it under ZeRO-3
    shape: torch.Size


def _full_shape(parameter: Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


class Directions:
    """K vectors laid out in the optimizer's flat groups.

    Args:
        groups: flat groups of the engine's adapter.
        sharding: of every parameter, by ``id`` (from the taps).
        layout: process groups.
        targets: K.
        dtype: storage type; fp64 only where the model itself is fp64.
    """

    def __init__(
        self,
        groups: Sequence[FlatGroup],
        sharding: dict[int, Sharding],
        layout: Layout,
        targets: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.groups = groups
        self.layout = layout
        self.targets = targets
        self._sharding, self._dtype = sharding, dtype
        self._buffers = [
            torch.zeros(
                targets,
                g.numel if g.residence is not Residence.PARTITIONED else g.stop - g.start,
                dtype=dtype,
                device=g.device,
            )
            for g in groups
        ]
        self._places: dict[int, _Place] = {}
        for index, group in enumerate(groups):
            for span in group.spans:
                shape = _full_shape(span.parameter)
                self._places[id(span.parameter)] = _Place(index, span.start, span.numel, shape)
        # What this rank counts in sums over all parameters: replicated parameters on tensor rank 0 only.
        self._counted = [merged(self._spans_that_count(g)) for g in groups]
        self._sequence = [merged(self._spans_of(g, Sharding.SEQUENCE)) for g in groups]

    def like(self, vectors: int) -> Directions:
        """``vectors`` further vectors in the same layout, zero."""
        return Directions(self.groups, self._sharding, self.layout, vectors, self._dtype)

    @property
    def device(self) -> torch.device:
        """Where directions lie (the optimizer's state may lie elsewhere)."""
        return self.groups[0].device

    @property
    def nbytes(self) -> int:
        """Bytes that directions hold on this rank between uses."""
        return sum(b.numel() * b.element_size() for b in self._buffers)

    def _spans_of(self, group: FlatGroup, sharding: Sharding) -> Iterator[Span]:
        return (s for s in group.local_spans() if self._sharding.get(id(s.parameter)) is sharding)

    def _spans_that_count(self, group: FlatGroup) -> Iterator[Span]:
        if group.residence is Residence.REPLICATED and self.layout.dp_rank > 0:
            return
        for span in group.local_spans():
            sharding = self._sharding.get(id(span.parameter))
            if getattr(span.parameter, "ds_pipe_replicated", False):
                continue  # DeepSpeed's mark: another pipeline stage holds this tied weight and counts it
            if sharding is not None and (sharding.splits or self.layout.tp_rank == 0):
                yield span

    # -- filling -------------------------------------------------------------------------------------

    def zero(self) -> None:
        for buffer in self._buffers:
            buffer.zero_()

    def accumulate(self, target: int, parameter: Parameter, add_to: Callable[[Tensor], None]) -> None:
        """Let ``add_to(out)`` add a gradient to the parameter's direction; ``out`` has its (local) shape."""
        place = self._places[id(parameter)]
        buffer = self._buffers[place.group]
        stored = buffer[target, place.start : place.start + place.numel]
        if self.groups[place.group].residence is not Residence.PARTITIONED:
            add_to(stored.view(place.shape))
            return
        # ZeRO-3: the whole gradient of this layer for a moment, then this rank's part of the sum over ranks.
        whole = torch.zeros(place.numel * self.layout.dp_size, dtype=buffer.dtype, device=buffer.device)
        add_to(whole[: place.shape.numel()].view(place.shape))
        part = torch.empty_like(stored)
        dist.reduce_scatter_tensor(part, whole, group=self.layout.dp_group)
        stored.add_(part)

    def reduce(self) -> None:
        """Sum over ranks; afterwards this rank's shard holds ``grad L_k`` (times the loss scale)."""
        for group, buffer in zip(self.groups, self._buffers, strict=True):
            if self.layout.dp_size == 1 or group.residence is Residence.PARTITIONED:
                continue
            if group.residence is Residence.REPLICATED:
                dist.all_reduce(buffer, group=self.layout.dp_group)
                continue
            for row in buffer:
                part = torch.empty_like(row[group.start : group.stop])
                dist.reduce_scatter_tensor(part, row, group=self.layout.dp_group)
                row[group.start : group.stop].copy_(part)
        if self.layout.tp_size > 1 and any(self._sequence):
            pieces = [
                shard[:, lo:hi]
                for shard, spans in zip(self.shards(), self._sequence, strict=True)
                for lo, hi in spans
            ]
            packed = torch.cat(pieces, dim=1)
            dist.all_reduce(packed, group=self.layout.tp_group)
            for piece, summed in zip(pieces, packed.split([p.shape[1] for p in pieces], dim=1), strict=True):
                piece.copy_(summed)

    def shards(self) -> list[Tensor]:
        """This rank's local part of every group, ``[K, n]`` views."""
        return [
            b if g.residence is Residence.PARTITIONED else b[:, g.start : g.stop]
            for g, b in zip(self.groups, self._buffers, strict=True)
        ]

    def publish(self) -> None:
        """All-gather the scaled shards to where the layers read them (nothing to do at stages 0 and 3)."""
        if self.layout.dp_size == 1:
            return
        for group, buffer in zip(self.groups, self._buffers, strict=True):
            if group.residence is Residence.FLAT:
                for row in buffer:
                    part = row[group.start : group.stop].clone()
                    dist.all_gather_into_tensor(row, part, group=self.layout.dp_group)

    # -- reading -------------------------------------------------------------------------------------

    def of(self, parameter: Parameter) -> list[Tensor]:
        """The K directions of a parameter in its (local) shape; a collective over dp under ZeRO-3.

        Views into the storage, but for ZeRO-3.
        """
        place = self._places[id(parameter)]
        buffer = self._buffers[place.group][:, place.start : place.start + place.numel]
        if self.groups[place.group].residence is not Residence.PARTITIONED:
            return [row.view(place.shape) for row in buffer]
        size = self.layout.dp_size * buffer.numel()
        gathered = torch.empty(size, dtype=buffer.dtype, device=buffer.device)
        dist.all_gather_into_tensor(gathered, buffer.reshape(-1), group=self.layout.dp_group)
        parts = gathered.view(self.layout.dp_size, self.targets, place.numel)
        return [parts[:, k].reshape(-1)[: place.shape.numel()].view(place.shape) for k in range(self.targets)]

    def counted(self, group: int, start: int, numel: int) -> list[tuple[int, int]]:
        """Stretches of ``[start, start + numel)`` of the group's local part that this rank counts, from 0."""
        return [
            (max(lo, start) - start, min(hi, start + numel) - start)
            for lo, hi in self._counted[group]
            if lo < start + numel and hi > start
        ]

    def squares(self) -> Tensor:
        """This rank's part of the squared norms of the K vectors whose shards are held now, ``[K]`` fp64."""
        squares = torch.zeros(self.targets, dtype=torch.float64, device=self.groups[0].device)
        for shard, stretches in zip(self.shards(), self._counted, strict=True):
            for lo, hi in stretches:
                squares += torch.linalg.vector_norm(shard[:, lo:hi], dim=1).double().square()
        return squares

    def norms(self) -> Tensor:
        """Euclidean norms of the K vectors whose shards are held now, ``[K]`` fp64; a collective over the world."""
        squares = self.squares()
        dist.all_reduce(squares)
        return squares.sqrt()

    def inner_products(self, group: int, start: int, vector: Tensor) -> Tensor:
        """``<d_k, vector>`` for all k over what this rank counts, ``[K]`` fp64.

        ``vector`` lies in the local part of ``group`` from element ``start``.
        """
        shard, numel = self.shards()[group], vector.numel()
        flat = vector.detach().reshape(-1).to(device=shard.device, dtype=shard.dtype)
        total = torch.zeros(self.targets, dtype=torch.float64, device=shard.device)
        size = CPU_BLOCK if shard.device.type == "cpu" else numel
        for begin, end in self.counted(group, start, numel):
            for lo in range(begin, end, size):
                hi = min(lo + size, end)
                # Summed in fp64: terms cancel to a thousandth of their absolute sum and less.
                total += (shard[:, start + lo : start + hi] * flat[lo:hi]).sum(1, dtype=torch.float64)
        return total
