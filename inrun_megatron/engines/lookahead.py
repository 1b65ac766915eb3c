"""Moving the model's weights to where the optimizer's step would take them, and back without a trace.

The optimizer's masters, moments and counters are only read. What moves is the copy that the layers use: this rank's
part of it is computed from the masters, and gathered the way DeepSpeed gathers it after a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from .shards import FlatGroup, Piece, Residence
from .zero_groups import OptimizerState

Place = Callable[[int, Piece, Tensor], object]
"""``(group, piece, out)``: write the piece's new weights ``[numel]`` into ``out``, in the model's precision."""


class Lookahead:
    """The weights of a DeepSpeed engine's module, as something that can be moved for the time of a forward pass."""

    def __init__(self, state: OptimizerState) -> None:
        self._state = state

    @contextmanager
    def moving(self) -> Iterator[Callable[[Place], None]]:
        """Yields ``move(place)``, to be called any number of times; afterwards the weights are what they were, bit for bit.

        ``place`` always sees the masters from before the first move. The weights come back from the masters, whose
        rounding they are; only where the layers' weights are the optimizer's own a copy of them is kept meanwhile.
        """
        own = [piece.tensor.data for _, piece in self._state.pieces()] if self._state.is_bare else []
        kept = [weights.clone() for weights in own]
        moved = False

        def back() -> None:
            for weights, original in zip(own, kept, strict=True):
                weights.copy_(original)

        def move(place: Place) -> None:
            nonlocal moved
            with torch.no_grad():
                if moved:
                    back()
                moved = True
                self._write_all(place)
                self._gather()

        try:
            yield move
        finally:
            with torch.no_grad():
                back()
            if not self._state.is_bare:
                self.settle()

    def settle(self) -> None:
        """Set the weights to the optimizer's masters, rounded to the model's precision."""
        with torch.no_grad():
            self._write_all(lambda _, piece, out: out.copy_(piece.tensor.view(-1)))
            self._gather()

    def _write_all(self, place: Place) -> None:
        for index, group in enumerate(self._state.groups):
            for piece in group.pieces:
                self._write(index, group, piece, place)

    def _local(self, group: FlatGroup) -> list[Tensor]:
        """This rank's part of the weights that the layers use, as flat views."""
        if group.residence is Residence.PARTITIONED:
            return [span.parameter.ds_tensor.data.view(-1) for span in group.spans]  # type: ignore[attr-defined]
        if group.flat is not None:
            return [group.flat[group.start : group.stop]]
        return [span.parameter.data.view(-1) for span in group.spans]

    def _write(self, index: int, group: FlatGroup, piece: Piece, place: Place) -> None:
        local = self._local(group)
        starts = [0] if group.residence is Residence.FLAT or group.flat is not None else _starts(group)
        exact = dict(zip(starts, local, strict=True)).get(piece.start)
        if exact is not None and exact.numel() == piece.numel:
            place(index, piece, exact)
            return
        # One tensor of the optimizer for several of the layers' (ZeRO-3).
        whole = torch.empty(piece.numel, dtype=local[0].dtype, device=local[0].device)
        place(index, piece, whole)
        for start, part in zip(starts, local, strict=True):
            part.copy_(whole[start - piece.start : start - piece.start + part.numel()])

    def _gather(self) -> None:
        layout = self._state.layout
        for group in self._state.groups:
            if group.residence is Residence.FLAT and layout.dp_size > 1:
                assert group.flat is not None
                own = group.flat[group.start : group.stop].clone()
                dist.all_gather_into_tensor(group.flat, own, group=layout.dp_group)
        self._state.release_gathered_weights()


def _starts(group: FlatGroup) -> list[int]:
    return [span.start for span in group.spans]
