"""One data-parallel rank's side of the ledger: buffer rows, hand them to a thread that writes durable parts.

Legend: n samples of one step on this rank, K targets in run.json's order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from inrun_megatron.errors import UserError
from inrun_megatron.ledger.background import Background
from inrun_megatron.ledger.description import read_run
from inrun_megatron.ledger.parts import Block, PartWriter
from inrun_megatron.ledger.run import OpenLedger, commit, create_ledger, open_ledger, rollback
from inrun_megatron.ledger.schema import (
    PER_TARGET_FIELDS,
    PartInfo,
    RunDescription,
    StepRecord,
)
from inrun_megatron.wording import counted

__all__ = [
    "LedgerWriter",
    "OpenLedger",
    "PartInfo",
    "RunDescription",
    "StepRecord",
    "commit",
    "create_ledger",
    "open_ledger",
    "rollback",
]

BUFFER_ROWS = 1 << 21
"""Rows a writer buffers (about 60 MB) before it hands them over on its own; the next commit names their part."""

BACKLOG_BUFFERS = 3
"""Full buffers that may wait for the file system; `append` waits only beyond them."""

BUFFER_RECORDS = 1 << 14
"""Step records that are buffered before they are handed over without a commit."""


class LedgerWriter:
    """Writes the rows of one data-parallel rank. Called from one thread; files are written by another.

    directory: the ledger directory; rank 0 has created or opened it before (so a barrier lies between).
    writer: this rank's number among the writers; unique, 0 for the one that also writes the steps.
    buffer_rows: upper bound of rows that are buffered, up to one step's rows more. In all, buffered and waiting
    for the file system, a writer holds at most 1 + BACKLOG_BUFFERS times as many.
    cut: whether samples are cut into parts; samples that are not, or are, are refused. None: not looked at.

    Nothing reaches a reader before `commit`. Raises UserError when the directory holds no ledger of this
    schema.
    """

    def __init__(
        self,
        directory: Path | str,
        writer: int,
        buffer_rows: int = BUFFER_ROWS,
        *,
        cut: bool | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.writer = writer
        run = read_run(self.directory)
        self.run_id = str(run["run_id"])
        self.targets = [str(target["name"]) for target in run["targets"]]
        self._datasets = len(run["datasets"])
        self._buffer_rows = buffer_rows
        self._blocks: list[Block] = []
        self._buffered = 0
        self._last_step = self._last_record = 0
        self._cut = cut
        self._records: list[StepRecord] = []
        self._parts = PartWriter(self.directory, writer, self.run_id, self.targets)
        self._written: list[PartInfo] = []  # by the thread
        self._lock = threading.Lock()  # of _written
        self._thread = Background(f"ledger-writer-{writer}", BACKLOG_BUFFERS * buffer_rows)

    def require(self, step: int, dataset: ArrayLike, sample: ArrayLike, cut: bool) -> None:
        """UserError where samples of `step` cannot be rows: a dataset index that run.json lacks, sample numbers that are no
        integers or below 0; or are cut into parts where the ledger is of whole samples, or the other way round."""
        datasets, samples = np.asarray(dataset).reshape(-1), np.asarray(sample).reshape(-1)
        if len(datasets) and not (datasets.min() >= 0 and datasets.max() < self._datasets):
            raise UserError(
                f"step {step}: samples are of datasets {datasets.min()} to {datasets.max()}, but the ledger was opened with "
                f"{counted(self._datasets, 'dataset')}, counted from 0"
            )
        if datasets.dtype.kind not in "iub" and (datasets % 1).any():
            raise UserError(f"step {step}: dataset numbers {datasets.tolist()} are no integers")
        if len(samples) and samples.dtype.kind not in "iu":
            raise UserError(f"step {step}: sample numbers are of type {samples.dtype}: give integers")
        if len(samples) and not (samples.min() >= 0 and samples.max() < 2**63):
            raise UserError(
                f"step {step}: sample numbers {samples.min()} to {samples.max()}; numbers go from 0 to 2**63 - 1 (a hash of 64 bits does not fit: "
                f"take it modulo 2**63)"
            )
        if self._cut is not None and cut != self._cut:
            raise UserError(
                f"step {step}: the samples come {'with' if cut else 'without'} segments=, but the ledger is one of "
                f"{'parts' if self._cut else 'whole samples'}: give RunLedger granularity="
                f"{'document or token' if cut else 'sample, or samples() segments'}"
            )

    def append(
        self,
        step: int,
        dataset: ArrayLike,
        sample: ArrayLike,
        tokens: ArrayLike,
        values: ArrayLike,
        segment: ArrayLike | None = None,
    ) -> None:
        """Buffer n samples of `step`: dataset [n], sample [n], tokens [n] (loss tokens), values [n, K] in
        nats, segment [n] (part of the sample, 0 where samples are not cut). Touches no file.

        Steps may not go back. Raises ValueError on shapes that do not fit, and UserError as `require` does.
        """
        self.require(step, dataset, sample, bool(self._cut))
        block: Block = {
            "dataset": np.asarray(dataset).reshape(-1),
            "sample": np.asarray(sample, dtype=np.int64).reshape(-1),
            "tokens": np.asarray(tokens, dtype=np.int32).reshape(-1),
            "value": np.asarray(values, dtype=np.float64),
        }
        n, expected = len(block["sample"]), (len(block["sample"]), len(self.targets))
        block["segment"] = (
            np.zeros(n, np.int32) if segment is None else np.asarray(segment, dtype=np.int32).reshape(-1)
        )
        lengths = {len(block[name]) for name in ("dataset", "tokens", "segment")}
        if block["value"].shape != expected or lengths != {n}:
            raise ValueError(
                f"step {step}: values have shape {block['value'].shape}, expected {expected} = [samples, targets], with "
                f"{len(block['dataset'])} datasets and {len(block['tokens'])} token counts"
            )
        if step < self._last_step:
            raise ValueError(f"step {step} appended after step {self._last_step}; steps may not go back")
        if n == 0:
            return
        if step > self._last_step and self._buffered >= self._buffer_rows:
            # Only between steps, so that no two parts of this writer share a step.
            self._hand_over_values()
        self._last_step = step
        block["step"] = np.full(n, step, dtype=np.int32)
        block["dataset"] = block["dataset"].astype(np.int16)
        # Copies: the caller's arrays may change before the thread has written them.
        self._blocks.append({name: np.array(column) for name, column in block.items()})
        self._buffered += n * len(self.targets)

    def append_step(self, record: StepRecord) -> None:
        """Buffer one step's record (writer 0 only). Raises ValueError on per-target fields that are not of
        length K."""
        assert self.writer == 0, "only writer 0 writes step records"
        for name in PER_TARGET_FIELDS:
            figures = getattr(record, name)
            if figures is not None and len(figures) != len(self.targets):
                raise ValueError(
                    f"step {record.step}: {name} has {len(figures)} entries for {len(self.targets)} targets"
                )
        if len(self._records) >= BUFFER_RECORDS:
            self._hand_over_steps()
        self._records.append(record)
        self._last_record = record.step

    @property
    def last_step(self) -> int:
        """The newest one of which anything was appended; 0: none."""
        return max(self._last_step, self._last_record)

    def hand_over(self) -> None:
        """Give everything buffered to the thread. Touches no file and does not wait for one, unless the backlog
        is full."""
        self._hand_over_values()
        self._hand_over_steps()

    @property
    def busy(self) -> bool:
        """Is anything that was handed over not yet written?"""
        return self._thread.busy

    @property
    def failed(self) -> bool:
        """Has the thread failed to write? `check` says why."""
        return self._thread.failed

    def check(self) -> None:
        """Raise the UserError of the thread, if it failed."""
        self._thread.check()

    def in_background(self, job: Callable[[], None]) -> None:
        """Run `job` on the writing thread after what it has to do (rank 0: a commit)."""
        self._thread.submit(job)

    def take_parts(self, step: int | None = None) -> list[PartInfo]:
        """The parts written since the last call, of steps up to `step` if given; they are durable."""
        self.check()
        with self._lock:
            taken = [part for part in self._written if step is None or part.last_step <= step]
            self._written = [part for part in self._written if part not in taken]
        return taken

    def write_parts(self) -> list[PartInfo]:
        """Write everything buffered, wait until it is durable, and return all parts since the last call.

        Raises UserError when the file system refuses or a part of that name exists (a resume without
        `rollback`).
        """
        self.hand_over()
        self._thread.wait()
        return self.take_parts()

    def close(self) -> None:
        """End the thread. What was not handed over is dropped."""
        self._thread.close()

    def _hand_over_values(self) -> None:
        if self._blocks:
            blocks, rows = self._blocks, self._buffered
            self._blocks, self._buffered = [], 0
            self._thread.submit(lambda: self._add(self._parts.write_values(blocks)), rows)

    def _hand_over_steps(self) -> None:
        if self._records:
            records, self._records = self._records, []
            self._thread.submit(lambda: self._add(self._parts.write_steps(records)))

    def _add(self, part: PartInfo) -> None:
        with self._lock:
            self._written.append(part)
