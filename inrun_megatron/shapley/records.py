"""A finished step's rows and its record, on their way to the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ledger.schema import StepRecord
from .rows import StepRows

if TYPE_CHECKING:
    from .scored_step import ScoredStep


def append(step: ScoredStep, rows: StepRows, *, samples: int, lr: float, seconds: float) -> None:
    """What ``step`` came to, where this rank has a ledger.

    Args:
        samples: of all replicas, if the step is scored.
        lr: of the optimizer's step.
        seconds: that the step took.
    """
    ledger, result = step.owner.ledger, step.result
    if ledger is None:
        return
    if result.scored:
        assert result.values is not None and result.parts is not None and result.places is not None
        dataset, sample, tokens = (column.numpy() for column in rows.joined())
        values, segment = result.parts.numpy(), result.places[1].numpy()
        ledger.append(step.iteration, dataset, sample, tokens, values, segment=segment)
    if ledger.writer == 0:
        ledger.append_step(
            StepRecord(
                step=step.iteration,
                status=result.status,
                consumed_samples=step.consumed_samples,
                samples=samples if result.scored else 0,
                lr=lr,
                train_loss=step.train_loss,
                grad_norm=result.gradient_norm,
                clip_coefficient=result.clip_coefficient,
                credit_factor=result.credit_factor,
                base=result.base,
                direction_age=result.direction_age,
                target_loss=result.target_losses,
                sum_values=result.sums,
                momentum_term=result.momentum_terms,
                decay_term=result.decay_terms,
                additivity_lhs=result.additivity_lhs,
                additivity_rhs=result.additivity_rhs,
                seconds_total=seconds,
                seconds_scoring=result.seconds_scoring,
            )
        )
