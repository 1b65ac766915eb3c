"""Rows of one writer as durable Parquet parts.

Legend: n samples (or segments of samples) of one step on this rank, K targets in run.json's order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from inrun_megatron.errors import UserError
from inrun_megatron.ledger.files import write_atomically
from inrun_megatron.ledger.schema import (
    META_RUN,
    META_TABLE,
    META_VERSION,
    PER_TARGET_FIELDS,
    SCHEMA_VERSION,
    SCHEMAS,
    STEPS,
    STEPS_SCHEMA,
    VALUES,
    PartInfo,
    StepRecord,
    part_name,
)

ROW_GROUP_ROWS = 1 << 18
"""Rows per Parquet row group: readers skip groups by their step range."""

Block = dict[str, NDArray[Any]]
"""Columns of one `append`: step, dataset, sample, segment, tokens [n] and value [n, K]."""


@dataclass(frozen=True)
class PartWriter:
    """Writes the parts of one writer of one run."""

    directory: Path
    writer: int
    run_id: str
    targets: Sequence[str]

    def write_values(self, blocks: list[Block]) -> PartInfo:
        """One part of `values/` from blocks in the order of their steps; empties `blocks`."""
        targets = len(self.targets)
        columns = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        blocks.clear()
        first, last, n = int(columns["step"][0]), int(columns["step"][-1]), len(columns["step"])
        value = columns.pop("value").reshape(-1)
        rows = {name: np.repeat(column, targets) for name, column in columns.items()}
        names = self._target_column(np.tile(np.arange(targets, dtype=np.int32), n))
        table = pa.table({**rows, "target": names, "value": value}, schema=SCHEMAS[VALUES])
        return self._write(VALUES, table, first, last)

    def write_steps(self, records: Sequence[StepRecord]) -> PartInfo:
        """One part of `steps/`."""
        targets = len(self.targets)
        columns: dict[str, Any] = {}
        for name in STEPS_SCHEMA.names:
            if name == "target":
                columns[name] = self._target_column(np.tile(np.arange(targets, dtype=np.int32), len(records)))
            elif name in PER_TARGET_FIELDS:
                columns[name] = [x for record in records for x in (getattr(record, name) or [None] * targets)]
            else:
                columns[name] = [getattr(record, name) for record in records for _ in range(targets)]
        steps = [record.step for record in records]
        return self._write(STEPS, pa.table(columns, schema=SCHEMAS[STEPS]), min(steps), max(steps))

    def _target_column(self, indices: NDArray[np.int32]) -> pa.DictionaryArray:
        return pa.DictionaryArray.from_arrays(
            pa.array(indices, pa.int32()), pa.array(self.targets, pa.string())
        )

    def _write(self, kind: str, table: pa.Table, first_step: int, last_step: int) -> PartInfo:
        metadata = {META_VERSION: str(SCHEMA_VERSION), META_RUN: self.run_id, META_TABLE: kind}
        name = part_name(kind, first_step, last_step, self.writer)
        return write_part(
            self.directory, name, table.replace_schema_metadata(metadata), first_step, last_step
        )


def write_part(directory: Path, name: str, table: pa.Table, first_step: int, last_step: int) -> PartInfo:
    """One durable part. Its schema's metadata say of which run and table it is."""
    path = directory / name
    if path.exists():
        # Never replace a part: it may be committed, and a commit record holds its hash.
        raise UserError(
            f"{path} exists already; roll the ledger back to the loaded checkpoint before writing"
        )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=ROW_GROUP_ROWS)
    content = sink.getvalue()
    # Hashed in memory, so that the record holds what was meant to reach the disk.
    digest = hashlib.sha256(content).hexdigest()
    write_atomically(path, memoryview(content))
    return PartInfo(name, table.num_rows, content.size, digest, first_step, last_step)
