"""Sums of groups of documents (a file, a source) by step, where samples were scored whole: without a join.

What a group has of a sample is its documents' part of it, by length. Samples of one step move together
(report/domains.py), so that a group's samples of one step are one draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from inrun_megatron.report.document_sums import FINITE, PIECE_SPANS
from inrun_megatron.report.documents import Documents
from inrun_megatron.report.draws import Draws, in_order, read_draws
from inrun_megatron.report.groups import Groups
from inrun_megatron.report.query import Query


def group_sums(
    query: Query, documents: Documents, groups: Groups, targets: Sequence[str], first: int, last: int
) -> Iterator[pa.Table]:
    """What each group has of the samples of each step in [first, last], in pieces that add up: columns step, grp, target,
    n (samples that it has a part of), tokens, total, negatives.

    Raises UserError when a part, or the data files, cannot be read or have changed.
    """
    draws = read_draws(query.ledger, targets, first, last)
    for dataset in np.unique(draws.dataset).tolist():
        own = np.flatnonzero(draws.dataset == dataset)
        size = max(1, int(PIECE_SPANS / documents.resolver.spans_per_sample(dataset)))
        pieces = (own[start : start + size] for start in range(0, len(own), size))
        work = _Work(documents, draws, targets, dataset, groups.of(dataset))
        for tables in in_order(work.of_piece, pieces):
            yield from tables


@dataclass(frozen=True)
class _Work:
    documents: Documents
    draws: Draws
    targets: Sequence[str]
    dataset: int
    group: np.ndarray
    """[documents] of the dataset"""

    def of_piece(self, piece: np.ndarray) -> list[pa.Table]:
        """The sums of the draws `piece`, one table per target."""
        samples = self.draws.sample[piece]
        row, document, tokens = self.documents.resolver.resolve_many(self.dataset, samples)
        share = tokens / np.bincount(row, weights=tokens, minlength=len(samples))[row]
        group = self.group[document]
        # Samples of which a group has several documents count once: first of them, in order of sample and group.
        order = np.lexsort((group, row))
        row, group, tokens, share = row[order], group[order], tokens[order], share[order]
        fresh = np.append(True, (row[1:] != row[:-1]) | (group[1:] != group[:-1]))[: len(row)]
        starts = np.flatnonzero(fresh)
        row, group = row[starts], group[starts]
        if not len(row):
            return []
        tokens, share = np.add.reduceat(tokens, starts), np.add.reduceat(share, starts)
        found = []
        step = self.draws.step[piece][row]
        for position, target in enumerate(self.targets):
            value = self.draws.value[piece, position][row]
            finite = np.abs(value) < FINITE
            found.append(
                _table(step[finite], group[finite], target, tokens[finite], value[finite] * share[finite])
            )
        return found


def _table(
    step: np.ndarray, group: np.ndarray, target: str, tokens: np.ndarray, value: np.ndarray
) -> pa.Table:
    count = int(group.max(initial=0)) + 1
    key, cell = np.unique(step.astype(np.int64) * count + group, return_inverse=True)
    cells = len(key)

    def added(weights: np.ndarray | None) -> np.ndarray:
        return np.bincount(cell, weights, minlength=cells)

    return pa.table(
        {
            "step": (key // count).astype(np.int32),
            "grp": key % count,
            "target": pa.DictionaryArray.from_arrays(np.zeros(cells, np.int32), pa.array([target])),
            "n": added(None),
            "tokens": np.rint(added(tokens)).astype(np.int64),
            "total": added(value),
            "negatives": np.rint(added(value < 0)).astype(np.int64),
        }
    )
