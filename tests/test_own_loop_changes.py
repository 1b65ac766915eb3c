"""Models, losses and loops of one's own that would change values or training unseen: refused in one line, or right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inrun_megatron.errors import UserError
from tests.distributed import Workers
from tests.own_loop import LENGTH, ROWS, VOCABULARY, Tiny, make_batch, make_engine, token_losses


def _scored(
    rank: int,
    world: int,
    model: nn.Module,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    stage: int = 0,
    accumulated: int = 1,
    loss: Any = token_losses,
    **options: Any,
) -> tuple[Any, Any]:
    """An engine, and an InRunShapley on it."""
    from inrun_megatron import InRunShapley, ShapleyTarget

    own = torch.optim.AdamW(model.parameters(), lr=1e-2) if optimizer is None else optimizer(model)
    settings = {"gradient_accumulation_steps": accumulated}
    engine = make_engine(model, own, {"stage": stage}, settings=settings)
    target = ShapleyTarget("held_out", [make_batch(50 + rank)], num_tokens=world * ROWS * LENGTH)
    return engine, InRunShapley(engine, [target], loss, **options)


def _train(engine: Any, step: Any, seed: int, loss: Any = token_losses, rows: int = ROWS) -> None:
    micro = {name: tensor[:rows] for name, tensor in make_batch(seed).items()}
    with step.samples(torch.zeros(rows), torch.arange(rows), micro["loss_mask"]):
        engine.backward(loss(engine, micro).mean())
        engine.step()


def _refusal(rank: int, world: int, case: Callable[..., Any], *args: Any) -> str:
    torch.manual_seed(0)
    with pytest.raises(UserError) as refusal:
        case(rank, world, *args)
    return str(refusal.value)


# -- models ------------------------------------------------------------------------------------------


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
    engine, shapley = _scored(rank, world, model)
    engine.train()  # as loops do after an evaluation
    with shapley.step(1) as step:
        _train(engine, step, rank)


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
        model.hidden.parametrizations.weight.original.requires_grad_(False)
        if kind == "adapter without bias":
            model.hidden.bias.requires_grad_(False)
    _, shapley = _scored(rank, world, model, stage=stage)
    with shapley.step(1):
        pass


def _normed_twice(rank: int, world: int) -> None:
    model = Tiny()
    model.norm = nn.LayerNorm([LENGTH, 9])
    _scored(rank, world, model, stage=3)


@pytest.mark.parametrize(
    ("case", "refused"),
    [
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
    for refusal in two_ranks.run(_refusal, *case):
        assert refused in refusal


class _Running(Tiny):
    """It keeps a running mean."""

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
        engine, shapley = _scored(rank, world, model, estimator="midpoint")
        if scored:
            with shapley.step(1, [make_batch(rank)]) as step:
                _train(engine, step, rank)
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
        engine, shapley = _scored(rank, world, _Passed(rank), stage=stage, interval=interval)
        for iteration in (1, 2, 3):
            with shapley.step(iteration) as step:
                _train(engine, step, 10 * iteration + rank)
        shapley.close()
        found.append(step.result.values)
    return found


@pytest.mark.parametrize("stage", [0, 2])
def test_a_layer_that_another_ranks_validation_uses(two_ranks: Workers, stage: int) -> None:
    for alone, after_others in two_ranks.run(_passed_by, stage):
        torch.testing.assert_close(after_others, alone, rtol=1e-3, atol=float(alone.abs().max()) * 1e-4)


# -- losses and optimizers -----------------------------------------------------------------------------


def _reduced(rank: int, world: int, kind: str) -> None:
    def loss(module: Any, micro: Any) -> torch.Tensor:
        losses = token_losses(module, micro)
        return losses.mean() if kind == "mean" else losses.unsqueeze(-1)

    _, shapley = _scored(rank, world, Tiny(), loss=loss)
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
        _, shapley = _scored(rank, world, Tiny(), optimizer, loss=loss)
        with shapley.step(1):
            pass
    finally:
        assert temperature.grad is None


class AdamW(torch.optim.Optimizer):
    """By name torch's."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})


def _namesake(rank: int, world: int) -> None:
    _scored(rank, world, Tiny(), lambda model: AdamW(model.parameters()))


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
            "optimizer tests.test_own_loop_changes.AdamW has the name of one with a known Jacobian",
        ),
    ],
)
def test_losses_and_optimizers_that_would_mislead(
    two_ranks: Workers, case: tuple[Any, ...], refused: str
) -> None:
    for refusal in two_ranks.run(_refusal, *case):
        assert refusal.startswith(refused)


# -- loops ---------------------------------------------------------------------------------------------


def _late_rate(rank: int, world: int, stage: int) -> None:
    engine, shapley = _scored(rank, world, Tiny(), stage=stage)
    with shapley.step(1) as step:
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-4
        _train(engine, step, rank)


def _grown(rank: int, world: int) -> None:
    """A further layer from the second step on."""
    model = Tiny()
    engine, shapley = _scored(rank, world, model)
    with shapley.step(1) as step:
        _train(engine, step, rank)
    model.further = nn.Linear(VOCABULARY, VOCABULARY)
    engine.optimizer.add_param_group({"params": list(model.further.parameters())})
    with shapley.step(2):
        pass


def _from_the_middle(rank: int, world: int, stage: int) -> None:
    """One microbatch of an accumulation of two has been trained on before."""
    engine, shapley = _scored(rank, world, Tiny(), stage=stage, accumulated=2)
    engine.backward(token_losses(engine, make_batch(rank)).mean())
    engine.step()
    with shapley.step(1) as step:
        _train(engine, step, 10 + rank)
        _train(engine, step, 20 + rank)


def _datasets(rank: int, world: int) -> None:
    _, shapley = _scored(rank, world, Tiny())
    with shapley.step(1) as step, step.samples(torch.zeros(ROWS + 1), torch.arange(ROWS), torch.ones(ROWS)):
        pass


@pytest.mark.parametrize(
    ("case", "refused"),
    [
        ((_late_rate, 0), "the optimizer took step 1 with lr 0.0001, but it was 0.01 when the step began"),
        ((_late_rate, 1), "the optimizer took step 1 with lr 0.0001, but it was 0.01 when the step began"),
        ((_late_rate, 3), "the optimizer took step 1 with lr 0.0001, but it was 0.01 when the step began"),
        ((_grown,), "the optimizer has parameter groups of [6, 2] parameters, and had [6] when"),
        (
            (_from_the_middle, 0),
            "step 1 began in the middle of an accumulation: the engine stepped after 1 of its 2",
        ),
        (
            (_from_the_middle, 2),
            "step 1 began in the middle of an accumulation: the engine stepped after 1 of its 2",
        ),
        ((_datasets,), "dataset of shape [4] and sample of shape [3]"),
    ],
)
def test_loops_that_change_what_was_scored(two_ranks: Workers, case: tuple[Any, ...], refused: str) -> None:
    """Both sides of the additivity audit are off by the same factor, or the step is called one that overflowed."""
    for refusal in two_ranks.run(_refusal, *case):
        assert refusal.startswith(refused)


def _uneven(rank: int, world: int, directory: str) -> None:
    """Two steps in which rank 1 has a row less."""
    from inrun_megatron import InRunShapley
    from inrun_megatron.ledger import LedgerWriter, RunDescription, commit, create_ledger

    engine, unwritten = _scored(rank, world, Tiny(), stage=1)
    coverage = unwritten.taps.coverage().to_dict()
    unwritten.close()
    described = RunDescription(
        targets=[{"name": "held_out"}], datasets=[{"index": 0, "name": "web"}], coverage=coverage
    )
    lock = create_ledger(directory, described) if rank == 0 else None
    torch.distributed.barrier()
    writer = LedgerWriter(directory, writer=rank)
    shapley = InRunShapley(engine, unwritten.targets, token_losses, ledger=writer)
    for iteration in (1, 2):
        micro = {name: tensor[: ROWS - rank] for name, tensor in make_batch(10 * iteration + rank).items()}
        ids = torch.arange(ROWS - rank) + 100 * iteration + 10 * rank
        with shapley.step(iteration) as step, step.samples(torch.zeros(len(ids)), ids, micro["loss_mask"]):
            engine.backward(token_losses(engine, micro).mean())
            engine.step()
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, writer.write_parts())
    if lock is not None:
        with lock:
            commit(directory, 2, [part for own in parts for part in own])
    writer.close()


def test_ranks_may_have_differently_many_rows(two_ranks: Workers, tmp_path: Path) -> None:
    """The step's record counts those of all ranks, as ``inrun verify`` does."""
    from inrun_megatron.ledger import Ledger

    two_ranks.run(_uneven, str(tmp_path / "shapley"))
    assert [check.detail for check in Ledger(tmp_path / "shapley").verify() if not check.ok] == []
