"""The records in commits/: which parts count, and whether one of them is gone.

A record names the one before it (`follows`), so that a record that was lost, in a copy that was cut short, say, is missed:
otherwise its rows would be missing silently, and a resume would remove its parts as those of no commit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inrun_megatron.errors import UserError
from inrun_megatron.ledger.files import read_json
from inrun_megatron.ledger.schema import COMMITS, PartInfo, commit_name


@dataclass(frozen=True)
class CommitRecord:
    """step: that rows are committed up to; parts: that it added; follows: step of the record before it, 0 for the first, None
    where a ledger of an earlier version does not say; identity: of the commit, None where its writer gave none."""

    step: int
    parts: list[PartInfo]
    follows: int | None
    identity: str | None = None


@dataclass
class CommitRecords:
    """`found`, by step; `faults`: of those that are damaged or gone, why, by their name in the ledger."""

    found: list[CommitRecord] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)


def commit_files(directory: Path) -> list[Path]:
    """The commit records, by step."""
    return sorted((directory / COMMITS).glob("*.json"))


def step_of(path: Path) -> int:
    """The step that a commit record's name gives; 0 where the name is none."""
    return int(path.stem) if path.stem.isdigit() else 0


def read_commit(path: Path) -> CommitRecord:
    """Raises UserError naming the file when it is damaged."""
    record = read_json(path)
    try:
        follows: Any = record.get("follows")
        parts = [PartInfo.from_dict(part) for part in record["parts"]]
        found = CommitRecord(
            int(record["step"]), parts, None if follows is None else int(follows), record.get("identity")
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a commit record ({error!r}); restore it from a copy") from error
    if path.name != Path(commit_name(found.step)).name:
        raise UserError(
            f"{path} holds the commit of step {found.step}, which is not its name; remove it if it is a copy"
        )
    return found


def read_commits(directory: Path) -> CommitRecords:
    """All of them. Beside a run that is writing a listing may hold a record and not the one before: it is made again then."""
    records = _read(directory)
    return records if not records.faults else _read(directory)


def _read(directory: Path) -> CommitRecords:
    records = CommitRecords()
    before = 0
    for path in commit_files(directory):
        try:
            record = read_commit(path)
        except UserError as error:
            records.faults[f"{COMMITS}/{path.name}"] = str(error)
            before = step_of(path)
            continue
        if record.follows is not None and record.follows > before:
            gone = commit_name(record.follows)
            records.faults[gone] = (
                f"{directory / gone} is missing, which the commit of step {record.step} follows; restore it from a copy"
            )
        records.found.append(record)
        before = record.step
    return records
