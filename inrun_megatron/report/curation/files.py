"""The directory that `inrun curate` writes.

DIR/NAME.bin, .idx, .json, .documents.parquet     each dataset that lost documents
DIR/keep_list.parquet                             every document: kept or why not, score, new number
DIR/curation.json                                 the rules, figures per dataset, data path and split
DIR/data_path.txt                                 `--data-path ... --split ...`, ready to paste
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from inrun_megatron.data.filtered import write_filtered
from inrun_megatron.data.origin import CURATION_FILE, KEEP_LIST_FILE, Origin, origin_of
from inrun_megatron.errors import UserError
from inrun_megatron.report.curation.candidates import REASONS, Candidates
from inrun_megatron.report.documents.lookup import Documents

_OWN_NAMES = {Path(CURATION_FILE).stem, Path(KEEP_LIST_FILE).stem}
"""A dataset of such a name would have its files take the place of these."""

KEEP_LIST_SCHEMA = pa.schema(
    [
        pa.field("dataset", pa.string()),
        pa.field("document", pa.int64()),
        pa.field("kept", pa.bool_()),
        pa.field("reason", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("samples", pa.int64()),
        pa.field("tokens", pa.int64()),
        pa.field("new_document", pa.int64()),
        pa.field("origin_document", pa.int64()),
    ]
)


def output_names(names: Sequence[str]) -> list[str]:
    """A file name per dataset: its name with what a path would misread replaced, made unique by a number."""
    safe = [
        "".join(c if c.isalnum() or c in "._-" else "_" for c in name).lstrip(".") or "data" for name in names
    ]
    single = {name for name in safe if safe.count(name) == 1 and name not in _OWN_NAMES}
    taken, found = {*safe, *_OWN_NAMES}, []
    for index, name in enumerate(safe):
        file, number = name, index + 1
        while file in taken and name not in single:
            file, number = f"{name}_{number}", number + 1
        taken.add(file)
        found.append(file)
    return found


def data_path(prefixes: Sequence[str], weights: Sequence[float]) -> list[str]:
    """Megatron's `--data-path`: weight and prefix in turn; datasets of weight 0 are left out."""
    return [
        piece
        for prefix, weight in zip(prefixes, weights, strict=True)
        if weight > 0
        for piece in (f"{weight:.6g}", prefix)
    ]


def pasted(record: Mapping[str, Any]) -> str:
    """The flags of the next run as one line for a shell. record: content of curation.json."""
    return shlex.join(["--data-path", *record["data_path"], "--split", record["split"]])


def check_output(directory: Path, overwrite: bool, read: Sequence[str]) -> None:
    """Raise UserError where `directory` may not be written: it exists, or holds data of the run."""
    for prefix in read:
        if Path(prefix).absolute().parent.resolve() == directory.resolve():
            raise UserError(
                f"--output {directory} holds {prefix}, which the run read; choose another directory"
            )
    if directory.exists() and not overwrite:
        raise UserError(f"{directory} exists; choose another --output, or give --overwrite")
    if directory.exists() and not (directory / CURATION_FILE).is_file():
        raise UserError(
            f"{directory} was not written by inrun curate (no {CURATION_FILE} in it), so it is not replaced; "
            "choose another --output"
        )


def write_curation(
    directory: Path,
    documents: Documents,
    datasets: Sequence[Candidates],
    record: dict[str, Any],
) -> list[str]:
    """Write the directory: under another name first, then renamed, so that it is there whole or not at all.

    record: content of curation.json; its `datasets` have `name`, `prefix` (None: nothing left) and `rewritten`. Returns
    names of files beside the datasets that could not be carried over.
    """
    work = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    left: list[str] = []
    try:
        work.mkdir(parents=True)
        with pq.ParquetWriter(work / KEEP_LIST_FILE, KEEP_LIST_SCHEMA) as keep_list:
            for index, (data, row) in enumerate(zip(datasets, record["datasets"], strict=True)):
                source = documents.resolver.file(index)
                origin = origin_of(source, documents.idx_sha256(index))
                row["origin_idx_sha256"] = origin.idx_sha256
                row["origin_bin_digest"] = origin.bin_digest
                if row["rewritten"]:
                    kept = np.flatnonzero(data.kept)
                    named = {"run": record["run"], "from": str(Path(source.prefix).absolute())}
                    left += write_filtered(source, kept, work / Path(row["prefix"]).name, named)
                keep_list.write_table(_keep_list(data, origin, row["rewritten"]))
        (work / "data_path.txt").write_text(f"{pasted(record)}\n", encoding="utf-8")
        (work / CURATION_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if directory.exists():
            old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
            directory.rename(old)
            work.rename(directory)
            shutil.rmtree(old)
        else:
            work.rename(directory)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return left


def _keep_list(data: Candidates, origin: Origin, rewritten: bool) -> pa.Table:
    numbers = np.arange(len(data.tokens), dtype=np.int64)
    # In a dataset that is used as it is every document keeps its number.
    new = np.where(data.kept, np.cumsum(data.kept) - 1, 0) if rewritten else numbers
    columns: Mapping[str, pa.Array] = {
        "dataset": pa.array([data.name] * len(numbers), pa.string()),
        "document": pa.array(numbers),
        "kept": pa.array(data.kept),
        "reason": pa.array(np.array(REASONS, dtype=object)[data.fate], pa.string()),
        "score": pa.array(data.score, mask=~np.isfinite(data.score)),
        "samples": pa.array(data.samples),
        "tokens": pa.array(data.tokens),
        "new_document": pa.array(new, mask=~data.kept),
        "origin_document": pa.array(origin.documents(numbers)),
    }
    return pa.table(columns, schema=KEEP_LIST_SCHEMA)
