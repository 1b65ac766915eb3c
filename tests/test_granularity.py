"""Values of documents and tokens against the fp64 oracle, and attention cut at documents, under every kind of layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.distributed import assert_cases, run_cases
from tests.layouts import LayoutCase, Ran, by_sample, deviation, train
from tests.oracle_parts import PartTrainer
from tests.test_exactness import TOLERANCE

# Each granularity, with attention over whole rows and cut at documents, through every way of sharding.
TWO = [
    LayoutCase(2, 2, True, 1, 2, "gpt2", "adamw", granularity="document"),
    LayoutCase(2, 2, True, 2, 1, "llama", "sgd", granularity="token", recompute=True),
    LayoutCase(2, 2, True, 0, 2, "gpt2", "sgd", granularity="document", reset_attention=True, recompute=True),
    LayoutCase(2, 1, False, 3, 1, "llama", "adamw", granularity="document", reset_attention=True),
    LayoutCase(2, 1, False, 1, 2, "gpt2", "adamw", granularity="token", pp=2),
    LayoutCase(
        2, 1, False, 1, 2, "gpt2", "adamw", granularity="document", reset_attention=True, pp=2, recompute=True
    ),
    LayoutCase(2, 1, False, 0, 3, "llama", "sgd", reset_attention=True, pp=2, micro_batch=1),
    LayoutCase(2, 2, False, 2, 1, "gpt2", "adamw", granularity="token", reset_attention=True),
]
FOUR = [
    LayoutCase(4, 2, True, 1, 2, "llama", "adamw", granularity="document", reset_attention=True, pp=2),
    LayoutCase(4, 4, True, 3, 1, "gpt2", "sgd", granularity="document"),
]
STEPS = 2


def _check(cases: list[LayoutCase]) -> None:
    failures = []
    for case, ranks in zip(
        cases, assert_cases(run_cases(train, cases[0].world, cases, timeout=180)), strict=True
    ):
        trainer = case.trainer(PartTrainer)
        oracle = trainer.run(case.batches())
        for step in range(case.steps):
            found = {"samples": deviation(ranks, oracle, step)}
            if case.granularity != "sample":
                found["parts"] = part_deviation(ranks, trainer, step)
                _check_sums(ranks, step)
            print(f"{case}: step {step + 1}: {found}")
            failures += [
                f"{case}: step {step + 1}: {what} {error:.2e} of the largest value"
                for what, error in found.items()
                if not error < tolerance(case)
            ]
    assert not failures, "\n".join(failures)


def tolerance(case: LayoutCase) -> float:
    """Of values relative to the largest one.

    The softmax does not see a key bias, so its gradient is zero, in fp32 rounding of about 1e-9, which Adam's factor scales
    up like any other. Over what is one for the attention it cancels; the tokens' own gradients of a key bias are not zero.
    """
    cancels = (case.granularity == "document" and case.reset_attention) or case.granularity == "sample"
    noisy = case.optimizer == "adamw" and case.shape == "gpt2" and not cancels
    return TOLERANCE[case.precision] * (10 if noisy else 1)


def part_deviation(ranks: list[Ran], trainer: PartTrainer, step: int) -> float:
    """Largest difference of a part's value from the oracle's over the largest value of a part, over all targets."""
    truth = trainer.parts[step]
    found = {key: value for ran in ranks for key, value in ran.parts[step].items()}
    assert found.keys() == truth.keys()
    keys = sorted(truth)
    expected = torch.stack([truth[key] for key in keys])
    difference = (torch.stack([found[key] for key in keys]) - expected).abs()
    return float((difference.amax(0) / expected.abs().amax(0)).max())


def _check_sums(ranks: list[Ran], step: int) -> None:
    """A sample's value is its parts' sum, to the rounding of a sum of m numbers in fp64."""
    values = by_sample(ranks, step)
    parts = {key: value for ran in ranks for key, value in ran.parts[step].items()}
    for sample, value in values.items():
        own = torch.stack([v for (of, _), v in parts.items() if of == sample])
        bound = len(own) * torch.finfo(torch.float64).eps * own.abs().sum(0)
        assert ((own.sum(0) - value).abs() <= bound).all()


@pytest.mark.parametrize("cases", [TWO, FOUR], ids=["two ranks", "four ranks"])
def test_parts_equal_the_oracle(cases: list[LayoutCase]) -> None:
    _check([replace(case, steps=STEPS) for case in cases])
