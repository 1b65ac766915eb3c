"""Which steps of a loop are finished: what a commit may name, and the only numbers that come next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError


class FinishedSteps:
    """Steps that are numbered one after the other; the keeper of an ``InRunShapley``.

    A number that is left out would be a step without values in the ledger, and one that comes twice would have its rows twice:
    both are refused before the step trains. One that failed may come again, unless the optimizer has taken it.

    Attributes:
        finished: the last one.
    """

    def __init__(self, directory: Path, after: int) -> None:
        """after: the last step that the ledger in `directory` holds; 0: a new ledger, which may begin anywhere."""
        self._directory = directory
        self.finished = after
        self._failed: int | None = None  # the newest step, where it did
        self._lost: int | None = None

    @contextmanager
    def during(self, iteration: int) -> Iterator[None]:
        """Step ``iteration`` happens inside; it is finished where no exception leaves the block."""
        self.require_none_lost()
        if iteration < 1:
            raise UserError(f"step {iteration}: steps are numbered from 1")
        if self.finished and iteration != self.finished + 1:
            why = "number the steps one after the other, and those of a resumed run on"
            if self._failed is not None:
                why = f"step {self._failed} failed, and its number is the next one's"
            elif iteration == self.finished:
                why = "it is finished, as a skipped step is, too"
            raise UserError(
                f"step {iteration} comes after step {self.finished} in {self._directory}: {why} (step {self.finished + 1} is next; "
                f"steps without values go through shapley.step, too: interval=)"
            )
        self._failed = iteration
        yield
        self.finished, self._failed = iteration, None

    def lost(self, iteration: int) -> None:
        """Weights have moved by a step that has no values: what comes after it has no place in this ledger."""
        self._lost = iteration

    def require_none_lost(self) -> None:
        """UserError after such a step."""
        if self._lost is not None:
            raise UserError(
                f"step {self._lost} failed after the optimizer had taken it, so that its values are missing in {self._directory}: go "
                f"back to the last checkpoint"
            )
