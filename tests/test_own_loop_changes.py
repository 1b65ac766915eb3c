"""Loops that change what was scored, or ranks unlike each other: refused in one line, or right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed import Workers
from tests.own_loop import ROWS, VOCABULARY, Tiny, make_batch, make_scored, refusal_of, token_losses, train_on


def _late_rate(rank: int, world: int, stage: int) -> None:
    engine, shapley = make_scored(rank, world, Tiny(), stage=stage)
    with shapley.step(1) as step:
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-4
        train_on(engine, step, rank)


def _grown(rank: int, world: int) -> None:
    """A further layer from the second step on."""
    model = Tiny()
    engine, shapley = make_scored(rank, world, model)
    with shapley.step(1) as step:
        train_on(engine, step, rank)
    model.further = nn.Linear(VOCABULARY, VOCABULARY)
    engine.optimizer.add_param_group({"params": list(model.further.parameters())})
    with shapley.step(2):
        pass


def _from_the_middle(rank: int, world: int, stage: int) -> None:
    """One microbatch of an accumulation of two has been trained on before."""
    engine, shapley = make_scored(rank, world, Tiny(), stage=stage, accumulated=2)
    engine.backward(token_losses(engine, make_batch(rank)).mean())
    engine.step()
    with shapley.step(1) as step:
        train_on(engine, step, 10 + rank)
        train_on(engine, step, 20 + rank)


def _datasets(rank: int, world: int) -> None:
    _, shapley = make_scored(rank, world, Tiny())
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
    for refusal in two_ranks.run(refusal_of, *case):
        assert refusal.startswith(refused)


def _uneven(rank: int, world: int, directory: str) -> None:
    """Two steps in which rank 1 has a row less."""
    from inrun_megatron import InRunShapley
    from inrun_megatron.ledger import LedgerWriter, RunDescription, commit, create_ledger

    engine, unwritten = make_scored(rank, world, Tiny(), stage=1)
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
