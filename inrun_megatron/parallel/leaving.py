"""The end of a process that has used gloo.

torch's ProcessGroupGloo (torch/csrc/distributed/c10d/ProcessGroupGloo.cpp, runLoop) reports a collective as done before its
thread lets go of the tensors, and a tensor made in Python it lets go with the interpreter's lock. A thread that asks for the
lock of an interpreter that is finalizing is ended there (CPython 3.11, take_gil in Python/ceval_gil.h), which C++ answers with
"terminate called without an active exception": the rank aborts when all is done, and its launcher reports a failed run.
``destroy_process_group`` ends these threads only where nobody else holds the group, and a DeepSpeed engine does.
"""

from __future__ import annotations

import atexit
import functools
import time
from collections.abc import Iterator
from pathlib import Path

RUN_LOOP = "pt_gloo_runloop"  # as torch names the threads
TASKS = Path("/proc/self/task")
IN_PEACE = 3  # looks in a row: one that waits for the lock seems idle until it has been given it


@functools.cache
def wait_at_exit() -> None:
    """``wait_for_gloo`` when the process ends; once, however often it is asked for."""
    atexit.register(wait_for_gloo)


def wait_for_gloo(seconds: float = 5.0) -> None:
    """Return when gloo's threads sleep, so that none of them still holds a tensor; at the latest after ``seconds``.

    After the last collective. Where there is no /proc, at once.
    """
    seen, end = 0, time.monotonic() + seconds
    while TASKS.exists() and seen < IN_PEACE and time.monotonic() < end:
        seen = 0 if _at_work() else seen + 1
        time.sleep(1e-3)  # they may have the interpreter's lock meanwhile


def _at_work() -> bool:
    """Does one of gloo's threads run, or wait for a core?"""
    return any(name == RUN_LOOP and state != "S" for name, state in _threads())


def _threads() -> Iterator[tuple[str, str]]:
    """Name and state of each thread of this process (proc_pid_stat(5)): S sleeps, R runs or wants to."""
    for task in TASKS.iterdir():
        try:
            text = (task / "stat").read_text()
        except OSError:  # it has ended
            continue
        yield text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2]
