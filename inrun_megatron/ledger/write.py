"""One data-parallel rank's side of the ledger: buffer rows, write them as durable Parquet parts.

Legend: n samples of one step on this rank, K targets in run.json's order.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from inrun_megatron.errors import UserError
from inrun_megatron.ledger.files import read_json, write_atomically
from inrun_megatron.ledger.run import OpenLedger, commit, create_ledger, open_ledger, rollback
from inrun_megatron.ledger.schema import (
    META_RUN,
    META_TABLE,
    META_VERSION,
    PER_TARGET_FIELDS,
    RUN_FILE,
    SCHEMA_VERSION,
    SCHEMAS,
    STEPS,
    STEPS_SCHEMA,
    VALUES,
    PartInfo,
    RunDescription,
    StepRecord,
    check_version,
    part_name,
)

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

ROW_GROUP_ROWS = 1 << 18
"""Rows per Parquet row group: readers skip groups by their step range."""

BUFFER_ROWS = 1 << 21
"""Rows a writer holds in memory (about 60 MB) before it writes a part on its own; the next commit names that
part."""


class LedgerWriter:
    """Writes the rows of one data-parallel rank. Not thread-safe.

    directory: the ledger directory; rank 0 has created or opened it before (so a barrier lies between).
    writer: this rank's number among the writers; unique, 0 for the one that also writes the steps.
    buffer_rows: upper bound of rows in memory, up to one step's rows more.

    Nothing reaches a reader before `commit`. Raises UserError when the directory holds no ledger of this
    schema.
    """

    def __init__(self, directory: Path | str, writer: int, buffer_rows: int = BUFFER_ROWS) -> None:
        self.directory = Path(directory)
        self.writer = writer
        run = read_json(self.directory / RUN_FILE)
        check_version(run.get("schema_version"), self.directory / RUN_FILE)
        self.run_id = str(run["run_id"])
        self.targets = [str(target["name"]) for target in run["targets"]]
        self._datasets = len(run["datasets"])
        self._buffer_rows = buffer_rows
        self._blocks: list[dict[str, NDArray[Any]]] = []
        self._buffered = 0
        self._last_step = 0
        self._records: list[StepRecord] = []
        self._written: list[PartInfo] = []

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
        nats, segment [n] (part of the sample, 0 where samples are not cut).

        Steps may not go back. Raises ValueError on shapes that do not fit and on a dataset index that
        run.json lacks.
        """
        block: dict[str, NDArray[Any]] = {
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
        if n and not (block["dataset"].min() >= 0 and block["dataset"].max() < self._datasets):
            raise ValueError(
                f"step {step}: dataset indices {block['dataset'].min()}..{block['dataset'].max()}, but run.json lists "
                f"{self._datasets} datasets"
            )
        if step < self._last_step:
            raise ValueError(f"step {step} appended after step {self._last_step}; steps may not go back")
        if n == 0:
            return
        if step > self._last_step and self._buffered >= self._buffer_rows:
            # Only between steps, so that no two parts of this writer share a step.
            self._written += self._write_values()
        self._last_step = step
        block["step"] = np.full(n, step, dtype=np.int32)
        block["dataset"] = block["dataset"].astype(np.int16)
        self._blocks.append(block)
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
        self._records.append(record)

    def write_parts(self) -> list[PartInfo]:
        """Write everything buffered, durably, and return all parts written since the last call ([] if none).

        Raises UserError when the file system refuses or a part of that name exists (a resume without
        `rollback`).
        """
        parts = self._written + self._write_values() + self._write_steps()
        self._written = []
        return parts

    def _write_values(self) -> list[PartInfo]:
        if not self._blocks:
            return []
        targets = len(self.targets)
        columns = {
            name: np.concatenate([block[name] for block in self._blocks])
            for name in ("step", "dataset", "sample", "segment", "tokens", "value")
        }
        rows = {
            name: column if name == "value" else np.repeat(column, targets)
            for name, column in columns.items()
        }
        table = pa.table(
            {
                "step": rows["step"],
                "dataset": rows["dataset"],
                "sample": rows["sample"],
                "segment": rows["segment"],
                "target": _target_column(
                    np.tile(np.arange(targets, dtype=np.int32), len(columns["step"])), self.targets
                ),
                "tokens": rows["tokens"],
                "value": rows["value"].reshape(-1),
            },
            schema=SCHEMAS[VALUES],
        )
        part = self._write(VALUES, table, int(columns["step"][0]), int(columns["step"][-1]))
        self._blocks, self._buffered = [], 0
        return [part]

    def _write_steps(self) -> list[PartInfo]:
        if not self._records:
            return []
        targets, records = len(self.targets), self._records
        columns: dict[str, Any] = {}
        for name in STEPS_SCHEMA.names:
            if name == "target":
                columns[name] = _target_column(
                    np.tile(np.arange(targets, dtype=np.int32), len(records)), self.targets
                )
            elif name in PER_TARGET_FIELDS:
                columns[name] = [x for record in records for x in (getattr(record, name) or [None] * targets)]
            else:
                columns[name] = [getattr(record, name) for record in records for _ in range(targets)]
        table = pa.table(columns, schema=SCHEMAS[STEPS])
        steps = [record.step for record in records]
        part = self._write(STEPS, table, min(steps), max(steps))
        self._records = []
        return [part]

    def _write(self, kind: str, table: pa.Table, first_step: int, last_step: int) -> PartInfo:
        name = part_name(kind, first_step, last_step, self.writer)
        path = self.directory / name
        if path.exists():
            # Never replace a part: it may be committed, and a commit record holds its hash.
            raise UserError(
                f"{path} exists already; roll the ledger back to the loaded checkpoint before writing"
            )
        metadata = {META_VERSION: str(SCHEMA_VERSION), META_RUN: self.run_id, META_TABLE: kind}
        sink = pa.BufferOutputStream()
        pq.write_table(
            table.replace_schema_metadata(metadata), sink, compression="zstd", row_group_size=ROW_GROUP_ROWS
        )
        content = sink.getvalue()
        # Hashed in memory, so that the record holds what was meant to reach the disk.
        digest = hashlib.sha256(content).hexdigest()
        write_atomically(path, memoryview(content))
        return PartInfo(name, table.num_rows, content.size, digest, first_step, last_step)


def _target_column(indices: NDArray[np.int32], targets: list[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(targets, pa.string()))
