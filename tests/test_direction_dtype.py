"""Directions stored in bf16: values within their rounding, audits as exact as ever, half the memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from inrun_megatron.directions import stored_type
from inrun_megatron.dots import copy_engine
from inrun_megatron.errors import UserError
from tests.distributed import assert_cases, run_cases, run_distributed
from tests.layout_engine import build_engine, forward_backward, share
from tests.layout_runs import TOLERANCE, deviation, train
from tests.layouts import LayoutCase
from tests.test_reductions import adding, publish_sums

CASES = [
    LayoutCase(2, 1, False, 0, 1, "gpt2", "adamw", steps=2, direction_dtype="bf16"),
    LayoutCase(2, 2, True, 1, 2, "gpt2", "adamw", steps=2, direction_dtype="bf16"),
    LayoutCase(2, 1, False, 2, 2, "llama", "adamw", steps=2, direction_dtype="bf16", granularity="document"),
    LayoutCase(2, 1, False, 3, 2, "gpt2", "adamw", steps=2, direction_dtype="bf16", micro_batch=1),
    LayoutCase(2, 1, False, 1, 2, "gpt2", "adamw", steps=3, direction_dtype="bf16", pp=2, refresh=2),
]
# bf16 rounds an element by up to 2^-9 of itself; signs of the errors vary, so that a sample's sum is off by less.
ROUNDING = 2**-8


def test_values_are_those_of_the_oracle_within_the_rounding() -> None:
    """And rounded they are: nothing else would explain a difference beyond fp32's."""
    results = assert_cases(run_cases(train, 2, CASES, timeout=180))
    for case, ranks in zip(CASES, results, strict=True):
        oracle = case.oracle()
        for step, truth in enumerate(oracle.steps):
            found = deviation(ranks, oracle, step)
            print(f"{case}: step {step + 1}: {found:.1e}")
            assert TOLERANCE["fp32"] < found < ROUNDING, f"{case}: step {step + 1}"
            assert truth.values is not None
            scale = truth.values.abs().sum(0).max() / truth.clip_coefficient
            for ran in ranks:  # both sides read the same rounded direction
                left, right = (torch.tensor(side) for side in ran.additivity[step])
                assert (left - right).abs().max() < TOLERANCE["fp32"] * scale, case


def _held(rank: int, world: int, case: LayoutCase) -> tuple[int, int, int]:
    """Bytes that directions hold while they are filled, when they are read, and after the step."""
    from inrun_megatron import InRunShapley, Layout, ShapleyTarget
    from inrun_megatron.models import token_losses

    engine = build_engine(case)
    layout = Layout.current()
    targets = [
        ShapleyTarget(t.name, share(t, layout, 2, pipeline=False), t.num_tokens) for t in case.targets()
    ]
    read: list[int] = []
    filled: list[int] = []
    shapley = InRunShapley(
        engine,
        targets,
        token_losses,
        layout=layout,
        direction_dtype=case.direction_dtype,
        consumers=[lambda emission: read.append(shapley.directions.nbytes)],
    )
    passes = shapley.passes.run

    def run(*arguments: Any, **options: Any) -> None:
        passes(*arguments, **options)
        filled.append(shapley.directions.nbytes)

    shapley.passes.run = run  # type: ignore[method-assign]
    [batch] = case.batches()
    with shapley.step(1) as step:
        for microbatch in batch[layout.dp_rank]:
            with step.samples(microbatch["dataset"], microbatch["sample"], microbatch["loss_mask"].sum(1)):
                forward_backward(engine, microbatch)
    assert step.result.scored
    return filled[-1], max(read), shapley.directions.nbytes  # before it comes the look at rows


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_two_bytes_per_parameter_and_target(zero: int) -> None:
    """While layers read them; the fp32 sums are there until then and gone afterwards."""
    wide = LayoutCase(2, 1, False, zero, 2, "llama", "adamw", steps=1)
    both = [wide, replace(wide, direction_dtype="bf16")]
    fp32, bf16 = assert_cases(run_cases(_held, 2, both, timeout=120))
    for (filled, read, after), (narrow_filled, narrow_read, narrow_after) in zip(fp32, bf16, strict=True):
        print(f"ZeRO-{zero}: fp32 {filled} {read} {after}, bf16 {narrow_filled} {narrow_read} {narrow_after}")
        assert filled == read == after == narrow_filled
        assert 2 * narrow_read == 2 * narrow_after == read


def _gathered(rank: int, world: int, dtype: str) -> list[Any]:
    """(all-gathers that run on after publish, after the first read, the direction as both ranks read it)."""
    from torch.nn import Parameter

    from inrun_megatron.directions import Directions
    from inrun_megatron.engines.shards import FlatGroup, Residence, Span
    from inrun_megatron.parallel import Layout

    weights = [Parameter(torch.zeros(3, 2)), Parameter(torch.zeros(4))]
    groups = [
        FlatGroup(Residence.FLAT, 2 * n, n * rank, n * rank + n, [Span(w, 0, w.numel())], w.device)
        for w, n in zip(weights, (3, 2), strict=True)
    ]
    directions = Directions(groups, {}, Layout.data_parallel(), 2, stored=stored_type(dtype, precise=False))
    directions.zero()
    for k in range(2):
        for weight in weights:
            add = torch.arange(weight.numel(), dtype=torch.float32).view(weight.shape)
            directions.accumulate(k, weight, adding(add + 10 * k + rank))
    directions.reduce()
    publish_sums(directions)
    running = directions._flat.running
    read = [directions.of(weights[0])[1].float().flatten().tolist()]
    after = directions._flat.running
    read.append(directions.of(weights[1])[0].float().tolist())
    first, second = directions.of(weights[1])
    return [running, after, directions._flat.running, read, second.data_ptr() - first.data_ptr()]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gathers_run_on_until_their_group_is_read(dtype: str) -> None:
    """Each group's is waited for by its own first reader, and what is read is whole, at addresses for the copy engine."""
    for running, after, end, read, step in run_distributed(_gathered, 2, dtype):
        assert (running, after, end) == (2, 1, 0)
        assert step % copy_engine.ALIGNMENT == 0, "4 elements, of 2 or 4 bytes"
        assert read == [[2.0 * i + 21.0 for i in range(6)], [2.0 * i + 1.0 for i in range(4)]]


def test_what_cannot_be_stored_is_refused() -> None:
    assert stored_type("fp32", precise=True) is torch.float64
    with pytest.raises(UserError, match="direction_dtype 'fp8' is neither fp32 nor bf16"):
        stored_type("fp8", precise=False)
    with pytest.raises(UserError, match="direction_dtype bf16 with fp64 weights"):
        stored_type("bf16", precise=True)
