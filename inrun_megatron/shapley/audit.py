"""The additivity audit: what the optimizer really consumed, seen through its public step hook.

    sum_i phi_i  =  c_t <d, G_t>

The left side comes from taps, reductions and scaling; the right side from the gradient that lies in the
inner optimizer's tensors when it steps (averaged, unscaled, clipped). They agree only if no layer, rank,
microbatch or factor was lost on the way, on the user's own cluster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..directions import Directions
from ..engines import ZeroAdapter


class AdditivityProbe:
    """Sums ``<v, c_t G_t>`` over what this rank's inner optimizer steps, of every vector v of ``watched``.

    Uses ``torch.optim.Optimizer.register_step_pre_hook``, which sees the tensors of a ZeRO shard just as
    those of plain training, so no gradient buffer of DeepSpeed's is touched.
    """

    def __init__(self, adapter: ZeroAdapter, *watched: Directions) -> None:
        self._watched = watched
        self._where = {
            id(piece.tensor): (index, piece.start)
            for index, group in enumerate(adapter.groups)
            for piece in group.pieces
        }
        self._total: Tensor | None = None
        self._hook = adapter.inner.register_step_pre_hook(self._before_step)

    def arm(self) -> None:
        """Watch the next optimizer step."""
        vectors = sum(directions.targets for directions in self._watched)
        self._total = torch.zeros(vectors, dtype=torch.float64, device=self._watched[0].device)

    def disarm(self) -> None:
        """Stop watching; what was seen is dropped."""
        self._total = None

    def collect(self) -> Tensor:
        """This rank's part of ``<v, c_t G_t>``, one for each vector; stops watching."""
        assert self._total is not None, "collect() without arm()"
        total, self._total = self._total, None
        return total

    def remove(self) -> None:
        """Take the hook out of the optimizer."""
        self._hook.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._total is None:
            return
        # ZeRO steps its groups one after another, with param_groups showing one at a time.
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None and id(tensor) in self._where:
                    index, start = self._where[id(tensor)]
                    found = [each.inner_products(index, start, tensor.grad) for each in self._watched]
                    self._total += found[0] if len(found) == 1 else torch.cat(found)
