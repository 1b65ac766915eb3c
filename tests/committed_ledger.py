"""A small run whose ledger is committed beside checkpoints, killed at any instant and started again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from inrun_megatron.ledger import Ledger, LedgerWriter, PartInfo, commit, create_ledger, open_ledger, rollback
from inrun_megatron.ledger import files as ledger_files
from inrun_megatron.ledger import run as ledger_run
from tests.synthetic_ledger import TARGETS, description, step_record

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


def sorted_values(ledger: Ledger) -> pa.Table:
    keys = [(name, "ascending") for name in ("step", "dataset", "sample", "target")]
    table = ledger.values().to_table()
    return table.set_column(4, "target", table["target"].cast(pa.string())).sort_by(keys)
