"""The rows of steps/ in order, with what only the next step could tell.

The loss of target k between the points where two consecutive steps took it changes by

    base current (w_t):       realised_t = L_k(w_t) - L_k(w_{t+1}),            predicted by  batch_t + momentum_t + decay_t
    base drift (Phi_t(0)):    realised_t = L_k(Phi_t(0)) - L_k(Phi_{t+1}(0)),  predicted by  batch_t + momentum_{t+1} + decay_{t+1}

since from Phi_t(0) this step's batch leads to w_{t+1}, and from there the next step's momentum and decay to Phi_{t+1}(0).
batch_t is the sum of the values of the step's own game: under trajectory credit the recorded sum over credit_factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from inrun_megatron.ledger.checks import setting
from inrun_megatron.ledger.columns import equals, integers, is_known, numbers, or_one, places, texts
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
class LossChanges:
    """The changes of targets' losses over scored steps, and what they are made of: arrays ``[n]``, one element for each
    step and target. Nats per token, positive = lower."""

    step: NDArray[np.int64]
    target: NDArray[np.object_]
    realised: NDArray[np.float64]
    batch: NDArray[np.float64]
    """Due to the step's samples."""
    momentum: NDArray[np.float64]
    decay: NDArray[np.float64]

    @property
    def predicted(self) -> NDArray[np.float64]:
        """What the change should be: due to the samples, momentum and weight decay together, ``[n]``."""
        return self.batch + self.momentum + self.decay

    def where(self, chosen: NDArray[np.bool_]) -> LossChanges:
        """Those of ``chosen [n]``."""
        return LossChanges(**{own.name: getattr(self, own.name)[chosen] for own in fields(self)})

    def of(self, target: str) -> LossChanges:
        """Those of one target."""
        return self.where(self.target == target)


def loss_changes(run: Mapping[str, Any], steps: pa.Table) -> LossChanges:
    """Of every (step, target) where both sides are known. run: run.json; steps: as `with_realised` gives them."""
    step, scored, drift = (
        integers(steps, "step"),
        equals(steps, "status", SCORED),
        equals(steps, "base", DRIFT),
    )
    known = scored & is_known(steps, "realised") & is_known(steps, "sum_values")
    # Where momentum and decay up to the later loss are recorded: in the step itself, or, at the drift point, in the next.
    after = steps.select(["step", "target"]).set_column(0, "step", pa.array(step + 1))
    recorded = np.where(drift, places(after, steps), np.arange(len(step)))
    # The drift of a next step that was not scored, or took its losses elsewhere, is not known.
    known &= ~drift | ((recorded >= 0) & scored[recorded] & drift[recorded])
    batch = numbers(steps, "sum_values")
    if setting(run, "credit", group="shapley") == "trajectory":
        batch = batch / or_one(steps, "credit_factor")
    momentum, decay = (
        np.where(is_known(steps, name), numbers(steps, name), 0.0)[recorded]
        for name in ("momentum_term", "decay_term")
    )
    whole = LossChanges(step, texts(steps, "target"), numbers(steps, "realised"), batch, momentum, decay)
    return whole.where(known)
