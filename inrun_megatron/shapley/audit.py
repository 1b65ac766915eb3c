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
from ..engines.inner import settings_of
from ..errors import UserError


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
        self._inner = adapter.inner
        # Hyperparameters that directions were made for, by parameter group; and the first that is another in the step.
        self._settings: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._changed: tuple[str, Any, Any] | None = None
        self._hook = adapter.inner.register_step_pre_hook(self._before_step)

    def arm(self) -> None:
        """Watch the next optimizer step."""
        vectors = sum(directions.targets for directions in self._watched)
        self._total = torch.zeros(vectors, dtype=torch.float64, device=self._watched[0].device)
        self._settings = [(group, settings_of(group)) for group in self._inner.param_groups]
        self._changed = None

    def require_unchanged(self, iteration: int) -> None:
        """The step must have had the hyperparameters that its directions were made for; after it.

        Raises:
            UserError: names the first that had another value: both sides of the audit would be off by the same factor.
        """
        if self._changed is not None:
            name, before, now = self._changed
            raise UserError(
                f"the optimizer took step {iteration} with {name} {now}, but it was {before} when the step began and its directions "
                f"were made: set hyperparameters before `with shapley.step(...)`, or after the engine's step"
            )

    def disarm(self) -> None:
        """Stop watching; what was seen is dropped."""
        self._total = None

    def collect(self) -> Tensor:
        """This rank's part of ``<v, c_t G_t>``, one for each vector; stops watching."""
        assert self._total is not None, "collect() without arm()"
        total, self._total = self._total, None
        return total

    def _compare(self, group: dict[str, Any]) -> None:
        before = next((settings for known, settings in self._settings if known is group), None)
        now = settings_of(group)
        if before is not None and before != now and self._changed is None:
            name = next(name for name in before if before[name] != now.get(name))
            self._changed = name, before[name], now.get(name)

    def remove(self) -> None:
        """Take the hook out of the optimizer."""
        self._hook.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._total is None:
            return
        # ZeRO steps its groups one after another, with param_groups showing one at a time.
        for group in optimizer.param_groups:
            self._compare(group)
            for tensor in group["params"]:
                if tensor.grad is not None and id(tensor) in self._where:
                    index, start = self._where[id(tensor)]
                    found = [each.inner_products(index, start, tensor.grad) for each in self._watched]
                    self._total += found[0] if len(found) == 1 else torch.cat(found)
