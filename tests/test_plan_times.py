"""What the plan makes of counts and rates: seconds of a step, and what of them hides."""

from __future__ import annotations

from dataclasses import replace

import pytest

from inrun_megatron.model_config import ModelConfig
from inrun_megatron.plan import costs, predict, times
from inrun_megatron.plan.costs import ESTIMATORS
from inrun_megatron.plan.job import Job
from inrun_megatron.plan.presets import PRESETS
from tests.test_plan import _case


def test_what_passes_hide_at_best() -> None:
    """Everything that may wait where computing is slow, nothing where it is fast; the rest is what no pass is beside."""
    job = replace(_case(2, 1, base="drift").job(), targets=4)
    slow, fast = times.Hardware(flops=1.0), times.Hardware(flops=1e60)
    network = slow.network

    def seconds(job: Job, *purposes: str) -> float:
        return sum(own.bytes for own in predict.collectives(job) if own.purpose in purposes) / network

    sums = seconds(job, predict.SUM)
    rest = seconds(job, predict.PUBLISH, predict.MOVE)
    # One bucket a target: only the last target's has no pass left to hide behind.
    assert times.time(job, slow).hidden == pytest.approx(rest + 3 / 4 * sums)
    assert times.time(job, fast).hidden == pytest.approx(0.0, abs=1e-30)
    single = replace(job, targets=1)
    assert times.time(single, slow).hidden == pytest.approx(seconds(single, predict.PUBLISH, predict.MOVE)), (
        "one target, one bucket: its sum hides behind nothing"
    )
    sharded = replace(job, zero_stage=3)
    assert times.time(sharded, slow).hidden == pytest.approx(seconds(sharded, predict.READ, predict.FILL))
    taken = times.time(job, times.Hardware())
    assert taken.overlapped_overhead == pytest.approx(taken.scored_overhead - taken.hidden / taken.training)


def test_dots_of_several_rows_cost_a_slower_product() -> None:
    """In bf16 with infinitely fast memory a single row's dots are free, and several rows' are what the kernel loses."""
    job = replace(_case(2, 1).job(), parameter_bytes=2, zero_stage=1)
    fast = times.Hardware(memory=1e60)
    linear = sum(p.numel for p in job.parameters if p.linear)
    tokens = job.seq_length * job.microbatches * job.micro_batch_size
    assert job.micro_batch_size > 1
    lost = (
        costs.SLOWER_PRODUCT * linear * tokens / fast.flops
    )  # 2 operations, at twice the rate of a whole step
    assert times.time(job, fast).dots == pytest.approx(lost)
    assert times.time(replace(job, micro_batch_size=1), fast).dots == pytest.approx(0.0, abs=1e-30)
    assert costs.dot_traffic_bytes(3, True, 1, 2) == 2 + costs.dot_traffic_bytes(3, True, 2, 2) == 2 + 3 * 2


def test_experts_of_few_tokens_are_projected() -> None:
    """In bf16 with infinitely slow memory what is left is a product for each target, sixteen times as long with fp32 directions."""
    job = replace(_case(2, 2, "llama", experts=4, direction_dtype="bf16").job(), parameter_bytes=2)
    slow = times.Hardware(memory=1e-60)
    met = sum(p.numel * p.share for p in job.parameters if p.linear)
    assert met < sum(p.numel for p in job.parameters if p.linear)
    tokens = job.seq_length * job.microbatches * job.micro_batch_size
    narrow = times.time(job, slow).dots
    assert narrow == pytest.approx(job.targets * met * tokens / slow.flops)
    wide = times.time(replace(job, direction_dtype="fp32"), slow).dots
    assert wide == pytest.approx(costs.WIDE_PROJECTION * narrow)


def test_elementwise_passes_are_per_step_and_shard() -> None:
    job = replace(_case(2, 1, base="drift").job(), parameter_bytes=2, direction_dtype="bf16", targets=1)
    assert costs.elementwise_bytes(1, 2, 2, moves=True) == 48  # docs/performance.md
    taken, hardware = times.time(job, times.Hardware()), times.Hardware()
    assert taken.elementwise == pytest.approx(48 * predict.shard(job) / hardware.memory)
    longer = times.time(replace(job, global_batch_size=4 * job.global_batch_size), hardware)
    assert longer.elementwise == taken.elementwise and longer.training > 3 * taken.training
    still = times.time(replace(job, base="current"), hardware)
    assert taken.elementwise - still.elementwise == pytest.approx(20 * predict.shard(job) / hardware.memory)
    stale = times.time(
        replace(job, refresh=10**9), times.Hardware(network=1e60)
    )  # the audit is in every step
    assert stale.overhead == pytest.approx(
        (stale.dots + 6 * predict.shard(job) / hardware.memory) / stale.training
    )


def test_time_follows_from_the_counts() -> None:
    """Validation alone costs its share of rows; an interval divides it; memory and network add their own."""
    model, fields = PRESETS["7b"]
    job = Job(model=ModelConfig(**model), **fields | {"target_sequences": 64})
    fast = times.Hardware(memory=1e30, network=1e30)
    assert times.time(job, fast).overhead == pytest.approx(64 / 1024)
    assert times.time(replace(job, interval=4), fast).overhead == pytest.approx(16 / 1024)
    assert times.time(replace(job, refresh=4), fast).overhead == pytest.approx(16 / 1024)
    each = times.time(replace(job, refresh=10**9), times.Hardware(memory=1e30))
    assert 0 < each.overhead < 1e-4 < each.scored_overhead  # dots and audits are sent in every scored step
    # One sequence costs as much as one per replica: the microbatches are filled up.
    assert times.time(replace(job, target_sequences=1), fast).overhead == pytest.approx(32 / 1024)
    assert times.time(job, times.Hardware()).dots > 0 < times.time(job, times.Hardware()).communication
    costs = {key: times.time(replace(job, estimator=key[0], base=key[1]), fast) for key in ESTIMATORS}
    ratio = 64 / 1024
    assert costs["simpson", "current"].overhead == pytest.approx(1 + 3 * ratio)
    assert 1 + ratio < costs["midpoint", "current"].overhead < 1 + 1.4 * ratio
    assert costs["first_order", "drift"].overhead == pytest.approx(ratio)
