"""Trajectory credit: what the optimizer's momentum makes of a gradient in the steps after its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..errors import UserError
from ..optimizers import Step
from .refresh import same


def credit_of_groups(coming: Sequence[Step], remaining: int | None, credit: str) -> float | None:
    """`credit_factor` of the coming step, by any parameter group; None where they do not agree.

    Args:
        coming: the coming step of each group.
        remaining: as in `credit_factor`.
        credit: ``step`` or ``trajectory``.

    Raises:
        UserError: trajectory credit, and there is no such number, or it is infinite.
    """
    factors = [credit_factor(step.reach(), remaining) for step in coming]
    agreed = same(factors)
    if credit == "trajectory" and not agreed:
        raise UserError(
            f"the optimizer's momentum carries gradients of its parameter groups unequally far ({min(factors):g} to "
            f"{max(factors):g} steps), so that a sample has no one factor: trajectory credit needs the same betas "
            f"(momentum) in all groups; use credit step"
        )
    if credit == "trajectory" and math.isinf(factors[0]):
        raise UserError(
            "momentum 1 or more forgets no gradient: trajectory credit needs total_steps; use credit step"
        )
    return factors[0] if agreed else None


def credit_factor(reach: Callable[[int], float], remaining: int | None) -> float:
    """A gradient's whole weight over its weight in its own step: ``sum_j reach(j)`` over the remaining steps.

    Args:
        reach: of the coming step (optimizers.Step.reach).
        remaining: steps of the run from the coming one on; None: no end.

    Returns:
        The sum; infinite where a momentum of 1 or more, which forgets nothing, meets a run without an end.
    """
    total, j, before = 0.0, 0, math.inf
    while remaining is None or j < remaining:
        weight = reach(j)
        # from the second step on it falls, or never does
        if remaining is None and j > 1 and weight >= before > 0.0:
            return math.inf
        total, j, before = total + weight, j + 1, weight
        if weight < 1e-9:
            break
    return total
