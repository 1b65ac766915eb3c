"""From samples to a step: batches and their loss, what goes to the device, the optimizer's groups and its schedule."""

from __future__ import annotations

import math

import pytest
import torch

from inrun_megatron.config import TrainingConfig
from inrun_megatron.losses import masked_mean
from inrun_megatron.training.batches import StepLoader, to_device
from inrun_megatron.training.deepspeed_config import Batch
from inrun_megatron.training.optimizer import build_schedule, parameter_groups
from tests.sequences import Sequences


def test_vectors_have_no_weight_decay() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(4, 3), torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    decayed, plain = parameter_groups(module, 0.1)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3), (3, 3)]
    assert [tuple(p.shape) for p in plain["params"]] == [(3,), (3,), (3,)]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
def test_schedule_warms_up_decays_and_keeps_the_groups_weight_decay(style: str) -> None:
    training = TrainingConfig(
        micro_batch_size=1,
        train_iters=10,
        lr=1.0,
        min_lr=0.1,
        lr_decay_style=style,  # type: ignore[arg-type]
        lr_warmup_iters=2,
        weight_decay=0.1,
    )
    optimizer = torch.optim.AdamW(parameter_groups(torch.nn.Linear(2, 2), 0.1), lr=1.0)
    schedule = build_schedule(optimizer, training, global_batch_size=8)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
        schedule.step(8)

    def rate(step: int) -> float:
        if step <= 2:
            return step / 2
        done = min((step - 2) / 8, 1.0)
        falling = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[style]
        return 0.1 + 0.9 * falling

    assert rates == pytest.approx([rate(step) for step in range(12)])


@pytest.mark.parametrize("ahead", [True, False])
def test_samples_are_consecutive_over_ranks_and_resume_where_they_stopped(ahead: bool) -> None:
    batch = Batch(micro=2, accumulation=3, data_parallel=2)

    def steps(consumed: int, count: int) -> list[list[list[int]]]:
        loaders = [
            StepLoader(Sequences(), batch, dp_rank=r, consumed_samples=consumed, ahead=ahead)
            for r in range(2)
        ]
        read = [
            [[m["sample"].tolist() for m in loader.next_step(more=i < count - 1)] for loader in loaders]
            for i in range(count)
        ]
        for loader in loaders:
            loader.close()
        return [[k for step in range(3) for rank in ranks for k in rank[step]] for ranks in read]

    assert steps(0, 3) == [list(range(12)), list(range(12, 24)), list(range(24, 36))]
    assert steps(24, 1) == [list(range(24, 36))]


def test_loss_is_the_mean_over_unmasked_tokens() -> None:
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    assert masked_mean(losses, mask).item() == pytest.approx((1 + 4 + 32) / 3)
    assert masked_mean(losses, torch.zeros(2, 3)).item() == 0.0


def test_only_what_layers_read_goes_to_the_device() -> None:
    """On a GPU the host would wait for the rest to come back."""
    columns = ("tokens", "labels", "loss_mask", "position_ids", "documents", "dataset", "sample", "segments")
    moved = to_device({name: torch.zeros(2) for name in columns}, torch.device("meta"))
    assert {name for name, column in moved.items() if column.device.type == "cpu"} == {
        "dataset",
        "sample",
        "segments",
    }
