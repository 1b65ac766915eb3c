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
from inrun_megatron.ledger.read import Ledger, one_line
from inrun_megatron.ledger.schema import VALUES, PartInfo

Item = TypeVar("Item")
Result = TypeVar("Result")

COLUMNS = ["step", "dataset", "sample", "target", "value"]

MOST_WORKERS = 8
"""Memory grows with each: a part's rows, or one piece of the samples."""


@dataclass
class Draws:
    """n samples in the order of the ledger's files. A sample that was scored in several steps is there once for each."""

    step: np.ndarray
    """[n] int32"""
    dataset: np.ndarray
    """[n] int16"""
    sample: np.ndarray
    """[n] int64"""
    value: np.ndarray
    """[n, targets] float64; not finite where the ledger has no finite value."""


BYTES_PER_DRAW = 4 + 2 + 8 + 16
"""Besides 8 for each target; 16: its place while a dataset is sorted."""


def read_draws(ledger: Ledger, targets: Sequence[str], first: int, last: int) -> Draws:
    """All samples of steps [first, last], with their values towards `targets`. Raises UserError on a part that cannot
    be read."""
    parts = [part for part in ledger.parts(VALUES) if part.first_step <= last and part.last_step >= first]
    wanted = [ledger.target_names.index(target) for target in targets]
    size = sum(-(-part.rows // len(ledger.target_names)) for part in parts)
    # Pages that are not written take no memory.
    found = Draws(
        np.empty(size, np.int32),
        np.empty(size, np.int16),
        np.empty(size, np.int64),
        np.empty((size, len(wanted))),
    )
    held = 0
    for own in in_order(lambda part: _read_part(ledger, part, wanted, first, last), parts):
        end = held + len(own.step)
        for name, column in vars(own).items():
            into = getattr(found, name)
            if end > len(into):
                into = np.resize(into, (end + end // 4, *into.shape[1:]))
                setattr(found, name, into)
            into[held:end] = column
        held = end
    return Draws(found.step[:held], found.dataset[:held], found.sample[:held], found.value[:held])


def _read_part(ledger: Ledger, part: PartInfo, wanted: Sequence[int], first: int, last: int) -> Draws:
    path, targets = ledger.directory / part.file, len(ledger.target_names)
    try:
        table = _rows(path, first, last)
        code = _positions(table["target"], ledger.target_names)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"{path} cannot be read: {one_line(error)[:300]}; `inrun verify` names damaged parts"
        ) from error
    step, dataset, sample, value = (table[name].to_numpy() for name in ("step", "dataset", "sample", "value"))
    if part.first_step < first or part.last_step > last:
        # Before samples are made out: a group of rows may begin inside one, of an earlier step then.
        inside = (step >= first) & (step <= last)
        step, dataset, sample, value, code = (
            column[inside] for column in (step, dataset, sample, value, code)
        )
    if _is_whole((step, dataset, sample), code, targets):
        step, dataset, sample = step[::targets], dataset[::targets], sample[::targets]
        value = value.reshape(-1, targets)
    else:
        value = np.where(code[:, None] == np.arange(targets), value[:, None], np.nan)
    return Draws(step, dataset, sample, value if len(wanted) == targets else value[:, wanted])


def _rows(path: Path, first: int, last: int) -> pa.Table:
    """The row groups that may hold steps [first, last]."""
    with pq.ParquetFile(path) as file:
        column = file.schema_arrow.get_field_index("step")
        groups = []
        for group in range(file.num_row_groups):
            known = file.metadata.row_group(group).column(column).statistics
            if known is None or not known.has_min_max or (known.min <= last and known.max >= first):
                groups.append(group)
        return file.read_row_groups(groups, columns=COLUMNS, use_threads=False)


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
