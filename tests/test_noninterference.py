"""Scoring does not change the training that it watches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.distributed import assert_cases, run_cases
from tests.layout_runs import Ran, train
from tests.layouts import VOCABULARY, LayoutCase
from tests.oracle_shards import merge_shards

STEPS, HEAD_DIMENSION = 6, 8
# With several rows per microbatch the rows' weight gradients are added one after another instead of inside one
# product: another order of fp32 sums. Adam magnifies a rounding error of a gradient that is near zero, so the bound
# is relative to the way that these steps of lr 2e-3 can go: a thousandth of it.
REORDERING = STEPS * 2e-3 * 1e-3

# One row per microbatch: no sum is reordered. Every ZeRO stage, shape, optimizer and precision, then estimators, the drift
# base and stale directions, then the pipeline.
ONE_ROW = [
    LayoutCase(2, 2, True, 2, 2, "gpt2", "adamw", dropout=0.1),
    LayoutCase(2, 1, False, 3, 2, "gpt2", "adamw", dropout=0.1, recompute=True),
    LayoutCase(2, 2, False, 1, 1, "llama", "adamw", precision="bf16"),
    LayoutCase(2, 1, False, 0, 2, "llama", "sgd"),
    LayoutCase(2, 1, False, 0, 2, "gpt2", "adamw", dropout=0.1, estimator="midpoint"),
    LayoutCase(2, 2, True, 1, 2, "llama", "adamw", dropout=0.1, estimator="simpson"),
    LayoutCase(2, 1, False, 3, 2, "gpt2", "adamw", dropout=0.1, estimator="simpson", recompute=True),
    LayoutCase(2, 1, False, 1, 2, "gpt2", "adamw", precision="bf16", estimator="midpoint"),
    LayoutCase(2, 1, False, 2, 2, "gpt2", "momentum", dropout=0.1, base="drift"),
    LayoutCase(2, 1, False, 2, 2, "gpt2", "adamw", dropout=0.1, refresh=2),
    LayoutCase(2, 2, True, 2, 2, "llama", "adamw", dropout=0.1, experts=4, balance="aux_loss"),
    LayoutCase(2, 1, False, 3, 2, "llama", "adamw", precision="bf16", experts=4, balance="seq_aux_loss"),
    LayoutCase(2, 1, False, 1, 2, "gpt2", "adamw", pp=2, dropout=0.1, recompute=True),
    LayoutCase(2, 1, False, 0, 3, "llama", "sgd", pp=2, dropout=0.1),
    LayoutCase(2, 1, False, 1, 2, "llama", "adamw", pp=2, precision="bf16"),
    LayoutCase(2, 1, False, 1, 2, "gpt2", "adamw", pp=2, dropout=0.1, estimator="midpoint"),
    # DeepSpeed's own checkpoints run a validation forward again in its backward: without dropout, there too.
    LayoutCase(2, 1, False, 1, 2, "gpt2", "adamw", pp=2, dropout=0.1, checkpoints=True),
    LayoutCase(2, 1, False, 0, 2, "llama", "sgd", pp=2, dropout=0.1, checkpoints=True, base="drift"),
    LayoutCase(2, 1, False, 1, 2, "gpt2", "adamw", pp=2, dropout=0.1, refresh=2),
]
ON_FOUR_RANKS = [
    LayoutCase(4, 2, True, 1, 2, "gpt2", "adamw", pp=2, recompute=True),
    LayoutCase(4, 1, False, 1, 4, "gpt2", "adamw", pp=4, layers=4, dropout=0.1),
    LayoutCase(4, 1, False, 1, 2, "llama", "adamw", pp=2, precision="fp16"),
]
SEVERAL_ROWS = [
    LayoutCase(2, 2, True, 2, 2, "gpt2", "adamw", micro_batch=4, dropout=0.1),
    LayoutCase(2, 1, False, 3, 1, "llama", "adamw", micro_batch=3),
    LayoutCase(2, 1, False, 2, 1, "llama", "adamw", micro_batch=3, experts=4, balance="aux_loss"),
]


def _with_steps(cases: list[LayoutCase], **changes: Any) -> list[LayoutCase]:
    return [replace(case, steps=STEPS, **changes) for case in cases]


def _difference(name: str, left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference of an element.

    Biases of keys are left out: softmax does not see them, so their gradient is 0 but for rounding, and Adam makes
    whole steps of that rounding in any two runs that order a sum differently.
    """
    if name.endswith("linear_qkv.bias"):  # [heads, (query, key, value), head dimension]
        left, right = (bias.view(-1, 3, HEAD_DIMENSION)[:, [0, 2]] for bias in (left, right))
    return float((left - right).abs().max())


def _plain(case: LayoutCase) -> LayoutCase:
    """The same training without scoring."""
    return replace(case, scoring=False, estimator="first_order", base="current", refresh=1)


def _pairs(cases: list[LayoutCase]) -> list[tuple[LayoutCase, list[Ran], list[Ran]]]:
    """Each case with its scored and its plain run."""
    both = list(dict.fromkeys([*cases, *map(_plain, cases)]))
    ran = dict(zip(both, assert_cases(run_cases(train, cases[0].world, both)), strict=True))
    return [(case, ran[case], ran[_plain(case)]) for case in cases]


def _check_all_but_weights(case: LayoutCase, on: Ran, off: Ran) -> None:
    assert on.statuses == ["scored"] * STEPS, case
    assert on.counters == off.counters and on.counters[0] == STEPS, case
    assert torch.equal(on.rng, off.rng), case


@pytest.mark.parametrize(
    "cases", [ONE_ROW, pytest.param(ON_FOUR_RANKS, marks=pytest.mark.long)], ids=["two ranks", "four ranks"]
)
def test_training_is_bitwise_the_same_with_scoring(cases: list[LayoutCase]) -> None:
    """Weights, counters, random streams and the pipeline's reported losses; moments through the weights they lead to."""
    for case, scored, plain in _pairs(_with_steps(cases, micro_batch=1)):
        for on, off in zip(scored, plain, strict=True):
            _check_all_but_weights(case, on, off)
            assert on.losses == off.losses and len(on.losses) == (STEPS if case.pp > 1 else 0), case
            for name, weight in off.weights.items():
                assert torch.equal(on.weights[name], weight), f"{case}: {name}"


def test_weights_differ_by_reordering_only_with_several_rows() -> None:
    for case, scored, plain in _pairs(_with_steps(SEVERAL_ROWS)):
        worst = 0.0
        for on, off in zip(scored, plain, strict=True):
            _check_all_but_weights(case, on, off)
            for name, weight in off.weights.items():
                worst = max(worst, _difference(name, on.weights[name], weight))
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
