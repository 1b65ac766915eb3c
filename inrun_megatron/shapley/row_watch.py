"""Do the layers keep the rows of a microbatch apart, and in order? Looked at once, before the first direction.

A row's value is taken from the row's own block of each layer's buffers. A layer may have as many rows as the microbatch and
yet other ones: those of a model that sorts them, or positions, where a layer is sequence first and the microbatch has as many
of them as rows. Or rows may change each other's losses. Values would then be of other samples and still add up to the
gradient, so that no audit sees it. So one validation microbatch is run with the loss of its first rows alone, and again, in
training mode, in which layers may compute something else, with that of the others: no layer may have a gradient in rows that
are not the loss's. Nor may any parameter get one past its tap (``Taps.untouched``).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..engines import rng
from ..engines.balancing import without_balancing_losses
from ..engines.evaluating import buffers_kept
from ..errors import UserError
from ..taps import Emission, Routing
from .consumers import require_rows, require_tokens
from .passes import Microbatch, Passes, Task


def require_rows_apart(
    passes: Passes, microbatch: Microbatch, module: nn.Module, device: torch.device
) -> bool:
    """Run a validation microbatch twice, to see whether layers keep its rows apart. Collective over the world.

    Returns:
        Could it be seen? Not in a single row.

    Raises:
        UserError: on all ranks; see RowWatch.
    """
    watch = RowWatch(len(microbatch["loss_mask"]))
    with rng.kept(device), buffers_kept(module), without_balancing_losses():  # training must not notice
        for own, training in zip(watch.halves, (False, True), strict=True):
            watch.own = own
            passes.run([Task(microbatch, watch, watch.loss)], training=training)
    return watch.require_apart(device)


class RowWatch:
    """A consumer of detached passes over a microbatch of ``rows`` rows, whose loss is that of its ``own`` rows alone."""

    def __init__(self, rows: int) -> None:
        half = (rows + 1) // 2
        self.halves = (slice(0, half), slice(half, rows)) if rows > 1 else (slice(0, 1), slice(0, 1))
        self.own = self.halves[0]
        self._rows = rows
        self._layers: list[str] = []
        self._reached: list[Tensor] = []
        self._misshapen: UserError | None = None

    def loss(self, losses: Tensor) -> Tensor:
        """Of the own rows, from token losses ``[b, s]``."""
        return losses[self.own].mean()

    def route(self, routing: Routing) -> None:
        """Emissions of experts shall say which tokens they are of."""
        try:
            require_tokens(routing, self._rows)
        except UserError as error:
            self._misshapen = self._misshapen or error

    def __call__(self, e: Emission) -> None:
        if e.routed is not None:
            row = e.routed.of(e.routed.routing.rows(self._rows))
            own = (row >= self.own.start) & (row < self.own.stop)
            self._layers.append(e.site.name)
            self._reached.append((e.output_grad.abs().sum(1) * ~own).sum() > 0)
            return
        try:
            require_rows(e, self._rows)
        except UserError as error:  # raised later, on all ranks
            self._misshapen = self._misshapen or error
            return
        for others in self.halves:
            if others != self.own:
                grad = e.output_grad.narrow(e.site.batch_dim, others.start, others.stop - others.start)
                self._layers.append(e.site.name)
                self._reached.append(grad.abs().amax() > 0)

    def require_apart(self, device: torch.device) -> bool:
        """Collective over the world, so that all ranks stop if one does. Could it be seen, on all of them?

        Raises:
            UserError: names the layer nearest to the loss, of those where a gradient has come to other rows, or one that does
                not see every row.
        """
        reached = (
            torch.stack(self._reached) if self._reached else torch.zeros(1, dtype=torch.bool, device=device)
        )
        known = torch.tensor([self._misshapen is not None, self._rows == 1], device=device)
        flags = torch.cat([reached.any()[None], known]).int()
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        mixed, misshapen, single = flags.tolist()
        if self._misshapen is not None:
            raise self._misshapen
        found = [name for name, other in zip(self._layers, reached.tolist(), strict=False) if other]
        if misshapen and not found:
            raise UserError("a layer on another rank does not see every row of the microbatch")
        if not mixed:
            return not single
        layer = f"layer {found[0]}" if found else "a layer on another rank"
        raise UserError(
            f"{layer} does not have the microbatch's rows apart and in order: in a validation microbatch the loss of a part of "
            f"its {self._rows} rows has a gradient in others there, and values would go to the wrong samples; keep "
            f"rows in their places (plain layers that are sequence first: taps=attach_taps(engine.module, sequence_first=True))"
        )
