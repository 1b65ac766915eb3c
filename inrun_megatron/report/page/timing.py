"""What steps/ tells of time: how long steps took, and what scoring adds to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from inrun_megatron.ledger.checks import setting
from inrun_megatron.ledger.columns import numbers
from inrun_megatron.ledger.read import Ledger
from inrun_megatron.report.overview import one_row_per_step

BINS = 100
"""Of the curve at most: means of as many steps each."""


def timing(ledger: Ledger, steps: pa.Table) -> dict[str, Any]:
    """Time of the recorded steps, and what scoring adds.

    added: scoring / (total - scoring) of recorded steps. added_over_run: the same over all steps of the run, for as many
    of which a recorded one stands as its --shapley-interval says; one in `interval` is scored, on average where a resume
    changed it. validation: what the validation pass alone adds over the run by its size, target sequences over the
    samples of a step (None where the estimator takes other passes as well). Throughput counts the time of scoring in.
    `curve`: means of bins of steps, in seconds.
    """
    own = one_row_per_step(ledger, steps)
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
        for part in np.array_split(np.arange(len(step)), min(len(step), BINS))
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
