"""Which files the inputs of `inrun prepare` name, and the format of each."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from inrun_megatron.errors import UserError

Format = Literal["auto", "text", "lines", "jsonl", "parquet"]
FORMATS: tuple[Format, ...] = ("auto", "text", "lines", "jsonl", "parquet")
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet", ".pq")
DIRECTORY_SUFFIXES = (".txt", ".text", ".md", ".rst", ".jsonl", ".ndjson", *PARQUET_SUFFIXES)
"""What is taken from a directory (also with .gz, except Parquet). Anything else is named by a glob or a path."""


def find_inputs(inputs: Sequence[str | Path], format: Format = "auto") -> list[str]:
    """All files that `inputs` (files, directories, globs with **) name, in order, each once.

    Directories are walked in sorted order without hidden files. UserError for whatever names nothing.
    """
    files: dict[str, str] = {}
    for item in map(str, inputs):
        for path in _named(item, format):
            _check_name(path)
            files.setdefault(os.path.realpath(path), path)
    if not files:
        raise UserError("no input is given: name files, directories or globs")
    return list(files.values())


def _named(item: str, format: Format) -> list[str]:
    """The files of one input. UserError where there are none."""
    if os.path.isdir(item):
        found = list(_walk(item, format))
        if not found:
            raise UserError(
                f"the directory {item} holds no file with one of the suffixes {' '.join(_suffixes(format))}: name the files by a "
                f"glob such as '{item.rstrip('/')}/**/*'"
            )
        return found
    if os.path.isfile(item):
        return [item]
    if not glob.has_magic(item):
        raise UserError(f"the input {item} does not exist")
    found = sorted(path for path in glob.glob(item, recursive=True) if os.path.isfile(path))
    if not found:
        raise UserError(f"no file matches {item!r}")
    return found


def _check_name(path: str) -> None:
    """documents.parquet keeps the name of every document's file, as UTF-8."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", errors="replace")
        raise UserError(f"the name of the input {shown} is not UTF-8: rename the file") from None


def _suffixes(format: Format) -> tuple[str, ...]:
    """Of the files that are taken from a directory."""
    if format == "auto":
        return DIRECTORY_SUFFIXES
    if format == "jsonl":
        return JSONL_SUFFIXES
    if format == "parquet":
        return PARQUET_SUFFIXES
    return tuple(suffix for suffix in DIRECTORY_SUFFIXES if kind_of(f"x{suffix}", "auto") == "text")


def _walk(directory: str, format: Format) -> Iterator[str]:
    wanted = _suffixes(format)
    for parent, directories, names in os.walk(directory):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in sorted(names):
            # documents.parquet is what an earlier inrun prepare left in the directory, and no input
            if name.startswith(".") or name.endswith(".documents.parquet"):
                continue
            if name.lower().removesuffix(".gz").endswith(wanted):
                yield os.path.join(parent, name)


def kind_of(path: str, format: Format) -> Format:
    """The format of one file."""
    if format != "auto":
        return format
    suffix = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    if suffix in JSONL_SUFFIXES:
        return "jsonl"
    return "parquet" if suffix in PARQUET_SUFFIXES else "text"
