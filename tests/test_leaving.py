"""A rank that is done ends with exit code 0, whatever gloo's threads still hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from inrun_megatron.config import ParallelConfig
from inrun_megatron.errors import UserError
from inrun_megatron.parallel import leaving
from inrun_megatron.shapley import in_run
from inrun_megatron.training import distributed

ROOT = Path(__file__).resolve().parents[1]

# Rank 0 forgets its tensor before rank 1 comes, so that gloo's thread is the last to hold it, and lets go of it for as long as a
# sort takes, without the interpreter's lock. A key of the store says that the collective is over.
RANK = """
import sys, time
import torch
import torch.distributed as dist
from inrun_megatron.parallel import leaving

class Sorted:
    def __del__(self):
        torch.rand(10_000_000).sort()
        print("let go", flush=True)

store, rank = dist.FileStore(sys.argv[1], 2), int(sys.argv[2])
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
held = torch.zeros(1)
if rank == 0:
    held.sorted = Sorted()
    dist.all_reduce(held, async_op=True)
    del held
    store.wait(["over"])
    print([name for name, _ in leaving._threads() if name == leaving.RUN_LOOP])
else:
    time.sleep(1.0)
    dist.all_reduce(held)
    store.set("over", "yes")
if rank == 1 or sys.argv[3] == "wait":
    leaving.wait_at_exit()
"""


# From Python 3.14 on such a thread is left to hang instead.
@pytest.mark.parametrize("how", ["wait", "leave"] if sys.version_info < (3, 14) else ["wait"])
def test_gloo_lets_go_before_the_interpreter_ends(tmp_path: Path, how: str) -> None:
    """Without it the rank aborts: the canary of what it is for."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path / "store"), str(rank), how],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    (out, err), _ = (rank.communicate(timeout=120) for rank in ranks)
    assert leaving.RUN_LOOP in out, "torch names gloo's threads otherwise"
    assert ranks[1].returncode == 0
    if how == "wait":
        assert ranks[0].returncode == 0 and "let go" in out, err
    else:
        assert "terminate called without an active exception" in err


def test_the_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter(["R"] * 5)
    monkeypatch.setattr(leaving, "_threads", lambda: [("python", "R"), (leaving.RUN_LOOP, next(looks, "D"))])
    leaving.wait_for_gloo(0.2)
    assert next(looks, None) is None


def test_threads_must_sleep_several_times_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter("SSRSRSSSR")
    monkeypatch.setattr(leaving, "_threads", lambda: [("python", "R"), (leaving.RUN_LOOP, next(looks))])
    leaving.wait_for_gloo()
    assert next(looks) == "R"


def test_it_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(leaving.atexit, "register", asked.append)
    leaving.wait_at_exit.cache_clear()
    leaving.wait_at_exit()
    leaving.wait_at_exit()
    assert asked == [leaving.wait_for_gloo]
    leaving.wait_at_exit.cache_clear()


class _FarEnough(Exception):
    """What comes after it needs ranks."""


def test_scoring_and_training_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(**options: object) -> None:
        raise _FarEnough

    asked: list[str] = []
    monkeypatch.setattr(in_run, "wait_at_exit", lambda: asked.append("scoring"))
    nothing: Any = None
    with pytest.raises(UserError, match="no target given"):
        in_run.InRunShapley(nothing, [], nothing)
    monkeypatch.setattr(distributed, "wait_at_exit", lambda: asked.append("training"))
    monkeypatch.setattr("deepspeed.init_distributed", stop)
    with pytest.raises(_FarEnough):
        distributed._start_deepspeed(ParallelConfig())
    assert asked == ["scoring", "training"]
