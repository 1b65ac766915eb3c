"""Many small parts become few: the same rows in fewer files, and nothing lost whatever happens meanwhile."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from inrun_megatron.ledger import Ledger, LedgerWriter, PartInfo, commit, create_ledger, merge, rollback
from inrun_megatron.ledger import files as ledger_files
from inrun_megatron.report.documents.draws import read_draws
from tests.committed_ledger import Killed, kill_at, sorted_values
from tests.synthetic_ledger import TARGETS, description, step_record

WRITERS, EVERY = 12, 3


def write(directory: Path, first: int, last: int) -> list[PartInfo]:
    """Parts of the steps, one of each writer and the step records'; two samples of each writer a step."""
    writers = [LedgerWriter(directory, number) for number in range(WRITERS)]
    for step in range(first, last + 1):
        values = np.random.default_rng(step).normal(size=(2 * WRITERS, len(TARGETS)))
        samples = np.arange(2 * WRITERS) + 2 * WRITERS * step
        writers[0].append_step(step_record(step, values, np.array([5.0, 5.0]), int(samples[-1])))
        for number, writer in enumerate(writers):
            own = slice(2 * number, 2 * number + 2)
            writer.append(step, [0, 1], samples[own], [64, 64], values[own])
    return [part for writer in writers for part in writer.write_parts()]


def two_commits(directory: Path) -> Ledger:
    with create_ledger(directory, description()):
        for last in (EVERY, 2 * EVERY):
            commit(directory, last, write(directory, last - EVERY + 1, last), f"iter_{last}")
    return Ledger(directory)


def files(directory: Path) -> set[str]:
    return {f"values/{path.name}" for path in (directory / "values").iterdir()}


def test_a_commit_has_few_files_however_many_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = two_commits(tmp_path / "merged")
    assert files(merged.directory) == {part.file for part in merged.parts("values")}
    assert [(part.first_step, part.last_step) for part in merged.parts("values")] == [(1, 3), (4, 6)]
    assert [check.name for check in merged.verify() if not check.ok and check.name != "additivity"] == []
    monkeypatch.setattr(merge, "MOST_PARTS", WRITERS)
    plain = two_commits(tmp_path / "plain")
    assert len(plain.parts("values")) == 2 * WRITERS
    assert sorted_values(merged).equals(sorted_values(plain))
    # Rows by step, those of a sample side by side: readers rely on the one for speed and on the other for memory.
    steps = merged.values().to_table()["step"].to_numpy()
    assert (np.diff(steps) >= 0).all()
    assert len(read_draws(merged, TARGETS, 1, 2 * EVERY).step) == merged.values().count_rows() // len(TARGETS)


def test_the_checkpoint_between_two_merged_commits_can_be_resumed(tmp_path: Path) -> None:
    before = two_commits(tmp_path).parts("values")[0]
    content = (tmp_path / before.file).read_bytes()
    rollback(tmp_path, EVERY)
    assert files(tmp_path) == {before.file} and (tmp_path / before.file).read_bytes() == content
    commit(tmp_path, 2 * EVERY, write(tmp_path, EVERY + 1, 2 * EVERY))
    assert len(files(tmp_path)) == 2


def test_killed_at_every_instant_of_the_commit(tmp_path: Path) -> None:
    instant = 0
    while True:
        instant += 1
        directory = tmp_path / str(instant)
        with create_ledger(directory, description()):
            parts = write(directory, 1, EVERY)
            with pytest.MonkeyPatch.context() as monkeypatch:
                kill_at(monkeypatch, instant)
                try:
                    commit(directory, EVERY, parts, "iter_3")
                    break
                except Killed:
                    pass
        ledger = Ledger(directory)
        rows = sum(part.rows for part in parts if part.table == "values")
        assert ledger.values().count_rows() == (rows if ledger.commits else 0), instant
        rollback(directory, EVERY)
        assert files(directory) == {part.file for part in ledger.parts("values")}, instant
    assert instant > WRITERS  # renames and syncs of the part and of the record, and each removal


def test_large_parts_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "MERGED_ROWS", 2 * 2 * len(TARGETS) * EVERY)
    assert len(two_commits(tmp_path).parts("values")) == 2 * WRITERS
    monkeypatch.setattr(merge, "MERGED_ROWS", 5 * 2 * len(TARGETS) * EVERY)
    rollback(tmp_path, EVERY)
    commit(tmp_path, 2 * EVERY, write(tmp_path, EVERY + 1, 2 * EVERY))
    own = [part.rows for part in Ledger(tmp_path).parts("values")[WRITERS:]]
    assert own == [60, 60, 24]


@pytest.mark.parametrize("fault", ["full disk", "altered part"])
def test_what_cannot_be_merged_is_committed_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    with create_ledger(tmp_path, description()):
        parts = write(tmp_path, 1, EVERY)
        values = {part.file for part in parts if part.table == "values"}
        if fault == "altered part":
            path = tmp_path / sorted(values)[3]
            content = bytearray(path.read_bytes())
            content[20] ^= 1
            path.write_bytes(content)
        else:

            def refused(path: Path, content: bytes) -> None:
                raise ledger_files.refused(path, OSError(errno.ENOSPC, "No space left on device"))

            monkeypatch.setattr("inrun_megatron.ledger.parts.write_atomically", refused)
        commit(tmp_path, EVERY, parts)
    assert {part.file for part in Ledger(tmp_path).parts("values")} == values == files(tmp_path)
