"""Agreement on a signal, and the watchdog's verdict on a rank that hangs. Launchers: tests/test_clusters_*.py."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from inrun_megatron.training.exit_codes import RANK_LOST
from inrun_megatron.training.stacks import odd_ones_out
from tests.distributed import run_distributed
from tests.hosts import environment

# Rank 1 never comes to the all-reduce in which the others wait.
HANGING = """
import time, torch, torch.distributed as dist
from inrun_megatron.training.watchdog import Watchdog

def feed_the_cat():
    time.sleep(600)

dist.init_process_group("gloo")
with Watchdog(timeout=10.0, stall=4.0) as watchdog:
    watchdog.arm()
    if dist.get_rank() == 1:
        feed_the_cat()
    dist.all_reduce(torch.ones(1))
"""
FAILING = HANGING.replace("feed_the_cat()\n    dist", 'raise ValueError("no more paper")\n    dist')
FIRST_FAILING = FAILING.replace("get_rank() == 1", "get_rank() == 0")
assert HANGING != FAILING != FIRST_FAILING


SIGNALLED_AFTER_AN_ERROR = """
import os, signal
from inrun_megatron.training.signals import StopSignals

try:
    with StopSignals():
        raise RuntimeError("Connection closed by peer")
except RuntimeError as error:
    os.kill(os.getpid(), signal.SIGTERM)
    print(error)
"""


def _signalled(rank: int, world: int) -> list[Any]:
    import torch
    import torch.distributed as dist

    from inrun_megatron.training.signals import StopSignals

    before, device = signal.getsignal(signal.SIGTERM), torch.device("cpu")
    answers: list[Any] = []
    for number, target in ((signal.SIGTERM, 0), (signal.SIGUSR1, 1)):
        with StopSignals() as signals:
            answers.append(signals.agreed(device))
            if rank == target:
                os.kill(os.getpid(), number)
            dist.barrier()
            answers.append(str(signals.agreed(device)))
    assert signal.getsignal(signal.SIGTERM) is before
    return answers


def test_a_rank_that_failed_lives_to_say_why() -> None:
    """A launcher that has seen another rank die sends SIGTERM while this one's collective fails."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED_AFTER_AN_ERROR], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "Connection closed by peer\n"), done.stderr


def test_all_ranks_learn_of_a_signal_at_the_same_place() -> None:
    expected = [None, "SIGTERM on rank 0", None, "SIGUSR1 on rank 1"]
    assert run_distributed(_signalled, 2) == [expected, expected]


@pytest.mark.parametrize(
    ("script", "message", "code"),
    [
        (
            HANGING,
            r"error: no rank has moved for 4 s: rank 1 \(\S+\) stands in script.py:\d+ feed_the_cat;",
            RANK_LOST,
        ),
        (FAILING, r"error: rank 1 \(\S+\) failed: ValueError: no more paper", 1),
        pytest.param(
            FIRST_FAILING,
            r"error: rank 0 \(\S+\) failed: ValueError: no more paper",
            1,
            marks=pytest.mark.long,
        ),
    ],
    ids=["hangs", "fails", "rank 0 fails"],
)
def test_one_line_names_the_rank(tmp_path: Path, script: str, message: str, code: int) -> None:
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and re.match(message, lines[0]), done.stderr[-3000:]
    # torchrun's table has the codes of the ranks that left by themselves.
    assert re.search(rf"exitcode\s*: {code}\b", done.stderr), done.stderr[-3000:]


def test_the_place_of_most_ranks_is_not_the_odd_one() -> None:
    assert odd_ones_out(["wait", "wait", "write", "wait"]) == {"write": [2]}
    assert odd_ones_out(["wait", "write"]) == {"wait": [0], "write": [1]}
    assert odd_ones_out(["wait", "wait"]) == {"wait": [0, 1]}
