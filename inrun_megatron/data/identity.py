"""From (dataset, sample), as the ledger keeps it, back to documents, token spans, text and metadata.

Needs the dataset table of a run (`DatasetDescription.to_dict()` of each) and the data. GPTDataset's three index arrays
(megatron/core/datasets/gpt_dataset.py) give the way:

    j = shuffle_index[sample]                           place of the sample in the stream before shuffling
    sample_index[j], sample_index[j + 1]                (position in document_index, token offset) where it begins and ends
    document_index[position]                            sequence of the .idx, over all epochs

A sample reads one token past its end, as the label of its last position; that token is the first one of the next sample.
No process group is needed, and neither torch nor megatron-core unless the cached arrays are gone: then they are built
again from the description. Hashes of the .idx and of the arrays make sure that the answer is that of the run.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from inrun_megatron.data.documents import documents_path, read_summary, read_table
from inrun_megatron.data.indexed import IndexedFile, normalise_prefix
from inrun_megatron.data.tokenizers import NullTokenizer, Tokenizer, build_tokenizer_from
from inrun_megatron.errors import UserError
from inrun_megatron.ledger.files import sha256_of

INDEX_NAMES = ("document_index", "sample_index", "shuffle_index")

_LEADS_TO_DOCUMENTS = ("idx_sha256", "description", "cache_files", "index_sha256")
"""What a row of the table needs beside path_prefix; a run in somebody's own loop may say no more than name and index."""


class Span(NamedTuple):
    """Tokens [start, end) of a document."""

    document: int
    start: int
    end: int


class SpanArrays(NamedTuple):
    """Spans of many samples, in reading order; `row` is the position of the sample in the query. All int64 [spans]."""

    row: np.ndarray
    document: np.ndarray
    start: np.ndarray
    end: np.ndarray


class DocumentShares(NamedTuple):
    """Which documents make up which samples; `row` as in SpanArrays, `n_tokens` tokens read. All int64 [spans]."""

    row: np.ndarray
    document: np.ndarray
    n_tokens: np.ndarray


def array_sha256(array: np.ndarray) -> str:
    """Hex sha256 of an array's type, shape and content."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    for start in range(0, len(array), 1 << 20):
        digest.update(array[start : start + (1 << 20)].tobytes())
    return digest.hexdigest()


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
        self._opened: dict[int, _OpenDataset] = {}

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

    def _open(self, dataset: int) -> _OpenDataset:
        dataset = int(dataset)
        if dataset not in self._opened:
            row = self._row(dataset)
            _require(row, ("path_prefix",))
            prefix = normalise_prefix(self._prefixes.get(dataset, row["path_prefix"]))
            self._opened[dataset] = _OpenDataset(row, prefix, self._verify)
        return self._opened[dataset]


def _require(row: Mapping[str, Any], names: Sequence[str]) -> None:
    absent = [name for name in names if name not in row]
    if absent:
        raise UserError(
            f"run.json says no {', '.join(absent)} of dataset {row['name']}, so that its samples lead to no documents: ask "
            "by sample or dataset (RunDescription takes DatasetDescription.to_dict() of each dataset)"
        )


class _OpenDataset:
    """One dataset of the table with its files."""

    def __init__(self, row: Mapping[str, Any], prefix: str, verify: bool) -> None:
        self._row, self._verify = row, verify
        self.data = IndexedFile(prefix)
        _require(row, _LEADS_TO_DOCUMENTS)
        if verify and sha256_of(self.data.idx_path) != row["idx_sha256"]:
            raise UserError(
                f"{self.data.idx_path} is not the file that the run read (sha256 differs): restore it, or name where the "
                "data lies now"
            )
        self._plain = self.data.one_sequence_per_document

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """document_index [positions], sample_index [samples + 1, 2], shuffle_index [samples]."""
        files = [Path(self._row["cache_files"][name]) for name in INDEX_NAMES]
        arrays: Sequence[np.ndarray] | None = None
        if all(map(Path.is_file, files)):
            try:
                arrays = [np.load(path, mmap_mode="r") for path in files]
            except (ValueError, EOFError, OSError):
                arrays = None  # left half-written by a killed run
        if arrays is None or not self._same(arrays):
            arrays = _rebuild_index(self._row["description"], self.data)
            if not self._same(arrays):
                raise UserError(
                    f"the sample order of {self.data.prefix} cannot be restored: the index cache {files[0].parent} is gone "
                    "or damaged, and the installed megatron-core builds another one; install the run's version"
                )
        document_index, sample_index, shuffle_index = arrays
        return document_index, sample_index, shuffle_index

    def _same(self, arrays: Sequence[np.ndarray]) -> bool:
        if not self._verify:
            return True
        known = self._row["index_sha256"]
        return all(
            array_sha256(array) == known[name] for name, array in zip(INDEX_NAMES, arrays, strict=True)
        )

    @cached_property
    def documents(self) -> pa.Table | None:
        """PREFIX.documents.parquet."""
        path = documents_path(self.data.prefix)
        if not path.exists():
            return None
        table = read_table(path, memory_map=True)
        if table.num_rows != self.data.num_documents:
            raise UserError(
                f"{path} has {table.num_rows} documents where {self.data.idx_path} has {self.data.num_documents}: they are "
                "not of one dataset; prepare it again"
            )
        return table

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer the data was prepared with, None where that is not known."""
        summary = read_summary(self.data.prefix)
        tokenizer = None if summary is None else build_tokenizer_from(summary["tokenizer"])
        return None if isinstance(tokenizer, NullTokenizer) else tokenizer

    @cached_property
    def reads_once(self) -> bool:
        if not self._plain:
            return False
        counts = np.bincount(self._index[0], minlength=1)
        return int(counts.max()) <= 1

    @property
    def spans_per_sample(self) -> float:
        document_index, _, shuffle_index = self._index
        return 1 + len(document_index) / max(len(shuffle_index), 1)

    def places(self, samples: np.ndarray) -> np.ndarray:
        """Places in the stream of samples [n]."""
        shuffle_index = self._index[2]
        if len(samples) and not (samples.min() >= 0 and samples.max() < len(shuffle_index)):
            bad = samples.min() if samples.min() < 0 else samples.max()
            raise UserError(
                f"dataset {self._row['name']} has samples 0 to {len(shuffle_index) - 1}, not {bad}"
            )
        return np.asarray(shuffle_index[samples].astype(np.int64))

    def spans(self, samples: np.ndarray) -> SpanArrays:
        """Spans of samples [n]."""
        document_index, sample_index, _ = self._index
        place = self.places(samples)
        first, first_offset = sample_index[place].astype(np.int64).T
        last, last_offset = sample_index[place + 1].astype(np.int64).T
        count = last - first + 1  # sequences that each sample touches
        row = np.repeat(np.arange(len(samples)), count)
        position = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + first[row]
        sequence = document_index[position].astype(np.int64)
        length = self.data.sequence_lengths[sequence].astype(np.int64)
        start = np.where(position == first[row], first_offset[row], 0)
        # + 1: the label of the sample's last position (GPTDatasetConfig.add_extra_token_to_sequence)
        end = np.where(position == last[row], np.minimum(last_offset[row] + 1, length), length)
        read = end > start  # sequences without tokens are passed over
        row, sequence, start, end = row[read], sequence[read], start[read], end[read]
        if self._plain:
            return SpanArrays(row, sequence, start, end)
        boundaries, pointers = self.data.document_boundaries, self.data.sequence_pointers
        document = np.searchsorted(boundaries, sequence, side="right") - 1
        offset = (pointers[sequence] - pointers[boundaries[document]]) // self.data.dtype.itemsize
        return SpanArrays(row, document, start + offset, end + offset)


def _rebuild_index(description: Mapping[str, Any], data: IndexedFile) -> list[np.ndarray]:
    """The three arrays as GPTDataset builds them for its description."""
    from inrun_megatron.data.blend import split_range
    from inrun_megatron.data.megatron import GPTDataset, GPTDatasetConfig, IndexedDataset, Split

    tokenizer = description["tokenizer"]
    split = Split[description["index_split"]]
    sequences = split_range(description["split_matrix"][split.value], data.num_sequences)
    with tempfile.TemporaryDirectory() as cache:
        config = GPTDatasetConfig(
            random_seed=description["random_seed"],
            sequence_length=description["sequence_length"],
            blend=([data.prefix], None),
            split=description["split"],
            path_to_cache=cache,
            tokenizer=NullTokenizer(tokenizer["vocab_size"], tokenizer["eod"]),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        indices = np.arange(sequences.start, sequences.stop, dtype=np.int32)
        dataset = GPTDataset(
            IndexedDataset(data.prefix), data.prefix, indices, description["num_samples"], split, config
        )
        return [np.array(getattr(dataset, name)) for name in INDEX_NAMES]
