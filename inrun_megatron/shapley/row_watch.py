"""Do the layers keep the rows of a microbatch apart, and in order? Looked at once, before the first direction.

A row's value is taken from the row's own block of each layer's buffers. A layer may have as many rows as the microbatch and
yet other ones: those of a model that sorts them, or positions, where a layer is sequence first and the microbatch has as many
of them as rows. Or rows may change each other's losses. Values would then be of other samples and still add up to the
gradient, so that no audit sees it. So one validation microbatch is run with the loss of its first rows alone: no layer may
have a gradient in the others.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..engines import rng
from ..errors import UserError
from ..taps import Emission
from .passes import Microbatch, Passes, Task


def require_rows_apart(passes: Passes, microbatch: Microbatch, device: torch.device) -> None:
    """Run a validation microbatch once, to see whether layers keep its rows apart. Collective over the world.

    Raises:
        UserError: on all ranks; see RowWatch.
    """
    watch = RowWatch(len(microbatch["loss_mask"]))
    with rng.kept(device):  # training must not notice
        passes.run([Task(microbatch, watch, watch.loss)], training=False)
    watch.require_apart(device)


class RowWatch:
    """A consumer of one detached pass over a microbatch of ``rows`` rows, whose loss is ``loss``; with a single row it can detect nothing."""

    def __init__(self, rows: int) -> None:
        self._rows, self._first = rows, (rows + 1) // 2
        self._layers: list[str] = []
        self._reached: list[Tensor] = []

    def loss(self, losses: Tensor) -> Tensor:
        """Of the first rows, from token losses ``[b, s]``."""
        return losses[: self._first].mean()

    def __call__(self, e: Emission) -> None:
        grad, dim = e.output_grad, e.site.batch_dim
        if self._first == self._rows or grad.dim() <= dim + 1 or grad.shape[dim] != self._rows:
            return  # the last two: scoring refuses the layer by its shape
        others = grad.narrow(dim, self._first, self._rows - self._first)
        self._layers.append(e.site.name)
        self._reached.append(others.abs().amax() > 0)

    def require_apart(self, device: torch.device) -> None:
        """Collective over the world, so that all ranks stop if one does.

        Raises:
            UserError: names the layer nearest to the loss, of those where a gradient has come to other rows.
        """
        reached = (
            torch.stack(self._reached) if self._reached else torch.zeros(1, dtype=torch.bool, device=device)
        )
        anywhere = reached.any().int()
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
        if not anywhere:
            return
        found = [name for name, other in zip(self._layers, reached.tolist(), strict=False) if other]
        layer = f"layer {found[0]}" if found else "a layer on another rank"
        raise UserError(
            f"{layer} does not have the microbatch's rows apart and in order: in a validation microbatch the loss of the first "
            f"{self._first} of {self._rows} rows has a gradient in others there, and values would go to the wrong samples; keep "
            f"rows in their places (plain layers that are sequence first: taps=attach_taps(engine.module, sequence_first=True))"
        )
