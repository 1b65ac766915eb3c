"""A run's ledger as a whole: create, open for a resume, commit, roll back. Called by rank 0 only.

docs/ledger.md gives the protocol and what a crash at any instant leaves.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from inrun_megatron.errors import UserError
from inrun_megatron.ledger.commit_records import commit_files, read_commits, step_of
from inrun_megatron.ledger.description import read_run
from inrun_megatron.ledger.files import (
    TEMPORARY_SUFFIX,
    fsync_directory,
    make_directory,
    read_json,
    write_json,
)
from inrun_megatron.ledger.lock import DirectoryLock
from inrun_megatron.ledger.merge import merge_small, remove
from inrun_megatron.ledger.resume import check_resumable
from inrun_megatron.ledger.schema import (
    COMMITS,
    RUN_FILE,
    STEPS,
    VALUES,
    PartInfo,
    RunDescription,
    commit_name,
    now,
)

VISIBILITY_SECONDS = 90.0
"""How long `commit` waits for another node's part to appear on a network file system that caches names: NFS clients may
answer from their cache for 60 seconds (acdirmax), unless they are told otherwise."""


class OpenLedger:
    """A ledger directory held for writing; holds the lock until `close()` or the end of the process.

    Attributes: `directory`, `run` (run.json as a dict). A context manager.
    """

    def __init__(self, directory: Path, run: dict[str, Any], lock: DirectoryLock) -> None:
        self.directory = directory
        self.run = run
        self._lock = lock

    @property
    def run_id(self) -> str:
        """As the run's checkpoints name it."""
        return str(self.run["run_id"])

    def close(self) -> None:
        """Release the directory for another run."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def create_ledger(directory: Path | str, description: RunDescription) -> OpenLedger:
    """Start a ledger in `directory` (made if missing), write run.json, take the lock. Rank 0 only.

    Raises UserError when the directory holds a run already, is being written by one, or holds parts without
    run.json.
    """
    directory = Path(directory)
    record = description.to_dict()
    _make_ledger_directory(directory)
    lock = DirectoryLock(directory)
    try:
        if (directory / RUN_FILE).exists():
            holder = read_json(directory / RUN_FILE).get("run_id", "unknown")
            raise UserError(
                f"{directory} holds the ledger of run {holder}; continue that run (--load; RunLedger(resume=...) in a loop of your own), "
                "or choose another directory (--shapley-dir)"
            )
        orphans = [path for table in (VALUES, STEPS, COMMITS) for path in (directory / table).glob("*")]
        if orphans:
            raise UserError(
                f"{directory} holds {len(orphans)} ledger files but no {RUN_FILE} (first: {orphans[0].name}); "
                f"restore {RUN_FILE}, or choose another directory (--shapley-dir)"
            )
        for table in (VALUES, STEPS, COMMITS):
            _make_ledger_directory(directory / table)
        write_json(directory / RUN_FILE, record)
    except BaseException:
        lock.close()
        raise
    return OpenLedger(directory, record, lock)


def open_ledger(directory: Path | str, description: RunDescription | None = None) -> OpenLedger:
    """Open an existing ledger to continue its run, take the lock. Rank 0 only; call `rollback` next.

    With `description` (of the resumed run) it must be one that can continue the rows (`check_resumable`).

    Raises UserError when there is no ledger, its schema is another, a run is writing it, or the description
    differs.
    """
    directory = Path(directory)
    if not (directory / RUN_FILE).exists():
        raise UserError(
            f"{directory} holds no ledger ({RUN_FILE} is missing); check the directory (--shapley-dir)"
        )
    lock = DirectoryLock(directory)
    try:
        run = read_run(directory)
        if description is not None:
            check_resumable(run, description.to_dict())
    except BaseException:
        lock.close()
        raise
    return OpenLedger(directory, run, lock)


def commit(
    directory: Path | str,
    step: int,
    parts: Iterable[PartInfo],
    checkpoint: str | None = None,
    identity: str | None = None,
) -> Path:
    """Make `parts` (of all writers, since the last commit) part of the ledger, up to and including `step`.
    Rank 0 only.

    Every part is durable before this is called; the commit itself is one atomic rename of
    commits/<step>.json. Call it before the checkpoint of `step` is saved. A second commit of the same step
    adds to the first. `identity` tells it from another commit of the same step, of a run that was taken back. Many small parts are merged first (merge.py).

    Raises UserError when a part is not visible from this host (a --shapley-dir that the nodes do not share),
    belongs to later steps than `step`, or the file system refuses.
    """
    directory = Path(directory)
    new = list(parts)
    for part in new:
        if part.last_step > step:
            raise UserError(
                f"{part.file} holds step {part.last_step}, after step {step} that is being committed"
            )
        _wait_for(directory / part.file, part.bytes)
    new, replaced = merge_small(directory, new)
    path = directory / commit_name(step)
    previous: dict[str, Any] = read_json(path) if path.exists() else {}
    known = {part["file"] for part in previous.get("parts", [])}
    follows = max((step_of(other) for other in commit_files(directory) if step_of(other) < step), default=0)
    record = {
        "step": step,
        "follows": previous.get("follows", follows),
        "created": now(),
        "parts": previous.get("parts", []) + [part.to_dict() for part in new if part.file not in known],
        "checkpoint": checkpoint if checkpoint is not None else previous.get("checkpoint"),
        "identity": identity if identity is not None else previous.get("identity"),
    }
    write_json(path, record)
    remove(directory, replaced)
    return path


def rollback(directory: Path | str, step: int) -> list[str]:
    """Take the ledger back to the checkpoint of `step` (0: to its beginning). Rank 0 only, on resume.

    Removes the commits after `step`, newest first, then every part and temporary file that no remaining
    commit names; interrupted at any instant, calling it again finishes the work. Returns the removed files,
    relative to `directory`.

    Files that are not the ledger's are left alone. A damaged record of a step after `step` goes with the others.

    Raises UserError, with nothing removed, when a commit after `step` also holds rows up to `step` that no
    earlier commit holds: dropping it would lose them; when a commit up to `step` is damaged or missing: its parts
    would be removed as those of no commit; and when the file system refuses.
    """
    directory = Path(directory)
    kept, later = _commits_around(directory, step)
    straddling = [part for parts in later.values() for part in parts if part.first_step <= step]
    if straddling:
        steps = sorted(step_of(path) for path in (*kept, *later))
        raise UserError(
            f"{directory} has no commit for the checkpoint of step {step}: {straddling[0].file} holds its rows together "
            f"with later ones; load the checkpoint of one of steps {steps}, or choose another directory (--shapley-dir)"
        )
    named = {part.file for parts in kept.values() for part in parts}
    removed = []
    try:
        for path in sorted(later, reverse=True):
            path.unlink()
            removed.append(path)
        fsync_directory(directory / COMMITS)
        for table in (VALUES, STEPS, COMMITS):
            for path in own_files(directory, table):
                if path not in kept and f"{table}/{path.name}" not in named:
                    path.unlink()
                    removed.append(path)
            fsync_directory(directory / table)
    except OSError as error:
        raise UserError(
            f"cannot take {directory} back to step {step}: {error.filename or directory}: {error.strerror or error}; "
            "repair it, then start the same command again"
        ) from error
    return [path.relative_to(directory).as_posix() for path in removed]


def _commits_around(
    directory: Path, step: int
) -> tuple[dict[Path, list[PartInfo]], dict[Path, list[PartInfo]]]:
    """The commits up to `step` and those after it, with their parts; of damaged ones after it none are known."""
    records = read_commits(directory)
    for name, fault in records.faults.items():
        if step_of(directory / name) <= step:
            raise UserError(f"{fault}, or choose another directory (--shapley-dir)")
    parts = {directory / commit_name(record.step): record.parts for record in records.found}
    kept: dict[Path, list[PartInfo]] = {}
    later: dict[Path, list[PartInfo]] = {}
    for path in commit_files(directory):
        (kept if step_of(path) <= step else later)[path] = parts.get(path, [])
    return kept, later


def own_files(directory: Path, table: str) -> list[Path]:
    """The files of a table (or of commits/) that a ledger writes, finished or not."""
    patterns = ("*.json" if table == COMMITS else "part-*.parquet", f"*{TEMPORARY_SUFFIX}")
    found = (path for pattern in patterns for path in (directory / table).glob(pattern))
    return sorted(path for path in found if path.is_file())


def _make_ledger_directory(directory: Path) -> None:
    try:
        make_directory(directory)
    except OSError as error:
        raise UserError(
            f"cannot create the ledger directory {directory}: {error.strerror or error}"
        ) from error


def _wait_for(path: Path, size: int) -> None:
    deadline = time.monotonic() + VISIBILITY_SECONDS
    while True:
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            found = -1
        if found == size:
            return
        if time.monotonic() > deadline:
            state = "is not visible" if found < 0 else f"has {found} of {size} bytes as seen"
            raise UserError(
                f"{path} {state} from {os.uname().nodename}; --shapley-dir must be on a file system that all nodes share"
            )
        # Listing the directory makes NFS clients look the name up again instead of answering from their
        # cache.
        os.listdir(path.parent)
        time.sleep(0.05)
