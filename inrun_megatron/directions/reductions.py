"""Sums of directions over ranks: over data-parallel ones, started while the validation backward still runs.

A backward completes a flat group from its end. In a target's last validation backward every bucket of it is sent as
soon as all that lies in it has been added, so that the network works while the layers before are computed, and a
target's sums travel while the next one's passes run:

    stage 0      an all-reduce of the bucket
    stages 1, 2  a reduce-scatter of it in equal parts, which go to their owners at the end (engines/buckets.py)
    stage 3      a reduce-scatter of every layer, which runs while the next layer's gradient is computed

The first step counts how often each target uses a parameter in a microbatch on this rank (twice, where embeddings are tied; not
at all, where its sequences pass a layer by); until then everything is sent at the end, as is always what a pipeline's other stage
adds to. Buckets are sent in one order, fixed by the layout, so that ranks never wait for each other's.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from ..engines.buckets import Buckets
from ..engines.shards import FlatGroup, Residence
from ..errors import UserError
from ..parallel import Layout

LAYERS_ON_THE_WAY = 1
"""Under ZeRO-3, beside the one whose gradient is computed; each holds its whole fp32 gradient."""


@dataclass(frozen=True)
class _Bucket:
    """``[lo, hi)`` of flat group ``group``."""

    group: int
    lo: int
    hi: int


class Reductions:
    """The sums of one set of K vectors; ``finish()`` ends what ``begin()`` began.

    Args:
        groups: flat groups of the engine's adapter.
        buckets: of these groups, by index; empty where nothing flat is summed (one rank, stage 3).
        layout: process groups.
        targets: K.
    """

    def __init__(
        self, groups: Sequence[FlatGroup], buckets: dict[int, Buckets], layout: Layout, targets: int
    ) -> None:
        self._groups, self._buckets, self._layout, self._targets = groups, buckets, layout, targets
        # Large groups first, because vectors are complete at the very end only.
        largest_first = sorted(buckets, key=lambda index: -groups[index].numel)
        self._order = [_Bucket(index, lo, hi) for index in largest_first for lo, hi in buckets[index].bounds]
        self._in: dict[int, list[int]] = {}  # by parameter: the buckets that it lies in
        for index in largest_first:
            first = next(place for place, bucket in enumerate(self._order) if bucket.group == index)
            for span in groups[index].spans:
                self._in[id(span.parameter)] = [first + place for place in buckets[index].meets(span)]
        self._uses: list[Counter[int]] | None = None  # by target: of each parameter in a microbatch
        self._layers: deque[tuple[dist.Work, Tensor, Tensor, Tensor]] = deque()
        self.hold(())
        self.begin()

    def hold(self, parameters: Iterable[Parameter]) -> None:
        """Send what these lie in at the end: something is added to them after the last backward."""
        self._held = {place for parameter in parameters for place in self._in.get(id(parameter), ())}
        every = [(target, place) for target in range(self._targets) for place in range(len(self._order))]
        self._queue = sorted(every, key=lambda own: own[1] in self._held)  # the held ones last

    @property
    def started(self) -> int:
        """Collectives over buckets since ``begin()``."""
        return len(self._works)

    def begin(self) -> None:
        """Nothing has been added up."""
        self._seen: list[Counter[int]] = [Counter() for _ in range(self._targets)]
        self._missing = [self._expected(target) for target in range(self._targets)]
        self._works: list[dist.Work] = []
        self._parts: dict[tuple[int, int], dict[int, Tensor]] = {}  # by group and target: by lower bound
        self._layers.clear()

    def unused(self, target: int) -> list[int]:
        """Parameters (by ``id``) that no bucket waits for, as the target does not use them here: their sums must be zero
        beforehand, since other ranks may use them. Of flat groups; none before the first step is over."""
        return [] if self._uses is None else [key for key in self._in if key not in self._uses[target]]

    def _expected(self, target: int) -> list[int]:
        """Parameters that each bucket waits for."""
        missing = [0] * len(self._order)
        for key in () if self._uses is None else self._uses[target]:
            for place in self._in[key]:
                missing[place] += 1
        return missing

    # -- stages 0 to 2 ---------------------------------------------------------------------------------

    def added(self, target: int, parameter: Parameter, sums: Sequence[Tensor], layer: str = "") -> None:
        """A use of the parameter, by the layer of that name, has been added to the sums ``[K, n]`` in the target's last backward.

        Raises:
            UserError: the parameter is used more often than in the first step, and its sum may be on its way.
        """
        if not self._order:
            return
        key, seen = id(parameter), self._seen[target]
        seen[key] += 1
        if self._uses is None or seen[key] < self._uses[target][key]:
            return
        if seen[key] > self._uses[target][key]:
            whose = f" of layer {layer}" if layer else ""
            raise UserError(
                f"a parameter{whose} of shape {tuple(parameter.shape)} is used {seen[key]} times in the last microbatch of a pass, "
                f"{self._uses[target][key]} times in that of the first step: sums are sent when the last use has been added; "
                f"score models that use their layers equally often"
            )
        for place in self._in[key]:
            self._missing[target][place] -= 1
        self._send(sums)

    def _send(self, sums: Sequence[Tensor], everything: bool = False) -> None:
        """Start the collectives whose turn it is."""
        for target, place in self._queue[len(self._works) :]:
            if not everything and (place in self._held or self._missing[target][place]):
                return
            self._works.append(self._start(target, self._order[place], sums))

    def _start(self, target: int, bucket: _Bucket, sums: Sequence[Tensor]) -> dist.Work:
        whole = sums[bucket.group][target, bucket.lo : bucket.hi]
        group = self._layout.dp_group
        if self._groups[bucket.group].residence is Residence.REPLICATED:
            return dist.all_reduce(whole, group=group, async_op=True)
        part = whole.new_empty(whole.numel() // self._layout.dp_size)
        self._parts.setdefault((bucket.group, target), {})[bucket.lo] = part
        return dist.reduce_scatter_tensor(part, whole, group=group, async_op=True)

    def finish(self, sums: Sequence[Tensor]) -> None:
        """Send what is left and wait; afterwards this rank's shards hold the sums over ranks."""
        while self._layers:
            self._add_layer()
        if not self._order:
            return
        self._send(sums, everything=True)
        for work in self._works:
            work.wait()
        for (index, target), parts in sorted(self._parts.items()):
            group, own = self._groups[index], self._buckets[index]
            in_order = [parts.pop(lo) for lo, _ in own.bounds]
            own.to_owners(in_order, sums[index][target, group.start : group.stop])
        if self._uses is None and any(self._seen):
            self._uses = self._seen
        self.begin()

    # -- stage 3 ---------------------------------------------------------------------------------------

    def add_layer(self, whole: Tensor, own: Tensor) -> None:
        """Add this rank's part of the sum over ranks to ``own [n]``, at ``finish()`` at the latest.

        Args:
            whole: a layer's padded gradient ``[d * n]``; it must not change any more.
        """
        part = torch.empty_like(own)
        work = dist.reduce_scatter_tensor(part, whole, group=self._layout.dp_group, async_op=True)
        self._layers.append((work, part, own, whole))
        while len(self._layers) > LAYERS_ON_THE_WAY:
            self._add_layer()

    def _add_layer(self) -> None:
        work, part, own, _ = self._layers.popleft()
        work.wait()
        own.add_(part)


def sum_together(pieces: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum views ``[K, n]`` over the group's ranks, in place and in one all-reduce."""
    packed = torch.cat(list(pieces), dim=1)
    dist.all_reduce(packed, group=group)
    for piece, summed in zip(pieces, packed.split([p.shape[1] for p in pieces], dim=1), strict=True):
        piece.copy_(summed)
