"""Faults under the real launcher: nothing is lost and nothing is there twice."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from inrun_megatron.ledger import Ledger
from tests import real_text
from tests.launched import ENDS_WITHIN, Launched
from tests.real_text import TARGETS, arguments, checkpoint_differences, ledger

data = real_text.data  # a fixture

EVERY = 3  # steps between checkpoints; a commit in each step between them
PER_KILL = (
    8  # steps of the run per kill: each starts from the last checkpoint and dies up to EVERY + 3 steps later
)
FLAGS = f"--zero-stage 1 --eval-iters 0 --save-interval {EVERY} --shapley-commit-interval 1 --shapley-audit-interval 1000"


def arguments_of(data: Path, run: Path, steps: int, *more: str) -> list[str]:
    return arguments(
        data,
        *TARGETS,
        *FLAGS.split(),
        "--train-iters",
        str(steps),
        "--save",
        str(run),
        "--load",
        str(run),
        *more,
    )


def same_ledger(run: Path, whole: Path) -> None:
    """Rows and step records are those of the uninterrupted run, bit for bit; verify finds nothing wrong."""
    for table in ("values", "steps"):
        found, expected = ledger(run, table), ledger(whole, table)
        assert len(found) == len(expected) and found == expected, table
    checks = {check.name: check for check in Ledger(run).verify()}
    for name in ("commits", "files", "rows", "duplicates", "steps", "additivity"):
        assert checks[name].ok, checks[name].detail
    assert checks["uncommitted"].figures["files"] == []


# --- kill -9 ---------------------------------------------------------------------------------------------------------


def in_a_step(run: Path, job: Launched, generator: random.Random) -> None:
    time.sleep(generator.uniform(0.0, 0.1))


def in_a_commit(run: Path, job: Launched, generator: random.Random) -> None:
    """While files of the ledger's tables come and go."""
    directories = [run / "shapley" / table for table in ("values", "steps", "commits")]

    def listing() -> list[list[str]]:
        return [sorted(os.listdir(directory)) for directory in directories]

    before = listing()
    job.until(lambda: listing() != before)
    time.sleep(generator.choice((0.0, 0.0, 0.001, 0.003)))


def in_a_checkpoint(run: Path, job: Launched, generator: random.Random) -> None:
    """While the files of a checkpoint are written, before `latest` names it."""
    root = run / "checkpoints"
    before = sorted(os.listdir(root))
    job.until(lambda: sorted(os.listdir(root)) != before)
    time.sleep(generator.choice((0.0, 0.001, 0.005, 0.02)))


KINDS: tuple[Callable[[Path, Launched, random.Random], None], ...] = (
    in_a_step,
    in_a_commit,
    in_a_checkpoint,
)


def kill_and_resume(data: Path, directory: Path, kills: int, seed: int) -> None:
    """One run killed `kills` times, one rank at a time, against the same run left alone."""
    generator = random.Random(seed)
    steps = PER_KILL * kills + 2 * EVERY
    run, whole = directory / "run", directory / "whole"
    seconds = []
    for kill in range(kills):
        with Launched(arguments_of(data, run, steps), directory / f"{kill}.log") as job:
            assert job.until(lambda job=job: job.step > 0), f"no step\n{job.log[-3000:]}"  # type: ignore[misc]
            wanted = job.step + generator.randint(1, EVERY + 3)
            assert job.until(lambda job=job, wanted=wanted: job.step >= wanted), job.log[-3000:]  # type: ignore[misc]
            kind, victim = KINDS[kill % len(KINDS)], generator.randrange(2)
            victims = job.ranks()
            assert len(victims) == 2
            kind(run, job, generator)
            victims[victim].kill()
            killed = time.monotonic()
            assert job.wait(ENDS_WITHIN) != 0, "the run ended before it was killed"
            seconds.append(time.monotonic() - killed)
            psutil.wait_procs(victims, timeout=ENDS_WITHIN)
            assert not any(process.is_running() for process in victims)
            print(f"{kind.__name__}, rank {victim}, step {job.step}: job over after {seconds[-1]:.1f} s")
    with Launched(arguments_of(data, run, steps), directory / "last.log") as job:
        assert job.wait() == 0, job.log[-3000:]
    with Launched(arguments_of(data, whole, steps), directory / "whole.log") as job:
        assert job.until(lambda: job.step > 0)
        ranks = job.ranks()
        for rank in ranks:
            rank.suspend()  # or it might end before the second has come up
        second_is_refused(data, whole, steps, directory)
        for rank in ranks:
            rank.resume()
        assert job.wait() == 0, job.log[-3000:]
    same_ledger(run, whole)
    last = f"checkpoints/iter_{steps:07d}"
    assert checkpoint_differences(run / last, whole / last) == []
    print(f"{kills} kills; the slowest job was over after {max(seconds):.1f} s")


def second_is_refused(data: Path, run: Path, steps: int, directory: Path) -> None:
    with Launched(arguments_of(data, run, steps), directory / "second.log") as second:
        assert second.wait() == 1, second.log[-3000:]
        assert len(second.errors) == 1 and "is being written by another run" in second.errors[0]


@pytest.mark.slow
def test_killed_ranks_and_a_second_run(data: Path, tmp_path: Path) -> None:
    kill_and_resume(data, tmp_path, kills=3, seed=1)


@pytest.mark.long
def test_twenty_kills(data: Path, tmp_path: Path) -> None:
    kill_and_resume(data, tmp_path, kills=20, seed=2)


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 4 MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", directory],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_space_brings_it_back(
    data: Path,
    tmp_path: Path,
    small_disk: Path,
) -> None:
    steps = 16
    run, whole, ballast = tmp_path / "run", tmp_path / "whole", small_disk / "ballast"
    argv = arguments_of(data, run, steps, "--shapley-dir", str(small_disk / "ledger"))
    free = shutil.disk_usage(small_disk).free
    ballast.write_bytes(b"x" * (free - 150_000))  # room for a few commits and checkpoints
    with Launched(argv, tmp_path / "full.log") as job:
        assert job.wait() == 1, job.log[-3000:]
        assert len(job.errors) == 1, job.errors
        assert "No space left on device; what was committed before is intact" in job.errors[0]
    stopped = Ledger(small_disk / "ledger")
    assert 0 < stopped.last_step < steps
    bad = [
        check.detail
        for check in stopped.verify()
        if check.name in ("files", "rows", "steps") and not check.ok
    ]
    assert bad == []
    ballast.unlink()
    with Launched(argv, tmp_path / "again.log") as job:
        assert job.wait() == 0, job.log[-3000:]
    with Launched(arguments_of(data, whole, steps), tmp_path / "whole.log") as job:
        assert job.wait() == 0, job.log[-3000:]
    shutil.copytree(small_disk / "ledger", run / "shapley")
    same_ledger(run, whole)
