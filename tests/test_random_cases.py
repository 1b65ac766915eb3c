"""Random combinations of what a LayoutCase can say, against the oracle: settings that no list of cases puts together.

A draw is a pure function of its seed: `pytest tests/test_random_cases.py -s` prints the cases, and a failing one can be copied
from there. Drawn is what training and scoring support together; what is refused has its own tests.
"""

from __future__ import annotations

import random

import pytest

from tests.distributed import assert_cases, run_cases
from tests.layout_runs import deviation, train
from tests.layouts import LayoutCase
from tests.oracle_parts import PartTrainer
from tests.test_granularity import part_deviation

# Gradients near zero, which Adam divides by themselves, make single values of some draws less sharp than those of the listed
# cases; what a lost factor, layer, rank or mask does is a hundred times this and more.
TOLERANCE = 1e-4
# Adam's first step is lr * g / (|g| + eps) of every element: one whose gradient is of eps's size, and so mostly rounding, counts
# up to 1 / eps in its slope. (Seed 3: one element of a norm at 3.7e-8 makes 1e-4.)
FIRST_ADAM_STEP = 1e-2


def drawn(seed: int) -> LayoutCase:
    """A case on two ranks in fp32: any layout, and everything else that goes with it."""
    r = random.Random(seed)
    tp, pp = r.choice([(1, 1), (1, 1), (2, 1), (1, 2)])
    estimator = r.choice(["first_order", "first_order", "midpoint", "simpson"])
    optimizer = r.choice(["sgd", "momentum", "adamw", "adamw", "adam"])
    # Of coupled decay and a path see test_path.py: the first step's quotient jumps.
    if optimizer == "adam":
        estimator = "first_order"
    shape = r.choice(["gpt2", "llama"])
    sequence_parallel = tp == 2 and r.random() < 0.5
    # Experts want sequence parallelism (test_experts.py).
    experts = r.choice([None, 3, 4]) if shape == "llama" and sequence_parallel == (tp == 2) else None
    frozen = [(), (), ("embedding.",), ("decoder.layers.1.",), ("decoder.final",)]
    return LayoutCase(
        2,
        tp,
        sequence_parallel,
        r.choice([0, 1] if pp == 2 else [0, 1, 2, 3]),
        r.choice([1, 2, 3]),
        shape,  # type: ignore[arg-type]
        optimizer,  # type: ignore[arg-type]
        micro_batch=r.choice([1, 2, 3]),
        recompute=r.random() < 0.4,
        steps=2,
        proxy=estimator == "first_order" and r.random() < 0.1,
        pp=pp,
        tied=r.choice([None, True, False]),
        estimator=estimator,
        base=r.choice(["current", "drift"]),
        granularity=r.choice(["sample", "sample", "document"]),
        reset_attention=r.random() < 0.4,
        refresh=r.choice([1, 2]) if estimator == "first_order" else 1,
        lr_growth=r.choice([1.0, 1.5]),
        frozen=r.choice(frozen),
        qk_layernorm=r.random() < 0.3,
        experts=experts,
        shared_expert=r.random() < 0.5,
        balance=r.choice([None, "aux_loss", "seq_aux_loss"]) if experts else None,
    )


def _check(seeds: range) -> None:
    cases = [drawn(seed) for seed in seeds]
    failures = []
    for seed, case, ranks in zip(
        seeds, cases, assert_cases(run_cases(train, 2, cases, timeout=240)), strict=True
    ):
        trainer = case.trainer(PartTrainer)
        oracle = trainer.run(case.batches())
        for step in range(case.steps):
            tolerance = FIRST_ADAM_STEP if step == 0 and case.optimizer in ("adam", "adamw") else TOLERANCE
            found = {"values": deviation(ranks, oracle, step)}
            if case.granularity != "sample":
                found["parts"] = part_deviation(ranks, trainer, step)
            print(f"{seed}: {case}: step {step + 1}: {found}")
            failures += [
                f"{seed}: {case}: step {step + 1}: {what} {error:.1e} of the largest"
                for what, error in found.items()
                if not error < tolerance
            ]
    assert not failures, "\n".join(failures)


def test_a_dozen_combinations_equal_the_oracle() -> None:
    _check(range(12))


@pytest.mark.long
def test_many_combinations_equal_the_oracle() -> None:
    _check(range(12, 112))


def test_a_draw_is_a_function_of_its_seed() -> None:
    cases = [drawn(seed) for seed in range(200)]
    assert cases == [drawn(seed) for seed in range(200)] and len(set(cases)) > 190
    for field, values in (
        ("pp", {1, 2}),
        ("zero", {0, 1, 2, 3}),
        ("estimator", {"first_order", "midpoint", "simpson"}),
    ):
        assert {getattr(case, field) for case in cases} == values
