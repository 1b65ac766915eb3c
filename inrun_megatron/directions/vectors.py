"""Directions: vectors shaped and sharded like the parameters, one per target.

    grad L_k over this rank's share of the validation sequences
      -> sum over data-parallel ranks            (all-reduce / reduce-scatter, as the gradients are)
      -> sum over tensor-parallel ranks          (replicated parameters that see sequence shards or own heads)
      -> times the optimizer's Jacobian          (elementwise, on the shard whose state this rank owns)
      -> where the layers can use it             (all-gather once, or with the layer under ZeRO-3)

the traffic of one optimizer step. Gradients are added up in fp32. What layers read is

    fp32    the same memory: K x 4 bytes per parameter of the rank, divided by the data-parallel size under ZeRO-3
    bf16    rounded once, as it is scaled: K x 2 bytes; the fp32 sums live from ``zero()`` to ``publish()``

Sums are on their way while the last validation backward still runs (reductions.py), gathers while training computes its
first microbatch; a layer waits for its own (gathers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from ..dots.copy_engine import ALIGNMENT
from ..engines.buckets import Buckets, FlatGathers
from ..engines.shards import FlatGroup, Residence, merged
from ..errors import UserError
from ..parallel import Layout
from ..taps import Sharding
from ..taps.coverage import full_shape
from .counting import Counting
from .gathers import LayerGathers
from .reductions import Reductions, sum_together

STORED = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class _Place:
    group: int
    start: int
    numel: int  # elements of the span: the parameter, or this rank's part of it under ZeRO-3
    shape: torch.Size


class Directions:
    """K vectors laid out in the optimizer's flat groups.

    Args:
        groups: flat groups of the engine's adapter.
        sharding: of every parameter, by ``id`` (from the taps).
        layout: process groups.
        targets: K.
        dtype: of the sums; fp64 only where the model itself is fp64.
        stored: of what layers read; default: that of the sums.
    """

    def __init__(
        self,
        groups: Sequence[FlatGroup],
        sharding: dict[int, Sharding],
        layout: Layout,
        targets: int,
        dtype: torch.dtype = torch.float32,
        stored: torch.dtype | None = None,
    ) -> None:
        self.groups = groups
        self.layout = layout
        self.targets = targets
        self._sharding, self._sum_dtype, self._stored_dtype = sharding, dtype, stored or dtype
        # One [K, n] per group. Where the sums are rounded, there are either sums or, after publish(), what layers read.
        self._rounds = self._stored_dtype != dtype
        self._sums: list[Tensor] = []
        self._stored: list[Tensor] = []
        if not self._rounds:
            self._sums = self._stored = [self._empty(group, dtype).zero_() for group in groups]
        self._places: dict[int, _Place] = {}
        self._views: dict[int, list[Tensor]] = {}  # of what is stored, by parameter
        # What lies in the sums of these, by target, is this step's; of flat groups only.
        self._begun: list[set[int]] = [set() for _ in range(targets)]
        for index, group in enumerate(groups):
            for span in group.spans:
                shape = full_shape(span.parameter)
                self._places[id(span.parameter)] = _Place(index, span.start, span.numel, shape)
        buckets = {
            index: Buckets(group, layout)
            for index, group in enumerate(groups)
            if group.residence is not Residence.PARTITIONED and layout.dp_size > 1
        }
        self._reductions = Reductions(groups, buckets, layout, targets)
        flat = {index: own for index, own in buckets.items() if groups[index].residence is Residence.FLAT}
        self._flat = FlatGathers(groups, flat, layout)
        self._layers = LayerGathers(
            layout.dp_group, layout.dp_size, lambda key: self._own(self._places[key]).reshape(-1)
        )
        self.counting = Counting(groups, sharding, layout)
        # Of replicated parameters of which a tensor-parallel rank sees a part: ranges of every group's local part.
        partial = (Sharding.SEQUENCE, Sharding.HEADS)
        self._partial = [
            merged(s for s in g.local_spans() if sharding.get(id(s.parameter)) in partial) for g in groups
        ]

    def like(self, vectors: int) -> Directions:
        """``vectors`` further vectors in the same layout, zero."""
        return Directions(self.groups, self._sharding, self.layout, vectors, self._sum_dtype)

    @property
    def device(self) -> torch.device:
        """Where directions lie (the optimizer's state may lie elsewhere)."""
        return self.groups[0].device

    @property
    def nbytes(self) -> int:
        """Bytes that directions hold on this rank now."""
        return sum(b.numel() * b.element_size() for b in self._present)

    @property
    def _present(self) -> list[Tensor]:
        return self._sums or self._stored

    def _empty(self, group: FlatGroup, dtype: torch.dtype) -> Tensor:
        own = group.stop - group.start if group.residence is Residence.PARTITIONED else group.numel
        return self._rows(own, dtype, group.device)

    def _rows(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``[K, numel]``, uninitialised. Every row begins where the copy engine can read (dots/copy_engine.py)."""
        multiple = ALIGNMENT // dtype.itemsize
        step = -(-numel // multiple) * multiple
        return torch.empty(self.targets, step, dtype=dtype, device=device)[:, :numel]

    def hold(self, parameters: Iterable[Parameter]) -> None:
        """What is added to these is complete at ``reduce()`` only: another pipeline stage uses them, too."""
        self._reductions.hold(parameters)

    # -- filling -------------------------------------------------------------------------------------

    def zero(self) -> None:
        """Begin anew: what layers read until now is gone."""
        self._flat.wait()
        self._views.clear()
        self.rewind()
        self._reductions.begin()
        if self._rounds:
            self._stored.clear()  # before the sums take their room
            self._sums = [self._empty(group, self._sum_dtype) for group in self.groups]
        for begun in self._begun:
            begun.clear()
        for group, buffer in zip(self.groups, self._sums, strict=True):
            if group.residence is Residence.PARTITIONED:
                buffer.zero_()
            elif self._rounds:
                for lo, hi in group.gaps():
                    buffer[:, lo:hi].zero_()
        for target in range(self.targets):  # no backward writes these before their buckets are sent
            self._begin([(key, self._places[key]) for key in self._reductions.unused(target)], target)

    def accumulate(
        self,
        target: int,
        parameter: Parameter,
        add_to: Callable[[Tensor, bool], None],
        *,
        last: bool = False,
        layer: str = "",
    ) -> None:
        """Let ``add_to(out, fresh)`` add a gradient to the parameter's direction; ``out`` has its (local) shape.

        ``fresh``: nothing has been added since ``zero()``, and what lies in ``out`` must be overwritten.
        ``last``: in the last backward that adds to the target, whose sums are sent as they are complete.
        ``layer``: name of the layer whose use of the parameter this is, for messages.
        """
        key = id(parameter)
        place = self._places.get(key)
        if place is None:
            raise UserError(
                f"the tap of layer {layer} was given a tensor of shape {list(parameter.shape)} that is no parameter of the optimizer: "
                f"give it the Parameter itself, no view of one, and where that has another shape write a tap of your own"
            )
        buffer = self._sums[place.group]
        own = buffer[target, place.start : place.start + place.numel]
        if self.groups[place.group].residence is not Residence.PARTITIONED:
            fresh = key not in self._begun[target]
            self._begun[target].add(key)
            add_to(own.view(place.shape), fresh)
            if last:
                self._reductions.added(target, parameter, self._sums, layer)
            return
        # ZeRO-3: the whole gradient of this layer for a moment, then this rank's part of the sum over ranks.
        whole = torch.zeros(place.numel * self.layout.dp_size, dtype=buffer.dtype, device=buffer.device)
        add_to(whole[: place.shape.numel()].view(place.shape), False)
        self._reductions.add_layer(whole, own)

    def sums(self, parameter: Parameter) -> list[Tensor]:
        """Views of what has been added up for a parameter, in its shape; not under ZeRO-3."""
        place = self._places[id(parameter)]
        assert self.groups[place.group].residence is not Residence.PARTITIONED
        self._begin_untouched([(id(parameter), place)])
        return [
            row[place.start : place.start + place.numel].view(place.shape) for row in self._sums[place.group]
        ]

    def _begin_untouched(self, places: Iterable[tuple[int, _Place]]) -> None:
        """Zero the sums of those parameters to which nothing has been added."""
        for target in range(self.targets):
            self._begin(places, target)

    def _begin(self, places: Iterable[tuple[int, _Place]], target: int) -> None:
        begun = self._begun[target]
        for key, place in places:
            partitioned = self.groups[place.group].residence is Residence.PARTITIONED
            if not partitioned and key not in begun:
                self._sums[place.group][target, place.start : place.start + place.numel].zero_()
                begun.add(key)

    def reduce(self) -> None:
        """Sum over ranks; afterwards this rank's shard holds ``grad L_k`` (times the loss scale)."""
        self._begin_untouched(self._places.items())
        self._reductions.finish(self._sums)
        if self.layout.tp_size > 1 and any(self._partial):
            pieces = [
                shard[:, lo:hi]
                for shard, ranges in zip(self.shards(), self._partial, strict=True)
                for lo, hi in ranges
            ]
            sum_together(pieces, self.layout.tp_group)

    def shards(self) -> list[Tensor]:
        """This rank's local part of every group, ``[K, n]`` views: of the sums, after ``publish`` of what layers read."""
        self._flat.wait()
        return [self._local(index) for index in range(len(self.groups))]

    def _local(self, index: int) -> Tensor:
        group, buffer = self.groups[index], self._present[index]
        return buffer if group.residence is Residence.PARTITIONED else buffer[:, group.start : group.stop]

    def leaving(self) -> list[Tensor | None]:
        """For every group a ``[K, n]`` that the scaled shard is to be written into, as layers read it; None: into itself."""
        return [self._leaving(index) for index in range(len(self.groups))]

    def _leaving(self, index: int) -> Tensor | None:
        group = self.groups[index]
        if not self._rounds and index not in self._flat.order:
            return None
        out = self._rows(group.stop - group.start, self._stored_dtype, group.device)
        for lo, hi in group.unstepped():
            out[:, lo:hi].zero_()
        return out

    def publish(self, leaving: Sequence[Tensor | None]) -> None:
        """Bring ``leaving()``, written by now, to where the layers read it; at stages 1 and 2 by all-gathers that run on."""
        for index, out in enumerate(leaving):
            if out is not None and index not in self._flat.order:
                self._sums[index] = out
        for index in self._flat.order:
            shards = leaving[index]
            assert shards is not None
            if self._rounds:
                self._sums[index] = torch.empty(0)  # before directions take its room
                self._sums[index] = self._empty(self.groups[index], self._stored_dtype)
            self._flat.start(index, shards, self._sums[index])
        if self._rounds:
            self._stored, self._sums = self._sums, []

    # -- reading -------------------------------------------------------------------------------------

    def of(self, parameter: Parameter) -> list[Tensor]:
        """The K directions of a parameter in its (local) shape, as they are stored; a collective over dp under ZeRO-3.

        Views into the storage, but for ZeRO-3.
        """
        key = id(parameter)
        self._flat.wait(key)
        if key in self._views:
            return self._views[key]
        place = self._places[key]
        if self.groups[place.group].residence is not Residence.PARTITIONED:
            self._views[key] = [row.view(place.shape) for row in self._own(place)]
            return self._views[key]
        parts = self._layers.read(key).view(self.layout.dp_size, self.targets, place.numel)
        whole = parts.transpose(0, 1).reshape(self.targets, -1)[:, : place.shape.numel()]
        return [row.view(place.shape) for row in whole]

    def rewind(self) -> None:
        """The backward of another microbatch is to read them."""
        self._layers.rewind()

    def _own(self, place: _Place) -> Tensor:
        """What this rank stores of a parameter's directions, ``[K, n]``."""
        return self._stored[place.group][:, place.start : place.start + place.numel]

    def squares(self) -> Tensor:
        """This rank's part of the squared norms of the K vectors whose shards are held now, ``[K]`` fp64."""
        return self.counting.squares(self.shards())

    def norms(self) -> Tensor:
        """Euclidean norms of the K vectors whose shards are held now, ``[K]`` fp64; a collective over the world."""
        squares = self.squares()
        dist.all_reduce(squares)
        return squares.sqrt()

    def inner_products(self, group: int, start: int, vector: Tensor) -> Tensor:
        """``<d_k, vector>`` for all k over what this rank counts, ``[K]`` fp64.

        ``vector`` lies in the local part of ``group`` from element ``start``.
        """
        self._flat.wait()
        shard = self._local(group)
        flat = vector.detach().reshape(-1).to(device=shard.device, dtype=self._sum_dtype)
        return self.counting.inner_products(group, shard, start, flat)


def stored_type(name: str, *, precise: bool) -> torch.dtype:
    """The type that layers read directions in, by its name; ``precise``: the model is fp64. Raises UserError."""
    if name not in STORED:
        raise UserError(f"direction_dtype {name!r} is neither fp32 nor bf16")
    if precise and name != "fp32":
        raise UserError(f"direction_dtype {name} with fp64 weights: their directions are fp64; leave it out")
    return torch.float64 if precise else STORED[name]
