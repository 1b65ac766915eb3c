"""What a step's losses say of the step before: by base, by credit, with gaps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from inrun_megatron.ledger.audits import check_additivity, check_efficiency
from inrun_megatron.ledger.description import Starts
from inrun_megatron.ledger.schema import STEPS_SCHEMA
from inrun_megatron.ledger.step_table import loss_changes, with_realised

LOSSES = {1: 5.0, 2: 4.0, 3: 3.5, 5: 3.0, 6: 2.75}


def table(base: str, **changed: Any) -> pa.Table:
    """Steps 1, 2, 3, 5, 6 of one target, in disorder: sum 0.1 t, momentum 0.01 t, decay -0.001 t, credit factor 4."""
    rows = [
        {
            "step": step,
            "target": "code",
            "status": "scored",
            "samples": 2,
            "base": base,
            "clip_coefficient": 0.5,
            "credit_factor": 4.0,
            "target_loss": LOSSES[step],
            "sum_values": 0.1 * step,
            "momentum_term": 0.01 * step,
            "decay_term": -0.001 * step,
            "additivity_lhs": 0.2 * step,
            "additivity_rhs": 0.2 * step,
        }
        | changed.get(f"step_{step}", {})
        for step in (3, 1, 6, 2, 5)
    ]
    return with_realised(pa.Table.from_pylist(rows, schema=STEPS_SCHEMA), ["code"])


def run(credit: str = "step") -> dict[str, Any]:
    return {"configuration": {"shapley": {"credit": credit}}}


def test_a_step_is_compared_with_its_own_drift_at_the_current_weights() -> None:
    found = loss_changes(run(), table("current"))
    assert found.step.tolist() == [1, 2, 5]  # the losses after 3 and 6 are not known
    assert found.realised[1] == 0.5 and found.predicted[1] == pytest.approx(0.2 + 0.02 - 0.002)


def test_a_step_is_compared_with_the_next_drift_at_the_drift_point() -> None:
    found = loss_changes(run(), table("drift"))
    assert found.step.tolist() == [1, 2, 5]
    assert found.realised[1] == 0.5 and found.predicted[1] == pytest.approx(0.2 + 0.03 - 0.003)
    # An overflow in step 3: its losses were taken, its drift was not.
    skipped = table("drift", step_3={"status": "skipped: overflow", "momentum_term": None})
    assert loss_changes(run(), skipped).step.tolist() == [1, 5]


def test_losses_at_different_points_are_not_subtracted() -> None:
    rows = table("drift", step_2={"base": "current"})
    assert rows["realised"].to_pylist() == [None, None, None, 0.25, None]


def test_trajectory_credit_is_taken_out(tmp_path: Path) -> None:
    step, whole = (loss_changes(run(credit), table("current")) for credit in ("step", "trajectory"))
    assert whole.batch.tolist() == (step.batch / 4).tolist()
    figures = check_efficiency(run("trajectory"), table("current")).figures["targets"]["code"]
    assert figures["batch"] == pytest.approx(0.8 / 4)
    assert figures["momentum"] == pytest.approx(0.08) and figures["decay"] == pytest.approx(-0.008)
    assert figures["explained_fraction"] == pytest.approx((0.2 + 0.08 - 0.008) / 1.75)
    # The rows carry the factor, the two sides of the audit do not: the scale must lose it.
    rows = table("current", step_2={"additivity_rhs": 0.4 * (1 + 2e-4)})
    absolute = 0.4 * rows["step"].to_numpy()
    worst = {
        name: check_additivity(Starts(tmp_path, run(name)), rows, absolute).figures["worst"]["code"]["error"]
        for name in ("step", "trajectory")
    }
    assert worst["trajectory"] == pytest.approx(4 * worst["step"]) == pytest.approx(2e-4)
