"""The commit protocol: what a kill at any instant leaves, what a resume keeps, who may write."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inrun_megatron.errors import UserError
from inrun_megatron.ledger import (
    Ledger,
    LedgerWriter,
    PartInfo,
    commit,
    create_ledger,
    lock,
    open_ledger,
    rollback,
)
from inrun_megatron.ledger import files as ledger_files
from inrun_megatron.ledger import run as ledger_run
from inrun_megatron.ledger.schema import SCHEMA_VERSION
from tests.synthetic_ledger import TARGETS, description, step_record
from tests.test_ledger_write import sorted_values

STEPS, EVERY, WRITERS = 6, 2, 2


class Killed(BaseException):
    """Stands for kill -9: nothing in the ledger catches it to tidy up."""


def train(directory: Path, checkpoint: int) -> int:
    """Steps after `checkpoint` with a commit before each checkpoint, as the training loop does; may be Killed.

    Values depend on the step alone, as a resumed run repeats them. Returns the last checkpoint saved.
    """
    writers = [LedgerWriter(directory, number) for number in range(WRITERS)]
    for step in range(checkpoint + 1, STEPS + 1):
        values = np.random.default_rng(step).normal(size=(4, len(TARGETS)))
        writers[0].append_step(step_record(step, values, np.array([5.0, 5.0]), 4 * step))
        for number, writer in enumerate(writers):
            own = slice(number, None, WRITERS)
            writer.append(step, [0, 1, 2, 0][own], np.arange(4)[own] + 4 * step, [64] * 2, values[own])
        if step % EVERY == 0:
            parts: list[PartInfo] = [part for writer in writers for part in writer.write_parts()]
            commit(directory, step, parts, f"iter_{step}")
            SAVED[directory] = step
    return STEPS


SAVED: dict[Path, int] = {}
"""The last checkpoint of each directory: what is durable outside the ledger."""


def run_or_resume(directory: Path) -> None:
    """Start, or go on from the last checkpoint, whatever the directory holds."""
    if (directory / "run.json").exists():
        handle = open_ledger(directory, description())
        with handle:
            rollback(directory, SAVED.get(directory, 0))
            train(directory, SAVED.get(directory, 0))
    else:
        with create_ledger(directory, description()):
            train(directory, 0)


def kill_at(monkeypatch: pytest.MonkeyPatch, instant: int) -> None:
    """Kill before the operation number `instant` on the file system: renames, removals, syncs."""
    count = 0

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == instant:
                raise Killed
            return operation(*arguments, **options)

        return run

    for name in ("replace", "fsync"):
        monkeypatch.setattr(ledger_files.os, name, counted(getattr(os, name)))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    monkeypatch.setattr(ledger_run, "fsync_directory", counted(ledger_files.fsync_directory))


def test_killed_at_every_instant_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run_or_resume(whole)
    expected = sorted_values(Ledger(whole))
    expected_steps = Ledger(whole).steps()
    instant = kills = 0
    while True:
        instant += 1
        directory = tmp_path / str(instant)
        with pytest.MonkeyPatch.context() as monkeypatch:
            kill_at(monkeypatch, instant)
            try:
                run_or_resume(directory)
                break  # fewer operations than `instant`: every one has been tried
            except Killed:
                kills += 1
        with pytest.MonkeyPatch.context() as monkeypatch:
            kill_at(
                monkeypatch, 1 + instant % 5
            )  # and the resume is killed too, in its rollback or soon after
            try:
                run_or_resume(directory)
            except Killed:
                kills += 1
        run_or_resume(directory)
        ledger = Ledger(directory)
        assert sorted_values(ledger).equals(expected), instant
        assert ledger.steps().equals(expected_steps), instant
        failed = [check for check in ledger.verify() if not check.ok and check.name != "additivity"]
        assert not failed, (instant, failed)
        leftovers = next(check for check in ledger.verify() if check.name == "uncommitted").figures["files"]
        assert leftovers == [], instant
    assert kills > 60


def test_uncommitted_parts_are_not_read(tmp_path: Path) -> None:
    with create_ledger(tmp_path, description()):
        writer = LedgerWriter(tmp_path, 0)
        writer.append(1, [0], [1], [64], np.ones((1, 2)))
        parts = writer.write_parts()
        assert Ledger(tmp_path).values().count_rows() == 0
        commit(tmp_path, 1, parts)
        assert Ledger(tmp_path).values().count_rows() == 2


def test_rollback_keeps_the_checkpoint_and_drops_the_rest(tmp_path: Path) -> None:
    run_or_resume(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "values").glob("*-0000000002-*")}
    dropped = rollback(tmp_path, 2)
    assert len(before) == WRITERS
    assert sorted(dropped)[:2] == ["commits/0000000004.json", "commits/0000000006.json"]
    assert len(dropped) == 2 + 2 * (WRITERS + 1)
    assert {path: path.read_bytes() for path in (tmp_path / "values").iterdir()} == before
    assert Ledger(tmp_path).last_step == 2
    assert len(rollback(tmp_path, 0)) == 1 + WRITERS + 1 and Ledger(tmp_path).last_step == 0


def test_rollback_into_the_middle_of_a_commit_is_refused(tmp_path: Path) -> None:
    run_or_resume(tmp_path)
    with pytest.raises(UserError, match=r"no commit for the checkpoint of step 3.*steps \[2, 4, 6\]"):
        rollback(tmp_path, 3)
    assert Ledger(tmp_path).last_step == 6


def test_a_second_commit_of_a_step_adds_to_the_first(tmp_path: Path) -> None:
    with create_ledger(tmp_path, description()):
        first, second = LedgerWriter(tmp_path, 0), LedgerWriter(tmp_path, 1)
        for writer in (first, second):
            writer.append(1, [0], [writer.writer], [64], np.ones((1, 2)))
        commit(tmp_path, 1, first.write_parts(), "iter_1")
        commit(tmp_path, 1, second.write_parts())
    record = json.loads((tmp_path / "commits" / "0000000001.json").read_text())
    assert record["checkpoint"] == "iter_1" and len(record["parts"]) == 2
    assert Ledger(tmp_path).values().count_rows() == 4


def test_commit_refuses_what_it_cannot_see_and_steps_of_the_future(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_run, "VISIBILITY_SECONDS", 0.1)
    with create_ledger(tmp_path, description()):
        writer = LedgerWriter(tmp_path, 0)
        writer.append(7, [0], [1], [64], np.ones((1, 2)))
        parts = writer.write_parts()
        with pytest.raises(UserError, match="holds step 7, after step 6"):
            commit(tmp_path, 6, parts)
        (tmp_path / parts[0].file).unlink()
        with pytest.raises(UserError, match="on a file system that all nodes share"):
            commit(tmp_path, 7, parts)
        assert Ledger(tmp_path).commits == []


def test_another_runs_directory_is_refused(tmp_path: Path) -> None:
    with create_ledger(tmp_path, description()) as handle:
        run_id = handle.run_id
    with pytest.raises(UserError, match=f"run {run_id}; continue that run with --load, or choose another"):
        create_ledger(tmp_path, description())
    with open_ledger(tmp_path) as handle:  # the refusal has let the lock go
        assert handle.run_id == run_id
    with pytest.raises(UserError, match="holds no ledger"):
        open_ledger(tmp_path / "elsewhere")
    (tmp_path / "run.json").unlink()
    (tmp_path / "values" / "part-x.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 ledger files but no run\.json"):
        create_ledger(tmp_path, description())


def test_rollback_removes_only_what_a_ledger_writes(tmp_path: Path) -> None:
    run_or_resume(tmp_path)
    others = [tmp_path / "values" / ".ipynb_checkpoints", tmp_path / "steps" / "notes.txt"]
    others[0].mkdir()
    others[1].write_text("mine")
    (tmp_path / "values" / "part-1.parquet.5.tmp").write_bytes(b"")
    uncommitted = next(check for check in Ledger(tmp_path).verify() if check.name == "uncommitted")
    assert uncommitted.figures["files"] == ["values/part-1.parquet.5.tmp"]
    assert "values/part-1.parquet.5.tmp" in rollback(tmp_path, 2)
    assert Ledger(tmp_path).last_step == 2 and all(path.exists() for path in others)


def test_a_damaged_record_after_the_checkpoint_is_removed(tmp_path: Path) -> None:
    run_or_resume(tmp_path)
    (tmp_path / "commits" / "0000000006.json").write_text("{")
    assert "commits/0000000006.json" in rollback(tmp_path, 4)
    assert Ledger(tmp_path).last_step == 4
    (tmp_path / "commits" / "0000000004.json").write_text("{")
    with pytest.raises(UserError, match=r"0000000004.json cannot be read"):  # its rows are the checkpoint's
        rollback(tmp_path, 4)


def test_a_rollback_that_the_file_system_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_or_resume(tmp_path)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    message = "cannot take .* back to step 2: .*0000000006.json: Permission denied; repair it"
    with pytest.raises(UserError, match=message):
        rollback(tmp_path, 2)


def test_schema_guards_and_damaged_records(tmp_path: Path) -> None:
    run_or_resume(tmp_path)
    (tmp_path / "commits" / "0000000006.json").write_text("{")
    ledger = Ledger(tmp_path)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        ledger.values()
    run = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(run | {"schema_version": 99}))
    for opening in (Ledger, open_ledger, lambda path: LedgerWriter(path, 0)):
        with pytest.raises(
            UserError, match=f"follows ledger schema 99, this package reads schema {SCHEMA_VERSION}"
        ):
            opening(tmp_path)
    for change, message in (
        ({"targets": None}, "run.json has no list of targets"),
        ({"datasets": None}, "run.json has no list of datasets"),
        ({"targets": [{}]}, "lacks the run's id or a target's name"),
    ):
        (tmp_path / "run.json").write_text(json.dumps(run | change))
        for opening in (Ledger, open_ledger, lambda path: LedgerWriter(path, 0)):
            with pytest.raises(UserError, match=message):
                opening(tmp_path)


HOLDER = """
import os, sys, time
from pathlib import Path
from inrun_megatron.ledger import open_ledger
ledger = open_ledger(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
time.sleep(60)
"""


def test_a_second_run_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    create_ledger(tmp_path, description()).close()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(
            UserError, match=f"is being written by another run .process {holder.pid} on"
        ) as refusal:
            open_ledger(tmp_path)
        assert "\n" not in str(refusal.value)
        Ledger(tmp_path)  # readers need no lock
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # a worker of the killed run still lives and must not hold the directory
        open_ledger(tmp_path).close()
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def test_a_dead_hosts_lock_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    create_ledger(tmp_path, description()).close()
    path = tmp_path / "LOCK"
    path.write_text(json.dumps({"host": "node7", "pid": 5, "created": "then"}))
    with open(path) as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.2)
        with pytest.raises(UserError, match="process 5 on node7"):
            open_ledger(tmp_path)
        monkeypatch.setattr(lock, "PATIENCE_SECONDS", 20.0)
        server = threading.Timer(0.5, fcntl.flock, (theirs, fcntl.LOCK_UN))  # forgets the dead host
        server.start()
        capsys.readouterr()
        open_ledger(tmp_path).close()
        server.join()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "process 5 on node7" in lines[0] and lines[0].endswith("waiting 20 s")


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """As on a read-only file system, which a test may not be allowed to mount."""
    (tmp_path / "LOCK").mkdir()
    with pytest.raises(
        UserError, match="LOCK: Is a directory; free or repair the file system, or choose another"
    ):
        create_ledger(tmp_path, description())


def test_one_process_cannot_open_a_directory_twice(tmp_path: Path) -> None:
    with create_ledger(tmp_path, description()):
        with pytest.raises(UserError, match="already open for writing in this process"):
            open_ledger(tmp_path)
    open_ledger(tmp_path).close()
