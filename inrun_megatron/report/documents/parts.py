"""Which part of which draw belongs to which document, for a piece of the draws of one dataset.

Where samples were scored whole, a document has the share of the sample's value that it has of its tokens. Where they were
scored by document or token it has its segments' values, or a share of those that it shares with others
(inrun_megatron/data/segments.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from inrun_megatron.report.documents.draws import Draws
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.documents.neighbours import within

PIECE_PARTS = 1 << 19
"""Parts of samples that one thread works on at a time, about."""


@dataclass(frozen=True)
class Parts:
    """Document `document` has `share` of the value in row `at` of `value`. All [parts] but `value`; those of one document and
    draw are neighbours."""

    value: np.ndarray
    """[targets, rows]"""
    draw: np.ndarray
    """Position of the draw in the piece."""
    at: np.ndarray
    document: np.ndarray
    tokens: np.ndarray
    """The document's tokens of the sample, or its share of the segment's loss tokens."""
    share: np.ndarray

    def of(self, chosen: np.ndarray) -> Parts:
        """Those of the rows that `chosen` [rows] is true of."""
        return self._taken(chosen[self.at])

    def by_document(self) -> Parts:
        """In the order of documents, and of draws for each."""
        return self._taken(np.lexsort((self.draw, self.document)))

    def _taken(self, which: np.ndarray) -> Parts:
        columns = (self.draw, self.at, self.document, self.tokens, self.share)
        return Parts(self.value, *(column[which] for column in columns))


def pieces_of(documents: Documents, draws: Draws, dataset: int, own: np.ndarray) -> Iterator[np.ndarray]:
    """The draws `own` of a dataset, in pieces of about PIECE_PARTS parts."""
    rows = len(draws.value) / len(draws.step)
    size = max(1, int(PIECE_PARTS / max(rows, documents.resolver.spans_per_sample(dataset))))
    return (own[start : start + size] for start in range(0, len(own), size))


def parts_of(documents: Documents, draws: Draws, dataset: int, piece: np.ndarray) -> Parts:
    """Parts of the draws `piece`, in its order."""
    if draws.begin is None:
        return _parts_of_samples(documents, draws, dataset, piece)
    return _parts_of_segments(documents, draws, dataset, piece)


def _parts_of_samples(documents: Documents, draws: Draws, dataset: int, piece: np.ndarray) -> Parts:
    row, document, tokens = documents.resolver.resolve_many(dataset, draws.sample[piece])
    per_sample = np.bincount(row, weights=tokens, minlength=len(piece))
    value = np.ascontiguousarray(draws.value[piece].T)
    return Parts(value, row, row, document, tokens, tokens / per_sample[row])


def _parts_of_segments(documents: Documents, draws: Draws, dataset: int, piece: np.ndarray) -> Parts:
    assert draws.begin is not None and draws.segment is not None and draws.tokens is not None
    begin = draws.begin[piece]
    count = np.append(draws.begin, len(draws.value))[piece + 1] - begin
    rows = np.repeat(begin, count) + within(count)
    segment, tokens = draws.segment[rows].astype(np.int64), draws.tokens[rows]
    draw = np.repeat(np.arange(len(piece)), count)
    places = documents.places(dataset, draws.sample[piece], segment[np.cumsum(count) - 1] + 1)
    if not (places.row[1:] >= places.row[:-1]).all():
        order = np.argsort(places.row, kind="stable")
        places = places._replace(**{name: column[order] for name, column in places._asdict().items()})
    # Rows of the place's segments, by (draw, segment).
    base = int(max(segment.max(initial=0), places.last.max(initial=0))) + 1
    key = draw * base + segment
    first = np.searchsorted(key, places.row * base + places.first)
    size = np.searchsorted(key, places.row * base + places.last, side="right") - first
    at = np.repeat(first, size) + within(size)
    place = np.repeat(np.arange(len(size)), size)
    share = places.share[place]
    value = np.ascontiguousarray(draws.value[rows].T)
    return Parts(value, draw[at], at, places.document[place], tokens[at] * share, share)
