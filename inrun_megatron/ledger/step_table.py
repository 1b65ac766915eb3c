"""The rows of steps/ in order, with what only the next step could tell."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from inrun_megatron.ledger.schema import STEPS_SCHEMA


def with_realised(steps: pa.Table, targets: list[str]) -> pa.Table:
    """Order rows of steps/ by step and target; fill `realised` of step t from `target_loss` of t and t +
    1."""
    order = {name: position for position, name in enumerate(targets)}
    position = [order.get(name, len(order)) for name in steps["target"].to_pylist()]
    steps = steps.append_column("_order", pa.array(position, pa.int32()))
    steps = steps.sort_by([("step", "ascending"), ("_order", "ascending")]).drop_columns("_order")
    keys = list(zip(steps["step"].to_pylist(), steps["target"].to_pylist(), strict=True))
    losses = {
        key: loss
        for key, loss in zip(keys, steps["target_loss"].to_pylist(), strict=True)
        if loss is not None
    }
    derived = [
        losses[step, target] - losses[step + 1, target]
        if (step, target) in losses and (step + 1, target) in losses
        else None
        for step, target in keys
    ]
    filled = pc.coalesce(steps["realised"], pa.array(derived, pa.float64()))
    column = steps.schema.get_field_index("realised")
    return steps.set_column(column, STEPS_SCHEMA.field("realised"), filled)
