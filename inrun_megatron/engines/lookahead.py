"""Moving the model's weights to where the optimizer's step would take them, and back without a trace.

The optimizer's masters, moments and counters are only read. What moves is the copy that the layers use: this rank's
part of it is computed from the masters, and gathered (stages 1 and 2) bucket by bucket while the first forward runs,
whose layers wait for their own (``arriving``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from .buckets import Buckets, FlatGathers
from .shards import FlatGroup, Piece, Residence
from .zero_groups import OptimizerState

Write = Callable[[int, Piece, Tensor], object]
"""``(group, piece, out)``: write the piece's new weights ``[numel]`` into ``out``, in the model's precision."""


class Lookahead:
    """The weights of a DeepSpeed engine's module, as something that can be moved for the time of a forward pass."""

    def __init__(self, state: OptimizerState) -> None:
        self._state = state
        buckets = {
            index: Buckets(g, state.layout) for index, g in enumerate(state.groups) if self._gathered(g)
        }
        self._gathers = FlatGathers(state.groups, buckets, state.layout)

    def arriving(self, parameter: Parameter) -> None:
        """Wait until the parameter's moved weights have come: before a layer reads it."""
        self._gathers.wait(id(parameter))

    @contextmanager
    def moving(self) -> Iterator[Callable[[Write], None]]:
        """Yields ``move(write)``, to be called any number of times; afterwards the weights are what they were, bit for bit.

        ``write`` always sees the masters from before the first move. A copy of the layers' weights is kept where the way
        back would be a collective (stages 1 and 2) or the weights are the optimizer's own; elsewhere they come back from
        the masters, whose rounding they are.
        """
        moved_from = self._weights_to_keep()
        kept = [weights.clone() for weights in moved_from]
        moved = False

        def back() -> None:
            for weights, original in zip(moved_from, kept, strict=True):
                weights.copy_(original)

        def move(write: Write) -> None:
            nonlocal moved
            self._gathers.wait()  # where a node's passes read less than the whole model
            with torch.no_grad():
                if moved and self._state.is_bare:
                    back()
                moved = True
                self._write_all(write)
                self._gather()

        try:
            yield move
        finally:
            self._gathers.wait()
            with torch.no_grad():
                back()
            if not kept:
                self.copy_from_masters()

    def _weights_to_keep(self) -> list[Tensor]:
        if self._state.is_bare:
            return [piece.tensor.data for _, piece in self._state.pieces()]
        flat = [group.flat for group in self._state.groups if self._gathered(group)]
        assert not flat or len(flat) == len(self._state.groups), "groups of one engine share a stage"
        return [weights for weights in flat if weights is not None]

    def _gathered(self, group: FlatGroup) -> bool:
        return group.residence is Residence.FLAT and self._state.layout.dp_size > 1

    def copy_from_masters(self) -> None:
        """Set the weights to the optimizer's masters, rounded to the model's precision."""
        with torch.no_grad():
            self._write_all(lambda _, piece, out: out.copy_(piece.tensor.view(-1)))
            self._gather()
            self._gathers.wait()

    def _write_all(self, write: Write) -> None:
        for index, group in enumerate(self._state.groups):
            for piece in group.pieces:
                self._write_piece(index, group, piece, write)

    def _local(self, group: FlatGroup) -> list[Tensor]:
        """This rank's part of the weights that the layers use, as flat views."""
        if group.residence is Residence.PARTITIONED:
            return [span.parameter.ds_tensor.data.view(-1) for span in group.spans]  # type: ignore[attr-defined]
        if group.flat is not None:
            return [group.flat[group.start : group.stop]]
        return [span.parameter.data.view(-1) for span in group.spans]

    def _write_piece(self, index: int, group: FlatGroup, piece: Piece, write: Write) -> None:
        local = self._local(group)
        starts = [0] if group.residence is Residence.FLAT or group.flat is not None else _starts(group)
        exact = dict(zip(starts, local, strict=True)).get(piece.start)
        if exact is not None and exact.numel() == piece.numel:
            write(index, piece, exact)
            return
        # One tensor of the optimizer for several of the layers' (ZeRO-3).
        whole = torch.empty(piece.numel, dtype=local[0].dtype, device=local[0].device)
        write(index, piece, whole)
        for start, part in zip(starts, local, strict=True):
            part.copy_(whole[start - piece.start : start - piece.start + part.numel()])

    def _gather(self) -> None:
        for index in self._gathers.order:
            group = self._state.groups[index]
            assert group.flat is not None
            own = group.flat[group.start : group.stop].clone()
            self._gathers.start(index, own.unsqueeze(0), group.flat.unsqueeze(0), forward=True)
        self._state.forget_gathered_weights()


def _starts(group: FlatGroup) -> list[int]:
    return [span.start for span in group.spans]
