"""Values through DeepSpeed's pipeline: against the oracle, against the same run without stages, and training left alone."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from tests.distributed import assert_cases, run_cases
from tests.layouts import LayoutCase, Ran, by_sample, deviation, train
from tests.test_exactness import STEPS_CHECKED, TOLERANCE, _side_figures


def four(
    pp: int, tp: int, zero: int, accumulation: int, tied: bool, optimizer: str, **more: object
) -> LayoutCase:
    """A layout on four ranks; what is left of them is data parallel. Four stages need four layers."""
    shape = "gpt2" if tied else "llama"
    return LayoutCase(
        4,
        tp,
        False,
        zero,
        accumulation,
        shape,
        optimizer,
        pp=pp,
        layers=max(2, pp),
        **more,  # type: ignore[arg-type]
    )


# Every value of {PP 2, 4} x {TP 1, 2} x {ZeRO 0, 1} x {tied, untied} x {accumulation P, 2P, 8} x {SGD, AdamW}.
COVERING = [
    four(2, 1, 0, 2, True, "adamw"),
    four(2, 1, 1, 4, False, "sgd"),
    four(2, 2, 1, 8, True, "adamw"),
    four(2, 2, 0, 2, False, "adamw"),
    four(4, 1, 1, 4, True, "sgd"),
    four(4, 1, 0, 8, True, "adamw"),
    four(4, 1, 1, 8, False, "sgd"),
]
# Each once: sequence parallelism, recomputation, one microbatch, one and many rows, the other shape tied or untied,
# momentum, coupled decay, the proxy, lower precision (bf16 with fp32 gradients is BF16_Optimizer).
BESIDES = [
    replace(four(2, 2, 1, 2, True, "adamw"), sp=True, recompute=True),
    replace(four(2, 2, 0, 1, False, "adamw"), sp=True),
    LayoutCase(2, 1, False, 1, 1, "gpt2", "adamw", pp=2, tied=False, micro_batch=1),
    LayoutCase(2, 1, False, 1, 3, "llama", "adam", pp=2, tied=True, recompute=True),
    LayoutCase(2, 1, False, 0, 2, "llama", "momentum", pp=2, micro_batch=4),
    LayoutCase(2, 1, False, 1, 2, "gpt2", "adamw", pp=2, proxy=True),
    LayoutCase(2, 1, False, 1, 2, "gpt2", "adamw", pp=2, precision="bf16"),
    LayoutCase(2, 1, False, 0, 2, "llama", "sgd", pp=2, precision="bf16"),
    LayoutCase(2, 1, False, 1, 2, "llama", "adamw", pp=2, precision="bf16", grad_accum_fp32=True),
    LayoutCase(2, 1, False, 1, 2, "gpt2", "sgd", pp=2, precision="fp16"),
    LayoutCase(2, 1, False, 1, 2, "llama", "adamw", pp=2, precision="fp16", recompute=True),
]


def full_product() -> list[LayoutCase]:
    return [
        four(pp, tp, zero, accumulation, tied, optimizer)
        for pp, tp, zero, tied, optimizer in itertools.product(
            (2, 4), (1, 2), (0, 1), (True, False), ("sgd", "adamw")
        )
        for accumulation in sorted({pp, 2 * pp, 8})
        if pp * tp <= 4
    ]


def tolerance(case: LayoutCase) -> float:
    """Four layers in fp32 round twice as much as two, with one stage as with four."""
    return TOLERANCE[case.precision] * case.layers / 2


def _check(cases: list[LayoutCase]) -> None:
    failures = []
    for world in sorted({case.world for case in cases}):
        own = [case for case in cases if case.world == world]
        for case, ranks in zip(own, assert_cases(run_cases(train, world, own, timeout=180)), strict=True):
            oracle = case.oracle()
            for step in STEPS_CHECKED:
                found = deviation(ranks, oracle, step)
                print(f"{case}: step {step + 1}: {found:.1e}")
                if not found < tolerance(case):
                    failures.append(f"{case}: step {step + 1}: {found:.2e} of the largest value")
                for ran in ranks:
                    if abs(ran.losses[step] - oracle.steps[step].train_loss) > tolerance(case) * 10:
                        failures.append(f"{case}: step {step + 1}: training loss {ran.losses[step]}")
            failures += _side_figures(case, ranks, oracle)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("cases", [COVERING, BESIDES], ids=["covering", "besides"])
def test_values_equal_the_oracle(cases: list[LayoutCase]) -> None:
    _check(cases)


@pytest.mark.long
def test_values_equal_the_oracle_full_product() -> None:
    _check(full_product())


def test_the_same_ledger_as_without_stages() -> None:
    """Values of the same run at PP 1, sample by sample; the order of fp32 sums differs."""
    staged = LayoutCase(2, 1, False, 1, 4, "gpt2", "adamw", pp=2)
    plain = replace(staged, world=1, pp=1)
    [with_stages] = assert_cases(run_cases(train, 2, [staged]))
    [without] = assert_cases(run_cases(train, 1, [plain]))
    for step in range(staged.steps):
        left, right = by_sample(with_stages, step), by_sample(without, step)
        assert left.keys() == right.keys() == set(range(step * 8, step * 8 + 8))
        scale = torch.stack(list(right.values())).abs().amax(0)
        worst = max(float(((left[k] - right[k]).abs() / scale).max()) for k in left)
        print(f"step {step + 1}: {worst:.1e}")
        assert worst < 1e-5


def test_control_half_of_a_tied_embedding_is_seen() -> None:
    """Scoring each stage's use against its own half of the direction is off by far more than the tolerance."""
    case = LayoutCase(2, 1, False, 0, 2, "gpt2", "sgd", pp=2, steps=1)
    [ranks] = assert_cases(run_cases(_without_tying_directions, 2, [case]))
    assert deviation(ranks, case.oracle(), 0) > 100 * TOLERANCE["fp32"]


def _without_tying_directions(rank: int, world: int, case: LayoutCase) -> Ran:
    from inrun_megatron.engines.pipeline import PipelineAdapter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PipelineAdapter, "tied", lambda self: [])
        return train(rank, world, case)


# --- training is left alone ------------------------------------------------------------------------------------------

ALONE = [
    LayoutCase(2, 1, False, 1, 2, "gpt2", "adamw", pp=2, micro_batch=1, steps=6, dropout=0.1, recompute=True),
    LayoutCase(2, 1, False, 0, 3, "llama", "sgd", pp=2, micro_batch=1, steps=6, dropout=0.1),
    LayoutCase(2, 1, False, 1, 2, "llama", "adamw", pp=2, micro_batch=1, steps=6, precision="bf16"),
]


def test_training_is_bitwise_the_same_with_scoring() -> None:
    """Weights, reported losses, counters and random streams; one row per microbatch, so that no sum is reordered."""
    both = [c for case in ALONE for c in (case, replace(case, scoring=False))]
    results = assert_cases(run_cases(train, 2, both, timeout=180))
    for case, scored, plain in zip(ALONE, results[::2], results[1::2], strict=True):
        for on, off in zip(scored, plain, strict=True):
            assert on.statuses == ["scored"] * case.steps
            assert on.losses == off.losses and len(on.losses) == case.steps, case
            assert on.counters == off.counters and on.counters[0] == case.steps, case
            assert torch.equal(on.rng, off.rng), case
            for name, weight in off.weights.items():
                assert torch.equal(on.weights[name], weight), f"{case}: {name}"
