"""The ledger's values against the fp64 oracle, under every layout that fits four ranks."""

from __future__ import annotations

import itertools

import pytest
import torch

from inrun_megatron.errors import UserError
from inrun_megatron.taps import Emission
from tests.distributed import assert_cases, run_cases, run_distributed
from tests.layout_runs import STEPS_CHECKED, TOLERANCE, Ran, deviation, side_figures, train
from tests.layouts import LayoutCase
from tests.oracle import OracleRun

# Pairwise covering of {TP 1, 2, 4} x {SP} x {ZeRO 0-3} x {accumulation 1, 2} x {shape} x {optimizer}, on four ranks.
PAIRWISE = [
    LayoutCase(4, 1, False, 0, 1, "gpt2", "adamw"),
    LayoutCase(4, 1, False, 1, 2, "llama", "sgd"),
    LayoutCase(4, 1, False, 2, 1, "llama", "adamw"),
    LayoutCase(4, 1, False, 3, 2, "gpt2", "adamw"),
    LayoutCase(4, 2, False, 0, 2, "llama", "adamw"),
    LayoutCase(4, 2, True, 1, 1, "gpt2", "adamw"),
    LayoutCase(4, 2, True, 2, 2, "gpt2", "sgd"),
    LayoutCase(4, 2, True, 3, 1, "llama", "adamw"),
    LayoutCase(4, 2, False, 3, 2, "gpt2", "sgd"),
    LayoutCase(4, 4, True, 0, 1, "llama", "sgd"),
    LayoutCase(4, 4, False, 1, 2, "gpt2", "adamw"),
    LayoutCase(4, 4, True, 2, 2, "llama", "adamw"),
    LayoutCase(4, 4, True, 3, 1, "gpt2", "adamw"),
    # Norms of which every tensor-parallel rank sees its own heads.
    LayoutCase(4, 2, True, 2, 1, "llama", "sgd", qk_layernorm=True),
    LayoutCase(4, 4, False, 3, 1, "gpt2", "sgd", qk_layernorm=True),
    LayoutCase(4, 2, False, 0, 2, "gpt2", "adamw", qk_layernorm=True),
]
# Tensor parallelism needs sequence parallelism (megatron/core/transformer/moe/moe_layer.py).
EXPERTS = [
    LayoutCase(2, 1, False, 0, 1, "llama", "adamw", experts=4),
    LayoutCase(2, 1, False, 3, 2, "llama", "adamw", experts=4, balance="aux_loss"),
    LayoutCase(2, 2, True, 1, 2, "llama", "sgd", experts=4, balance="seq_aux_loss", shared_expert=True),
    LayoutCase(2, 2, True, 3, 1, "llama", "momentum", experts=8, micro_batch=4, balance="aux_loss"),
    LayoutCase(2, 1, False, 2, 2, "llama", "momentum", experts=3, micro_batch=1, shared_expert=True),
    # Of sixteen experts some are given no token, on one rank or on both.
    LayoutCase(2, 1, False, 3, 2, "llama", "sgd", experts=16, micro_batch=1, recompute=True),
]
# What the product leaves out: one row and many rows per microbatch, recomputation, momentum, Adam with coupled
# decay, the SGD proxy, lower precision, each once.
BESIDES = [
    LayoutCase(2, 2, True, 2, 2, "gpt2", "adamw", micro_batch=1, recompute=True),
    LayoutCase(2, 1, False, 3, 2, "gpt2", "adamw", micro_batch=3, recompute=True),
    LayoutCase(2, 1, False, 3, 1, "llama", "momentum", micro_batch=10),
    LayoutCase(2, 2, False, 1, 1, "gpt2", "adam", micro_batch=4),
    LayoutCase(2, 2, True, 0, 1, "llama", "adamw", micro_batch=4, proxy=True),
    LayoutCase(2, 2, True, 2, 2, "gpt2", "adamw", precision="bf16"),
    LayoutCase(2, 1, False, 1, 2, "llama", "adamw", precision="bf16", grad_accum_fp32=True),
    LayoutCase(2, 1, False, 3, 2, "gpt2", "adamw", precision="bf16"),
    # SGD: at stage 0 DeepSpeed steps Adam once with zero gradients when it is built, which the oracle does not.
    LayoutCase(2, 2, True, 0, 2, "llama", "sgd", precision="bf16"),
    LayoutCase(2, 1, False, 2, 2, "gpt2", "sgd", precision="fp16"),
    LayoutCase(2, 2, True, 1, 2, "llama", "adamw", precision="fp16"),
    LayoutCase(2, 2, True, 3, 1, "gpt2", "adamw", precision="fp16"),
]


def full_product() -> list[LayoutCase]:
    """Every layout of the product that fits four ranks (sequence parallelism needs tensor parallelism)."""
    return [
        LayoutCase(4, tp, sp, zero, accumulation, shape, optimizer)  # type: ignore[arg-type]
        for tp, sp, zero, accumulation, shape, optimizer in itertools.product(
            (1, 2, 4), (False, True), range(4), (1, 4), ("gpt2", "llama"), ("sgd", "adamw")
        )
        if tp > 1 or not sp
    ]


def _reference(case: LayoutCase) -> OracleRun:
    """The oracle's run; layouts that differ in nothing it knows share one."""
    groups = case.model().groups
    return LayoutCase(
        case.dp * groups if case.shape == "llama" else case.dp,
        groups if case.shape == "llama" else 1,
        False,
        0,
        case.accumulation,
        case.shape,
        case.optimizer,
        precision=case.precision,
        micro_batch=case.micro_batch,
        proxy=case.proxy,
        qk_layernorm=case.qk_layernorm,
        experts=case.experts,
        shared_expert=case.shared_expert,
        balance=case.balance,
    ).oracle()


def _check(cases: list[LayoutCase]) -> None:
    failures = []
    for world in sorted({case.world for case in cases}):
        own = [case for case in cases if case.world == world]
        for case, ranks in zip(own, assert_cases(run_cases(train, world, own, timeout=180)), strict=True):
            oracle = _reference(case)
            for step in STEPS_CHECKED:
                found = deviation(ranks, oracle, step)
                print(f"{case}: step {step + 1}: {found:.1e}")
                if not found < TOLERANCE[case.precision]:
                    failures.append(f"{case}: step {step + 1}: {found:.2e} of the largest value")
            failures += side_figures(case, ranks, oracle)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    "cases",
    [PAIRWISE, EXPERTS, pytest.param(BESIDES, marks=pytest.mark.slow)],
    ids=["pairwise", "experts", "besides"],
)
def test_values_equal_the_oracle(cases: list[LayoutCase]) -> None:
    _check(cases)


@pytest.mark.long
def test_values_equal_the_oracle_full_product() -> None:
    _check(full_product())


def test_control_a_wrong_value_is_seen() -> None:
    """Leaving out one of the two uses of the tied embedding moves values by far more than the tolerance."""
    case = LayoutCase(1, 1, False, 0, 1, "gpt2", "sgd", steps=1)
    [ranks] = assert_cases(run_cases(_without_output_layer, 1, [case]))
    assert deviation(ranks, case.oracle(), 0) > 100 * TOLERANCE["fp32"]


def _shared_with_other_shards(rank: int, world: int, case: LayoutCase) -> bool:
    """Canary: does DeepSpeed still share hpZ's copies among ranks that hold other tensor-parallel shards?"""
    from deepspeed.utils import groups

    with pytest.raises(
        UserError, match=r"zero_hpz_partition_size 2 with tensor parallel size 2.* leave it out"
    ):
        train(rank, world, case)
    copies = torch.distributed.get_process_group_ranks(groups._get_zero_param_intra_parallel_group())
    return copies == [0, 1]


def test_copies_of_weights_that_deepspeed_mixes_up_are_refused() -> None:
    """Values were those of no model: off by up to nine times the largest, and every audit held."""
    case = LayoutCase(2, 2, False, 3, 1, "gpt2", "adamw", second_copy=2)
    assert run_distributed(_shared_with_other_shards, 2, case, timeout=180) == [True, True]


def _without_output_layer(rank: int, world: int, case: LayoutCase) -> Ran:
    from inrun_megatron.shapley import consumers

    scored = consumers.RowScorer.__call__

    def partial(self: consumers.RowScorer, e: Emission) -> None:
        if e.site.name != "output_layer":
            scored(self, e)

    consumers.RowScorer.__call__ = partial  # type: ignore[method-assign]
    try:
        return train(rank, world, case)
    finally:
        consumers.RowScorer.__call__ = scored  # type: ignore[method-assign]
