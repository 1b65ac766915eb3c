"""What lies beside a prepared PREFIX.bin/.idx: PREFIX.json and PREFIX.documents.parquet.

PREFIX.json says how the dataset was made. PREFIX.documents.parquet has one row per document, in order:

    document int64    its number in the .idx
    source   string   the record's own `source` where that field is kept, else the file
    file     string   the input file
    line     int64    1-based line of the text file or JSONL file, or 1-based row of the Parquet file
    tokens   int64    with the end-of-document token
    ...               the kept metadata fields
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from inrun_megatron.data.indexed import normalise_prefix
from inrun_megatron.errors import UserError
from inrun_megatron.ledger.files import read_json
from inrun_megatron.wording import one_line

FIXED_COLUMNS = ("document", "source", "file", "line", "tokens")
_ROWS_PER_GROUP = 1 << 16


def summary_path(prefix: str | Path) -> Path:
    """PREFIX.json"""
    return Path(f"{normalise_prefix(prefix)}.json")


def documents_path(prefix: str | Path) -> Path:
    """PREFIX.documents.parquet"""
    return Path(f"{normalise_prefix(prefix)}.documents.parquet")


def read_summary(prefix: str | Path) -> dict[str, Any] | None:
    """The content of PREFIX.json; None where there is none (a dataset prepared by other tools)."""
    path = summary_path(prefix)
    if not path.exists():
        return None
    summary = read_json(path)
    if not isinstance(summary.get("tokenizer"), dict) or "vocab_size" not in summary["tokenizer"]:
        raise UserError(
            f"{path} was not written by inrun prepare (no tokenizer in it): prepare the data again"
        )
    return summary


def read_table(path: Path, **options: Any) -> pa.Table:
    """A Parquet file beside the data; `options` as of pyarrow. UserError naming it when it is damaged."""
    try:
        return pq.read_table(path, **options)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"{path} cannot be read: {one_line(error)[:200]}; restore it from a copy, or prepare the data again"
        ) from error


class DocumentTable:
    """Collects the rows of documents.parquet in any number and writes them with one type per column.

    JSON records may give a field as an integer here and as text there, so a column's type is known only at the end: until
    then rows are spooled to a temporary file with each kept value as JSON text. The final type is bool, int64, float64
    (also for integers and floats mixed) or string; other mixtures, lists and objects stay JSON text.
    """

    def __init__(self, spool: Path, fields: Sequence[str]) -> None:
        self._fields = tuple(fields)
        # "source" has a column of its own
        self._extra = tuple(field for field in self._fields if field != "source")
        self._kinds: dict[str, set[str]] = {field: set() for field in self._fields}
        self._rows: list[tuple[Any, ...]] = []
        self._spool_path = spool
        columns = [
            ("source", pa.string()),
            ("file", pa.string()),
            ("line", pa.int64()),
            ("tokens", pa.int64()),
        ]
        self._schema = pa.schema(
            columns + [(f"kept_{position}", pa.string()) for position in range(len(self._extra))]
        )
        self._spool = pq.ParquetWriter(spool, self._schema)
        self.rows = 0

    @property
    def absent_fields(self) -> list[str]:
        """Kept fields for which no document so far had a value."""
        return [field for field in self._fields if not self._kinds[field]]

    def append(self, file: str, line: int, tokens: int, kept: Mapping[str, Any]) -> None:
        """One document; `kept` may leave out fields."""
        for field in self._fields:
            if kept.get(field) is not None:
                self._kinds[field].add(_kind(kept[field]))
        source = kept.get("source")
        source = file if source is None else source if isinstance(source, str) else _json(source)
        values = (None if kept.get(field) is None else _json(kept[field]) for field in self._extra)
        self._rows.append((source, file, line, tokens, *values))
        self.rows += 1
        if len(self._rows) == _ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        columns = zip(*self._rows, strict=True) if self._rows else ([] for _ in self._schema)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._spool.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._rows = []

    def finish(self, path: Path) -> None:
        """Write documents.parquet to `path` and remove the spool."""
        self._flush()
        self._spool.close()
        types = {field: _column_type(self._kinds[field]) for field in self._extra}
        fixed = [pa.field(name, self._schema.field(name).type) for name in FIXED_COLUMNS[1:]]
        kept = [pa.field(field, kind or pa.string()) for field, kind in types.items()]
        schema = pa.schema([pa.field("document", pa.int64()), *fixed, *kept])
        first = 0
        with pq.ParquetWriter(path, schema) as writer, pq.ParquetFile(self._spool_path) as spool:
            for batch in spool.iter_batches(batch_size=_ROWS_PER_GROUP):
                document = pa.array(range(first, first + batch.num_rows), pa.int64())
                columns = [document, *batch.columns[: len(fixed)]]
                for column, field in zip(batch.columns[len(fixed) :], self._extra, strict=True):
                    kind = types[field]
                    if kind is not None:  # decode; what stays JSON text is already in place
                        values = (None if text is None else json.loads(text) for text in column.to_pylist())
                        column = pa.array(values, kind)
                    columns.append(column)
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                first += batch.num_rows
        self._spool_path.unlink()

    def close(self) -> None:
        """Stop without a result: for errors."""
        self._spool.close()


def _json(value: Any) -> str:
    return json.dumps(
        value, ensure_ascii=False, default=str
    )  # default: dates, decimals and bytes of Parquet columns


def _kind(value: Any) -> str:
    """Type name of a value; integers beyond int64 are set apart, as no Arrow integer holds them."""
    return "big" if isinstance(value, int) and not -(2**63) <= value < 2**63 else type(value).__name__


def _column_type(kinds: set[str]) -> pa.DataType | None:
    """The column type for values of these Python types, None for JSON text."""
    if kinds == {"bool"}:
        return pa.bool_()
    if kinds == {"int"}:
        return pa.int64()
    if kinds and kinds <= {"int", "float"}:
        return pa.float64()
    # str(date) and the like have become JSON strings as well
    return pa.string() if not kinds & {"bool", "int", "big", "float", "list", "dict"} else None
