"""Commits inside the training loop: who touches files, and how a rank's failure to write ends the run."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import threading
from pathlib import Path

import pytest

from inrun_megatron.ledger import Ledger
from tests import real_text
from tests.distributed import DistributedError, Workers
from tests.real_text import TARGETS, arguments, ledger

data = real_text.data  # a fixture

FLAGS = ("--train-iters", "8", "--shapley-commit-interval", "2", "--zero-stage", "1", "--eval-iters", "0")


def _run(rank: int, world: int, argv: list[str], full: bool) -> list[tuple[int, str]]:
    """Trains; returns (iteration, thread) of every fsync of a ledger file. `full`: rank 1's disk is, from the first
    part on."""
    from inrun_megatron.ledger import files
    from inrun_megatron.training.arguments import parse
    from inrun_megatron.training.loop import Run
    from inrun_megatron.training.progress import StepFigures
    from inrun_megatron.training.run import prepare, run

    synced: list[tuple[int, str]] = []
    iteration = 0
    fsync, step = os.fsync, Run._step

    def counted(descriptor: int) -> None:
        synced.append((iteration, threading.current_thread().name))
        if full and rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    def stepped(self: Run, number: int, *rest: object) -> StepFigures:
        nonlocal iteration
        iteration = number
        return step(self, number, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "fsync", counted)
        patch.setattr(Run, "_step", stepped)
        run(prepare(parse(argv), world))
    return synced


def test_the_training_thread_syncs_no_file_between_checkpoints(
    two_ranks: Workers,
    data: Path,
    tmp_path: Path,
) -> None:
    argv = arguments(data, *TARGETS, *FLAGS, "--save", str(tmp_path), "--save-interval", "6")
    for rank, synced in enumerate(two_ranks.run(_run, argv, False, timeout=300.0)):
        inside = [name for step, name in synced if 1 <= step < 6]
        assert inside and set(inside) == {f"ledger-writer-{rank}"}, inside
    commits = sorted(path.name for path in (tmp_path / "shapley" / "commits").iterdir())
    # A commit that found the one before it unfinished takes its parts along.
    assert {"0000000006.json", "0000000008.json"} <= set(commits) and len(commits) <= 4
    last = [json.loads((tmp_path / "shapley/commits" / name).read_text())["checkpoint"] for name in commits]
    assert last[-2:] == ["iter_0000006", "iter_0000008"]
    rows = ledger(tmp_path, "values")
    assert len(rows) == 8 * 8 * 2 and len(ledger(tmp_path, "steps")) == 8 * 2


def _train(rank: int, world: int, argv: list[str]) -> None:
    from deepspeed.accelerator import get_accelerator

    from inrun_megatron.training.arguments import parse
    from inrun_megatron.training.run import prepare, run

    # DeepSpeed refuses fp16 on CPUs without native fp16; torch computes in it all the same.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
        run(prepare(parse(argv), world))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            "--lr 1e30 --lr-warmup-iters 0 --clip-grad 0",
            "not finite|overflow",
        ),  # DeepSpeed itself skips NaN gradients at some stages
        ("--fp16 --initial-loss-scale 1099511627776", "overflow"),
    ],
    ids=["NaN loss", "fp16 overflow"],
)
def test_steps_that_fail_have_no_rows_and_a_count(
    two_ranks: Workers,
    data: Path,
    tmp_path: Path,
    flags: str,
    reason: str,
) -> None:
    argv = arguments(data, *TARGETS, *FLAGS, "--save", str(tmp_path), "--save-interval", "0", *flags.split())
    two_ranks.run(_train, argv, timeout=300.0)
    found = Ledger(tmp_path)
    statuses: dict[int, str] = {row["step"]: row["status"] for row in found.steps().to_pylist()}
    skipped = {step for step, status in statuses.items() if status.startswith("skipped")}
    assert len(statuses) == 8 and len(skipped) >= 2
    assert any(word in statuses[step] for word in reason.split("|") for step in skipped), statuses
    rows = found.values().to_table()
    scored = {step for step, status in statuses.items() if status == "scored"}
    assert set(rows["step"].to_pylist()) == scored and rows.num_rows == len(scored) * 8 * 2
    (steps,) = [check for check in found.verify() if check.name == "steps"]
    assert steps.ok and sum(steps.figures["statuses"].values()) == 8
    for status in {statuses[step] for step in skipped}:
        assert f"{sum(own == status for own in statuses.values())} {status}" in steps.detail


def _train_aloud(rank: int, world: int, argv: list[str]) -> str:
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        _train(rank, world, argv)
    return told.getvalue()


def test_a_start_without_a_checkpoint_says_what_it_repeats(
    two_ranks: Workers,
    data: Path,
    tmp_path: Path,
) -> None:
    argv = arguments(data, *TARGETS, *FLAGS, "--save", str(tmp_path), "--save-interval", "0")
    two_ranks.run(_train, [*argv, "--exit-interval", "3"], timeout=300.0)
    first = ledger(tmp_path, "values")
    told, _ = two_ranks.run(
        _train_aloud, [*argv, "--load", str(tmp_path), "--exit-interval", "3"], timeout=300.0
    )
    assert (
        f"--load {tmp_path} holds no checkpoint (--save-interval 0 writes none): starting from the beginning"
        in told
    )
    assert "the ledger's values of steps 1 to 3 are taken back: these steps are repeated" in told
    assert first and ledger(tmp_path, "values") == first


def test_a_stretch_without_scoring_is_no_lost_record(
    two_ranks: Workers,
    data: Path,
    tmp_path: Path,
) -> None:
    """Steps 4 to 6 are trained with --no-shapley, between starts that score."""
    argv = [*arguments(data, *TARGETS, *FLAGS), "--save", str(tmp_path), "--load", str(tmp_path)]
    for flags in (("--exit-interval", "3"), ("--exit-interval", "6", "--no-shapley"), ()):
        two_ranks.run(_train, [*argv, *flags], timeout=300.0)
    found = Ledger(tmp_path)
    assert sorted(set(found.steps()["step"].to_pylist())) == [1, 2, 3, 7, 8]
    (steps,) = [check for check in found.verify() if check.name == "steps"]
    assert steps.ok, steps.detail
    starts = json.loads((tmp_path / "shapley" / "starts.json").read_text())["starts"]
    assert [(start["step"], start["ledger_step"]) for start in starts] == [(6, 3)]


def test_a_full_disk_of_one_rank_ends_the_run_on_all(
    two_ranks: Workers,
    data: Path,
    tmp_path: Path,
) -> None:
    argv = arguments(data, *TARGETS, *FLAGS, "--save", str(tmp_path), "--save-interval", "0")
    with pytest.raises(DistributedError) as caught:
        two_ranks.run(_run, argv, True, timeout=300.0)
    assert caught.value.alive, "a rank hangs"
    message = str(caught.value)
    assert "AgreedError" in message and "-w1.parquet: No space left on device; what was committed" in message
    assert "failed first; ranks" in message  # both raise
    assert "after_step" in message, "the loop's end found it, not a step"
