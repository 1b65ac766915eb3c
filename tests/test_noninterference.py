"""Scoring does not change the training that it watches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.distributed import assert_cases, run_cases
from tests.layout_runs import Ran, train
from tests.layouts import VOCABULARY, LayoutCase
from tests.oracle_shards import merge_shards

STEPS, HEAD_DIMENSION = 8, 8
# With several rows per microbatch the rows' weight gradients are added one after another instead of inside one
# product: another order of fp32 sums. Adam magnifies a rounding error of a gradient that is near zero, so the bound
# is relative to the way that eight steps of lr 2e-3 can go: a thousandth of it.
REORDERING = STEPS * 2e-3 * 1e-3

ONE_ROW = [
    LayoutCase(2, 2, True, 2, 2, "gpt2", "adamw", micro_batch=1, steps=STEPS, dropout=0.1),
    LayoutCase(2, 1, False, 3, 2, "gpt2", "adamw", micro_batch=1, steps=STEPS, dropout=0.1, recompute=True),
    LayoutCase(2, 2, False, 1, 1, "llama", "adamw", micro_batch=1, steps=STEPS, precision="bf16"),
    LayoutCase(2, 1, False, 0, 2, "llama", "sgd", micro_batch=1, steps=STEPS),
]
SEVERAL_ROWS = [
    LayoutCase(2, 2, True, 2, 2, "gpt2", "adamw", micro_batch=4, steps=STEPS, dropout=0.1),
    LayoutCase(2, 1, False, 3, 1, "llama", "adamw", micro_batch=3, steps=STEPS),
]


def _difference(name: str, left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference of an element.

    Biases of keys are left out: softmax does not see them, so their gradient is 0 but for rounding, and Adam makes
    whole steps of that rounding in any two runs that order a sum differently.
    """
    if name.endswith("linear_qkv.bias"):  # [heads, (query, key, value), head dimension]
        left, right = (bias.view(-1, 3, HEAD_DIMENSION)[:, [0, 2]] for bias in (left, right))
    return float((left - right).abs().max())


def _pairs(cases: list[LayoutCase]) -> list[tuple[LayoutCase, list[Ran], list[Ran]]]:
    both = [c for case in cases for c in (case, replace(case, scoring=False))]
    results = assert_cases(run_cases(train, cases[0].world, both, timeout=180))
    return [(case, results[2 * i], results[2 * i + 1]) for i, case in enumerate(cases)]


@pytest.fixture(scope="module")
def runs() -> list[tuple[LayoutCase, list[Ran], list[Ran]]]:
    return _pairs(ONE_ROW + SEVERAL_ROWS)


def test_counters_and_random_streams_are_the_same(
    runs: list[tuple[LayoutCase, list[Ran], list[Ran]]],
) -> None:
    for case, scored, plain in runs:
        for on, off in zip(scored, plain, strict=True):
            assert on.statuses == ["scored"] * STEPS, case
            assert on.counters == off.counters, case
            assert torch.equal(on.rng, off.rng), case


def test_weights_are_bitwise_the_same_with_one_row(
    runs: list[tuple[LayoutCase, list[Ran], list[Ran]]],
) -> None:
    for case, scored, plain in runs[: len(ONE_ROW)]:
        for on, off in zip(scored, plain, strict=True):
            for name, weight in off.weights.items():
                assert torch.equal(on.weights[name], weight), f"{case}: {name}"


def test_weights_differ_by_reordering_only_with_several(
    runs: list[tuple[LayoutCase, list[Ran], list[Ran]]],
) -> None:
    for case, scored, plain in runs[len(ONE_ROW) :]:
        worst = max(
            _difference(name, on.weights[name], weight)
            for on, off in zip(scored, plain, strict=True)
            for name, weight in off.weights.items()
        )
        print(f"{case}: largest difference of a weight {worst:.1e}")
        assert worst < REORDERING, case


def test_sequence_parallel_training_equals_one_rank() -> None:
    parallel = LayoutCase(2, 2, True, 2, 2, "gpt2", "adamw", micro_batch=2, steps=STEPS, scoring=False)
    single = replace(parallel, world=1, tp=1, sp=False, zero=1)
    [ranks] = assert_cases(run_cases(train, 2, [parallel]))
    [[alone]] = assert_cases(run_cases(train, 1, [single]))
    padded = replace(parallel.model(), padded_vocab_size=VOCABULARY + VOCABULARY % 2)
    merged = merge_shards([r.weights for r in sorted(ranks, key=lambda r: r.place)], padded)
    worst = 0.0
    for name, weight in merged.items():
        whole = alone.weights[name][: len(weight)]  # rows of the vocabulary's padding aside
        worst = max(worst, _difference(name, weight[: len(whole)], whole))
    print(f"largest difference of a weight after {STEPS} steps: {worst:.1e}")
    assert worst < REORDERING
