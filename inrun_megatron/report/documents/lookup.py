"""Documents behind ledger rows: where they come from and a line of their text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from inrun_megatron.data.identity import SampleResolver, Span
from inrun_megatron.data.segments import SegmentPlaces, places_of_documents, places_of_tokens
from inrun_megatron.errors import UserError
from inrun_megatron.ledger.read import Ledger
from inrun_megatron.report.text import printable, shorten


class Documents:
    """Samples and documents of one run, by dataset index.

    moved: the entries of --data, NAME=PREFIX of datasets that no longer lie where the run read them. UserError on unknown
    names; methods raise it when data files are missing or are not those of the run.
    """

    def __init__(self, ledger: Ledger, moved: Sequence[str] | None = None) -> None:
        self._datasets = ledger.datasets
        self.resolver = SampleResolver(ledger.datasets, _parse_moved(ledger, moved or ()))
        self._granularity = ledger.granularity

    def shares(self, dataset: int, samples: np.ndarray) -> pa.Table:
        """Which documents make up each sample: columns dataset, sample, document, tokens (of the document in the
        sample) and share (of the sample's tokens; a sample's shares add up to 1)."""
        row, document, tokens = self.resolver.resolve_many(dataset, samples)
        # A document comes up twice in one sample where an epoch ends with it and the next begins with it.
        spans = pa.table({"row": row, "document": document, "tokens": tokens})
        spans = spans.group_by(["row", "document"], use_threads=False).aggregate([("tokens", "sum")])
        row, tokens = spans["row"].to_numpy(), spans["tokens_sum"].to_numpy()
        per_sample = np.bincount(row, weights=tokens, minlength=len(samples))
        return pa.table(
            {
                "dataset": np.full(len(row), dataset, dtype=np.int16),
                "sample": np.asarray(samples, dtype=np.int64)[row],
                "document": spans["document"],
                "tokens": tokens,
                "share": tokens / per_sample[row],
            }
        )

    def segments(self, dataset: int, samples: np.ndarray, counts: np.ndarray) -> pa.Table:
        """Which documents the ledger's segments are of: columns dataset, sample, first and last (segments), document, share
        (of those segments' values; 1 unless a segment touches several documents). counts: segments of each sample."""
        samples = np.asarray(samples, dtype=np.int64)
        places = self.places(dataset, samples, counts)
        return pa.table(
            {
                "dataset": np.full(len(places.row), dataset, dtype=np.int16),
                "sample": samples[places.row],
                "first": places.first,
                "last": places.last,
                "document": places.document,
                "share": places.share,
            }
        )

    def places(self, dataset: int, samples: np.ndarray, counts: np.ndarray) -> SegmentPlaces:
        """The same as arrays, samples by their positions in `samples`."""
        if self._granularity == "token":
            return places_of_tokens(self.resolver, dataset, samples)
        return places_of_documents(self.resolver, dataset, samples, np.asarray(counts))

    def described(self, dataset: int) -> bool:
        """Does run.json say where the dataset lies? A loop of one's own may give its name alone."""
        return "path_prefix" in self._datasets[dataset]

    def spans(self, dataset: int, sample: int) -> list[Span]:
        """The spans that a sample reads, in order."""
        return self.resolver.resolve(dataset, sample)

    def idx_sha256(self, dataset: int) -> str:
        """sha256 of the .idx that the run read."""
        return str(self._datasets[dataset]["idx_sha256"])

    def metadata(self, dataset: int, document: int) -> dict[str, Any]:
        """What `inrun prepare` kept of a document."""
        return self.resolver.document_metadata(dataset, document)

    def source(self, dataset: int, document: int) -> str:
        """Where a document comes from, in a few words: its own source field, else file and line."""
        metadata = self.metadata(dataset, document)
        source, file, line = metadata.get("source"), metadata.get("file"), metadata.get("line")
        if file is None or (source is not None and source != file):
            return str(source)
        return f"{file}:{line}" if line is not None and line > 1 else str(file)

    def text(self, dataset: int, document: int, start: int = 0, end: int | None = None) -> str:
        """Text of tokens [start, end) of a document; token ids where its tokenizer is not known."""
        text = self.resolver.document_text(dataset, document, start, end)
        if text is None:
            ids = self.resolver.document_tokens(dataset, document)[start:end]
            return "tokens " + " ".join(map(str, ids))
        return text

    def snippet(
        self, dataset: int, document: int, characters: int = 80, start: int = 0, end: int | None = None
    ) -> str:
        """The beginning of tokens [start, end) as one printable line."""
        # At least a character per 4 tokens, and blank lines at the start are passed over.
        wanted = start + 4 * characters + 64
        text = self.text(dataset, document, start, wanted if end is None else min(end, wanted))
        return shorten(printable(text.strip()), characters)


def _parse_moved(ledger: Ledger, entries: Sequence[str]) -> dict[int, str]:
    """`NAME=PREFIX` (or INDEX=PREFIX) of --data -> prefix by dataset index. Raises UserError on unknown names."""
    moved = {}
    for entry in entries:
        name, equals, prefix = entry.partition("=")
        if not equals or not prefix:
            raise UserError(
                f"--data {entry!r} is not NAME=PREFIX, such as {ledger.dataset_names[0]}=data/prefix"
            )
        moved[dataset_index(ledger, name)] = str(Path(prefix).expanduser())
    return moved


def dataset_index(ledger: Ledger, name: str) -> int:
    """Index of a dataset given by name or number. Raises UserError with the known ones."""
    names = ledger.dataset_names
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(names):
        return int(name)
    known = ", ".join(f"{index} ({known})" for index, known in enumerate(names))
    raise UserError(f"the run has no dataset {name!r}; it has {known}")
