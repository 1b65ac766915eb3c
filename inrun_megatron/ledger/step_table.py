"""The rows of steps/ in order, with what only the next step could tell.

The loss of target k between the points where two consecutive steps took it changes by

    base current (w_t):       realised_t = L_k(w_t) - L_k(w_{t+1}),            predicted by  batch_t + momentum_t + decay_t
    base drift (Phi_t(0)):    realised_t = L_k(Phi_t(0)) - L_k(Phi_{t+1}(0)),  predicted by  batch_t + momentum_{t+1} + decay_{t+1}

since from Phi_t(0) this step's batch leads to w_{t+1}, and from there the next step's momentum and decay to Phi_{t+1}(0).
batch_t is the sum of the values of the step's own game: under trajectory credit the recorded sum over credit_factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from inrun_megatron.ledger.checks import setting
from inrun_megatron.ledger.schema import DRIFT, SCORED, STEPS_SCHEMA


def with_realised(steps: pa.Table, targets: list[str]) -> pa.Table:
    """Order rows of steps/ by step and target; fill `realised` of step t from `target_loss` of t and t + 1, where both
    are known and were taken at the same kind of point."""
    position = pc.fill_null(
        pc.index_in(pc.cast(steps["target"], pa.string()), pa.array(targets)), len(targets)
    )
    # By target, then step: the next row is the next step.
    steps = steps.append_column("_order", position).sort_by([("_order", "ascending"), ("step", "ascending")])
    step, order = steps["step"].to_numpy(), steps["_order"].to_numpy()
    loss = steps["target_loss"].to_numpy(zero_copy_only=False).astype(np.float64)  # null: NaN
    drift = pc.equal(steps["base"], DRIFT).to_numpy(zero_copy_only=False)
    follows = (step[1:] == step[:-1] + 1) & (order[1:] == order[:-1]) & (drift[1:] == drift[:-1])
    change = np.full(len(step), np.nan)
    change[:-1] = np.where(follows, loss[:-1] - loss[1:], np.nan)
    known = np.zeros(len(step), dtype=bool)
    valid = steps["target_loss"].is_valid().to_numpy(zero_copy_only=False)
    known[:-1] = follows & valid[:-1] & valid[1:]
    filled = pc.coalesce(steps["realised"], pa.array(change, mask=~known))
    steps = steps.set_column(steps.schema.get_field_index("realised"), STEPS_SCHEMA.field("realised"), filled)
    return steps.sort_by([("step", "ascending"), ("_order", "ascending")]).drop_columns("_order")


@dataclass(frozen=True)
class LossChange:
    """The change of one target's loss over one scored step, and what it is made of. Nats per token, positive = lower."""

    step: int
    target: str
    realised: float
    batch: float
    """Due to the step's samples."""
    momentum: float
    decay: float

    @property
    def predicted(self) -> float:
        return self.batch + self.momentum + self.decay


def loss_changes(run: Mapping[str, Any], steps: Iterable[Mapping[str, Any]]) -> list[LossChange]:
    """Of every (step, target) where both sides are known. run: run.json; steps: rows of `with_realised`."""
    trajectory = setting(run, "credit", group="shapley") == "trajectory"
    rows = list(steps)
    drift_of = {(row["step"], row["target"]): row for row in rows if row["base"] == DRIFT}
    changes = []
    for row in rows:
        if row["status"] != SCORED or row["realised"] is None or row["sum_values"] is None:
            continue
        drifting: Mapping[str, Any] | None = row
        if row["base"] == DRIFT:
            drifting = drift_of.get((row["step"] + 1, row["target"]))
            if drifting is None or drifting["status"] != SCORED:
                continue  # the next step's own drift is not known
        assert drifting is not None
        changes.append(
            LossChange(
                step=row["step"],
                target=row["target"],
                realised=row["realised"],
                batch=row["sum_values"] / ((row["credit_factor"] or 1.0) if trajectory else 1.0),
                momentum=drifting["momentum_term"] or 0.0,
                decay=drifting["decay_term"] or 0.0,
            )
        )
    return changes
