"""What a scored step must have been for its values to be the step's. No audit sees these: additivity holds along any path, and
for any factor. Figures are those of all ranks, so that all of them raise or none does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import torch.distributed as dist

from ..errors import UserError

if TYPE_CHECKING:
    from ..ledger.write import LedgerWriter
    from .rows import MicrobatchRows

PATH_TOLERANCE = 0.1
"""Relative difference of the gradient that a path estimator integrated along and of the one that was stepped: far above
rounding, below what a loss of another scale or other microbatches come to."""

APART = 1e-5
"""Relative deviation of ranks' factors from each other from which on they are not one number."""


def refusal(ledger: LedgerWriter | None, iteration: int, rows: MicrobatchRows) -> str | None:
    """Why the ledger cannot take the samples of a microbatch of this rank."""
    if ledger is None:
        return None
    try:
        ledger.require(iteration, rows.dataset, rows.sample, rows.segments is not None)
    except UserError as error:
        return str(error)
    except (TypeError, RuntimeError) as error:  # no numbers that numpy knows, or with a gradient
        return f"step {iteration}: dataset and sample of `samples` are no plain integers: {error}"
    return None


def raise_anywhere(own: str | None) -> NoReturn:
    """On all ranks the UserError of the first rank that has one; ``own``: this rank's. Collective over the world."""
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, own)
    raise UserError(next(message for message in messages if message is not None))


def require_one_step(iteration: int, *, seen: int, accumulated: int, steps: int, early: int = 0) -> None:
    """Raise UserError where a step's microbatches are not those of one step of the optimizer.

    Args:
        seen: microbatches that went through ``samples``.
        accumulated: microbatches of one step of the engine.
        steps: of the engine's optimizer meanwhile.
        early: microbatches that came before the engine's step, if others came after it; else 0.
    """
    if seen != accumulated or steps != 1:
        raise UserError(
            f"step {iteration} saw {seen} microbatches and {steps} steps of the engine's optimizer, but the engine accumulates "
            f"{accumulated}; put all microbatches of one optimizer step inside one `with shapley.step(...)`"
        )
    if early:
        raise UserError(
            f"step {iteration} began in the middle of an accumulation: the engine stepped after {early} of its {seen} microbatches, "
            f"and the others wait for the next step; put all microbatches of one optimizer step inside one `with shapley.step(...)`"
        )


def require_the_path(
    iteration: int, estimator: str, *, integrated: float, stepped: float | None, along: float
) -> None:
    """Raise UserError where a path estimator integrated along another gradient than was stepped.

    Args:
        integrated, stepped: the gradients' norms before clipping; ``stepped`` is None where nothing took it.
        along: ``<p, c_t G_t> / |p|^2`` with the p that was integrated along; 1 if it is what was stepped. NaN, of gradients
            that are zero or not finite, says nothing.
    """
    norm = integrated if stepped is None else stepped
    if abs(integrated - norm) > PATH_TOLERANCE * max(integrated, norm) or abs(along - 1.0) > PATH_TOLERANCE:
        found = "one" if stepped is None else f"one of norm {stepped:.3g}"
        raise UserError(
            f"estimator {estimator} integrated along a gradient of norm {integrated:.3g}, but {found} that goes {along:.2f} times "
            f"as far along it was stepped in step {iteration}: give step() the microbatches that are trained on, and "
            f"InRunShapley as training_loss what engine.backward gets"
        )


def same_on_all(ranks: int, total: float, squares: float) -> bool:
    """Is a number the same on all ranks? From the sums of it and of its square."""
    return ranks * squares - total**2 <= (APART * total) ** 2


def require_one_factor(ranks: int, stale: Sequence[float], refresh: int) -> None:
    """Raise UserError where pipeline stages scaled a stale direction's values by different factors.

    Args:
        stale: sums over ranks of the factor and of its square.
        refresh: every how many scored steps directions are taken.
    """
    if not same_on_all(ranks, *stale):
        raise UserError(
            f"learning rates of the parameter groups of pipeline stages moved by different factors since the direction was "
            f"taken: refresh {refresh} needs one schedule for all groups; use refresh 1"
        )


def refuse_stages_credits() -> NoReturn:
    """Raise UserError: trajectory credit multiplies values by a factor that pipeline stages do not share."""
    raise UserError(
        "the optimizer's momentum carries gradients of the pipeline stages' parameter groups unequally far, so that a "
        "sample has no one factor: trajectory credit needs the same betas (momentum) on all stages; use credit step"
    )
