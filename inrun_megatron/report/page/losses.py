"""What steps/ tells of losses: the training loss, and each target's with the part of it that the values explain.

The loss of target k is known at the scored steps t_1 < t_2 < ..., before each of them. Between two of them the values
predict

    L_k(t_j) - L_k(t_j+1)  ~  (t_j+1 - t_j) * (sum_i phi_i + momentum + decay)(t_j)

where every step is scored (t_j+1 - t_j = 1) a plain sum; with `--shapley-interval N` a scored step stands for the N steps
up to the next one. Where the loss was taken at the drift point (`base` = drift), the momentum and decay that lie between
two losses are those of the later step. With trajectory credit values are divided by the step's credit factor: they hold
what the gradient does in later steps as well.

The running prediction starts again from the true loss at the beginning of every phase: first-order values overshoot while
losses fall fast, and this overshoot would otherwise hide how well later steps are explained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from inrun_megatron.ledger.checks import setting
from inrun_megatron.ledger.columns import numbers
from inrun_megatron.ledger.read import Ledger
from inrun_megatron.ledger.schema import DRIFT, SCORED
from inrun_megatron.report.overview import one_row_per_step
from inrun_megatron.report.phases import Phase, with_whole_run

POINTS = 400
"""Points of a curve at most; more steps are thinned."""

STRETCHES = 20
"""Of the explained fraction over the run: few, because the change of a loss over a few late steps is mostly noise."""


@dataclass(frozen=True)
class TargetSeries:
    """One target at the steps where its loss is known and finite: arrays [n]; `terms` [n - 1] each, the predicted loss reduction
    from one of these steps to the next, NaN where unknown. Nats per token."""

    step: np.ndarray
    loss: np.ndarray
    terms: dict[str, np.ndarray]


def target_series(ledger: Ledger, steps: pa.Table, target: str) -> TargetSeries:
    """steps: `Ledger.steps()`."""
    own = steps.filter(
        pc.and_(pc.equal(pc.cast(steps["target"], pa.string()), target), pc.is_valid(steps["target_loss"]))
    )
    finite = np.isfinite(numbers(own, "target_loss"))
    lost = own["step"].to_numpy()[~finite].astype(np.int64)  # a run that diverged, if only for a step
    own = own.filter(pa.array(finite))
    step = own["step"].to_numpy().astype(np.int64)
    scored = np.array(pc.equal(own["status"], SCORED), dtype=bool)
    skipped = np.array(pc.starts_with(own["status"], "skipped"), dtype=bool)
    gap = np.diff(step)
    values, momentum, decay = (numbers(own, name) for name in ("sum_values", "momentum_term", "decay_term"))
    if setting(ledger.run, "credit", group="shapley") == "trajectory":
        values = values / np.where(np.isnan(factor := numbers(own, "credit_factor")), 1.0, factor)
    # A skipped step moves nothing; what the steps without a record between two scored ones did is not known then.
    known = scored | (skipped & np.append(gap == 1, True))
    values = np.where(scored, values, np.where(known, 0.0, np.nan))
    momentum, decay = (np.where(scored, np.nan_to_num(term), 0.0) for term in (momentum, decay))
    later = np.array(pc.equal(own["base"], DRIFT), dtype=bool)[1:]
    unknown = [*ledger.starts.stretches_without_scoring(), *zip(lost, lost, strict=True)]
    for first, last in unknown:
        # A scored step stands for those up to the next one, but not for a stretch with --no-shapley.
        values[:-1][(step[:-1] <= last) & (step[1:] > first)] = np.nan
    # What momentum and decay did up to the later loss is known only where that step was scored.
    values[:-1][later & ~scored[1:]] = np.nan
    terms = {
        "values": values[:-1],
        "momentum": np.where(later, momentum[1:], momentum[:-1]),
        "decay": np.where(later, decay[1:], decay[:-1]),
    }
    return TargetSeries(step, numbers(own, "target_loss"), {name: term * gap for name, term in terms.items()})


def loss_curve(series: TargetSeries, phases: Sequence[Phase]) -> list[dict[str, Any]]:
    """Points {step, loss, predicted, run}: `predicted` restarts with each `run`, at phases and after unknown steps."""
    n = len(series.step)
    if n == 0:
        return []
    predicted, run = series.loss.copy(), np.zeros(n, dtype=np.int64)
    starts = {int(np.searchsorted(series.step, phase.first)) for phase in phases}
    reduction = np.sum(list(series.terms.values()), axis=0)
    for point in range(1, n):
        restart = point in starts or not np.isfinite(reduction[point - 1])
        run[point] = run[point - 1] + restart
        if not restart:
            predicted[point] = predicted[point - 1] - reduction[point - 1]
    kept = np.union1d(thinned(n), [start for start in starts if start < n])
    return [
        {
            "step": int(series.step[i]),
            "loss": float(series.loss[i]),
            "predicted": float(predicted[i]),
            "run": int(run[i]),
        }
        for i in kept
    ]


def explained(series: TargetSeries, phases: Sequence[Phase], last_step: int) -> list[dict[str, Any]]:
    """For the whole run and each phase: first and last loss, `realised` reduction over the steps with a prediction, the
    predicted reduction by term, and explained_fraction = predicted / realised (None where realised is 0)."""
    start = series.step[:-1]
    figures = []
    for phase in with_whole_run(phases, last_step):
        inside = np.flatnonzero((start >= phase.first) & (start <= phase.last))
        figures.append(
            {
                "phase": phase.name,
                "first_step": phase.first,
                "last_step": phase.last,
                "first_loss": float(series.loss[inside[0]]) if len(inside) else None,
                "last_loss": float(series.loss[inside[-1] + 1]) if len(inside) else None,
                **_explained(series, inside),
            }
        )
    return figures


def explained_curve(series: TargetSeries) -> list[dict[str, Any]]:
    """The same over the run, in up to STRETCHES stretches of as many steps each: `first`, `last`, `step` (the middle) and
    the figures of `explained`; stretches without a prediction or a change are left out."""
    steps = len(series.step) - 1
    if steps < 1:
        return []
    curve = []
    for inside in np.array_split(np.arange(steps), min(steps, STRETCHES)):
        first, last = int(series.step[inside[0]]), int(series.step[inside[-1] + 1])
        found = _explained(series, inside)
        if found["explained_fraction"] is not None:
            curve.append({"first": first, "last": last, "step": (first + last) / 2, **found})
    return curve


def _explained(series: TargetSeries, inside: np.ndarray) -> dict[str, Any]:
    """Sums over the intervals `inside` that have a prediction; None where there are none."""
    known = inside[np.isfinite(series.terms["values"][inside])]
    realised = float((series.loss[known] - series.loss[known + 1]).sum())
    terms = {name: float(term[known].sum()) for name, term in series.terms.items()}
    return {
        "intervals": len(known),
        "realised": realised if len(known) else None,
        **{name: value if len(known) else None for name, value in terms.items()},
        "explained_fraction": sum(terms.values()) / realised if len(known) and realised else None,
    }


def training_curve(ledger: Ledger, steps: pa.Table) -> list[dict[str, Any]]:
    """Points {step, loss, lr} of the training loss and learning rate."""
    own = one_row_per_step(ledger, steps)
    own = own.filter(pc.is_valid(own["train_loss"]))
    return own.select(["step", "train_loss", "lr"]).take(thinned(own.num_rows)).to_pylist()


def thinned(n: int) -> np.ndarray:
    """At most POINTS indices into n points, with the first and the last."""
    return np.unique(np.linspace(0, n - 1, min(n, POINTS)).round().astype(np.int64)) if n else np.arange(0)
