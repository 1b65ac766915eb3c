"""One dataset of a run's table with its files, and the order in which the run read it.

GPTDataset's three index arrays (megatron/core/datasets/gpt_dataset.py) lead from a sample to its documents:

    j = shuffle_index[sample]                           place of the sample in the stream before shuffling
    sample_index[j], sample_index[j + 1]                (position in document_index, token offset) where it begins and ends
    document_index[position]                            sequence of the .idx, over all epochs

A sample reads one token past its end, as the label of its last position; that token is the first one of the next sample.
Where the cached arrays are gone they are built again from the description, for which megatron-core is needed. Hashes of the
.idx and of the arrays make sure that they are those of the run.
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
from inrun_megatron.ledger.files import digest_of, sha256_of

INDEX_NAMES = ("document_index", "sample_index", "shuffle_index")

_DESCRIPTION = (
    "num_samples",
    "index_split",
    "random_seed",
    "sequence_length",
    "split",
    "split_matrix",
    "tokenizer",
)
_LEADS_TO_DOCUMENTS = {
    "idx_sha256": (),
    "description": _DESCRIPTION,
    "cache_files": INDEX_NAMES,
    "index_sha256": INDEX_NAMES,
}
"""What a row of the table needs beside path_prefix, and each of these in turn; a run in somebody's own loop may say no more than name and index."""


class SpanArrays(NamedTuple):
    """Spans of many samples, in reading order; `row` is the position of the sample in the query. All int64 [spans]."""

    row: np.ndarray
    document: np.ndarray
    start: np.ndarray
    end: np.ndarray


def array_sha256(array: np.ndarray) -> str:
    """Hex sha256 of an array's type, shape and content."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    for start in range(0, len(array), 1 << 20):
        digest.update(array[start : start + (1 << 20)].tobytes())
    return digest.hexdigest()


def _require(row: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> None:
    absent = [name for name in names if name not in row]
    for name, parts in names.items():
        held = row.get(name)
        if parts and name in row:
            absent += [
                f"{name}.{part}" for part in parts if not isinstance(held, Mapping) or part not in held
            ]
    if absent:
        raise UserError(
            f"run.json says no {', '.join(absent)} of dataset {row['name']}, so that its samples lead to no documents: ask "
            "by sample or dataset (RunLedger takes DatasetDescription.to_dict() of each dataset)"
        )


class RunDataset:
    """Its data, documents and tokenizer, and the spans of its samples.

    Args:
        row: of the run's dataset table.
        prefix: where the data lies now, None: where the row says.
        verify: compare the hashes of the .idx and of the index arrays with the row.

    Raises:
        UserError: the row names no files, or they are not those that the run read.
    """

    def __init__(self, row: Mapping[str, Any], prefix: str | Path | None, verify: bool) -> None:
        self._row, self._verify = row, verify
        _require(row, {"path_prefix": ()})
        self.data = IndexedFile(normalise_prefix(prefix or row["path_prefix"]))
        _require(row, _LEADS_TO_DOCUMENTS)
        if verify and sha256_of(self.data.idx_path) != row["idx_sha256"]:
            raise UserError(
                f"{self.data.idx_path} is not the file that the run read (sha256 differs): restore it, or name where the "
                "data lies now"
            )
        # Older runs did not note it.
        if verify and row.get("bin_digest") not in (None, digest_of(self.data.bin_path)):
            raise UserError(
                f"{self.data.bin_path} does not hold the text that the run read, though its index is the same: restore it, "
                "or name where the data lies now"
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
        """Has every document one place in the stream (one epoch, one sequence a document)?"""
        if not self._plain:
            return False
        counts = np.bincount(self._index[0], minlength=1)
        return int(counts.max()) <= 1

    @property
    def spans_per_sample(self) -> float:
        """Spans of documents that a sample reads, on average; no less than that."""
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
