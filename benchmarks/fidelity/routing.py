"""Tokens that keep their experts, to tell what jumps of the routing cost the values of a mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracle import OracleGPT, Parameters


class HeldRouting(OracleGPT):
    """The model in which every sequence keeps the experts that its tokens had when it was first seen."""

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)  # type: ignore[arg-type]
        self._held: dict[tuple[int, bytes], Tensor] = {}  # of layer and sequence: [s, k]
        self._sequences: list[bytes] = []

    def logits(self, parameters: Parameters, tokens: Tensor, position_ids: Tensor) -> Tensor:
        self._sequences = [row.numpy().tobytes() for row in tokens]
        return super().logits(parameters, tokens, position_ids)

    def chosen(self, logits: Tensor) -> Tensor:
        layer, now = len(self.routed), super().chosen(logits)
        return torch.stack(
            [self._held.setdefault((layer, key), own) for key, own in zip(self._sequences, now, strict=True)]
        )
