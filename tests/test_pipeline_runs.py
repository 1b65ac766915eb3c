"""Whole runs through the pipeline, on real text: the ledger of every layout, resumption on four ranks, overflow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import real_text, test_pretrain
from tests.distributed import Workers, assert_cases, run_cases
from tests.layout_runs import by_sample, train
from tests.layouts import LayoutCase
from tests.real_text import TARGETS, arguments, ledger, run_here

data = real_text.data  # a fixture
resumed = test_pretrain.test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit

TOLERANCE = 1e-5
PIPELINES = {
    "pp 2, dp 2": "--pipeline-model-parallel-size 2",
    "pp 2, tp 2": "--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
    "pp 4": "--pipeline-model-parallel-size 4",
}


Key = tuple[int, int, int, int]


def _values(run: Path) -> dict[Key, dict[str, float]]:
    """(step, dataset, sample, segment) -> target -> value."""
    found: dict[Key, dict[str, float]] = {}
    for row in ledger(run, "values"):
        own = found.setdefault((row["step"], row["dataset"], row["sample"], row["segment"]), {})
        assert row["target"] not in own, f"twice in the ledger: {row}"
        own[row["target"]] = row["value"]
    return found


def _largest_difference(left: dict[Key, dict[str, float]], right: dict[Key, dict[str, float]]) -> float:
    """Of the same sample's values, over the largest value of the step and target."""
    assert left.keys() == right.keys()
    scale: dict[tuple[int, str], float] = {}
    for (step, *_), values in right.items():
        for target, value in values.items():
            scale[step, target] = max(scale.get((step, target), 0.0), abs(value))
    return max(
        abs(left[key][target] - value) / scale[key[0], target]
        for key, values in right.items()
        for target, value in values.items()
    )


def test_the_ledger_does_not_depend_on_the_layout(four_ranks: Workers, data: Path, tmp_path: Path) -> None:
    """Sample by sample against data parallel 4 without stages, read back from the Parquet files of whole runs.

    Targets have other counts of sequences, neither a multiple of the microbatch; documents' ends have no loss.
    """
    # eps: at step 1 Adam's factor is 1 / (|h| + eps), and where an element of h is rounding alone, 1e-8 lets it through.
    flags = (
        "--zero-stage 1 --num-layers 4 --eod-mask-loss --lr 1e-3 --lr-warmup-iters 0 --adam-eps 1e-6 "
        "--hidden-dropout 0 --attention-dropout 0 --eval-iters 0 "
        "--shapley-base current"  # validation rides in front of training; without stages drift is the default
    )
    argv = arguments(data, *TARGETS, *flags.split())
    four_ranks.run(run_here, [*argv, "--save", str(tmp_path / "plain")])
    expected, steps = _values(tmp_path / "plain"), ledger(tmp_path / "plain", "steps")
    assert len(expected) == 4 * 8 and {row["status"] for row in steps} == {"scored"}
    for name, flags in PIPELINES.items():
        run = tmp_path / name.replace(" ", "")
        four_ranks.run(run_here, [*argv, *flags.split(), "--save", str(run)])
        found = _values(run)
        worst = _largest_difference(found, expected)
        print(f"{name}: {worst:.1e} of the largest value")
        assert worst < TOLERANCE, name
        # Control: with the values of two samples exchanged the ledger is another one.
        (one, first), (other, second) = list(found.items())[:2]
        exchanged = found | {one: second, other: first}
        assert _largest_difference(exchanged, expected) > 100 * TOLERANCE
        for row, plain in zip(ledger(run, "steps"), steps, strict=True):
            assert (row["step"], row["target"], row["samples"]) == (plain["step"], plain["target"], 8)
            for figure in ("train_loss", "target_loss", "lr", "grad_norm", "sum_values", "decay_term"):
                assert row[figure] == pytest.approx(plain[figure], rel=1e-4, abs=1e-7), (name, figure)


@pytest.mark.long
@pytest.mark.parametrize("name", PIPELINES)
def test_a_resumed_run_on_four_ranks_is_the_uninterrupted_one(
    four_ranks: Workers, data: Path, tmp_path: Path, name: str
) -> None:
    """With dropout and recomputation; two ranks: tests/test_pretrain.py."""
    flags = f"{PIPELINES[name]} --zero-stage 1 --num-layers 4 --recompute-granularity full"
    resumed(four_ranks, data, tmp_path, flags, 2 if "dp 2" in name else 1)


def test_a_step_that_overflows_has_no_values() -> None:
    """fp16's first loss scale is too large: skipped steps have no rows, those after them the values of PP 1."""
    staged = LayoutCase(2, 1, False, 1, 2, "gpt2", "adamw", pp=2, precision="fp16", scale_power=19, steps=8)
    plain = LayoutCase(1, 1, False, 1, 2, "gpt2", "adamw", precision="fp16", scale_power=19, steps=8)
    [ranks] = assert_cases(run_cases(train, 2, [staged], timeout=240))
    [alone] = assert_cases(run_cases(train, 1, [plain], timeout=240))
    statuses = alone[0].statuses
    assert {"skipped: overflow", "scored"} == set(statuses)
    for ran in ranks:
        assert ran.statuses == statuses
        assert ran.counters[0] == alone[0].counters[0] and ran.counters[2] == alone[0].counters[2]
        assert [value is not None for value in ran.values] == [status == "scored" for status in statuses]
    for step, status in enumerate(statuses):
        if status == "scored":
            found, expected = by_sample(ranks, step), by_sample(alone, step)
            for sample, value in expected.items():
                torch.testing.assert_close(
                    found[sample], value, rtol=0.05, atol=0.01 * float(value.abs().max())
                )
