"""Some documents of an indexed dataset as a dataset of their own, with what lies beside it.

PREFIX.bin, .idx                  by megatron-core's own writer
PREFIX.json                       as of the source, with the new counts and where the documents come from
PREFIX.documents.parquet          and any other PREFIX.*.parquet with one row per document: the rows kept
"""

from __future__ import annotations

import glob
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from inrun_megatron.data.documents import read_summary, summary_path
from inrun_megatron.data.indexed import IndexedFile


def write_filtered(
    source: IndexedFile, documents: np.ndarray, prefix: str | Path, record: Mapping[str, Any]
) -> list[str]:
    """Write `documents` (ascending numbers) of `source` as the dataset `prefix`; document n becomes its place in the list.

    record: added to PREFIX.json under `curated`, where the source has a PREFIX.json. Returns the names of files beside the
    source that were not carried over: all but tokenizers and .parquet files with one row per document.
    """
    _write_tokens(source, documents, str(prefix))
    summary = read_summary(source.prefix)
    if summary is not None:
        tokens = int(document_lengths(source)[documents].sum())
        summary |= {"documents": len(documents), "tokens": tokens, "curated": dict(record)}
        summary_path(prefix).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return _carry_sidecars(source, documents, Path(prefix))


def document_lengths(data: IndexedFile) -> np.ndarray:
    """Tokens of each document, int64 [documents]."""
    ends = np.concatenate([[0], np.cumsum(data.sequence_lengths, dtype=np.int64)])
    return np.diff(ends[data.document_boundaries])


def _write_tokens(source: IndexedFile, documents: np.ndarray, prefix: str) -> None:
    from inrun_megatron.data.megatron import IndexedDatasetBuilder  # imports torch

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=source.dtype.type)
    try:
        for document in documents:
            first, last = source.document_boundaries[document : document + 2]
            lengths = source.sequence_lengths[first:last].tolist()
            builder.add_document(source.document(int(document)), lengths)
        builder.finalize(f"{prefix}.idx")
    finally:
        builder.data_file.close()


def _carry_sidecars(source: IndexedFile, documents: np.ndarray, prefix: Path) -> list[str]:
    """Carry over what lies beside the source under its prefix; returns what could not be."""
    origin, left = Path(source.prefix), []
    known = {source.bin_path, source.idx_path, summary_path(source.prefix)}
    keep = np.zeros(source.num_documents, bool)
    keep[documents] = True
    for path in sorted(origin.parent.glob(f"{glob.escape(origin.name)}.*")):
        # "web" and "web.de" may be two datasets: the second one's files are not the first one's.
        suffix = path.name.removeprefix(origin.name)
        if path in known or not path.is_file() or _of_another_dataset(path, origin):
            continue
        target = prefix.with_name(prefix.name + suffix)
        if path.suffix == ".parquet" and pq.read_metadata(path).num_rows == source.num_documents:
            _filter_rows(path, target, keep)
        elif "tokenizer" in suffix:
            shutil.copyfile(path, target)
        else:
            left.append(path.name)
    return left


def _of_another_dataset(path: Path, origin: Path) -> bool:
    stem = path.name
    while "." in stem and len(stem) > len(origin.name):
        stem = stem.rpartition(".")[0]
        if stem != origin.name and path.with_name(f"{stem}.idx").exists():
            return True
    return False


def _filter_rows(path: Path, target: Path, keep: np.ndarray) -> None:
    """The rows of kept documents, in order; a column `document` counts from 0 again."""
    with pq.ParquetFile(path) as file, pq.ParquetWriter(target, file.schema_arrow) as writer:
        place = file.schema_arrow.get_field_index("document")
        read = written = 0
        for batch in file.iter_batches(1 << 16):
            rows = pa.table(batch).filter(pa.array(keep[read : read + batch.num_rows]))
            if place >= 0:
                field = file.schema_arrow.field(place)
                numbers = pa.array(np.arange(written, written + rows.num_rows)).cast(field.type)
                rows = rows.set_column(place, field, numbers)
            writer.write_table(rows)
            read, written = read + batch.num_rows, written + rows.num_rows
