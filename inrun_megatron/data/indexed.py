"""Megatron's indexed dataset on disk: PREFIX.idx and PREFIX.bin, read with numpy alone.

The format is that of megatron/core/datasets/indexed_dataset.py. The .idx holds, little-endian: 9 bytes of magic, uint64
version, uint8 code of the token type, uint64 number of sequences n, uint64 number of document boundaries d, then
lengths int32[n], byte offsets int64[n], document boundaries int64[d] (0 first, n last) and, for multimodal data, int8
modes [n]. A *document* is the sequences between two boundaries. `inrun prepare` writes one sequence per document;
Megatron's own preprocessing may write one per sentence, and its GPTDataset shuffles those.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from inrun_megatron.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER_BYTES = 34
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}


def normalise_prefix(path: str | Path) -> str:
    """The prefix of a .bin/.idx pair; a path that ends in .bin or .idx is taken for its prefix."""
    text = str(path).strip()
    for suffix in (".bin", ".idx"):
        if text.endswith(suffix):
            return text.removesuffix(suffix)
    return text


class IndexedFile:
    """One .bin/.idx pair, memory-mapped, with the sizes of both files checked against the index.

    Raises UserError when a file is missing, unreadable, no index of this format, truncated, of another pair, or empty.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = normalise_prefix(prefix)
        self.idx_path, self.bin_path = Path(f"{self.prefix}.idx"), Path(f"{self.prefix}.bin")
        idx_bytes, self.bin_bytes = _size(self.idx_path, self.prefix), _size(self.bin_path, self.prefix)
        with open(self.idx_path, "rb") as file:
            header = file.read(_HEADER_BYTES)
        if len(header) < _HEADER_BYTES or header[:9] != _MAGIC:
            raise UserError(
                f"{self.idx_path} is no Megatron index ({idx_bytes} bytes): write the pair again with inrun prepare"
            )
        version, code, sequences, boundaries = struct.unpack("<QBQQ", header[9:])
        if version != 1 or code not in _DTYPES or not np.issubdtype(_DTYPES[code], np.integer):
            raise UserError(
                f"{self.idx_path} has version {version} and type code {code}: only version 1 with integer tokens "
                "can be read; write the pair again with inrun prepare"
            )
        expected = _HEADER_BYTES + 12 * sequences + 8 * boundaries
        if idx_bytes not in (expected, expected + sequences):  # the latter: with the modes of multimodal data
            raise UserError(
                f"{self.idx_path} has {idx_bytes} bytes where its header says {expected}: it is truncated or damaged; "
                "copy or prepare it again"
            )
        if sequences == 0:
            raise UserError(f"{self.prefix} holds no documents: prepare it from inputs with text")
        self.dtype = np.dtype(_DTYPES[code])
        index = np.memmap(self.idx_path, mode="r")
        self.sequence_lengths = index[_HEADER_BYTES : _HEADER_BYTES + 4 * sequences].view(np.int32)
        """[sequences] tokens."""
        start = _HEADER_BYTES + 4 * sequences
        self.sequence_pointers = index[start : start + 8 * sequences].view(np.int64)
        """[sequences] byte offsets into the .bin."""
        start += 8 * sequences
        self.document_boundaries = index[start : start + 8 * boundaries].view(np.int64)
        """[documents + 1] first sequence of each document, and the number of sequences."""
        needed = int(self.sequence_pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
        if self.bin_bytes != needed:
            fault = "it is truncated" if self.bin_bytes < needed else "the two are not of one pair"
            raise UserError(
                f"{self.bin_path} has {self.bin_bytes} bytes where {self.idx_path} says {needed}: {fault}; "
                "copy or prepare both again"
            )
        if needed == 0:
            raise UserError(f"{self.prefix} holds no tokens: prepare it from inputs with text")
        self._tokens = np.memmap(self.bin_path, dtype=self.dtype, mode="r")

    @property
    def num_sequences(self) -> int:
        """Sequences: what GPTDataset shuffles and splits."""
        return len(self.sequence_lengths)

    @property
    def num_documents(self) -> int:
        """Documents."""
        return len(self.document_boundaries) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return self.bin_bytes // self.dtype.itemsize

    @property
    def one_sequence_per_document(self) -> bool:
        """Whether sequence i is document i."""
        return self.num_sequences == self.num_documents and bool(
            np.array_equal(self.document_boundaries, np.arange(self.num_sequences + 1))
        )

    def sequence(self, index: int, start: int = 0, end: int | None = None) -> np.ndarray:
        """Tokens [start, end) of one sequence, as a read-only view of the file."""
        first = int(self.sequence_pointers[index]) // self.dtype.itemsize
        stop = int(self.sequence_lengths[index]) if end is None else end
        return self._tokens[first + start : first + stop]

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, as a read-only view of the file."""
        if not 0 <= index < self.num_documents:
            raise UserError(f"{self.prefix} has documents 0 to {self.num_documents - 1}, not {index}")
        first, last = (int(boundary) for boundary in self.document_boundaries[index : index + 2])
        if first == last:
            return self._tokens[:0]
        start = int(self.sequence_pointers[first]) // self.dtype.itemsize
        return self._tokens[start : start + int(self.sequence_lengths[first:last].sum(dtype=np.int64))]

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Tokens [start, end) of the .bin as one stream, as a read-only view of the file."""
        return self._tokens[start:end]

    def token_range(self, limit: int = 1 << 25) -> tuple[int, int]:
        """Smallest and largest token of the file; of 64 evenly spread pieces where it has more than `limit` tokens."""
        if self.num_tokens <= limit:
            return int(self._tokens.min()), int(self._tokens.max())
        piece = limit // 64
        starts = np.linspace(0, self.num_tokens - piece, 64, dtype=np.int64)
        pieces = [self._tokens[start : start + piece] for start in starts]
        return min(int(part.min()) for part in pieces), max(int(part.max()) for part in pieces)


def _size(path: Path, prefix: str) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: {prefix!r} must be the path of a .bin/.idx pair without its suffix "
            "(inrun prepare writes one)"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
