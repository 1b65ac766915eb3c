"""Models of one's own whose values or training would change unseen: refused in one line, or right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.distributed import Workers
from tests.own_loop import LENGTH, Tiny, make_batch, make_scored, refusal_of, token_losses, train_on


class _BatchNormed(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(9, affine=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.statistics(self.embedding(tokens).transpose(1, 2)).transpose(1, 2)
        return self.output(F.gelu(self.hidden(self.norm(x))))


def _thawed_statistics(rank: int, world: int) -> None:
    model = _BatchNormed()
    model.statistics.eval()
    engine, shapley = make_scored(rank, world, model)
    engine.train()  # as loops do after an evaluation
    with shapley.step(1) as step:
        train_on(engine, step, rank)


class _Sum(nn.Module):
    """A weight plus a product of two others: an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(9, 2, bias=False), nn.Linear(2, 13, bias=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up.weight @ self.down.weight


def _computed(rank: int, world: int, kind: str, stage: int) -> None:
    model = Tiny()
    if kind == "weight_norm":
        nn.utils.weight_norm(model.hidden)
    else:
        nn.utils.parametrize.register_parametrization(model.hidden, "weight", _Sum())
        model.hidden.parametrizations.weight.original.requires_grad_(False)  # type: ignore[union-attr]
        if kind == "adapter without bias":
            model.hidden.bias.requires_grad_(False)
    _, shapley = make_scored(rank, world, model, stage=stage)
    with shapley.step(1):
        pass


def _normed_twice(rank: int, world: int) -> None:
    model = Tiny()
    model.norm = nn.LayerNorm([LENGTH, 9])
    make_scored(rank, world, model, stage=3)


class _Repeated(Tiny):
    """A layer that is used once, or more often."""

    def __init__(self) -> None:
        super().__init__()
        self.further, self.times = nn.Linear(9, 9), 1

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for _ in range(self.times):
            x = x + self.further(x)
        return self.output(F.gelu(self.hidden(self.norm(x))))


def _used_more_often(rank: int, world: int) -> None:
    model = _Repeated()
    engine, shapley = make_scored(rank, world, model, stage=1)
    for iteration in (1, 2):
        model.times = iteration
        with shapley.step(iteration) as step:
            train_on(engine, step, 10 * iteration + rank)


@pytest.mark.parametrize(
    ("case", "refused"),
    [
        (
            (_used_more_often,),
            "a parameter of layer further of shape (9,) is used 2 times in the last microbatch of a pass, 1 times",
        ),
        ((_thawed_statistics,), "layer statistics is a BatchNorm1d and has been put into training mode"),
        ((_normed_twice,), "norm norm is over 2 dimensions"),
        ((_computed, "weight_norm", 0), "the weight of hidden is computed from others"),
        ((_computed, "adapter", 0), "the weight of hidden is computed from others"),
        (
            (_computed, "adapter without bias", 0),
            "weight is used outside its own module",
        ),
    ],
)
def test_models_that_taps_cannot_follow(two_ranks: Workers, case: tuple[Any, ...], refused: str) -> None:
    """Rows that change each other's losses in training only; a norm whose shape ZeRO-3 hides; weights that are no parameters."""
    for refusal in two_ranks.run(refusal_of, *case):
        assert refused in refusal


class _Running(Tiny):
    """It keeps a running mean."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(9))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        return self.output(F.gelu(self.hidden(self.norm(x - self.mean))))


def _running_means(rank: int, world: int) -> list[torch.Tensor]:
    found = []
    for scored in (True, False):
        torch.manual_seed(0)
        model = _Running()
        engine, shapley = make_scored(rank, world, model, estimator="midpoint")
        if scored:
            with shapley.step(1, [make_batch(rank)]) as step:
                train_on(engine, step, rank)
        else:
            engine.backward(token_losses(engine, make_batch(rank)).mean())
            engine.step()
        shapley.close()
        found.append(model.mean.clone())
    return found


def test_a_pass_along_the_path_leaves_buffers_alone(two_ranks: Workers) -> None:
    """It runs in training mode, where a model may move its buffers, and the step's own forward does it again."""
    for scored, plain in two_ranks.run(_running_means):
        assert torch.equal(scored, plain)


class _Passed(Tiny):
    """A layer that rank 1 passes by in validation."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.further, self._rank = nn.Linear(9, 9), rank

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        if self.training or self._rank == 0:
            x = x + self.further(x)
        return self.output(F.gelu(self.hidden(self.norm(x))))


def _passed_by(rank: int, world: int, stage: int) -> list[torch.Tensor]:
    """Values of the third step, in a run in which it was scored alone, and in one with all steps scored."""
    found = []
    for interval in (3, 1):
        torch.manual_seed(0)
        engine, shapley = make_scored(rank, world, _Passed(rank), stage=stage, interval=interval)
        for iteration in (1, 2, 3):
            with shapley.step(iteration) as step:
                train_on(engine, step, 10 * iteration + rank)
        shapley.close()
        found.append(step.result.values)
    return found


@pytest.mark.parametrize("stage", [0, 2])
def test_a_layer_that_another_ranks_validation_uses(two_ranks: Workers, stage: int) -> None:
    for alone, after_others in two_ranks.run(_passed_by, stage):
        torch.testing.assert_close(after_others, alone, rtol=1e-3, atol=float(alone.abs().max()) * 1e-4)
