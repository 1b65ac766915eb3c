"""What is on its way is neither read nor written: values where every collective that runs on arrives only when it is waited for.

On CPUs gloo is often done before anyone looks, so that a missing wait would go unseen. Here a collective's output is NaN until
its work is waited for, and its input must be then what it was when it was started.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.counting import standing_in
from tests.distributed import DistributedError, assert_cases, run_cases, run_distributed
from tests.layout_runs import TOLERANCE, Ran, deviation, train
from tests.layouts import LayoutCase

SUMS, OTHERS = "directions.reductions", ("directions.gathers", "directions.vectors", "engines.buckets")


class LateWork:
    """Of a collective that is done, but shows it to those who wait only."""

    def __init__(self, output: Tensor, result: Tensor, given: Tensor | None) -> None:
        self._output, self._result = output, result
        self._given = None if given is None else (given, given.clone())
        output.fill_(float("nan"))

    def wait(self) -> None:
        if self._given is not None:
            now, then = self._given
            assert torch.equal(now, then), "the input of a collective changed while it was on its way"
        self._output.copy_(self._result)


class Late:
    """Stands where a module has `torch.distributed`.

    Attributes:
        started: collectives that ran on.
    """

    def __init__(self) -> None:
        self.started = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_reduce(self, tensor: Tensor, *, async_op: bool = False, **options: Any) -> Any:
        if not async_op:
            return dist.all_reduce(tensor, **options)
        result = tensor.clone()
        dist.all_reduce(result, **options)
        return self._late(tensor, result, None)

    def reduce_scatter_tensor(self, output: Tensor, given: Tensor, *, async_op: bool, **options: Any) -> Any:
        result = torch.empty_like(output)
        dist.reduce_scatter_tensor(result, given, **options)
        return self._late(output, result, given)

    def all_gather_into_tensor(self, output: Tensor, given: Tensor, *, async_op: bool, **options: Any) -> Any:
        result = torch.empty_like(output)
        dist.all_gather_into_tensor(result, given, **options)
        return self._late(output, result, given)

    def _late(self, output: Tensor, result: Tensor, given: Tensor | None) -> LateWork:
        self.started += 1
        return LateWork(output, result, given)


CASES = [
    LayoutCase(4, 1, False, 0, 1, "gpt2", "adamw", steps=3),
    LayoutCase(4, 1, False, 1, 1, "llama", "adamw", steps=3, base="drift"),
    LayoutCase(4, 2, True, 2, 2, "gpt2", "adamw", steps=3, estimator="midpoint"),
    LayoutCase(4, 1, False, 3, 2, "gpt2", "adamw", steps=3),
    LayoutCase(4, 2, True, 3, 1, "llama", "sgd", steps=3, recompute=True),
    LayoutCase(4, 1, False, 1, 2, "gpt2", "adamw", steps=3, pp=2),
    LayoutCase(4, 1, False, 1, 2, "gpt2", "adamw", steps=3, pp=2, base="drift"),
    LayoutCase(4, 1, False, 0, 2, "llama", "adamw", steps=3, pp=2),
    LayoutCase(4, 1, False, 2, 1, "llama", "adamw", steps=3, refresh=2),
]


@dataclass(frozen=True)
class Flown:
    """A run, the collectives that ran on, and those of sums by validation pass: (before it had ended, at its end)."""

    ran: Ran
    started: int
    sums: list[tuple[int, int]]


def _train_late(rank: int, world: int, case: LayoutCase) -> Flown:
    """Buckets are smaller than a weight."""
    from inrun_megatron.engines import buckets
    from inrun_megatron.shapley.preparation import Preparation

    buckets.BUCKET_SIZE = 500
    sums, others, reduce = Late(), Late(), Preparation.reduce
    passes: list[tuple[int, int]] = []

    def counted(self: Preparation, scale: float) -> None:
        early = sums.started - sum(sum(one) for one in passes)
        reduce(self, scale)
        passes.append((early, sums.started - early - sum(sum(one) for one in passes)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Preparation, "reduce", counted)
        with standing_in(sums, [SUMS]), standing_in(others, OTHERS):
            return Flown(train(rank, world, case), sums.started + others.started, passes)


def test_values_where_nothing_comes_before_it_is_waited_for() -> None:
    """And from the second pass on every sum is on its way when the pass ends, but for those that another stage adds to."""
    for case, ranks in zip(CASES, assert_cases(run_cases(_train_late, 4, CASES, timeout=180)), strict=True):
        oracle = case.oracle()
        assert min(rank.started for rank in ranks) > 20, case
        for step in range(case.steps):
            found = deviation([rank.ran for rank in ranks], oracle, step)
            print(f"{case}: step {step + 1}: {found:.1e}")
            assert found < TOLERANCE["fp32"], f"{case}: step {step + 1}"
        tied_stages = case.pp > 1 and case.model().is_tied
        for (first, _), *later in (rank.sums for rank in ranks):
            # At first a pass has to see how often weights are used; midpoint's batch gradient is summed before its reduction.
            assert (first == 0) == (case.zero < 3 and case.estimator == "first_order"), f"{case}: {first}"
            for early, late in later:
                assert early > 8 and (late > 0) == tied_stages, f"{case}: {early} early, {late} late"


def _careless(rank: int, world: int, mistake: str) -> float:
    given, output = torch.ones(2), torch.empty(2 * world)
    work = Late().all_gather_into_tensor(output, given, async_op=True)
    if mistake == "write":
        given.add_(1.0)
    if mistake != "read":
        work.wait()
    return float(output.sum())


def test_control_early_reads_and_writes_are_seen() -> None:
    assert run_distributed(_careless, 2, "none") == [4.0, 4.0]
    assert all(found != found for found in run_distributed(_careless, 2, "read"))
    with pytest.raises(DistributedError, match="changed while it was on its way"):
        run_distributed(_careless, 2, "write")


def test_zero_3_fetches_moved_weights_after_they_were_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU DeepSpeed's fetches run in a stream of their own, ahead of the one that writes the shards."""
    from inrun_megatron.engines import lookahead, zero_groups
    from inrun_megatron.engines.shards import FlatGroup, Piece, Residence, Span

    done: list[str] = []
    shard = torch.zeros(4)
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_tensor = shard  # type: ignore[attr-defined]
    master = torch.ones(4)
    group = FlatGroup(Residence.PARTITIONED, 4, 0, 4, [Span(parameter, 0, 4)], shard.device)
    group.pieces = [Piece(master, 0, 0, 4)]

    class Fetches:
        def wait_stream(self, other: str) -> None:
            done.append(f"fetches wait for {other}, weights {shard.tolist()}")

    state: Any = object.__new__(zero_groups.OptimizerState)
    wrapper = SimpleNamespace(
        _partition_all_parameters=lambda: None,
        invalidate_secondary_tensor=lambda: None,
        parameter_offload=SimpleNamespace(**{zero_groups._FETCHES: Fetches()}),
    )
    state.engine, state.stage, state.groups = SimpleNamespace(optimizer=wrapper), 3, [group]
    state.inner, state.layout = None, SimpleNamespace(dp_size=2)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "ours")
    with lookahead.Lookahead(state).moving() as move:
        move(lambda index, piece, out: out.fill_(2.0))
        done.append("forward")
    assert done == [
        "fetches wait for ours, weights [2.0, 2.0, 2.0, 2.0]",
        "forward",
        "fetches wait for ours, weights [1.0, 1.0, 1.0, 1.0]",
    ]


# --- stages ----------------------------------------------------------------------------------------------------------

# Untied and tied, and fewer training microbatches than stages: some stages have no forward left to begin with.
STAGES = [
    LayoutCase(2, 1, False, 1, 2, "llama", "adamw", pp=2, micro_batch=8, steps=1),
    LayoutCase(2, 1, False, 0, 1, "gpt2", "adamw", pp=2, steps=1),
]
FOUR_STAGES = [
    LayoutCase(4, 1, False, 1, 1, "llama", "adamw", pp=4, layers=4, steps=1),
    LayoutCase(4, 1, False, 0, 4, "gpt2", "adamw", pp=4, layers=4, steps=1),
]


class Connecting:
    """Stands where a module has `torch.distributed`: what runs on elsewhere makes the host wait for the group's other ranks, as
    NCCL does where it connects them: at their first use."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_reduce(self, tensor: Tensor, *, async_op: bool = False, **options: Any) -> Any:
        dist.all_reduce(tensor, **options)
        return SimpleNamespace(wait=lambda: None) if async_op else None


def _train_connecting(rank: int, world: int, case: LayoutCase) -> Ran:
    with standing_in(Connecting(), ["shapley.pipeline"]):
        return train(rank, world, case)


@pytest.mark.parametrize(
    "cases", [STAGES, pytest.param(FOUR_STAGES, marks=pytest.mark.slow)], ids=["two stages", "four stages"]
)
def test_a_stage_that_waits_for_the_others_has_sent_them_what_they_wait_for(cases: list[LayoutCase]) -> None:
    for case, ranks in zip(
        cases, assert_cases(run_cases(_train_connecting, cases[0].world, cases, timeout=60)), strict=True
    ):
        assert all(ran.statuses == ["scored"] for ran in ranks), case
