"""A dataset of made sequences, in the order of their numbers."""

from __future__ import annotations

import torch

from tests.small_models import VOCABULARY

SEQUENCE = 16


class Sequences:
    """A dataset whose item k is a sequence that depends on k, with every third token without loss."""

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, VOCABULARY, (SEQUENCE + 1,), generator=torch.Generator().manual_seed(k))
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": (torch.arange(SEQUENCE) % 3 != k % 3).float(),
            "position_ids": torch.arange(SEQUENCE),
            "dataset": torch.tensor(0),
            "sample": torch.tensor(k),
        }
