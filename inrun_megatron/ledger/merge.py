"""Small parts of one commit, written anew as few larger ones before the commit names them.

Every writer leaves a part at every commit: 128 replicas that commit every 100 steps would leave 128,000 files in 100,000
steps, of a few thousand rows each, and every pass of a reader opens all of them. So rank 0 merges what a commit would
name, and removes the small parts afterwards. No commit has named those: a reader never sees them, and a crash at any
instant leaves files that a resume removes.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from inrun_megatron.errors import UserError
from inrun_megatron.ledger.parts import write_part
from inrun_megatron.ledger.schema import VALUES, PartInfo

MOST_PARTS = 8
"""Small parts of `values/` that a commit names as they are."""

MERGED_ROWS = 1 << 20
"""Rows of a merged part, at most: about 100 MB while it is made. A part of half as many is not small."""


def merge_small(directory: Path, parts: Sequence[PartInfo]) -> tuple[list[PartInfo], list[PartInfo]]:
    """What to commit in the place of `parts`, and those of them that nobody needs once that is done. Rank 0 only.

    All parts are durable, and so is what is returned. Parts that cannot be merged (a full disk, say, or bytes that are not
    those of the record) are committed as they are: it costs readers time, and no value.
    """
    small = [part for part in parts if part.table == VALUES and part.rows < MERGED_ROWS // 2]
    if len(small) <= MOST_PARTS:
        return list(parts), []
    merged: list[PartInfo] = []
    replaced: list[PartInfo] = []
    for group in _groups(small):
        try:
            merged.append(_merged(directory, group))
        except (UserError, OSError, pa.ArrowException):
            continue
        replaced += group
    gone = set(replaced)
    return [part for part in parts if part not in gone] + merged, replaced


def remove(directory: Path, parts: Iterable[PartInfo]) -> None:
    """Take away parts that no commit names. What the file system keeps, the next resume removes."""
    for part in parts:
        with contextlib.suppress(OSError):
            (directory / part.file).unlink()


def _groups(small: Sequence[PartInfo]) -> list[list[PartInfo]]:
    """Neighbours in the order of steps, with at most MERGED_ROWS rows together; two parts at least."""
    groups: list[list[PartInfo]] = []
    held = MERGED_ROWS
    for part in sorted(small, key=lambda part: part.first_step):
        if held + part.rows > MERGED_ROWS:
            groups.append([])
            held = 0
        groups[-1].append(part)
        held += part.rows
    return [group for group in groups if len(group) > 1]


def _merged(directory: Path, group: Sequence[PartInfo]) -> PartInfo:
    """One durable part of the rows of `group`, by step. Raises OSError where a file is not what was written."""
    tables = []
    for part in group:
        content = (directory / part.file).read_bytes()
        if hashlib.sha256(content).hexdigest() != part.sha256:
            raise OSError(f"{part.file} is not what was written")
        tables.append(pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False))
    table = pa.concat_tables(tables).unify_dictionaries()
    del tables
    # A stable sort: rows of one sample stay together, in the order of the targets.
    table = table.take(pc.sort_indices(table, sort_keys=[("step", "ascending")]))
    first, last = group[0].first_step, max(part.last_step for part in group)
    number = 0
    while (directory / (name := f"{VALUES}/part-{first:010d}-{last:010d}-m{number}.parquet")).exists():
        number += 1
    return write_part(directory, name, table, first, last)
