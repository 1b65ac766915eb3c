"""Scored samples of a range of steps as arrays: what is summed outside SQL.

The ledger's writer puts a sample's rows, one per target, one after another. Where a part has that shape it is read as it
is, without grouping; in a part that has not, each row stands for itself, which gives the same sums.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from inrun_megatron.errors import UserError
from inrun_megatron.ledger.read import Ledger
from inrun_megatron.ledger.schema import VALUES, PartInfo
from inrun_megatron.report.documents.neighbours import changes, starts
from inrun_megatron.wording import one_line

Item = TypeVar("Item")
Result = TypeVar("Result")

KEYS = ["step", "dataset", "sample"]
CUT = ["segment", "tokens"]

MOST_WORKERS = 8
"""Memory grows with each: a part's rows, or one piece of the samples."""


@dataclass
class Draws:
    """n samples in the order of the ledger's files. A sample that was scored in several steps is there once for each.

    `value`, `tokens` and `segment` are of rows: one for each sample where samples are scored whole, else one for each of its
    segments [rows]; those of a sample are neighbours, in the order of the segments.
    """

    step: np.ndarray
    """[n] int32"""
    dataset: np.ndarray
    """[n] int16"""
    sample: np.ndarray
    """[n] int64"""
    value: np.ndarray
    """[rows, targets] float64; not finite where the ledger has no finite value."""
    begin: np.ndarray | None = None
    """[n] int64, the first row of each sample; None where samples are scored whole: draw i has row i."""
    tokens: np.ndarray | None = None
    """[rows] int32, loss tokens; None like `begin`."""
    segment: np.ndarray | None = None
    """[rows] int32; None like `begin`."""


OF_ROWS = ("value", "tokens", "segment")

BYTES_PER_DRAW = 4 + 2 + 8 + 16
"""Besides 8 for each target; 16: its place while a dataset is sorted."""


def read_draws(ledger: Ledger, targets: Sequence[str], first: int, last: int) -> Draws:
    """All samples of steps [first, last], with their values towards `targets`. Raises UserError on a part that cannot
    be read."""
    parts = [part for part in ledger.parts(VALUES) if part.first_step <= last and part.last_step >= first]
    wanted = [ledger.target_names.index(target) for target in targets]
    size = sum(-(-part.rows // len(ledger.target_names)) for part in parts)
    # Pages that are not written take no memory.
    columns: dict[str, np.ndarray] = {
        "step": np.empty(size, np.int32),
        "dataset": np.empty(size, np.int16),
        "sample": np.empty(size, np.int64),
        "value": np.empty((size, len(wanted))),
    }
    if ledger.granularity != "sample":
        columns |= {
            "begin": np.empty(size, np.int64),
            "tokens": np.empty(size, np.int32),
            "segment": np.empty(size, np.int32),
        }
    draws = rows = 0
    for own in in_order(lambda part: _read_part(ledger, part, wanted, first, last), parts):
        if own.begin is not None:
            own.begin += rows
        for name in columns:
            column, start = getattr(own, name), rows if name in OF_ROWS else draws
            end, into = start + len(column), columns[name]
            if end > len(into):
                columns[name] = into = np.resize(into, (end + end // 4, *into.shape[1:]))
            into[start:end] = column
        draws, rows = draws + len(own.step), rows + len(own.value)
    return Draws(**{name: column[: rows if name in OF_ROWS else draws] for name, column in columns.items()})


def _read_part(ledger: Ledger, part: PartInfo, wanted: Sequence[int], first: int, last: int) -> Draws:
    path, targets = ledger.directory / part.file, len(ledger.target_names)
    cut = ledger.granularity != "sample"
    names = KEYS + (CUT if cut else [])
    try:
        table = _rows(path, [*names, "target", "value"], first, last)
        code = _positions(table["target"], ledger.target_names)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"{path} cannot be read: {one_line(error)[:300]}; `inrun verify` names damaged parts"
        ) from error
    keys, value = [table[name].to_numpy() for name in names], table["value"].to_numpy()
    if part.first_step < first or part.last_step > last:
        # Before samples are made out: a group of rows may begin inside one, of an earlier step then.
        inside = (keys[0] >= first) & (keys[0] <= last)
        keys, value, code = [key[inside] for key in keys], value[inside], code[inside]
    if _is_whole(keys, code, targets):
        keys, value = [key[::targets] for key in keys], value.reshape(-1, targets)
    else:
        value = np.where(code[:, None] == np.arange(targets), value[:, None], np.nan)
    if len(wanted) < targets:
        value = value[:, wanted]
    if cut:
        return _by_sample(keys, value)
    step, dataset, sample = keys
    return Draws(step, dataset, sample, value)


def _by_sample(keys: Sequence[np.ndarray], value: np.ndarray) -> Draws:
    """Draws of rows that are segments. keys [rows] each: KEYS and CUT."""
    step, dataset, sample, segment, tokens = keys
    rows = [step, dataset, sample]
    fresh = changes(*rows)
    begin = np.flatnonzero(fresh)
    if not (segment == np.arange(len(step)) - begin[np.cumsum(fresh) - 1]).all():
        order = np.lexsort((segment, sample, dataset, step))
        rows = [key[order] for key in rows]
        segment, tokens, value = segment[order], tokens[order], value[order]
        begin = starts(*rows)
    step, dataset, sample = (key[begin] for key in rows)
    return Draws(step, dataset, sample, value, begin, tokens, segment)


def _rows(path: Path, columns: list[str], first: int, last: int) -> pa.Table:
    """The row groups that may hold steps [first, last]."""
    with pq.ParquetFile(path) as file:
        column = file.schema_arrow.get_field_index("step")
        groups = []
        for group in range(file.num_row_groups):
            known = file.metadata.row_group(group).column(column).statistics
            if known is None or not known.has_min_max or (known.min <= last and known.max >= first):
                groups.append(group)
        return file.read_row_groups(groups, columns=columns, use_threads=False)


def _positions(target: pa.ChunkedArray, names: Sequence[str]) -> np.ndarray:
    """Position of each row's target in `names`, -1 for others."""
    if not len(target):
        return np.empty(0, np.int64)
    encoded = target.unify_dictionaries().combine_chunks()
    known = {name: position for position, name in enumerate(names)}
    position = np.array([known.get(name, -1) for name in encoded.dictionary.to_pylist()], np.int64)
    return np.asarray(position[encoded.indices.to_numpy()])


def _is_whole(keys: Sequence[np.ndarray], code: np.ndarray, targets: int) -> bool:
    """Do each `targets` rows belong to one sample, in the order of the targets?"""
    if len(code) % targets or not (code.reshape(-1, targets) == np.arange(targets)).all():
        return False
    return all(bool((key.reshape(-1, targets) == key[::targets, None]).all()) for key in keys)


def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Results of `work` in the order of `items`, made by threads that run only a little ahead of the consumer."""
    workers = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
