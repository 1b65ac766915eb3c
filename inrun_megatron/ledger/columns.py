"""Columns of the ledger's tables as numpy arrays: a long run has more step records than Python objects are good for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


def numbers(table: pa.Table, name: str) -> NDArray[np.float64]:
    """A numeric column in fp64, NaN for null (and for NaN: `is_known` tells them apart)."""
    return np.asarray(pc.cast(table[name], pa.float64()).to_numpy(zero_copy_only=False), np.float64)


def integers(table: pa.Table, name: str) -> NDArray[np.int64]:
    """A column of whole numbers without nulls."""
    return np.asarray(pc.cast(table[name], pa.int64()).to_numpy(), np.int64)


def is_known(table: pa.Table, name: str) -> NDArray[np.bool_]:
    """Where a column is not null."""
    return np.asarray(table[name].is_valid().to_numpy(zero_copy_only=False), bool)


def equals(table: pa.Table, name: str, value: Any) -> NDArray[np.bool_]:
    """Where a column has this value; null has none."""
    return np.asarray(pc.fill_null(pc.equal(table[name], value), False).to_numpy(zero_copy_only=False), bool)


def texts(table: pa.Table, name: str) -> NDArray[np.object_]:
    """A column of text, plain or dictionary-encoded."""
    return np.asarray(pc.cast(table[name], pa.string()).to_numpy(zero_copy_only=False), object)


def or_one(table: pa.Table, name: str) -> NDArray[np.float64]:
    """A column of factors, 1 where none (or 0) is recorded."""
    factor = numbers(table, name)
    return np.where(is_known(table, name) & (factor != 0), factor, 1.0)


def places(rows: pa.Table, keys: pa.Table) -> NDArray[np.int64]:
    """For each row the last row of ``keys`` with its step and target ``[rows]``; -1 where there is none."""
    names = pc.unique(pc.cast(keys["target"], pa.string()).combine_chunks())
    wanted, held = (_pairs(table, names) for table in (rows, keys))
    if not len(held):
        return np.full(len(wanted), -1)
    order = np.argsort(held, kind="stable")
    place = order[np.searchsorted(held, wanted, side="right", sorter=order) - 1]
    return np.where(held[place] == wanted, place, -1)


def taken(column: NDArray[Any], places: NDArray[np.int64]) -> NDArray[Any]:
    """``column[places]``, 0 where a place is -1 ``[n]``."""
    return np.append(column, 0)[places]  # the last one, at -1, is the 0


def _pairs(table: pa.Table, names: pa.Array) -> NDArray[np.int64]:
    number = pc.fill_null(pc.index_in(pc.cast(table["target"], pa.string()), names), len(names))
    return integers(table, "step") * (len(names) + 1) + np.asarray(number.to_numpy(), np.int64)
