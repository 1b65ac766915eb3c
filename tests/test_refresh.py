"""Directions that are used for several steps: against the oracle with the same stale direction, and when they are renewed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from inrun_megatron.errors import UserError
from inrun_megatron.shapley.refresh import RefreshSchedule, require_refresh
from tests.counting import Collectives
from tests.distributed import assert_cases, run_cases
from tests.layout_engine import build_engine
from tests.layout_runs import TOLERANCE, deviation, train
from tests.layouts import LayoutCase

STEPS = 4
AGES = {2: [0, 1, 0, 1], 3: [0, 1, 2, 0]}
# A learning rate that grows by half from step to step: the scalar part of the Jacobian must be the step's own.
CASES = [
    replace(case, steps=STEPS)
    for case in (
        LayoutCase(2, 1, False, 0, 1, "gpt2", "adamw", refresh=3, lr_growth=1.5),
        LayoutCase(2, 2, True, 1, 2, "gpt2", "adamw", refresh=2, lr_growth=1.5),
        LayoutCase(2, 1, False, 2, 2, "llama", "adam", refresh=3, lr_growth=1.5),
        LayoutCase(2, 1, False, 3, 2, "gpt2", "adamw", refresh=2, lr_growth=1.5),
        LayoutCase(2, 1, False, 2, 1, "llama", "momentum", refresh=3, lr_growth=1.5),
        LayoutCase(2, 1, False, 1, 1, "gpt2", "adamw", refresh=3, base="drift"),
        LayoutCase(2, 1, False, 1, 3, "gpt2", "adamw", pp=2, refresh=3, lr_growth=1.5),
        LayoutCase(2, 1, False, 0, 2, "llama", "sgd", pp=2, refresh=2, lr_growth=1.5),
    )
]


def test_values_equal_the_oracle_with_the_same_stale_direction() -> None:
    """At every step, under every ZeRO stage and through the pipeline; both sides of the additivity audit as well."""
    results = assert_cases(run_cases(train, 2, CASES, timeout=240))
    for case, ranks in zip(CASES, results, strict=True):
        oracle = case.oracle()
        fresh = replace(case, refresh=1).oracle() if case is CASES[0] else None
        ages = AGES[case.refresh]
        for step, age in enumerate(ages):
            found = deviation(ranks, oracle, step)
            print(f"{case}: step {step + 1}, age {age}: {found:.1e}")
            assert found < TOLERANCE["fp32"], f"{case}: step {step + 1}"
            if age and fresh is not None:  # the control: a fresh direction would have given other values
                assert deviation(ranks, fresh, step) > 100 * TOLERANCE["fp32"], f"{case}: step {step + 1}"
        truths = [
            t.values.abs().sum(0).max() / t.clip_coefficient for t in oracle.steps if t.values is not None
        ]
        for ran in ranks:
            assert ran.ages == ages and ran.statuses == ["scored"] * STEPS
            assert [losses is None for losses in ran.target_losses] == [age > 0 for age in ages]
            assert [terms is None for terms in ran.drift] == [age > 0 for age in ages]
            for (left, right), scale in zip(ran.additivity, truths, strict=True):
                gap = (torch.tensor(left) - torch.tensor(right)).abs().max()
                assert gap < TOLERANCE["fp32"] * scale, case


def test_a_step_after_a_skipped_one_takes_its_own() -> None:
    """What overflowed may be in the directions. fp16 with a loss scale that is too large for the first steps."""
    case = LayoutCase(
        2, 1, False, 2, 1, "gpt2", "sgd", precision="fp16", scale_power=18, steps=8, refresh=100
    )
    [ranks] = assert_cases(run_cases(train, 2, [case], timeout=120))
    for ran in ranks:
        skipped = [status != "scored" for status in ran.statuses]
        print(ran.statuses, ran.ages)
        first = skipped.index(False)
        assert skipped == [True] * first + [False] * (8 - first) and 0 < first < 7
        assert ran.ages == [0] * first + list(range(8 - first))


@dataclass(frozen=True)
class Counted:
    ages: list[int | None]
    before: list[int]  # collectives before the first training microbatch
    loads: list[int]  # of the target's microbatches


def _count(rank: int, world: int, case: LayoutCase) -> Counted:
    from inrun_megatron import InRunShapley, Layout, ShapleyTarget
    from inrun_megatron.models import token_losses
    from tests.layout_engine import forward_backward, share

    engine = build_engine(case)
    layout = Layout.current()
    loads = 0

    def losses(module: Any, microbatch: Any) -> torch.Tensor:
        nonlocal loads
        loads += 1
        return token_losses(module, microbatch)

    targets = [
        ShapleyTarget(t.name, share(t, layout, 2, pipeline=False), t.num_tokens) for t in case.targets()
    ]
    shapley = InRunShapley(engine, targets, losses, layout=layout, refresh=case.refresh, interval=2)
    counted = Counted([], [], [])
    for iteration, batch in enumerate(case.batches(), start=1):
        loads, before = 0, Collectives()
        with before:
            context = shapley.step(iteration)
            step = context.__enter__()
        for microbatch in batch[layout.dp_rank]:
            with step.samples(microbatch["dataset"], microbatch["sample"], microbatch["loss_mask"].sum(1)):
                forward_backward(engine, microbatch)
        context.__exit__(None, None, None)
        if iteration == 6:
            shapley.expire_direction()  # as a checkpoint does
        counted.ages.append(step.result.direction_age)
        counted.before.append(sum(before.counts.values()))
        counted.loads.append(loads)
    return counted


def test_a_stale_step_runs_no_validation_pass_and_sends_nothing_before_training() -> None:
    """Every second step is scored; refreshes at the scored steps 1 and 4, and after a checkpoint of the third."""
    case = LayoutCase(2, 1, False, 2, 1, "gpt2", "adamw", steps=12, refresh=4)
    [ranks] = assert_cases(run_cases(_count, 2, [case], timeout=120))
    for found in ranks:
        scored = slice(1, None, 2)
        assert found.ages[scored] == [0, 2, 4, 0, 0, 2] and set(found.ages[::2]) == {None}
        assert set(found.before[::2]) == {0}
        for age, before, loads in zip(found.ages[scored], found.before[scored], found.loads[scored]):
            assert (before > 0, loads > 0) == (age == 0, age == 0)


def test_refreshes_lie_at_fixed_iterations() -> None:
    """Whenever the process started, and whatever iterations it sees."""
    whole, resumed = RefreshSchedule(3, 2), RefreshSchedule(3, 2)
    due: dict[str, list[int]] = {}
    for name, schedule, iterations in (
        ("whole", whole, range(2, 30, 2)),
        ("resumed", resumed, range(12, 30, 2)),
    ):
        due[name] = []
        for iteration in iterations:
            if schedule.due(iteration):
                schedule.taken(iteration, [0.1])
                due[name].append(iteration)
    assert due == {"whole": [2, 8, 14, 20, 26], "resumed": [12, 14, 20, 26]}
    every = RefreshSchedule(1, 1)
    every.taken(1, [0.1])
    assert every.due(1)


def test_a_direction_of_a_later_step_is_not_used() -> None:
    """Its age would be negative: the loop went back to a checkpoint."""
    schedule = RefreshSchedule(10, 1)
    schedule.taken(5, [0.1])
    assert not schedule.due(6) and schedule.due(4) and schedule.due(5)


def test_a_direction_of_learning_rate_zero_is_not_kept() -> None:
    schedule = RefreshSchedule(10, 1)
    schedule.taken(1, [0.0, 0.0])
    assert schedule.due(2)
    schedule.taken(2, [0.1, 0.0])  # a group that is never trained does not count
    assert not schedule.due(3) and schedule.factor([0.05, 0.0]) == pytest.approx(0.5) and schedule.age(5) == 3


def test_what_a_stale_direction_cannot_be_is_refused() -> None:
    schedule = RefreshSchedule(10, 1)
    schedule.taken(1, [0.1, 0.2])
    for gains in ([0.1, 0.1], [0.1, 0.0]):
        with pytest.raises(
            UserError, match="learning rates of the parameter groups moved by different factors"
        ):
            schedule.factor(gains)
    schedule.taken(1, [0.1, 0.0])
    with pytest.raises(UserError, match="moved by different factors"):
        schedule.factor([0.1, 0.1])
    with pytest.raises(UserError, match="refresh 0 is not a positive number of scored steps"):
        require_refresh(0, "first_order")
    with pytest.raises(
        UserError, match=r"refresh 2 with estimator midpoint: .* use first_order or refresh 1"
    ):
        require_refresh(2, "midpoint")
