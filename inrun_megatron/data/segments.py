"""Which documents the segments of a ledger are of, where values are by document or by token.

A run cuts a sample's row after each end-of-document token; segment d of a sample is the d-th piece of its row. The spans
that `SampleResolver` finds from the .idx are cut where documents end. The two agree where every document ends with that
token and has no other: then segment d is the d-th document of the sample. This is checked, span by span; samples for which
it does not hold (data prepared without the token) are read again, and a segment's value is shared by length among the
documents that it touches.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from inrun_megatron.data.identity import SampleResolver
from inrun_megatron.errors import UserError


class SegmentPlaces(NamedTuple):
    """Segments `first` to `last` of sample `row` (its position in the query) are, by `share`, of `document`. [places]"""

    row: np.ndarray
    first: np.ndarray
    last: np.ndarray
    document: np.ndarray
    share: np.ndarray


class _Pieces(NamedTuple):
    """What rows [0, s) are made of: positions [begin, end) are of one document. [pieces]"""

    row: np.ndarray
    document: np.ndarray
    begin: np.ndarray
    end: np.ndarray


def places_of_tokens(resolver: SampleResolver, dataset: int, samples: np.ndarray) -> SegmentPlaces:
    """Where segments are token positions."""
    pieces = _pieces(resolver, dataset, samples)[0]
    return SegmentPlaces(
        pieces.row, pieces.begin, pieces.end - 1, pieces.document, np.ones(len(pieces.row), np.float64)
    )


def places_of_documents(
    resolver: SampleResolver, dataset: int, samples: np.ndarray, counts: np.ndarray
) -> SegmentPlaces:
    """Where rows are cut after end-of-document tokens. counts [n]: how many segments the ledger has of each sample.

    Raises UserError where the data give another number of segments than the ledger has.
    """
    eod = resolver.end_of_document(dataset)
    pieces, ends_with = _pieces(resolver, dataset, samples)
    first_of_row = np.searchsorted(pieces.row, np.arange(len(samples)))
    ordinal = np.arange(len(pieces.row)) - first_of_row[pieces.row]
    inner = np.append(pieces.row[1:] == pieces.row[:-1], False)  # another document follows in the row
    doubtful = np.bincount(pieces.row, minlength=len(samples)) != counts
    doubtful[pieces.row[inner & (ends_with != eod)]] = True
    plain = ~doubtful[pieces.row]
    columns = [pieces.row, ordinal, ordinal, pieces.document, np.ones(len(pieces.row), np.float64)]
    parts = [SegmentPlaces(*(column[plain] for column in columns))]
    for row in np.flatnonzero(doubtful):
        own = _Pieces(*(column[pieces.row == row] for column in pieces))
        tokens = resolver.tokens(dataset, int(samples[row]))[: own.end[-1]]
        parts.append(_by_length(own, tokens, eod, int(counts[row]), int(samples[row])))
    return SegmentPlaces(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _pieces(resolver: SampleResolver, dataset: int, samples: np.ndarray) -> tuple[_Pieces, np.ndarray]:
    """Pieces of the samples' rows, and the last token of each."""
    length = resolver.sequence_length(dataset)
    row, document, start, stop = resolver.spans(dataset, samples)
    size = stop - start
    end = np.cumsum(size)
    # A sample reads one token more than its row has: the label of the last position.
    begin = end - size - row * (length + 1)
    # Sequences of one document, read on from one to the next, are one piece.
    fresh = np.ones(len(row), bool)
    fresh[1:] = (row[1:] != row[:-1]) | (document[1:] != document[:-1]) | (start[1:] != stop[:-1])
    fresh &= begin < length
    row, document, start, begin = row[fresh], document[fresh], start[fresh], begin[fresh]
    last = np.append(row[1:] != row[:-1], True) if len(row) else np.zeros(0, bool)
    end = np.where(last, length, np.append(begin[1:], length))
    tokens = resolver.tokens_at(dataset, document, start + (end - begin) - 1)
    return _Pieces(row, document, begin, end), tokens


def _by_length(own: _Pieces, tokens: np.ndarray, eod: int, count: int, sample: int) -> SegmentPlaces:
    """One sample whose segments are not its documents: each segment's value by length."""
    starts = np.append(0, np.flatnonzero(tokens[:-1] == eod) + 1)
    if len(starts) != count:
        raise UserError(
            f"sample {sample} has {count} segments in the ledger, but its tokens are cut into {len(starts)}: the data are "
            "not those of the run; name where the run's data lie with --data NAME=PREFIX"
        )
    edges = np.union1d(starts, own.begin)
    segment = np.searchsorted(starts, edges, side="right") - 1
    piece = np.searchsorted(own.begin, edges, side="right") - 1
    sizes = np.diff(np.append(edges, len(tokens)))
    share = sizes / np.bincount(segment, weights=sizes)[segment]
    return SegmentPlaces(np.full(len(edges), own.row[0]), segment, segment, own.document[piece], share)
