"""From input files to documents: pieces of work, and the reading of one piece.

A *piece* is what one worker process tokenizes at a time: a whole text file, some lines of a JSONL or text file, or one row
group of a Parquet file. Pieces come in the order of the inputs, so the result does not depend on the number of workers.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from inrun_megatron.data.inputs import Format, kind_of
from inrun_megatron.errors import UserError
from inrun_megatron.wording import one_line

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class ReadOptions:
    """How documents are read."""

    format: Format = "auto"
    """text: a file is a document; lines: a line of a text file is a document; auto: by suffix, else text."""
    text_field: str = "text"
    """JSONL field or Parquet column of the text."""
    keep: tuple[str, ...] = ()
    """Metadata fields of JSONL and Parquet records to keep."""
    replace_invalid: bool = False
    """Replace bytes that are not UTF-8 by U+FFFD instead of stopping."""


@dataclass(frozen=True)
class Piece:
    """One unit of work. `weight`: its share of the input's bytes on disk, for the progress bar."""

    path: str
    kind: Format
    weight: int
    lines: tuple[tuple[int, bytes], ...] = ()
    """(1-based line number, content) of JSONL and line-wise text."""
    row_group: int = 0
    first_row: int = 0


@dataclass(frozen=True)
class Document:
    """One document before tokenization."""

    text: str
    line: int
    kept: Mapping[str, Any] = field(default_factory=dict)


def pieces(files: Sequence[str], options: ReadOptions) -> Iterator[Piece]:
    """The pieces of all files, in order."""
    for path in files:
        kind = kind_of(path, options.format)
        try:
            if kind == "parquet":
                yield from _parquet_pieces(path, options)
            elif kind == "text":
                yield Piece(path, kind, os.path.getsize(path))
            else:
                yield from _line_pieces(path, kind)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _open(path: str) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.lower().endswith(".gz") else open(path, "rb")


def _line_pieces(path: str, kind: Format) -> Iterator[Piece]:
    lines: list[tuple[int, bytes]] = []
    size, last_size, total, scale = 0, 0, os.path.getsize(path), 1.0
    with _open(path) as file:
        for number, line in enumerate(_lines(file, path), start=1):
            lines.append((number, line))
            size += len(line)
            if size >= _PIECE_BYTES:
                if isinstance(file, gzip.GzipFile):  # progress is counted in bytes on disk
                    scale = file.fileobj.tell() / max(last_size + size, 1) if file.fileobj else 1.0
                weight = min(int(size * scale), total)
                total -= weight
                yield Piece(path, kind, weight, tuple(lines))
                lines, last_size, size = [], last_size + size, 0
    yield Piece(path, kind, total, tuple(lines))


def _lines(file: BinaryIO, path: str) -> Iterator[bytes]:
    try:
        yield from file
    except (EOFError, zlib.error):
        raise _damaged(path) from None


def _damaged(path: str) -> UserError:
    return UserError(f"{path} is a truncated or damaged gzip file: copy it again")


def _parquet_pieces(path: str, options: ReadOptions) -> Iterator[Piece]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema, rows = (
                file.schema_arrow,
                [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)],
            )
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is no Parquet file that can be read ({one_line(error)})") from None
    for name in (options.text_field, *options.keep):
        if name not in schema.names:
            option = "--text-field" if name == options.text_field else "--metadata-fields"
            raise UserError(
                f"{path} has no column {name!r} ({option}); its columns are {', '.join(schema.names)}"
            )
    kind = schema.field(options.text_field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(
            f"column {options.text_field!r} of {path} holds {kind}, not text: choose another --text-field"
        )
    weight = os.path.getsize(path) // max(len(rows), 1)
    for group, _ in enumerate(rows):
        yield Piece(path, "parquet", weight, row_group=group, first_row=sum(rows[:group]) + 1)


def read_piece(piece: Piece, options: ReadOptions) -> list[Document]:
    """The documents of one piece, empty ones included. UserErrors name the file and the line."""
    if piece.kind == "parquet":
        documents = _read_parquet(piece, options)
    elif piece.kind == "jsonl":
        documents = [
            _read_record(line, number, piece.path, options)
            for number, line in piece.lines
            if line.strip(b" \t\r\n")
        ]
    elif piece.kind == "lines":
        documents = [
            Document(_decode(line.rstrip(b"\r\n"), piece.path, number, options), number)
            for number, line in piece.lines
        ]
    else:
        documents = [_read_text(piece.path, options)]
    return documents


def _read_text(path: str, options: ReadOptions) -> Document:
    try:
        with _open(path) as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (EOFError, zlib.error):
        raise _damaged(path) from None
    return Document(_decode(content.removeprefix(b"\xef\xbb\xbf"), path, None, options), 1)


def _decode(content: bytes, path: str, line: int | None, options: ReadOptions) -> str:
    try:
        return content.decode("utf-8", errors="replace" if options.replace_invalid else "strict")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1 if line is None else line
        raise UserError(
            f"{path}:{line}: byte 0x{content[error.start]:02x} is not UTF-8: convert the file, or give --replace-invalid"
        ) from None


def _encodable(value: Any, where: str, options: ReadOptions) -> Any:
    """A value of JSON, whose strings can hold half of a surrogate pair: text for Python, but without UTF-8."""
    errors = "replace" if options.replace_invalid else "strict"
    try:
        if isinstance(value, str):
            return value.encode("utf-8", errors).decode("utf-8")
        if isinstance(value, list | dict):
            return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", errors))
    except UnicodeEncodeError:
        raise UserError(
            f"{where} has half of a surrogate pair: repair it, or give --replace-invalid"
        ) from None
    return value


def _read_record(content: bytes, line: int, path: str, options: ReadOptions) -> Document:
    text = _decode(content.removeprefix(b"\xef\xbb\xbf") if line == 1 else content, path, line, options)
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{line}: invalid JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{path}:{line}: invalid JSON (nested too deeply)") from None
    except ValueError:  # Python's own limit for integers
        limit = sys.get_int_max_str_digits()
        raise UserError(
            f"{path}:{line}: an integer has more than {limit} digits: write it as a string, or leave it out"
        ) from None
    if not isinstance(record, dict):
        raise UserError(
            f"{path}:{line}: a JSON {type(record).__name__} where an object with {options.text_field!r} was expected"
        )
    if options.text_field not in record:
        raise UserError(
            f"{path}:{line}: no field {options.text_field!r} (the record has {', '.join(map(repr, record)) or 'none'}): "
            "choose it with --text-field"
        )
    value = record[options.text_field]
    if value is None:
        value = ""
    if not isinstance(value, str):
        raise UserError(
            f"{path}:{line}: field {options.text_field!r} holds a {type(value).__name__}, not text"
        )
    kept = {
        name: _encodable(record[name], f"{path}:{line}: field {name!r}", options)
        for name in options.keep
        if name in record
    }
    return Document(_encodable(value, f"{path}:{line}: the text", options), line, kept)


def _read_parquet(piece: Piece, options: ReadOptions) -> list[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(dict.fromkeys((options.text_field, *options.keep)))
    try:
        with pq.ParquetFile(piece.path) as file:
            table = file.read_row_group(piece.row_group, columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        reason = one_line(error)
        raise UserError(f"{piece.path}: row group {piece.row_group} cannot be read ({reason})") from None
    texts = table.column(options.text_field).to_pylist()
    kept = table.select(list(options.keep)).to_pylist() if options.keep else [{}] * len(texts)
    rows = zip(texts, kept, strict=True)
    return [Document(text or "", piece.first_row + row, fields) for row, (text, fields) in enumerate(rows)]
