"""Seconds of a scored step by a model: what `predict` counts, at the rates of one GPU. docs/scaling.md derives it."""

from __future__ import annotations

from dataclasses import dataclass

from inrun_megatron.plan.costs import (
    BACKWARD,
    FORWARD,
    SLOWER_PRODUCT,
    SUM_BYTES,
    WIDE_PROJECTION,
    audit_bytes,
    dot_traffic_bytes,
    elementwise_bytes,
)
from inrun_megatron.plan.job import Job, Parameter
from inrun_megatron.plan.predict import (
    AUDITS,
    DOTS,
    FILL,
    MOVE,
    PUBLISH,
    READ,
    SUM,
    buckets,
    collectives,
    operations,
    shard,
)


@dataclass(frozen=True)
class Hardware:
    """Of one GPU. flops: what training really reaches, per second. memory, network: bytes per second. Default: an H100
    SXM at 40% of its bf16 peak, and 400 Gbit/s of network."""

    flops: float = 400e12
    memory: float = 3.35e12
    network: float = 50e9


@dataclass(frozen=True)
class Time:
    """Seconds of one step: training without scoring, and what scoring adds to one that takes its own directions. elementwise:
    passes over the optimizer's shard. each: the part of `communication` and `elementwise` that steps with older directions
    have, too. hidden: the part of `communication` that passes hide at best."""

    training: float
    passes: float
    dots: float
    elementwise: float
    communication: float
    interval: int
    refresh: int
    each: float
    hidden: float

    @property
    def scored_overhead(self) -> float:
        """Of a scored step, as a share of a step without scoring; nothing is hidden."""
        return (self.passes + self.dots + self.elementwise + self.communication) / self.training

    @property
    def overlapped_overhead(self) -> float:
        """Of a scored step that hides what it can."""
        return self.scored_overhead - self.hidden / self.training

    @property
    def overhead(self) -> float:
        """Over the run."""
        fresh = (self.passes + self.elementwise + self.communication - self.each) / self.refresh
        return (fresh + self.each + self.dots) / self.training / self.interval


def time(job: Job, hardware: Hardware) -> Time:
    """A model, not a measurement: matrix products at the rate training reaches, dots at the speed of memory, collectives
    at that of the network."""
    work, stages = operations(job), job.pipeline_parallel
    microbatch = (work.training / job.global_batch_size) * job.micro_batch_size
    microbatch /= job.tensor_parallel * stages * hardware.flops
    bubble = stages - 1
    extra = (work.validation + work.batch) / work.training * job.microbatches
    if stages > 1 and job.cost.moves:
        # Weights that move let nothing ride along: every pass fills and drains the pipeline.
        extra += bubble * (job.cost.validation_passes + job.cost.batch_passes + job.cost.loss_passes / 3)
    dots = sum(_dots(job, hardware, parameter) for parameter in job.parameters if parameter.linear)
    sent = [
        (own, own.bytes * (2 if own.kind == "all_reduce" else 1) / hardware.network)
        for own in collectives(job)
    ]
    of_memory = shard(job) / hardware.memory  # seconds per byte of every element
    each = sum(seconds for own, seconds in sent if own.purpose in (READ, DOTS, AUDITS))
    each += of_memory * audit_bytes(job.targets, job.direction_bytes)
    return Time(
        training=(job.microbatches + bubble) * microbatch,
        passes=extra * microbatch,
        dots=dots * job.microbatches * job.micro_batch_size,
        elementwise=of_memory
        * elementwise_bytes(job.targets, job.direction_bytes, job.parameter_bytes, job.cost.moves),
        communication=sum(seconds for _, seconds in sent),
        interval=job.interval,
        refresh=job.refresh,
        each=each,
        hidden=_hidden(job, microbatch, {own.purpose: seconds for own, seconds in sent}),
    )


def _dots(job: Job, hardware: Hardware, parameter: Parameter) -> float:
    """Of one row and a linear layer's weight, beside the weight gradient."""
    low = job.parameter_bytes < 4
    traffic = parameter.numel * dot_traffic_bytes(job.targets, low, job.micro_batch_size, job.direction_bytes)
    # cuBLAS alone is about twice as fast as a whole training step per operation.
    product = 2.0 * parameter.numel * parameter.share * job.seq_length / (2.0 * hardware.flops)
    slower = SLOWER_PRODUCT * product if low and job.micro_batch_size > 1 else 0.0
    # An expert of few tokens is scored by projecting them.
    wide = WIDE_PROJECTION if low and job.direction_bytes == SUM_BYTES else 1.0
    return min(traffic / hardware.memory + slower, job.targets * product * wide)


def _hidden(job: Job, microbatch: float, seconds: dict[str, float]) -> float:
    """Seconds of the collectives, by purpose, that passes hide at best; `microbatch`: of a training one."""
    backward = BACKWARD / (FORWARD + BACKWARD)
    validation = microbatch * job.validation_rows / job.micro_batch_size
    if job.zero_stage == 3:
        # A layer's collective beside the next layer's products.
        cost, train = job.cost, microbatch * backward * job.microbatches
        fill = validation * backward * cost.validation_passes * job.validation_microbatches
        return min(seconds[READ], train) + min(seconds[FILL], fill + train * cost.batch_passes)
    # Sums travel from the first target's last backward on; the last bucket has nothing left to hide behind.
    window = validation * (job.validation_microbatches * (1 - 1 / job.targets) + backward)
    last = 1 / (job.targets * max(buckets(job)))
    # Gathers travel from training's first forward on, through a pipeline from its first backward, and a layer waits
    # for its own.
    beside = microbatch * (backward if job.pipeline_parallel > 1 else 1.0)
    # Moved weights travel in the first forward after each move.
    moved = min(seconds.get(MOVE, 0.0), job.cost.gathers * validation * (1 - backward))
    return moved + min(seconds.get(SUM, 0.0) * (1 - last), window) + min(seconds.get(PUBLISH, 0.0), beside)
