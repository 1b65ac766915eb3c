"""The constants of the formulas in one place. Where the code's own costs change, this is what to correct."""

from __future__ import annotations

from dataclasses import dataclass

SUM_BYTES = 4
"""Per element of what gradients of directions, and the batch's, are added up in (directions/)."""

DIRECTION_BYTES = {"fp32": 4, "bf16": 2}
"""Per element of a direction as layers read it, by --shapley-direction-dtype."""

DOT_BYTES = 8
"""Per dot, loss or audit figure in a collective: they are fp64."""

FORWARD, BACKWARD, ATTENTION_BACKWARD = 1, 2, 2.5
"""Operations of a pass, in forwards: a linear layer's backward takes the gradients of input and weight; flash attention's
has five products where forward has two, because it forms the scores again."""


@dataclass(frozen=True)
class EstimatorCost:
    """What an estimator needs on a scored step beside the training pass itself (shapley/estimators.py).

    validation_passes: forwards and backwards of every target's sequences, one per node. loss_passes: forwards of them
    alone, where no node gives the loss at the base point. batch_passes: forwards and backwards of the batch, whose
    gradient then takes a buffer. moves: the weights are moved to each node and back: one all-gather per node, and where
    the way back would take another one, a copy of the weights.
    """

    validation_passes: int
    loss_passes: int = 0
    batch_passes: int = 0
    moves: bool = False

    @property
    def gathers(self) -> int:
        """Moves of the weights, one to each node."""
        return self.validation_passes if self.moves else 0


ESTIMATORS = {
    ("first_order", "current"): EstimatorCost(1),
    ("first_order", "drift"): EstimatorCost(1, moves=True),
    ("midpoint", "current"): EstimatorCost(1, loss_passes=1, batch_passes=1, moves=True),
    ("simpson", "current"): EstimatorCost(3, batch_passes=1, moves=True),
}


def estimator_cost(estimator: str, base: str) -> EstimatorCost:
    """The path estimators have their own nodes: `base` changes nothing for them."""
    return ESTIMATORS[estimator, base if estimator == "first_order" else "current"]


LEDGER_ROW_BYTES, LEDGER_SAMPLE_BYTES = 9.0, 2.5
"""Of a Parquet part, zstd: per row (its value hardly compresses), and per sample for what its K rows share."""


STATE_BYTES = 12
"""Per element of the optimizer's shard: fp32 weight and Adam's two moments, which the Jacobian and `Phi(0)` read."""


def audit_bytes(targets: int, direction_bytes: int) -> int:
    """Memory traffic of the audit per element of the optimizer's shard: gradient and directions."""
    return SUM_BYTES + direction_bytes * targets


def elementwise_bytes(targets: int, direction_bytes: int, parameter_bytes: int, moves: bool) -> int:
    """Memory traffic of a step's own directions, per element of the optimizer's shard, as the kernels of triton_adam.py have it.

    Norms, the Jacobian (read with the state, written as layers read it), the audit; the weights to `Phi(0)` and back from
    the masters where they move. The path estimators' Jacobian takes several passes more, which are not counted.
    """
    norms = SUM_BYTES * targets
    jacobian = STATE_BYTES + (SUM_BYTES + direction_bytes) * targets
    moving = STATE_BYTES + SUM_BYTES + 2 * parameter_bytes if moves else 0
    return norms + jacobian + audit_bytes(targets, direction_bytes) + moving


SLOWER_PRODUCT = 0.22
"""Of a weight gradient's product, in bf16 or fp16 with several rows to a microbatch: how much longer than cuBLAS's the kernel
takes that scores on the way (docs/dots.md)."""


WIDE_PROJECTION = 16.0
"""Of a projection of 16-bit tokens: how much longer it takes with fp32 directions, as a product in fp32 (dots/cost.py)."""


def dot_traffic_bytes(targets: int, low_precision: bool, rows: int, direction_bytes: int = 4) -> float:
    """Memory traffic of scoring one weight of a linear layer for one row, beyond training (docs/dots.md).

    bf16 and fp16 on a GPU: each of the K directions is read (4 K, or 2 K); for a microbatch of one row the product, too (2),
    which with several rows stays in the kernel that computes it (`SLOWER_PRODUCT`). fp32: the product is read with each of
    the directions (8 K), and with several rows in a microbatch the accumulator is read and written once more (8); bf16
    directions are written out in fp32 once per microbatch (6 K).
    """
    if low_precision:
        return float(direction_bytes * targets + (2 if rows == 1 else 0))
    widening = 0 if direction_bytes == SUM_BYTES else direction_bytes + SUM_BYTES
    return 2 * SUM_BYTES * targets + (8 if rows > 1 else 0) + widening * targets / rows
