"""The commit protocol: what a kill at any instant leaves, what a resume keeps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from inrun_megatron.errors import UserError
from inrun_megatron.ledger import (
    Ledger,
    LedgerWriter,
    commit,
    create_ledger,
    open_ledger,
    rollback,
)
from inrun_megatron.ledger import run as ledger_run
from tests.committed_ledger import WRITERS, Killed, kill_at, run_or_resume, sorted_values
from tests.synthetic_ledger import description


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
    with pytest.raises(
        UserError, match=rf"run {run_id}; continue that run \(--load; .*\), or choose another"
    ):
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
