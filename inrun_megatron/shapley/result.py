"""What a scored step is asked for and what it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..ledger.schema import CURRENT
from .passes import Microbatch


@dataclass(frozen=True)
class ShapleyTarget:
    """A validation target.

    Attributes:
        name: as it appears in the ledger.
        microbatches: this data-parallel rank's share of the sequences; the same number on every rank. Each has
            ``loss_mask [b, s]`` and what the loss function reads.
        num_tokens: loss tokens of *all* the target's sequences over all ranks, the denominator of L_k.
    """

    name: str
    microbatches: Sequence[Microbatch]
    num_tokens: float


@dataclass
class StepResult:
    """What a step came to; sequences are over the K targets. None where the step was not scored."""

    status: str = "off"
    # where the direction and target_losses were taken: w_t, or Phi_t(0) (drift)
    base: str = CURRENT
    # steps since the direction was taken; 0: in this one
    direction_age: int | None = None
    # None with an older direction, as are the momentum and decay terms
    target_losses: list[float] | None = None
    sums: list[float] | None = None  # of the values
    step_sums: list[float] | None = None  # of the values of the step's own game
    credit_factor: float | None = None
    values: Tensor | None = None  # [rows of this data-parallel rank, K], fp64, on the CPU
    parts: Tensor | None = None  # [parts of those rows, K], summed in `values`; a row that is not cut is one
    places: tuple[Tensor, Tensor] | None = None  # (row, ordinal within the row) of every part, [parts] each
    additivity_lhs: list[float] | None = None
    additivity_rhs: list[float] | None = None
    momentum_terms: list[float] | None = None
    decay_terms: list[float] | None = None
    clip_coefficient: float | None = None
    gradient_norm: float | None = None  # without scoring only where the host knows it: fp32 at ZeRO stage 0
    seconds_scoring: float = 0.0

    @property
    def scored(self) -> bool:
        """Are there values? Not where the step was skipped or nothing was asked for."""
        return self.status == "scored"
