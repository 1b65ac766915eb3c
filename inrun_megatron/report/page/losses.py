"""What steps/ tells over time: each target's loss with the part that the values explain, and the time of steps.

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
from inrun_megatron.report.phases import Phase, whole_run

POINTS = 400
"""Points of a curve at most; more steps are thinned (losses) or averaged (times)."""

STRETCHES = 20
"""Of the explained fraction over the run: few, because the change of a loss over a few late steps is mostly noise."""

TERMS = ("values", "momentum", "decay")


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
    shown = [whole_run(last_step), *(phases if len(phases) > 1 else [])]
    start = series.step[:-1]
    figures = []
    for phase in shown:
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


def timing(ledger: Ledger, steps: pa.Table) -> dict[str, Any]:
    """Time of the recorded steps, and what scoring adds.

    added: scoring / (total - scoring) of recorded steps. added_over_run: the same over all steps of the run, for as many
    of which a recorded one stands as its --shapley-interval says; one in `interval` is scored, on average where a resume
    changed it. validation: what the validation pass alone adds over the run by its size, target sequences over the
    samples of a step (None where the estimator takes other passes as well). Throughput counts the time of scoring in.
    `curve`: means of bins of steps, in seconds.
    """
    own = steps.filter(pc.equal(pc.cast(steps["target"], pa.string()), ledger.target_names[0]))
    step, samples = own["step"].to_numpy(), own["samples"].to_numpy()
    total, scoring = numbers(own, "seconds_total"), numbers(own, "seconds_scoring")
    known = np.isfinite(total) & np.isfinite(scoring) & (total > 0)
    stands_for = np.array([_interval(ledger, int(number)) for number in step], dtype=np.int64)
    length = setting(ledger.run, "seq_length")
    if not known.any():
        return {"steps": 0, "interval": _interval(ledger, 1), "curve": []}
    age = numbers(own, "direction_age")[known]
    step, samples, total, scoring = step[known], samples[known], total[known], scoring[known]
    stands_for = stands_for[known]
    steps_of_run = int(stands_for.sum())
    plain = float(total.sum() - scoring.sum())
    per_second = float(samples.sum() / total.sum())
    curve = [
        {
            "step": float(step[part].mean()),
            "first": int(step[part[0]]),
            "last": int(step[part[-1]]),
            "training": float((total - scoring)[part].mean()),
            "scoring": float(scoring[part].mean()),
        }
        for part in np.array_split(np.arange(len(step)), min(len(step), POINTS // 4))
    ]
    added = float(scoring.sum()) / plain if plain > 0 else None
    plain_over_run = float(((total - scoring) * stands_for).sum())
    fresh = int((~(age > 0)).sum())  # an older direction, of --shapley-refresh, took no validation pass
    return {
        "steps": len(step),
        "interval": steps_of_run // len(step) if steps_of_run % len(step) == 0 else steps_of_run / len(step),
        "seconds_total": float(total.sum()),
        "seconds_scoring": float(scoring.sum()),
        "median_step": float(np.median(total)),
        "median_scoring": float(np.median(scoring)),
        "added": added,
        "added_over_run": float(scoring.sum()) / plain_over_run if plain_over_run > 0 else None,
        "validation": _validation(ledger, samples, fresh / steps_of_run),
        "samples_per_second": per_second,
        "tokens_per_second": per_second * length if length else None,
        "curve": curve,
    }


def _interval(ledger: Ledger, step: int) -> int:
    """--shapley-interval of the start that made `step`."""
    return int(setting(ledger.starts.at(step), "interval", 1, group="shapley") or 1)


def _validation(ledger: Ledger, samples: np.ndarray, passes: float) -> dict[str, float] | None:
    """Target sequences and samples of a scored step, and sequences / samples per step of the run. samples [steps]: scored
    in each; passes: validation passes per step of the run."""
    sequences = [target.get("sequences") for target in ledger.targets]
    first_order = setting(ledger.run, "estimator", group="shapley") in (None, "first_order")
    samples = samples[samples > 0]  # a skipped step scored none
    if not first_order or None in sequences or not len(samples):
        return None
    total, batch = sum(int(count) for count in sequences if count is not None), float(samples.mean())
    return {"sequences": total, "samples": batch, "added_over_run": total / batch * passes}


def training_curve(ledger: Ledger, steps: pa.Table) -> list[dict[str, Any]]:
    """Points {step, loss, lr} of the training loss and learning rate."""
    own = steps.filter(pc.equal(pc.cast(steps["target"], pa.string()), ledger.target_names[0]))
    own = own.filter(pc.is_valid(own["train_loss"]))
    return own.select(["step", "train_loss", "lr"]).take(thinned(own.num_rows)).to_pylist()


def thinned(n: int) -> np.ndarray:
    """At most POINTS indices into n points, with the first and the last."""
    return np.unique(np.linspace(0, n - 1, min(n, POINTS)).round().astype(np.int64)) if n else np.arange(0)
