"""Sums of documents, without a join, in the order of the stream that samples are cut from.

GPTDataset strings documents together, cuts the stream into samples and shuffles those. In the order of the stream the
samples of a document are neighbours, so that its sums are sums over neighbours; a piece of the stream is worked on at a
time. What a document has of a draw is in parts.py; the columns are those of `sql.moments`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from inrun_megatron.report.documents.draws import BYTES_PER_DRAW, Draws, in_order, read_draws
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.documents.neighbours import starts
from inrun_megatron.report.documents.parts import Parts, parts_of, pieces_of
from inrun_megatron.report.query import Query
from inrun_megatron.report.sql import LARGEST

DRAW_BYTES = 3 << 29
"""Draws that are held at a time: about 100 million rows with 4 targets."""


@dataclass(frozen=True)
class Scales:
    """What a value of step t towards target k is multiplied by: arrays [K, last step + 1]."""

    factor: np.ndarray
    per_change: np.ndarray
    """NaN where the realised change is not known."""


@dataclass(frozen=True)
class Leading:
    """Which documents are asked for: those that may be among the `n` highest or lowest towards a target."""

    measure: str
    """value, mean, per_token, normalised or relative."""
    n: int

    def of(self, columns: Mapping[str, Any]) -> np.ndarray:
        """Those documents [documents], with all that tie with the last of them. columns: moments by document."""
        value = np.asarray(columns["value"])
        if len(value) <= self.n:
            return np.ones(len(value), bool)
        if self.measure == "mean":
            value = value / columns["draws"]
        elif self.measure == "per_token":
            tokens = np.asarray(columns["tokens"])
            value = np.divide(value, tokens, out=np.full(len(value), np.nan), where=tokens > 0)
        elif self.measure != "value":
            value = pa.array(columns[self.measure]).to_numpy(zero_copy_only=False)
        chosen = np.zeros(len(value), bool)
        for signed in (value, -value):
            signed = np.where(np.isnan(signed), -np.inf, signed)
            chosen |= signed >= np.partition(signed, -self.n)[-self.n]
        return chosen


@dataclass(frozen=True)
class Sums:
    """Moments of documents. `whole`: these documents have no further rows in the range of steps."""

    table: pa.Table
    whole: bool


def draws_at_a_time(targets: int) -> int:
    """How many draws may be held."""
    return DRAW_BYTES // (BYTES_PER_DRAW + 8 * targets)


def document_sums(
    query: Query,
    documents: Documents,
    targets: Sequence[str],
    first: int,
    last: int,
    leading: Leading | None = None,
) -> Iterator[Sums]:
    """Moments of every document in steps [first, last], in pieces: columns dataset, document, target, draws, tokens,
    first_step, last_step, value, squares, negatives, normalised, relative. leading: leave out whole documents that are not
    asked for.

    Raises UserError when a part, or the data files, cannot be read or have changed.
    """
    draws = read_draws(query.ledger, targets, first, last)
    scales = _scales(query, targets, last)
    for dataset in np.unique(draws.dataset).tolist():
        own = np.flatnonzero(draws.dataset == dataset)
        place = documents.resolver.places(dataset, draws.sample[own])
        order = np.argsort(place)
        place = place[order]
        # Only then are a document's samples neighbours, and its spans one after another.
        once = documents.resolver.reads_once(dataset) and bool((place[1:] > place[:-1]).all())
        own = own[order]
        del place, order
        work = _Work(documents, draws, scales, targets, dataset, once, leading)
        for sums in in_order(work.of_piece, pieces_of(documents, draws, dataset, own)):
            yield from sums


def _scales(query: Query, targets: Sequence[str], last: int) -> Scales:
    table = query.table(f"SELECT step, target, factor, per_change FROM scales WHERE step <= {last}")
    factor, per_change = np.zeros((len(targets), last + 1)), np.full((len(targets), last + 1), np.nan)
    names = np.array(table["target"].to_pylist(), dtype=object)
    for position, target in enumerate(targets):
        own = table.filter(pa.array(names == target, pa.bool_()))
        factor[position, own["step"].to_numpy()] = own["factor"].to_numpy()
        per_change[position, own["step"].to_numpy()] = own["per_change"].to_numpy(zero_copy_only=False)
    return Scales(factor, per_change)


@dataclass(frozen=True)
class _Work:
    """What is done to each piece of one dataset's draws."""

    documents: Documents
    draws: Draws
    scales: Scales
    targets: Sequence[str]
    dataset: int
    once: bool
    """Draws are in the order of the stream, in which every document has one place."""
    leading: Leading | None

    def of_piece(self, piece: np.ndarray) -> list[Sums]:
        """Sums of the draws `piece`."""
        parts, step = parts_of(self.documents, self.draws, self.dataset, piece), self.draws.step[piece]
        if not self.once:
            # A document comes up twice in one sample where an epoch ends with it and the next begins with it.
            parts = parts.by_document()
        finite = np.abs(parts.value) < LARGEST
        common = _ByDocument(parts, step) if finite.all() else None
        found: list[tuple[str, np.ndarray, dict[str, Any]]] = []
        for position, target in enumerate(self.targets):
            summed = common or _ByDocument(parts.of(finite[position]), step)
            if len(summed.document):
                factor, per_change = self.scales.factor[position], self.scales.per_change[position]
                found.append(
                    (target, summed.document, summed.columns(parts.value[position], factor, per_change))
                )
        if not found:
            return []
        if not self.once:
            return [Sums(self._table(found), whole=False)]
        # The first and the last document may go on in the neighbouring pieces.
        edge = np.unique(parts.document[[0, -1]])
        inner = np.setdiff1d(
            np.concatenate([self._asked(document, columns) for _, document, columns in found]), edge
        )
        return [Sums(self._table(found, inner), whole=True), Sums(self._table(found, edge), whole=False)]

    def _asked(self, document: np.ndarray, columns: dict[str, Any]) -> np.ndarray:
        return document if self.leading is None else document[self.leading.of(columns)]

    def _table(
        self, found: Sequence[tuple[str, np.ndarray, dict[str, Any]]], only: np.ndarray | None = None
    ) -> pa.Table:
        tables = []
        for target, document, columns in found:
            names = pa.DictionaryArray.from_arrays(np.zeros(len(document), np.int32), pa.array([target]))
            keys = {
                "dataset": np.full(len(document), self.dataset, np.int16),
                "document": document,
                "target": names,
            }
            table = pa.table(keys | columns)
            tables.append(table if only is None else table.filter(pa.array(np.isin(document, only))))
        return pa.concat_tables(tables).unify_dictionaries()


class _ByDocument:
    """Parts summed by draw and document, and those by document: what does not depend on the target, once."""

    def __init__(self, parts: Parts, step: np.ndarray) -> None:
        self._parts = parts
        self.document = parts.document[:0]
        if not len(parts.draw):
            return
        inner = starts(parts.draw, parts.document)
        self._inner = None if len(inner) == len(parts.draw) else inner
        draw, document, tokens = parts.draw, parts.document, parts.tokens
        if self._inner is not None:
            draw, document = draw[self._inner], document[self._inner]
            tokens = np.add.reduceat(tokens, self._inner)
        self._step = step[draw]
        self._starts = starts(document)
        self.document = document[self._starts]
        self._same = {
            "draws": np.diff(self._starts, append=len(draw)),
            "tokens": np.add.reduceat(np.rint(tokens).astype(np.int64), self._starts),
            "first_step": np.minimum.reduceat(self._step, self._starts),
            "last_step": np.maximum.reduceat(self._step, self._starts),
        }

    def columns(
        self, value: np.ndarray, factor: np.ndarray, per_change: np.ndarray
    ) -> dict[str, np.ndarray | pa.Array]:
        """Moments by document. value: of the parts' rows; factor, per_change: of the steps."""
        own, begin = value[self._parts.at] * self._parts.share, self._starts
        if self._inner is not None:
            own = np.add.reduceat(own, self._inner)
        relative = own * per_change[self._step]
        known = ~np.isnan(relative)
        columns = self._same | {
            "value": np.add.reduceat(own, begin),
            "squares": np.add.reduceat(own * own, begin),
            "negatives": np.add.reduceat((own < 0).astype(np.int64), begin),
            "normalised": np.add.reduceat(own * factor[self._step], begin),
        }
        if known.all():
            return columns | {"relative": np.add.reduceat(relative, begin)}
        some = np.logical_or.reduceat(known, begin)
        sums = np.add.reduceat(np.where(known, relative, 0.0), begin)
        return columns | {"relative": pa.array(sums, mask=~some)}
