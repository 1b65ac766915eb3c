"""The training thread and the file system: who touches it, who waits, what an error of the thread does."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inrun_megatron.errors import UserError
from inrun_megatron.ledger import Ledger, LedgerWriter, commit, create_ledger
from inrun_megatron.ledger import files as ledger_files
from inrun_megatron.ledger.background import Background
from inrun_megatron.ledger.write import BACKLOG_BUFFERS
from tests.synthetic_ledger import TARGETS, description, step_record

WAIT = 30.0  # seconds until a thread that should go on counts as stuck


class SlowFiles:
    """Every fsync waits for `go`; the threads that called it are kept."""

    def __init__(self) -> None:
        self.go, self.reached = threading.Event(), threading.Event()
        self.threads: list[str] = []

    def fsync(self, descriptor: int) -> None:
        self.threads.append(threading.current_thread().name)
        self.reached.set()
        assert self.go.wait(WAIT)
        _fsync(descriptor)


_fsync = os.fsync


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowFiles]:
    """A ledger in `tmp_path` on files that do not answer until they are told to."""
    files = SlowFiles()
    with create_ledger(tmp_path, description()):
        monkeypatch.setattr(ledger_files.os, "fsync", files.fsync)
        yield files
        files.go.set()


def add_step(writer: LedgerWriter, step: int, rows: int = 4) -> None:
    values = np.random.default_rng(step).normal(size=(rows, len(TARGETS)))
    writer.append(step, [0] * rows, np.arange(rows) + rows * step, [64] * rows, values)
    writer.append_step(step_record(step, values, np.array([5.0, 5.0]), rows * step))


def test_steps_go_on_while_the_file_system_does_not_answer(tmp_path: Path, slow: SlowFiles) -> None:
    writer = LedgerWriter(tmp_path, 0)
    for step in range(1, 201):
        add_step(writer, step)
        if step % 50 == 0:
            writer.hand_over()  # what the loop does at a commit
    assert slow.reached.wait(WAIT) and writer.busy and not slow.go.is_set()
    slow.go.set()
    commit(tmp_path, 200, writer.write_parts())
    assert Ledger(tmp_path).values().count_rows() == 200 * 4 * len(TARGETS)
    own = [name for name in slow.threads if name == "ledger-writer-0"]
    # Two tables, four times, file and directory each; the test's own commit is the rest.
    assert len(own) == 16 and len(slow.threads) == 18
    assert [check.name for check in Ledger(tmp_path).verify() if not check.ok] == []


def test_the_backlog_is_bounded(tmp_path: Path, slow: SlowFiles) -> None:
    """Beyond the backlog the run waits for the file system, and loses nothing."""
    writer = LedgerWriter(tmp_path, 0, buffer_rows=20)
    done = threading.Event()
    reached: list[int] = []

    def train() -> None:
        for step in range(1, 101):
            reached.append(step)
            add_step(writer, step, rows=5)
        done.set()

    training = threading.Thread(target=train, daemon=True)
    training.start()
    assert slow.reached.wait(WAIT)
    assert not done.wait(1.0)
    assert (reached[-1] - 1) * 5 * len(TARGETS) <= (1 + BACKLOG_BUFFERS) * 20
    slow.go.set()
    assert done.wait(WAIT)
    commit(tmp_path, 100, writer.write_parts())
    assert Ledger(tmp_path).values().count_rows() == 100 * 5 * len(TARGETS)


def test_a_parts_error_is_kept_and_the_steps_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with create_ledger(tmp_path, description()):
        writer = LedgerWriter(tmp_path, 0)
        monkeypatch.setattr(ledger_files.os, "fsync", full)
        add_step(writer, 1)
        writer.hand_over()
        writer._thread.close()  # done, whatever came of it
        assert writer.failed and not writer.busy
        add_step(writer, 2)  # a step in the middle of which one rank alone may not stop
        for ask in (writer.check, writer.take_parts):
            with pytest.raises(
                UserError, match="No space left on device; what was committed before is intact"
            ):
                ask()
        assert list((tmp_path / "values").iterdir()) == []


def test_jobs_run_in_order_and_none_after_a_failure() -> None:
    seen: list[int] = []
    thread = Background("jobs", limit=2)

    def job(number: int) -> Any:
        if number == 3:
            raise UserError("three")
        seen.append(number)

    for number in range(1, 6):
        thread.submit(partial(job, number))
    with pytest.raises(UserError, match="three"):
        thread.wait()
    thread.close()
    assert seen == [1, 2]


def test_taken_parts_are_those_of_the_commits_steps(tmp_path: Path) -> None:
    """A part that filled up after the hand-over belongs to the next commit."""
    with create_ledger(tmp_path, description()):
        writer = LedgerWriter(tmp_path, 0, buffer_rows=8)
        add_step(writer, 1)
        writer.hand_over()
        for step in (2, 3):  # step 3 hands step 2 over
            add_step(writer, step)
        writer._thread.wait()
        assert {part.last_step for part in writer.take_parts(1)} == {1}
        assert {part.last_step for part in writer.write_parts()} == {2, 3}
