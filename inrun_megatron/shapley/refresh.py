"""When a direction is taken anew, and what must be renewed before an older one serves this step.

With ``refresh=N`` every N-th scored step takes directions of its own; those between use the last ones: no validation
pass, no reduction, no gather. Of the Jacobian in a stale direction

    the scalar part (learning rate, the first moment's bias correction)   is renewed: a number on the host
    the elementwise part (the second moments, and their stand-in)         is that of the refresh

Renewing the elementwise part would need the plain gradients beside the directions, twice the memory, and an all-gather
per step; the second moments move by 1 - beta2 of themselves a step. The learning rate can move from 0 in a warm-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError

SAME = 1e-6
"""Relative difference up to which two parameter groups' factors are the same: they are one number but for rounding."""


def same(factors: Sequence[float]) -> bool:
    """Are the parameter groups' (non-negative) factors one number?"""
    low, high = min(factors, default=0.0), max(factors, default=0.0)
    return low == high or low >= high * (1.0 - SAME)


@dataclass(frozen=True)
class _Held:
    """The directions that are held: taken in step ``iteration``, with these scalar parts of the Jacobian."""

    iteration: int
    window: int
    gains: tuple[float, ...]


class RefreshSchedule:
    """Which scored steps take directions of their own.

    Refreshes lie at fixed iterations, those of the scored steps 1, 1 + every, 1 + 2 every, ..., whenever a run started or
    was resumed. Beside these a step takes its own where none are held: the first scored one of a process, after
    ``expire()``, and after a step at learning rate 0, whose directions are 0.

    Every method depends on numbers alone that are the same on all ranks.
    """

    def __init__(self, every: int, interval: int) -> None:
        self.every, self.interval = every, interval
        self._held: _Held | None = None

    def due(self, iteration: int) -> bool:
        """Must scored step ``iteration`` take its own directions?"""
        held = self._held
        if self.every == 1 or held is None:
            return True
        # The loop may have gone back to a checkpoint.
        return iteration <= held.iteration or self._window(iteration) != held.window

    def taken(self, iteration: int, gains: Sequence[float]) -> None:
        """Step ``iteration`` took its own, with these scalar parts of the Jacobian, one per parameter group."""
        held = _Held(iteration, self._window(iteration), tuple(gains))
        self._held = held if any(gains) else None

    def expire(self) -> None:
        """The next scored step takes its own."""
        self._held = None

    def age(self, iteration: int) -> int:
        """Optimizer steps since the held directions were taken."""
        assert self._held is not None
        return iteration - self._held.iteration

    def factor(self, gains: Sequence[float]) -> float:
        """What values from the held directions are multiplied by: this step's scalar part over that of the refresh.

        Raises:
            UserError: the parameter groups' learning rates moved by different factors.
        """
        assert self._held is not None
        pairs = [(now, then) for now, then in zip(gains, self._held.gains, strict=True) if now or then]
        factors = [now / then if then else float("inf") for now, then in pairs]
        if not same(factors):
            low, high = min(factors), max(factors)
            raise UserError(
                f"learning rates of the parameter groups moved by different factors ({low:g} to {high:g}) since the "
                f"direction was taken: refresh {self.every} needs one schedule for all groups; use refresh 1"
            )
        return max(factors, default=0.0)

    def _window(self, iteration: int) -> int:
        return (iteration // self.interval - 1) // self.every


def require_refresh(refresh: int, estimator: str) -> None:
    """Raise UserError where directions cannot be used for ``refresh`` scored steps."""
    if refresh < 1:
        raise UserError(f"refresh {refresh} is not a positive number of scored steps")
    if refresh > 1 and estimator != "first_order":
        raise UserError(
            f"refresh {refresh} with estimator {estimator}: a direction integrated along one step's own path says "
            f"nothing of another step; use first_order or refresh 1"
        )
