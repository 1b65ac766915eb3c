"""A run whose training is lost ends with a line, before a checkpoint holds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from inrun_megatron.training.arguments import parse
from inrun_megatron.training.health import Health
from inrun_megatron.training.progress import StepFigures
from tests import real_text
from tests.distributed import Workers
from tests.real_text import TARGETS, arguments, ledger, refused, run_here

data = real_text.data  # a fixture
# Step 1 has learning rate 0; step 2 throws the weights so far that the loss of step 3 overflows.
THROWN = ("--optimizer", "sgd", "--lr", "1e30", "--clip-grad", "0", "--save-interval", "1")


@pytest.mark.parametrize(
    "layout", ["--zero-stage 0", "--zero-stage 0 --pipeline-model-parallel-size 2 --no-shapley"]
)
def test_a_step_with_nan_ends_the_run(two_ranks: Workers, data: Path, tmp_path: Path, layout: str) -> None:
    scoring = () if "--no-shapley" in layout else TARGETS
    argv = arguments(data, *layout.split(), *scoring, *THROWN)
    line = refused(two_ranks, [*argv, "--save", str(tmp_path / "run")])
    assert "of step 3 is nan, and the optimizer took the step: start again from the last checkpoint" in line
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / "latest").read_text() == "iter_0000002"
    assert sorted(path.name for path in checkpoints.glob("iter*")) == ["iter_0000001", "iter_0000002"]
    if scoring:
        steps = ledger(tmp_path / "run", "steps")
        assert [row["step"] for row in steps if row["target"] == "code"] == [1, 2, 3]
    two_ranks.run(run_here, [*argv, "--save", str(tmp_path / "on"), "--no-check-for-nan-in-loss-and-grad"])
    assert (tmp_path / "on" / "checkpoints" / "latest").read_text() == "iter_0000004"


def test_steps_that_are_all_skipped_end_the_run(two_ranks: Workers, data: Path, tmp_path: Path) -> None:
    """ZeRO's optimizers leave a step with NaN out, and with such weights every one that follows."""
    argv = arguments(
        data, *THROWN, "--save-interval", "0", "--zero-stage", "1", "--no-shapley", "--eval-interval", "0"
    )
    line = refused(two_ranks, [*argv, "--train-iters", "60"])
    assert "the optimizer skipped the last 50 steps, up to 52: gradients are not finite; look at" in line
    two_ranks.run(run_here, [*argv, "--train-iters", "51"])


@pytest.mark.parametrize(("scale", "ends"), [(1e9, True), (0.0, False)])
def test_only_a_fixed_loss_scale_can_overflow_for_good(data: Path, scale: float, ends: bool) -> None:
    """A dynamic one halves until DeepSpeed gives up."""
    config = parse(arguments(data, "--fp16", "--zero-stage", "1", "--loss-scale", str(scale)))
    health = Health(config)
    faults = [
        health.fault(StepFigures(step, loss=5.0, lr=1e-3, tokens=1, seconds=1.0, skipped=True))
        for step in range(1, 101)
    ]
    assert any(faults) == ends
    assert not ends or ("at --loss-scale 1e+09; lower it" in str(faults[49]) and faults[:49] == [None] * 49)
