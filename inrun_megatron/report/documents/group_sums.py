"""Sums of groups of documents (a file, a source) by step, without a join.

What a group has of a sample is what its documents have of it (parts.py). Samples of one step move together
(report/values/domains.py), so that a group's samples of one step are one draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from inrun_megatron.report.documents.draws import Draws, in_order, read_draws
from inrun_megatron.report.documents.groups import Groups
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.documents.neighbours import added, starts
from inrun_megatron.report.documents.parts import Parts, parts_of, pieces_of
from inrun_megatron.report.query import Query
from inrun_megatron.report.sql import LARGEST


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
        work = _Work(documents, draws, targets, dataset, groups.of(dataset))
        for tables in in_order(work.of_piece, pieces_of(documents, draws, dataset, own)):
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
        parts, step = parts_of(self.documents, self.draws, self.dataset, piece), self.draws.step[piece]
        finite = np.abs(parts.value) < LARGEST
        common = _ByGroup(parts, self.group, step) if finite.all() else None
        found = []
        for position, target in enumerate(self.targets):
            summed = common or _ByGroup(parts.of(finite[position]), self.group, step)
            found.append(summed.table(target, parts.value[position]))
        return found


class _ByGroup:
    """Parts summed by draw and group, and those by step and group: what does not depend on the target, once."""

    def __init__(self, parts: Parts, group_of: np.ndarray, step: np.ndarray) -> None:
        tokens = parts.tokens
        if tokens.dtype.kind == "f":
            # Shares of segments: a document's tokens of a sample are whole.
            parts = parts.by_document()
            begin = starts(parts.draw, parts.document)
            tokens = np.zeros(len(parts.draw), np.int64)
            tokens[begin] = np.rint(added(parts.tokens, begin))
        group = group_of[parts.document]
        # Samples of which a group has several documents count once.
        order = np.lexsort((group, parts.draw))
        draw, group = parts.draw[order], group[order]
        self._at, self._share = parts.at[order], parts.share[order]
        self._starts = starts(draw, group)
        self._tokens = added(tokens[order], self._starts)
        draw, group = draw[self._starts], group[self._starts]
        count = int(group.max(initial=0)) + 1
        key, self._cell = np.unique(step[draw].astype(np.int64) * count + group, return_inverse=True)
        self._step, self._group = (key // count).astype(np.int32), key % count

    def table(self, target: str, value: np.ndarray) -> pa.Table:
        """value: of the parts' rows."""
        own = added(value[self._at] * self._share, self._starts)
        cells = len(self._step)

        def per_cell(weights: np.ndarray | None) -> np.ndarray:
            return np.bincount(self._cell, weights, minlength=cells)

        return pa.table(
            {
                "step": self._step,
                "grp": self._group,
                "target": pa.DictionaryArray.from_arrays(np.zeros(cells, np.int32), pa.array([target])),
                "n": per_cell(None),
                "tokens": np.rint(per_cell(self._tokens)).astype(np.int64),
                "total": per_cell(own),
                "negatives": np.rint(per_cell(own < 0)).astype(np.int64),
            }
        )
