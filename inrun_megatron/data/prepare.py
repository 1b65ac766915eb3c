"""Text, JSONL and Parquet files to a Megatron indexed dataset: PREFIX.bin, .idx, .json and .documents.parquet."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from inrun_megatron.data.documents import FIXED_COLUMNS, DocumentTable, documents_path, summary_path
from inrun_megatron.data.indexed import normalise_prefix
from inrun_megatron.data.inputs import FORMATS, Format, find_inputs, kind_of
from inrun_megatron.data.readers import ReadOptions, pieces
from inrun_megatron.data.tokenization import TokenizedPiece, TokenizeJob, tokenized
from inrun_megatron.data.tokenizers import build_tokenizer
from inrun_megatron.errors import UserError
from inrun_megatron.ledger.files import fsync_directory

_LARGEST_DOCUMENT = 2**31 - 1  # the .idx holds lengths as int32


@dataclass(frozen=True)
class PrepareSummary:
    """What `prepare` made."""

    prefix: str
    documents: int
    tokens: int
    """Tokens with the end-of-document tokens."""
    empty: int
    """Documents without text: left out."""
    files: int
    input_bytes: int
    bin_bytes: int
    tokenizer: dict[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON-serialisable values."""
        return asdict(self)


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path = "bytes",
    eod_token: str | None = None,
    text_field: str = "text",
    keep: Sequence[str] = (),
    format: Format = "auto",
    append_eod: bool = True,
    replace_invalid: bool = False,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = False,
) -> PrepareSummary:
    """Tokenize `inputs` (files, directories, globs) into the dataset with the prefix `output`.

    Documents keep the order of the inputs whatever the number of `workers`; an end-of-document token follows each
    (`append_eod`); documents without text are left out and counted. All files appear at the end by renames, the .idx
    last, so that a dataset is there whole or not at all. Raises UserError on bad input, naming file and line.
    """
    started = time.monotonic()
    if format not in FORMATS:
        raise UserError(f"the format {format!r} is not known: use one of {', '.join(FORMATS)}")
    if workers < 1:
        raise UserError(f"--workers is {workers}: use 1 for one process, or more")
    prefix = normalise_prefix(output)
    options = ReadOptions(format, text_field, _checked_fields(keep), replace_invalid)
    files = find_inputs(inputs, format)
    targets = _check_output(prefix, files, overwrite)
    if options.keep and not any(kind_of(path, format) in ("jsonl", "parquet") for path in files):
        raise UserError(
            f"--metadata-fields {','.join(options.keep)}: text files have no fields; use it with JSONL or Parquet"
        )
    tokens_of = build_tokenizer(tokenizer, eod_token)
    directory = Path(prefix).absolute().parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{Path(prefix).name}.", suffix=".tmp", dir=directory))
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}") from None
    try:
        # only here, after the checks: it imports torch
        from inrun_megatron.data.megatron import DType

        dtype = np.dtype(DType.optimal_dtype(tokens_of.vocab_size))
        job = TokenizeJob(tokenizer, eod_token, dtype.str, append_eod, options)
        input_bytes = sum(map(os.path.getsize, files))
        bar = tqdm(
            total=input_bytes, unit="B", unit_scale=True, desc="prepare", disable=None if progress else True
        )
        with bar, contextlib.closing(tokenized(pieces(files, options), job, tokens_of, workers)) as results:
            figures = _write(results, dtype, options.keep, bar, work)
        summary = PrepareSummary(
            prefix=prefix,
            files=len(files),
            input_bytes=input_bytes,
            bin_bytes=(work / "bin").stat().st_size,
            tokenizer=tokens_of.describe(),
            seconds=time.monotonic() - started,
            **figures,
        )
        record = {
            "tokenizer": summary.tokenizer,
            "documents": summary.documents,
            "tokens": summary.tokens,
            "inputs": [str(item) for item in inputs],
            "files": summary.files,
            "input_bytes": summary.input_bytes,
            "empty_documents": summary.empty,
            "append_eod": append_eod,
            "format": format,
            "text_field": text_field,
            "keep": list(options.keep),
            "version": package_version(),
        }
        (work / "json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        _publish(work, targets, directory)
        return summary
    except OSError as error:
        raise UserError(f"cannot write {prefix}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def package_version() -> str:
    """Version of this package; "unknown" where it runs from a checkout that is not installed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("inrun-megatron")
    return "unknown"


def _checked_fields(keep: Sequence[str]) -> tuple[str, ...]:
    fields = tuple(dict.fromkeys(keep))
    for name in fields:
        if name in FIXED_COLUMNS and name != "source":
            raise UserError(
                f"--metadata-fields {name}: documents.parquet has a column of its own with this name; rename the field"
            )
    return fields


def _check_output(prefix: str, files: Sequence[str], overwrite: bool) -> dict[str, Path]:
    """The four output paths by their name in the work directory, in the order of their renames."""
    if not Path(prefix).name or prefix.endswith(os.sep):
        example = os.path.join(prefix.rstrip(os.sep) or "data", "corpus")
        raise UserError(
            f"--output {prefix!r} is a directory and no PREFIX of files: give a path such as {example}"
        )
    targets = {
        "bin": Path(f"{prefix}.bin"),
        "documents": documents_path(prefix),
        "json": summary_path(prefix),
        "idx": Path(f"{prefix}.idx"),
    }
    read = {os.path.realpath(path) for path in files}
    for path in targets.values():
        if os.path.realpath(path) in read:
            raise UserError(f"--output {prefix} would overwrite the input {path}: choose another prefix")
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists: give --overwrite to replace the dataset, or another --output")
    return targets


def _write(
    results: Iterable[TokenizedPiece], dtype: np.dtype, keep: Sequence[str], bar: tqdm, work: Path
) -> dict[str, int]:
    """Write bin, idx and documents into the directory `work`; returns the counts."""
    from inrun_megatron.data.megatron import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(work / "bin"), dtype=dtype.type)
    table = DocumentTable(work / "spool", keep)
    tokens = empty = 0
    try:
        for result in results:
            end = 0
            for length, line, kept in zip(result.lengths, result.lines, result.kept, strict=True):
                if length > _LARGEST_DOCUMENT:
                    raise UserError(
                        f"{result.path}:{line}: {length} tokens in one document are more than the format allows "
                        f"({_LARGEST_DOCUMENT}): split it (--format lines takes each line as a document)"
                    )
                builder.add_document(result.tokens[end : end + length], [length])
                table.append(result.path, line, length, kept)
                end += length
            tokens += end
            empty += result.empty
            bar.update(result.weight)
            bar.set_postfix(documents=table.rows, tokens=tokens, refresh=False)
        if table.rows == 0:
            raise UserError(f"the input holds no text ({empty} empty documents): nothing was written")
        if table.absent_fields:
            raise UserError(
                f"no record has a value for the field {', '.join(map(repr, table.absent_fields))} (--metadata-fields): check its "
                "spelling or leave it out"
            )
        builder.finalize(str(work / "idx"))
        table.finish(work / "documents")
    finally:
        builder.data_file.close()
        table.close()
    return {"documents": table.rows, "tokens": tokens, "empty": empty}


def _publish(work: Path, targets: dict[str, Path], directory: Path) -> None:
    """Rename the finished files into place. Without its .idx a dataset does not exist: it goes first and comes last."""
    for name in targets:
        with open(work / name, "rb") as file:
            os.fsync(file.fileno())
    targets["idx"].unlink(missing_ok=True)
    fsync_directory(directory)
    for name, path in targets.items():
        os.replace(work / name, path)
    fsync_directory(directory)
