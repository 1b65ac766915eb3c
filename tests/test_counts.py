"""What scoring adds to a step: collectives by type, and reads by the host."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from tests.counting import Collectives, HostReads, HostWaits
from tests.distributed import assert_cases, run_cases
from tests.layout_engine import build_engine, forward_backward, share
from tests.layouts import LayoutCase


@dataclass(frozen=True)
class Case:
    layout: LayoutCase
    targets: int = 2
    scoring: bool = True
    interval: int = 1  # the second step is counted: with 2 it is scored


CASES = [
    Case(LayoutCase(2, 2, True, 0, 2, "gpt2", steps=2)),
    Case(LayoutCase(2, 2, True, 1, 2, "gpt2", steps=2), targets=6),
    Case(LayoutCase(2, 1, False, 2, 2, "gpt2", steps=2)),
    Case(LayoutCase(2, 2, False, 2, 2, "llama", steps=2, layers=4), targets=1),
    Case(LayoutCase(2, 1, False, 3, 2, "llama", steps=2)),
    Case(LayoutCase(2, 1, False, 2, 2, "llama", steps=2, experts=4)),
]
PIPELINES = [
    Case(LayoutCase(2, 1, False, 1, 2, "gpt2", steps=2, pp=2)),
    Case(LayoutCase(2, 1, False, 0, 2, "llama", "sgd", steps=2, pp=2)),
]


@dataclass(frozen=True)
class Counted:
    """Of the second step, whose optimizer state exists."""

    prepare: Counter[str]  # collectives before the first training microbatch
    rest: Counter[str]  # and from there on
    reads: Counter[str]  # by the host, as Python calls them
    waits: Counter[str]  # operations that the host must wait for, from anywhere
    emissions: int  # of layers that are scored on this rank
    validation: int = 0  # microbatches of all targets


def _count(rank: int, world: int, counted: Case) -> Counted:
    """A step with scoring, or a plain one where the case says so; a function for `run_cases`."""
    from inrun_megatron import InRunShapley, Layout, ShapleyTarget
    from inrun_megatron.models import token_losses

    case = counted.layout
    engine = build_engine(case)
    layout = Layout.current()
    emissions = 0

    def count(emission: Any) -> None:
        nonlocal emissions
        emissions += emission.site.counts_here

    shapley = None
    given = []
    if counted.scoring:
        given = [
            ShapleyTarget(t.name, share(t, layout, 2, pipeline=False), t.num_tokens)
            for t in (case.targets() * 3)[: counted.targets]
        ]
        shapley = InRunShapley(
            engine, given, token_losses, layout=layout, consumers=[count], interval=counted.interval
        )
    before, during = Collectives(), Collectives()
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)

    def counters() -> list[torch.Tensor]:  # of the optimizer's steps, on the CPU
        return [s["step"] for s in inner.state.values() if "step" in s]

    reads, waits = HostReads(counters), HostWaits(counters)
    for iteration, batch in enumerate(case.batches(), start=1):
        for counts in (before.counts, during.counts, reads.counts, waits.counts):
            counts.clear()
        emissions = 0
        microbatches = batch[layout.dp_rank]
        with reads, waits:
            if shapley is None:
                with during:
                    for microbatch in microbatches:
                        forward_backward(engine, microbatch)
                _read_norm(engine)
                continue
            with before:
                context = shapley.step(iteration)
                step = context.__enter__()
            with during:
                for microbatch in microbatches:
                    with step.samples(
                        microbatch["dataset"], microbatch["sample"], microbatch["loss_mask"].sum(1)
                    ):
                        forward_backward(engine, microbatch)
                context.__exit__(None, None, None)
            assert step.result.scored == (iteration % counted.interval == 0)
            if not step.result.scored:
                _read_norm(engine)
    validation = sum(len(target.microbatches) for target in given)
    return Counted(before.by_type(), during.by_type(), reads.counts, waits.counts, emissions, validation)


def _read_norm(engine: Any) -> None:
    """What a training loop reports of a plain step."""
    norm = engine.get_global_grad_norm()
    if isinstance(norm, torch.Tensor):
        float(norm)


def _count_pipeline(rank: int, world: int, counted: Case) -> Counted:
    """The same through a pipeline: a step is one ``train_batch``."""
    from inrun_megatron import Layout, PipelineShapley, ShapleyTarget
    from inrun_megatron.engines.pipeline import train_batch

    case = counted.layout
    engine = build_engine(case)
    layout = Layout.current()
    shapley = None
    if counted.scoring:
        targets = [
            ShapleyTarget(t.name, share(t, layout, case.micro_batch, pipeline=True), t.num_tokens)
            for t in case.targets()
        ]
        shapley = PipelineShapley(engine, targets, engine.module.loss_fn, layout=layout)
    collectives = Collectives()
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)

    def counters() -> list[torch.Tensor]:
        return [s["step"] for s in inner.state.values() if "step" in s]

    reads, waits = HostReads(counters), HostWaits(counters)
    for iteration, batch in enumerate(case.batches(), start=1):
        for counts in (collectives.counts, reads.counts, waits.counts):
            counts.clear()
        with reads, waits, collectives:
            if shapley is None:
                float(train_batch(engine, [engine.module.loss_fn.split(m) for m in batch[0]]))
                _read_norm(engine)
                continue
            with shapley.step(iteration) as step:
                step.train_batch(batch[0])
        assert step.result.scored
    return Counted(Counter(), collectives.by_type(), reads.counts, waits.counts, 0)


@pytest.fixture(scope="module")
def counted() -> list[tuple[Case, Counted, Counted]]:
    both = [c for case in CASES for c in (case, replace(case, scoring=False))]
    results = [ranks[0] for ranks in assert_cases(run_cases(_count, 2, both, timeout=300))]
    return list(zip(CASES, results[::2], results[1::2], strict=True))


def test_one_collective_for_the_dots(counted: list[tuple[Case, Counted, Counted]]) -> None:
    """Whatever the layers, targets and microbatches; a second one of 4 K figures is the audit's."""
    for case, scored, plain in counted:
        extra = scored.rest - plain.rest
        print(f"{case}: before the step {dict(scored.prepare)}, in it {dict(extra)} more than a plain one")
        assert not plain.rest - scored.rest, case
        # At stage 3 directions are gathered with their layer, once for every use that is scored.
        gathers = {"allgather_base": scored.emissions} if case.layout.zero == 3 else {}
        assert extra == {"allreduce": 1 + (case.layout.tp > 1), **gathers}, f"{case}: {extra}"


def test_no_read_by_the_host_that_plain_training_does_not_have(
    counted: list[tuple[Case, Counted, Counted]],
) -> None:
    """A training loop reads the gradient norm of a plain step; of a scored one everything comes in that one copy.

    At stage 0 in fp32 DeepSpeed reads the norm itself, in order to clip, so that the copy is one more.
    """
    for case, scored, plain in counted:
        print(f"{case}: scored {dict(scored.reads)}, plain {dict(plain.reads)}")
        of_validation = _of_megatrons_experts(case, scored.validation)
        assert sum(scored.reads.values()) <= (
            sum(plain.reads.values()) + of_validation["reads"] + (case.layout.zero == 0)
        ), case
        print(f"  waits: scored {dict(scored.waits)}, plain {dict(plain.waits)}")
        assert sum(plain.waits.values()) > 0, "the control: plain training reads its norm"
        more = scored.waits - plain.waits
        more["masked_select"] -= of_validation["masked_select"]
        assert not +more, f"{case}: {more}"


def _of_megatrons_experts(case: Case, forwards: int) -> Counter[str]:
    """What megatron-core's dispatcher and experts read in so many forwards: sizes, copied and read, and what a mask selects."""
    mixtures = 0 if case.layout.experts is None else case.layout.layers
    return Counter(reads=2 * mixtures * forwards, masked_select=2 * mixtures * forwards)


def test_a_step_between_two_scored_ones_asks_for_nothing(
    counted: list[tuple[Case, Counted, Counted]],
) -> None:
    between = [replace(case, interval=3) for case in CASES]
    found = [ranks[0] for ranks in assert_cases(run_cases(_count, 2, between, timeout=300))]
    for own, (case, _, plain) in zip(found, counted, strict=True):
        assert (own.rest, own.reads, own.waits) == (plain.rest, plain.reads, plain.waits), case
        assert not own.prepare, case


def test_no_read_by_the_host_through_a_pipeline() -> None:
    """But the one copy with everything, on every stage; plain training reads the loss and the norm."""
    both = [c for case in PIPELINES for c in (case, replace(case, scoring=False))]
    results = assert_cases(run_cases(_count_pipeline, 2, both, timeout=300))
    for case, stages, without in zip(PIPELINES, results[::2], results[1::2], strict=True):
        for scored, plain in zip(stages, without, strict=True):
            print(f"{case}: reads {dict(scored.reads)}, plain {dict(plain.reads)}")
            print(f"  waits {dict(scored.waits)}, plain {dict(plain.waits)}")
            assert not scored.waits - plain.waits, f"{case}: {scored.waits - plain.waits}"
            assert sum(scored.reads.values()) <= sum(plain.reads.values()) + 1, case


def _waiting(tensor: torch.Tensor) -> Counter[str]:
    with HostWaits() as waits:
        float(tensor.sum())
        tensor[tensor > 0]
        tensor[tensor > 0] = 1.0  # no wait
        tensor.nonzero()
        bool(tensor.any())
    return waits.counts


def test_control_waits_are_seen() -> None:
    found = _waiting(torch.randn(5))
    assert found["_local_scalar_dense"] == 2 and found["index"] == 1 and found["nonzero"] >= 1, found
    assert not found["index_put_"] and not found["index_put"], found
