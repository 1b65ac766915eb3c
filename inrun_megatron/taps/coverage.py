"""Which of a model's parameters the taps see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Coverage:
    """Which trainable parameters have a tap; ``elements`` count scalars of this rank's shards."""

    parameters: int
    tapped: int
    elements: int
    tapped_elements: int
    missing: tuple[str, ...]

    @classmethod
    def together(cls, stages: Sequence[Coverage]) -> Coverage:
        """Of the whole model: its pipeline stages' together (a tied weight counts on both of its stages)."""
        return cls(
            parameters=sum(stage.parameters for stage in stages),
            tapped=sum(stage.tapped for stage in stages),
            elements=sum(stage.elements for stage in stages),
            tapped_elements=sum(stage.tapped_elements for stage in stages),
            missing=tuple(name for stage in stages for name in stage.missing),
        )

    def to_dict(self) -> dict[str, object]:
        """As run.json holds it."""
        return asdict(self) | {"missing": list(self.missing)}


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """ZeRO-3 keeps empty tensors between uses and the true shape in ``ds_shape``."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
