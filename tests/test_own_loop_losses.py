"""Losses and optimizers of one's own that would mislead: refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.distributed import Workers
from tests.own_loop import Tiny, make_scored, refusal_of, token_losses


def _reduced(rank: int, world: int, kind: str) -> None:
    def loss(module: Any, micro: Any) -> torch.Tensor:
        losses = token_losses(module, micro)
        return losses.mean() if kind == "mean" else losses.unsqueeze(-1)

    _, shapley = make_scored(rank, world, Tiny(), loss=loss)
    with shapley.step(1):
        pass


def _strange_loss(rank: int, world: int, stepped: bool) -> None:
    """The logits times a parameter that is not the engine's, which the optimizer steps or not."""
    temperature = nn.Parameter(torch.ones(()))

    def loss(module: Any, micro: Any) -> torch.Tensor:
        logits = module(micro["tokens"]) * temperature
        return F.cross_entropy(logits.flatten(0, 1), micro["labels"].flatten(), reduction="none").view_as(
            micro["labels"]
        )

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([*model.parameters(), *([temperature] if stepped else [])], lr=0.1)

    try:
        _, shapley = make_scored(rank, world, Tiny(), optimizer, loss=loss)
        with shapley.step(1):
            pass
    finally:
        assert temperature.grad is None


class AdamW(torch.optim.Optimizer):
    """By name torch's."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})


def _namesake(rank: int, world: int) -> None:
    make_scored(rank, world, Tiny(), lambda model: AdamW(model.parameters()))


@pytest.mark.parametrize(
    ("case", "refused"),
    [
        ((_reduced, "mean"), "loss_fn returned losses of shape [] for a loss_mask of shape [3, 5]"),
        ((_reduced, "further dimension"), "loss_fn returned losses of shape [3, 5, 1] for a loss_mask"),
        (
            (_strange_loss, True),
            "the optimizer steps parameters that are not in the engine's module (1, of shape ())",
        ),
        (
            (_strange_loss, False),
            "the loss function trains a parameter of shape () that is not in the engine's",
        ),
        (
            (_namesake,),
            "optimizer tests.test_own_loop_losses.AdamW has the name of one with a known Jacobian",
        ),
    ],
)
def test_losses_and_optimizers_that_would_mislead(
    two_ranks: Workers, case: tuple[Any, ...], refused: str
) -> None:
    for refusal in two_ranks.run(refusal_of, *case):
        assert refusal.startswith(refused)
