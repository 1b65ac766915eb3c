"""From (dataset, sample), as the ledger keeps it, back to documents, token spans, text and metadata.

Needs the dataset table of a run (`DatasetDescription.to_dict()` of each) and the data; no process group, and neither torch
nor megatron-core unless the cached sample order is gone (run_dataset.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from inrun_megatron.data.indexed import IndexedFile
from inrun_megatron.data.run_dataset import RunDataset, SpanArrays
from inrun_megatron.errors import UserError


class Span(NamedTuple):
    """Tokens [start, end) of a document."""

    document: int
    start: int
    end: int


class DocumentShares(NamedTuple):
    """Which documents make up which samples; `row` as in SpanArrays, `n_tokens` tokens read. All int64 [spans]."""

    row: np.ndarray
    document: np.ndarray
    n_tokens: np.ndarray


class SampleResolver:
    """Resolves samples of a run. Datasets are opened when first asked for.

    Args:
        table: the run's dataset table; entries as mappings or as DatasetDescription.
        prefixes: where datasets lie now, by their index in the table, if they have moved.
        verify: compare the hashes of the .idx and of the index arrays with the table (reads them once).
    """

    def __init__(
        self, table: Sequence[Any], prefixes: Mapping[int, str | Path] | None = None, *, verify: bool = True
    ) -> None:
        rows = [row if isinstance(row, Mapping) else row.to_dict() for row in table]
        self._rows = {int(row["index"]): row for row in rows}
        self._prefixes = dict(prefixes or {})
        self._verify = verify
        self._opened: dict[int, RunDataset] = {}

    def name(self, dataset: int) -> str:
        """Name of a dataset in the table."""
        return str(self._row(dataset)["name"])

    def resolve(self, dataset: int, sample: int) -> list[Span]:
        """The spans that the sample reads, in order; their lengths sum to the sequence length + 1."""
        _, document, start, end = self.spans(dataset, np.array([sample]))
        return [Span(*map(int, span)) for span in zip(document, start, end, strict=True)]

    def spans(self, dataset: int, samples: np.ndarray) -> SpanArrays:
        """`resolve` for many samples of one dataset at once."""
        return self._open(dataset).spans(np.asarray(samples, np.int64))

    def resolve_many(self, dataset: int, samples: np.ndarray) -> DocumentShares:
        """(row, document, n_tokens) for many samples of one dataset at once, one entry per span."""
        row, document, start, end = self.spans(dataset, samples)
        return DocumentShares(row, document, end - start)

    def places(self, dataset: int, samples: np.ndarray) -> np.ndarray:
        """Where samples [n] lie in the stream before shuffling: neighbours there share a document, or follow one another."""
        return self._open(dataset).places(np.asarray(samples, np.int64))

    def reads_once(self, dataset: int) -> bool:
        """Has every document one place in the stream (one epoch, one sequence a document)?"""
        return self._open(dataset).reads_once

    def spans_per_sample(self, dataset: int) -> float:
        """Spans that a sample reads, on average; no less than that."""
        return self._open(dataset).spans_per_sample

    def tokens(self, dataset: int, sample: int) -> np.ndarray:
        """The tokens that the sample reads, int64 [seq_length + 1]: its tokens, and the label of the last one."""
        data = self._open(dataset).data
        parts = [
            data.document(span.document)[span.start : span.end] for span in self.resolve(dataset, sample)
        ]
        return np.concatenate(parts).astype(np.int64)

    def tokens_at(self, dataset: int, document: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Single tokens of documents, by their positions in them; int64, shaped as both arguments."""
        data = self._open(dataset).data
        pointers = data.sequence_pointers[data.document_boundaries[document]] // data.dtype.itemsize
        return data.tokens(0, data.num_tokens)[pointers + position].astype(np.int64)

    def sequence_length(self, dataset: int) -> int:
        """Positions of a sample's row."""
        return int(self._description(dataset)["sequence_length"])

    def end_of_document(self, dataset: int) -> int:
        """The token that ended documents in the run."""
        return int(self._description(dataset)["tokenizer"]["eod"])

    def document_tokens(self, dataset: int, document: int) -> np.ndarray:
        """All tokens of a document, int64."""
        return self._open(dataset).data.document(document).astype(np.int64)

    def document_text(
        self, dataset: int, document: int, start: int = 0, end: int | None = None
    ) -> str | None:
        """Text of tokens [start, end) of a document; None where the data's tokenizer is not known."""
        opened = self._open(dataset)
        if opened.tokenizer is None:
            return None
        return opened.tokenizer.decode(opened.data.document(document)[start:end])

    def document_metadata(self, dataset: int, document: int) -> dict[str, Any]:
        """What `inrun prepare` kept of a document: document, source, file, line, tokens and the kept fields.

        For data prepared by other tools only document, source (the dataset's path) and tokens.
        """
        opened = self._open(dataset)
        if opened.documents is None:
            tokens = len(opened.data.document(document))
            return {"document": document, "source": opened.data.prefix, "tokens": tokens}
        if not 0 <= document < opened.documents.num_rows:
            raise UserError(
                f"{opened.data.prefix} has documents 0 to {opened.documents.num_rows - 1}, not {document}"
            )
        return opened.documents.slice(document, 1).to_pylist()[0]

    def file(self, dataset: int) -> IndexedFile:
        """The dataset's .bin/.idx, where they lie now."""
        return self._open(dataset).data

    def training_documents(self, dataset: int) -> range:
        """Documents that the run's training split holds at least one sequence of."""
        from inrun_megatron.data.blend import split_range  # imports torch, which resolving does not need

        data, description = self.file(dataset), self._description(dataset)
        sequences = split_range(description["split_matrix"][0], data.num_sequences)
        first = np.searchsorted(data.document_boundaries, sequences.start, side="right") - 1
        last = np.searchsorted(data.document_boundaries, sequences.stop, side="left")
        return range(int(first), int(last))

    def document_count(self, dataset: int) -> int:
        """Documents in the dataset's files."""
        return self._open(dataset).data.num_documents

    def documents(self, dataset: int) -> pa.Table | None:
        """PREFIX.documents.parquet, one row per document in order; None for data prepared by other tools."""
        return self._open(dataset).documents

    def _row(self, dataset: int) -> Mapping[str, Any]:
        if dataset not in self._rows:
            raise UserError(f"the run has the datasets {sorted(self._rows)}, not {dataset}")
        return self._rows[dataset]

    def _description(self, dataset: int) -> Mapping[str, Any]:
        """megatron-core's description of a dataset."""
        self._open(dataset)  # refuses a row that has none
        description: Mapping[str, Any] = self._row(dataset)["description"]
        return description

    def _open(self, dataset: int) -> RunDataset:
        dataset = int(dataset)
        if dataset not in self._opened:
            row, moved = self._row(dataset), self._prefixes.get(dataset)
            self._opened[dataset] = RunDataset(row, moved, self._verify)
        return self._opened[dataset]
