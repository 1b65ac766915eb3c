"""The engine: the same training for every layout, schedule, batches, progress, agreement between ranks."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from inrun_megatron.config import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    ShapleyConfig,
    TrainingConfig,
)
from inrun_megatron.errors import UserError
from inrun_megatron.training.batches import StepLoader, microbatch_loss, to_device
from inrun_megatron.training.deepspeed_config import Batch, merge
from inrun_megatron.training.optimizer import build_schedule, parameter_groups
from inrun_megatron.training.progress import ProgressBar, StepFigures
from tests.distributed import Workers, run_distributed
from tests.test_models import LLAMA, VOCABULARY

SEQUENCE, STEPS = 16, 3


def settings(*, shape: str = "gpt2", tp: int = 1, sp: bool = False, zero: int = 0, **training: Any) -> Config:
    arguments: dict[str, Any] = {
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "train_iters": STEPS,
        "lr": 0.1,
    }
    return Config(
        model=ModelConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            **(LLAMA if shape == "llama" else {}),
        ),
        data=DataConfig(data_path=("unused",), seq_length=SEQUENCE),
        training=TrainingConfig(**(arguments | training)),
        parallel=ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=sp, zero_stage=zero),
        shapley=ShapleyConfig(enabled=False),
    )


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


def consecutive(consumed: int, micro: int, rank: int, size: int) -> range:
    return range(consumed + rank * micro, consumed + (rank + 1) * micro)


# --- the same training for every layout -------------------------------------------------------------------------------


def _train(rank: int, world: int, config: Config, left_out: str | None = None) -> dict[str, Any]:
    """STEPS steps; losses, gradient norms, and the final norm's weight. left_out: a function of engine.py."""
    import torch.distributed as dist

    from inrun_megatron.models import token_losses
    from inrun_megatron.parallel import Layout
    from inrun_megatron.training import distributed, engine

    distributed.initialise(config.parallel)
    layout = Layout.from_megatron()
    config, deepspeed_config, batch = merge(config, layout.dp_size)
    with pytest.MonkeyPatch.context() as patch:
        if left_out is not None:
            patch.setattr(engine, left_out, lambda *arguments: [])
        trainer = engine.build_trainer(config, deepspeed_config, batch, VOCABULARY)
    loader = StepLoader(Sequences(), batch, dp_rank=layout.dp_rank, consumed_samples=0, indices=consecutive)
    losses, norms = [], []
    for _ in range(STEPS):
        loss = torch.zeros(())
        for microbatch in loader.next_step():
            one = microbatch_loss(token_losses(trainer.engine, microbatch), microbatch["loss_mask"])
            trainer.engine.backward(one)
            trainer.engine.step()
            loss += one.detach() / batch.accumulation / layout.dp_size
        dist.all_reduce(loss, group=layout.dp_group)
        losses.append(loss.item())
        norms.append(trainer.engine.get_global_grad_norm())
        trainer.schedule.step(batch.size)
    loader.close()
    import deepspeed

    norm = trainer.model.decoder.final_layernorm.weight
    with deepspeed.zero.GatheredParameters([norm]):
        weight = norm.detach().float().clone()
    return {
        "losses": losses,
        "norms": [float(norm) for norm in norms],
        "weight": weight,
        "lr": trainer.optimizer.param_groups[0]["lr"],
        "marked": sum(
            getattr(parameter, "sequence_parallel", False) for parameter in trainer.model.parameters()
        ),
    }


SGD = {"optimizer": "sgd", "clip_grad": 0.5}
LAYOUTS = [
    {"zero": 1},
    {"zero": 2},
    {"zero": 3},
    {"tp": 2},
    {"tp": 2, "zero": 2},
    {"tp": 2, "sp": True},
    {"tp": 2, "sp": True, "zero": 1},
    {"tp": 2, "sp": True, "zero": 3},
]


@pytest.fixture(scope="module")
def baseline(two_ranks: Workers) -> dict[str, dict[str, Any]]:
    return {shape: two_ranks.run(_train, settings(shape=shape, **SGD))[0] for shape in ("gpt2", "llama")}


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_training_does_not_depend_on_the_layout(
    two_ranks: Workers, baseline: dict[str, dict[str, Any]], layout: dict[str, Any], shape: str
) -> None:
    """SGD with clipping: a gradient that is off by a factor, or counted twice in the norm, shows."""
    expected = baseline[shape]
    for result in two_ranks.run(_train, settings(shape=shape, **layout, **SGD)):
        assert result["losses"] == pytest.approx(expected["losses"], rel=2e-6)
        assert result["norms"] == pytest.approx(expected["norms"], rel=2e-5)
        torch.testing.assert_close(result["weight"], expected["weight"], rtol=0, atol=1e-6)
    assert (
        expected["norms"][0] > 0.5 and (expected["weight"] - 1).abs().max() > 1e-4
    )  # clipping and training happened


def test_without_the_sum_sequence_parallel_training_is_wrong(
    two_ranks: Workers, baseline: dict[str, dict[str, Any]]
) -> None:
    """Control: DeepSpeed alone lets the replicas of a norm drift apart."""
    results = two_ranks.run(_train, settings(tp=2, sp=True, **SGD), "sum_sequence_parallel_gradients")
    assert results[0]["marked"] == 14  # 5 norms with weight and bias, 2 row-parallel biases per layer
    assert (results[0]["weight"] - results[1]["weight"]).abs().max() > 1e-5
    assert (results[0]["weight"] - baseline["gpt2"]["weight"]).abs().max() > 1e-5


BF16 = [{"zero": 0}, {"zero": 1}, {"zero": 3}, {"tp": 2, "zero": 0}, {"tp": 2, "sp": True, "zero": 2}]


@pytest.mark.parametrize("layout", BF16, ids=str)
def test_bf16_is_near_fp32(
    two_ranks: Workers, baseline: dict[str, dict[str, Any]], layout: dict[str, Any]
) -> None:
    result = two_ranks.run(_train, settings(bf16=True, **layout, **SGD))[0]
    assert result["losses"] == pytest.approx(baseline["gpt2"]["losses"], rel=2e-3)
    assert result["losses"] != baseline["gpt2"]["losses"]
    assert result["norms"] == pytest.approx(baseline["gpt2"]["norms"], rel=1e-2)


def test_canary_unfused_optimizer_forgets_tensor_parallel_shards(
    two_ranks: Workers, baseline: dict[str, dict[str, Any]]
) -> None:
    """Control of `mark_tensor_parallel_gradients`: without it DeepSpeed's norm misses rank 1's shards."""
    config = settings(bf16=True, tp=2, zero=0, **SGD)
    result = two_ranks.run(_train, config, "mark_tensor_parallel_gradients")[0]
    assert result["norms"][0] < 0.98 * baseline["gpt2"]["norms"][0]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_bf16_takes_no_step_before_the_first(two_ranks: Workers, optimizer: str) -> None:
    """At stage 0 DeepSpeed's optimizer takes one when it is built: decay at the whole learning rate, Adam's t one ahead."""
    rest = {"bf16": True, "optimizer": optimizer, "weight_decay": 2.0, "lr": 0.05}
    at = [two_ranks.run(_train, settings(zero=stage, **rest))[0] for stage in (0, 1)]
    assert at[0]["losses"] == pytest.approx(at[1]["losses"], rel=1e-3)
    assert at[1]["losses"][2] != pytest.approx(at[1]["losses"][0], rel=5e-3)  # a step does more than that


# --- optimizer and schedule ------------------------------------------------------------------------------------------


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


# --- batches and loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [True, False])
def test_samples_are_consecutive_over_ranks_and_resume_where_they_stopped(ahead: bool) -> None:
    batch = Batch(micro=2, accumulation=3, data_parallel=2)

    def steps(consumed: int, count: int) -> list[list[list[int]]]:
        loaders = [
            StepLoader(
                Sequences(), batch, dp_rank=r, consumed_samples=consumed, indices=consecutive, ahead=ahead
            )
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
    assert microbatch_loss(losses, mask).item() == pytest.approx((1 + 4 + 32) / 3)
    assert microbatch_loss(losses, torch.zeros(2, 3)).item() == 0.0


# --- progress --------------------------------------------------------------------------------------------------------


def _figures(iteration: int) -> StepFigures:
    return StepFigures(
        iteration=iteration,
        loss=5.0,
        lr=1e-3,
        tokens=1000,
        seconds=0.5,
        seconds_scoring=0.1,
        gradient_norm=1.5,
        targets={"code": 5.25},
    )


def test_progress_without_a_terminal_is_lines() -> None:
    stream = io.StringIO()
    bar = ProgressBar(4, 0, 2, stream=stream)
    for iteration in range(1, 5):
        bar.step(_figures(iteration))
    bar.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and "\r" not in stream.getvalue()
    assert lines[0].startswith("step 2/4 | loss 5.0000 | code 5.2500 | lr 1.00e-03 | grad norm 1.50")
    assert lines[0].endswith("2,000 tokens/s | scoring 20%")


def test_progress_on_a_terminal_is_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    bar = ProgressBar(4, 2, 10, stream=stream)
    bar.step(_figures(3))
    bar.write("a line")
    bar.close()
    assert "3/4" in stream.getvalue() and "code 5.2500" in stream.getvalue() and "a line" in stream.getvalue()
    silent = Terminal()
    ProgressBar(4, 0, 1, enabled=False, stream=silent).step(_figures(1))
    assert silent.getvalue() == ""


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_only_what_layers_read_goes_to_the_device() -> None:
    """On a GPU the host would wait for the rest to come back."""
    columns = ("tokens", "labels", "loss_mask", "position_ids", "documents", "dataset", "sample", "segments")
    moved = to_device({name: torch.zeros(2) for name in columns}, torch.device("meta"))
    assert {name for name, column in moved.items() if column.device.type == "cpu"} == {
        "dataset",
        "sample",
        "segments",
    }


def _shared_memory(rank: int, world: int) -> tuple[int, int, float]:
    """DeepSpeed's files in /dev/shm before and after they are released, and a sum through them."""
    import deepspeed
    import torch.distributed as dist

    from inrun_megatron.training.distributed import release_shared_memory

    def files() -> int:
        dist.barrier()
        return len(list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{os.environ['MASTER_PORT']}_*")))

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    before = files()
    release_shared_memory()
    after = files()
    total = torch.full((64,), rank + 1.0)
    deepspeed.comm.inference_all_reduce(total)
    return before, after, float(total.mean())


def test_shared_memory_goes_with_the_ranks() -> None:
    here = {"LOCAL_SIZE": "2"}  # as the deepspeed launcher sets it, without which DeepSpeed shares none
    assert run_distributed(_shared_memory, 2, initialise=False, env=here) == [(2, 0, 3.0)] * 2


def _agree(rank: int, world: int) -> list[Any]:
    from inrun_megatron.training.distributed import AgreedError, all_ranks, rank0_then_all

    def fail(on: int) -> int:
        if rank == on:
            raise UserError(f"rank {rank} misses a file")
        return rank

    outcome: list[Any] = [all_ranks(lambda: fail(-1)), rank0_then_all(lambda: f"from {rank}")]
    for check in (lambda: all_ranks(lambda: fail(1)), lambda: rank0_then_all(lambda: fail(0))):
        try:
            check()
        except AgreedError as error:
            outcome.append(str(error))
    return outcome


def test_an_error_of_one_rank_is_raised_by_all(two_ranks: Workers) -> None:
    first, second = two_ranks.run(_agree)
    assert first == [0, "from 0", "rank 1 misses a file", "rank 0 misses a file"]
    assert second == [1, "from 0", "rank 1 misses a file", "rank 0 misses a file"]


# --- threads ---------------------------------------------------------------------------------------------------------


def threads_of_a_rank(rank: int, world: int, decided: bool) -> int:
    from inrun_megatron.training.distributed import share_cores

    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            patch.delenv(name, raising=False)
        if decided:
            patch.setenv("OMP_NUM_THREADS", "64")
        patch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
        torch.set_num_threads(6)
        try:
            share_cores()
            return torch.get_num_threads()
        finally:
            torch.set_num_threads(1)


def test_ranks_of_a_host_share_its_cores(two_ranks: Workers) -> None:
    assert two_ranks.run(threads_of_a_rank, False) == [3, 3]
    assert two_ranks.run(threads_of_a_rank, True) == [6, 6], "somebody decided otherwise"


def _open_files(rank: int, world: int) -> tuple[int, int]:
    import resource

    from inrun_megatron.config import ParallelConfig
    from inrun_megatron.training.distributed import meet

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    meet(ParallelConfig())
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def test_a_rank_may_open_a_file_for_each_of_a_thousand_ranks(two_ranks: Workers) -> None:
    for soft, hard in two_ranks.run(_open_files):
        assert soft >= min(hard, 1 << 16) or (hard == -1 and soft >= 1 << 16)


def test_an_audit_line_says_which_way_the_loss_went() -> None:
    from inrun_megatron.training.loop import _audit_line

    audits = {"audit/additivity/code": 1e-8, "audit/realised/code": -7.6e-6, "audit/predicted/code": 2.8e-2}
    assert _audit_line(50, audits) == (
        "step 50: audit | code: additivity off by 1.0e-08, loss fell by -7.6e-06 in one step (predicted +2.8e-02)"
    )
    assert _audit_line(50, {"audit/additivity/code": 1e-8}).endswith("additivity off by 1.0e-08")
