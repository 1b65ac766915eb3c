"""The records in commits/: damaged, gone, copied, of another schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inrun_megatron.errors import UserError
from inrun_megatron.ledger import (
    Ledger,
    LedgerWriter,
    open_ledger,
    rollback,
)
from inrun_megatron.ledger.schema import SCHEMA_VERSION
from tests.committed_ledger import STEPS, run_or_resume, train


def test_a_damaged_record_after_the_checkpoint_is_removed(tmp_path: Path) -> None:
    run_or_resume(tmp_path)
    (tmp_path / "commits" / "0000000006.json").write_text("{")
    assert "commits/0000000006.json" in rollback(tmp_path, 4)
    assert Ledger(tmp_path).last_step == 4
    (tmp_path / "commits" / "0000000004.json").write_text("{")
    with pytest.raises(UserError, match=r"0000000004.json cannot be read"):  # its rows are the checkpoint's
        rollback(tmp_path, 4)


@pytest.mark.parametrize("step", [2, 4])
def test_a_record_that_is_gone_is_missed(tmp_path: Path, step: int) -> None:
    """Readers would show the other steps as if they were all; a resume would remove its parts as those of no commit."""
    run_or_resume(tmp_path)
    record = tmp_path / "commits" / f"{step:010d}.json"
    record.rename(tmp_path / "kept.json")
    message = f"{record.name} is missing, which the commit of step {step + 2} follows; restore it from a copy"
    with pytest.raises(UserError, match=message):
        Ledger(tmp_path).values()
    checks = {check.name: check for check in Ledger(tmp_path).verify()}
    assert not checks["commits"].ok and checks["commits"].figures["damaged"] == [f"commits/{record.name}"]
    assert "of no commit record that can be read: " in checks["uncommitted"].detail
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        rollback(tmp_path, 6)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "kept.json").rename(record)
    assert Ledger(tmp_path).values().count_rows() == 2 * 4 * STEPS


def test_a_record_that_is_gone_after_the_checkpoint_is_not_needed(tmp_path: Path) -> None:
    run_or_resume(tmp_path)
    (tmp_path / "commits" / "0000000004.json").unlink()
    rollback(tmp_path, 2)
    train(tmp_path, 2)
    assert all(check.ok for check in Ledger(tmp_path).verify())


def test_records_of_an_earlier_version_do_not_say_what_they_follow(tmp_path: Path) -> None:
    run_or_resume(tmp_path)
    for path in (tmp_path / "commits").iterdir():
        record = json.loads(path.read_text())
        assert record.pop("follows") == record["step"] - 2
        path.write_text(json.dumps(record))
    assert all(check.ok for check in Ledger(tmp_path).verify())


def test_a_copy_among_the_records_is_not_counted_twice(tmp_path: Path) -> None:
    run_or_resume(tmp_path)
    copy = tmp_path / "commits" / "0000000004 (copy).json"
    copy.write_bytes((tmp_path / "commits" / "0000000004.json").read_bytes())
    with pytest.raises(UserError, match=r"holds the commit of step 4, which is not its name; remove it"):
        Ledger(tmp_path).values()


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
