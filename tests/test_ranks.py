"""What ranks share: memory, errors, the cores of a host; and how many files a rank may open."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from inrun_megatron.config import ParallelConfig
from inrun_megatron.errors import UserError
from tests.distributed import Workers, run_distributed


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
    from inrun_megatron.keeping.agreement import AgreedError, all_ranks, rank0_then_all

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

    from inrun_megatron.training.distributed import meet

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    meet(ParallelConfig())
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def test_a_rank_may_open_a_file_for_each_of_a_thousand_ranks(two_ranks: Workers) -> None:
    for soft, hard in two_ranks.run(_open_files):
        assert soft >= min(hard, 1 << 16) or (hard == -1 and soft >= 1 << 16)
