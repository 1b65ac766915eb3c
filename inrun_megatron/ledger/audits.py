"""The three audits (design: additivity, efficiency, coverage), judged from what the run recorded.

additivity   sum_i <d, g_i> = <d, G_t>       taps, reductions and scaling are complete
efficiency   sum_i phi_i + momentum + decay  against  the loss change between two steps (step_table.py)
coverage     every trainable parameter has a tap
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from inrun_megatron.ledger.checks import Check, setting
from inrun_megatron.ledger.columns import equals, integers, is_known, numbers, or_one, texts
from inrun_megatron.ledger.description import Starts
from inrun_megatron.ledger.schema import SCORED
from inrun_megatron.ledger.step_table import loss_changes

ADDITIVITY_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""Largest |lhs - rhs| of a step, relative to sum_i |<d, g_i>|, by the precision of the weights' gradients.

The two sides are the same sum in another order, so the difference is rounding: about 2^-24 per addition in
fp32, and 2^-9 (bf16) or 2^-12 (fp16) per rounding of the gradient that the optimizer receives. A lost tap,
rank, microbatch or factor shows as a share of the whole, far above these."""

EFFICIENCY_RANGE = (1 / 20, 20.0)
"""Explained fraction outside which the scale is absurd.

First-order values leave out curvature, so their sum exceeds what was realised, several times over where the
learning rate is large (and the gradient at w_t turns within the step). A lost factor (accumulation steps,
replicas, loss scale) or a wrong sign on the whole run is what this audit is to catch; everything finer is
reported."""

EFFICIENCY_SCALE = (1 / 2, 2.0)
"""Explained fraction outside which the audit passes with a note: the sign is right, the size of sums is not. The band is
a convention; ranks within a step hold better than sums (docs/evidence.md, 1)."""

EFFICIENCY_MINIMUM_STEPS = 20
"""Fewer steps with a known realised change are reported, not judged."""

EFFICIENCY_TREND = 0.25
"""The sign and scale are judged only when |sum realised| is at least this share of sum |realised|: where
losses go up and down about equally, the ratio of the two sums says nothing."""


def precision_of(run: Mapping[str, Any]) -> str:
    """`fp32`, `bf16` or `fp16`, from the configuration: `precision`, else the switches `bf16` and `fp16`."""
    named = setting(run, "precision")
    if named in ADDITIVITY_TOLERANCE:
        return str(named)
    for name in ("bf16", "fp16"):
        if setting(run, name):
            return name
    return "fp32"


def check_coverage(run: Mapping[str, Any]) -> Check:
    """Every trainable parameter had a tap."""
    coverage = run.get("coverage")
    if not coverage:
        return Check("coverage", False, "not recorded in run.json", {})
    parameters, tapped = int(coverage.get("parameters", 0)), int(coverage.get("tapped", 0))
    missing = list(coverage.get("missing") or [])
    figures = {"parameters": parameters, "tapped": tapped, "missing": missing}
    detail = f"{tapped:,} of {parameters:,} trainable parameters have a tap"
    if missing:
        detail += f"; without: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}"
    return Check("coverage", parameters > 0 and tapped == parameters and not missing, detail, figures)


def check_additivity(starts: Starts, steps: pa.Table, absolute: NDArray[np.float64]) -> Check:
    """Worst step of |lhs - rhs| / (sum_i |phi_i| / c_t), within the tolerance of the step's precision.

    starts: the settings in force. steps: `Ledger.steps()`. absolute: sum of |values| of each row of steps. lhs and rhs are
    before clipping, the values after it, hence the clip coefficient c_t (and under trajectory credit the credit factor).
    """
    scored = equals(steps, "status", SCORED)
    chosen = scored & is_known(steps, "additivity_lhs") & is_known(steps, "additivity_rhs")
    own = steps.filter(pa.array(chosen))
    lhs, rhs = numbers(own, "additivity_lhs"), numbers(own, "additivity_rhs")
    factor = or_one(own, "clip_coefficient")
    if setting(starts.at(0), "credit", group="shapley") == "trajectory":
        factor = factor * or_one(own, "credit_factor")
    step, target = integers(own, "step"), texts(own, "target")
    scale = absolute[chosen] / factor
    error = _ratios(np.abs(lhs - rhs), np.where(scale > 0, scale, np.maximum(np.abs(lhs), np.abs(rhs))))
    precisions = [precision_of(settings) for settings in starts.all()]
    in_force = starts.numbers(step)
    tolerance = np.array([ADDITIVITY_TOLERANCE[name] for name in precisions])[in_force]
    failed = np.unique(step[~(error <= tolerance)]).tolist()  # "not within", so that a NaN fails
    worst = {}
    for name in dict.fromkeys(target):
        places_of = np.flatnonzero(target == name)
        worst_of = places_of[np.argmax(error[places_of])]  # the first NaN, if there is one
        worst[name] = {"error": float(error[worst_of]), "step": int(step[worst_of])}
    judged_as = dict.fromkeys(precisions[number] for number in np.unique(in_force))
    judged, total = len(step), int(scored.sum())
    figures = {
        "tolerance": {precision: ADDITIVITY_TOLERANCE[precision] for precision in judged_as},
        "scored": total,
        "judged": judged,
        "failed_steps": failed,
        "worst": {
            target: {"error": _finite(entry["error"]), "step": entry["step"]}
            for target, entry in worst.items()
        },
    }
    if total == 0:
        return Check("additivity", True, "no scored step to judge", figures)
    if judged == 0:
        return Check("additivity", False, f"no figures recorded for {total:,} scored (step, target)", figures)
    story = ", ".join(
        f"{target} {entry['error']:.1e} (step {entry['step']})" for target, entry in worst.items()
    )
    tolerances = ", ".join(f"{ADDITIVITY_TOLERANCE[name]:.0e} ({name})" for name in judged_as)
    detail = f"largest gap {story}; tolerance {tolerances} of sum |values|"
    if failed:
        detail = f"{len(failed):,} steps beyond the tolerance; " + detail
    return Check("additivity", not failed, detail, figures)


def check_efficiency(run: Mapping[str, Any], steps: pa.Table) -> Check:
    """Predicted against realised loss change over all scored steps where both are known, per target.

    Explained fraction = sum_t (batch + momentum + decay) / sum_t realised; the figures give each of the three sums.
    Fails on figures that are not finite, and, where it can be judged (see the constants), on a wrong sign or an absurd
    scale; passes with a note where the scale is off by more than EFFICIENCY_SCALE. Values of the SGD proxy under another optimizer are not meant to add up to the realised change: reported
    only.
    """
    proxy = _is_proxy(run)
    figures: dict[str, Any] = {"proxy": proxy, "targets": {}}
    story, faults = [], []
    targets = list(dict.fromkeys(texts(steps, "target")))
    changes = loss_changes(run, steps)
    for target in targets:
        own = changes.of(target)
        with np.errstate(invalid="ignore"):  # of opposite infinities
            entry, fault = judge_efficiency(own.predicted, own.realised, proxy)
            for name in ("batch", "momentum", "decay"):
                entry[name] = _finite(float(getattr(own, name).sum()))
        figures["targets"][target] = entry
        if fault:
            faults.append(f"{target}: {fault}")
        fraction = entry["explained_fraction"]
        story.append(f"{target} {'unknown' if fraction is None else f'{fraction:.2f}'}")
    if not targets:
        return Check("efficiency", True, "no scored step to judge", figures)
    detail = f"predicted / realised loss change: {', '.join(story)}"
    if proxy:
        detail += " (SGD proxy: reported, not judged)"
    off = [target for target in targets if figures["targets"][target]["off_scale"]]
    if faults:
        detail = f"{'; '.join(faults)}; {detail}"
    elif off:
        low, high = EFFICIENCY_SCALE
        first_order = setting(run, "estimator", group="shapley") in (None, "first_order")
        remedy = "--shapley-estimator midpoint or smaller steps" if first_order else "smaller steps"
        detail += (
            f"; outside {low:g} to {high:g}: {', '.join(off)}. The sign agrees, the scale does not: read sums of values as an "
            f"order, not as sizes. {remedy} help"
        )
    return Check("efficiency", not faults, detail, figures, note=bool(off) and not faults)


def judge_efficiency(
    predicted: np.ndarray, realised: np.ndarray, proxy: bool
) -> tuple[dict[str, Any], str | None]:
    """Figures of one target and the fault, if any. predicted, realised: [steps], nats per token."""
    with np.errstate(invalid="ignore"):  # of opposite infinities
        sums = float(predicted.sum()), float(realised.sum())
    entry: dict[str, Any] = {
        "steps": len(predicted),
        "predicted": _finite(sums[0]),
        "realised": _finite(sums[1]),
        "explained_fraction": None,
        "correlation": None,
        "off_scale": False,
    }
    if len(predicted) == 0:
        return entry, None
    if not (np.isfinite(predicted).all() and np.isfinite(realised).all()):
        return entry, "figures are not finite"
    if realised.sum() != 0:
        entry["explained_fraction"] = float(predicted.sum() / realised.sum())
    if len(predicted) > 2 and predicted.std() > 0 and realised.std() > 0:
        entry["correlation"] = float(np.corrcoef(predicted, realised)[0, 1])
    trend = abs(realised.sum()) >= EFFICIENCY_TREND * np.abs(realised).sum() > 0
    if proxy or len(predicted) < EFFICIENCY_MINIMUM_STEPS or not trend:
        return entry, None
    fraction = entry["explained_fraction"]
    if fraction < 0:
        return entry, f"predicted and realised loss change have opposite signs ({fraction:.2f})"
    low, high = EFFICIENCY_RANGE
    if not low <= fraction <= high:
        return entry, f"explained fraction {fraction:.3g} outside {low:g} to {high:g}"
    entry["off_scale"] = not EFFICIENCY_SCALE[0] <= fraction <= EFFICIENCY_SCALE[1]
    return entry, None


def _is_proxy(run: Mapping[str, Any]) -> bool:
    chosen = setting(run, "optimizer", group="shapley")
    if chosen is None:
        chosen = setting(run, "shapley_optimizer")
    trained = setting(run, "optimizer", group="training")
    return chosen == "sgd" and trained != "sgd"


def _ratios(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of what is not negative; over nothing 0 / 0 is 0, anything else infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        over_nothing = np.where(numerator == 0, 0.0, np.where(np.isnan(numerator), np.nan, np.inf))
        return np.where(denominator > 0, numerator / denominator, over_nothing)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
