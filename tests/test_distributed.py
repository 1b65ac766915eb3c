"""The spawn helper itself: results, failures, hangs, and groups that are built anew for every case."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import DistributedError, Workers, assert_cases, run_cases, run_distributed
from tests.layouts import LayoutCase


def add_ranks(rank: int, world_size: int, offset: torch.Tensor) -> dict[str, Any]:
    total = offset + rank
    dist.all_reduce(total)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "DS_ACCELERATOR", "OMP_NUM_THREADS", "EXTRA")
    return {"total": total, "world": world_size, "env": {name: os.environ.get(name) for name in names}}


def without_world(rank: int, world_size: int) -> bool:
    return dist.is_initialized() or "MASTER_PORT" not in os.environ


def misbehave(rank: int, world_size: int, how: str) -> int:
    print(f"rank {rank} about to {how}", file=sys.stderr)
    if how == "raise together":
        raise ValueError("everybody raises")
    if how == "exit together":
        raise SystemExit(3)
    if rank == 1:
        if how == "raise":
            raise ValueError("rank 1 is unwell")
        if how == "die":
            os._exit(7)
        if how == "sleep":
            time.sleep(60)
    if how != "nothing":
        dist.barrier()
    return os.getpid()


def train_one_step(rank: int, world_size: int, case: tuple[int, int]) -> tuple[int, int, float]:
    """Real groups of megatron-core and a real DeepSpeed engine: (tp size, dp size, a weight after one step)."""
    import deepspeed
    from megatron.core import parallel_state

    from inrun_megatron.training.distributed import Mpu

    tp_size, stage = case
    deepspeed.init_distributed(dist_backend="gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp_size)

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed 0.19 clips at 1.0 where nothing is said
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config, mpu=None if tp_size == 1 else Mpu()
    )
    dp_rank = parallel_state.get_data_parallel_rank()
    loss = engine(torch.full((1, 4), 1.0 + dp_rank)).sum()
    engine.backward(loss)
    engine.step()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        weight = engine.module.weight[0, 0].item()
    engine.destroy()
    return (
        dist.get_world_size(parallel_state.get_tensor_model_parallel_group()),
        deepspeed.utils.groups._get_data_parallel_world_size(),
        weight,
    )


def test_results_come_back_by_rank_from_a_working_group() -> None:
    results = run_distributed(add_ranks, 3, torch.tensor(10), env={"EXTRA": "yes"})
    for rank, result in enumerate(results):
        assert int(result["total"]) == 33
        assert result["world"] == 3
        assert result["env"] == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "EXTRA": "yes",
        }
    assert "EXTRA" not in os.environ and "RANK" not in os.environ


def test_torch_distributed_can_be_left_to_the_function() -> None:
    assert run_distributed(without_world, 1, initialise=False) == [False]


def test_failures_name_the_rank_and_spare_the_rest_of_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.distributed.GRACE_SECONDS", 2.0)
    cases = ["nothing", "raise", "die", "raise together", "exit together", "nothing"]
    outcomes = run_cases(misbehave, 2, cases, timeout=600)
    assert [outcome.error is None for outcome in outcomes] == [True, False, False, False, False, True]
    messages = [str(outcome.error) for outcome in outcomes]
    # Rank 0 waits in a barrier that nobody joins; it is not waited for.
    assert "rank 1 of 2 failed first; ranks [0] did not answer any more" in messages[1]
    assert "ValueError: rank 1 is unwell" in messages[1]
    assert "in misbehave" in messages[1]
    assert "rank 1 about to raise" in messages[1], "the log's end is part of the message"
    assert "rank 0 about to raise" not in messages[1]
    assert "exit code 7" in messages[2]
    assert "ValueError: everybody raises" in messages[3]
    assert outcomes[3].error is not None and outcomes[3].error.alive
    assert "SystemExit: 3" in messages[4]
    with pytest.raises(AssertionError, match=r"4 of 6 cases failed"):
        assert_cases(outcomes)


def test_a_hanging_rank_is_ended_and_shows_where_it_hangs() -> None:
    with Workers(2) as workers:
        first = workers.run(misbehave, "nothing", timeout=600)
        with pytest.raises(DistributedError, match=r"did not answer within 4 s") as caught:
            workers.run(misbehave, "sleep", timeout=4)
        assert "in misbehave" in str(caught.value), "faulthandler's stack of the stuck rank"
        assert not caught.value.alive
        assert all(not os.path.exists(f"/proc/{pid}") for pid in first)
        second = workers.run(misbehave, "nothing", timeout=600)
        assert set(first).isdisjoint(second)
        assert workers.run(misbehave, "nothing", timeout=600) == second, (
            "the same processes serve the next call"
        )


def test_groups_are_built_anew_for_every_case() -> None:
    cases = [(1, 1), (2, 1), (1, 3), (2, 2), (1, 0)]
    for (tp_size, _), reports in zip(cases, assert_cases(run_cases(train_one_step, 2, cases)), strict=True):
        # The gradient is the mean input of the replicas: 1 for one, 1.5 for two.
        expected = (tp_size, 2 // tp_size, -1.5 if tp_size == 1 else -1.0)
        assert reports == [expected, expected]


def modules_of_a_run(rank: int, world_size: int, case: LayoutCase) -> set[str]:
    """What a rank that trains and scores had to import first."""
    from tests.layout_runs import train

    before = set(sys.modules)
    train(rank, world_size, case)
    packages = ("inrun_megatron", "megatron", "deepspeed", "pyarrow", "pandas", "tests")
    return {name for name in sys.modules if name.partition(".")[0] in packages} - before


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks are not forked beside a GPU")
def test_ranks_are_forked_with_everything_imported() -> None:
    """Each would spend seconds on it; and an import that fails in preloaded.py is passed over without a word."""
    partitioned = LayoutCase(2, 1, False, 3, 1, "gpt2", "adamw", steps=1)
    staged = LayoutCase(2, 1, False, 1, 1, "gpt2", "adamw", pp=2, steps=1)
    for case in (partitioned, staged):  # each in ranks of its own
        assert run_distributed(modules_of_a_run, 2, case) == [set(), set()], "name them in preloaded.py"
