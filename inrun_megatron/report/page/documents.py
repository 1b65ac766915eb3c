"""The best and worst documents of the last phase, with their texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from inrun_megatron.errors import UserError
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.documents.sums import Leading
from inrun_megatron.report.phases import Phase
from inrun_megatron.report.query import Query
from inrun_megatron.report.text import printable_lines, shorten
from inrun_megatron.report.values.ranking import Level, create_figures, ranked

TEXT_CHARACTERS = 2000
"""How much of a document's text the report holds."""


def best_and_worst(query: Query, phase: Phase, n: int, moved: Sequence[str]) -> dict[str, Any]:
    """`documents`: the n best and worst of each target in `phase`; None with n = 0, and where the data files are not at hand,
    with the reason as `documents_error`. moved: `NAME=PREFIX` of datasets that have moved."""
    found: dict[str, Any] = {
        "documents": None,
        "documents_error": None,
        "documents_phase": phase.to_dict(),
    }
    if n > 0:
        documents = Documents(query.ledger, moved)
        try:
            found["documents"] = _listed(query, documents, phase, n)
        except UserError as error:
            # Figures per domain need no data files: a ledger read on another machine still gives its report.
            found["documents_error"] = str(error)
    return found


def _listed(query: Query, documents: Documents, phase: Phase, n: int) -> list[dict[str, Any]]:
    """Documents on a list, each once, with their values towards every target; `lists`: as `_lists` has them."""
    create_figures(query, Level.document, phase, documents, leading=Leading("value", n))
    lists = _lists(query, n)
    keys = {
        name: pa.array([key[position] for key in lists], kind)
        for position, (name, kind) in enumerate((("dataset", pa.int16()), ("document", pa.int64())))
    }
    query.register("listed", pa.table(keys))
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for row in query.rows(
        "SELECT f.* FROM figures f SEMI JOIN listed l ON f.dataset = l.dataset AND f.document = l.document "
        "ORDER BY f.dataset, f.document"
    ):
        key = (row["dataset"], row["document"])
        entry = found.setdefault(
            key,
            {name: row[name] for name in ("dataset", "dataset_name", "document", "tokens", "samples")}
            | {"values": dict.fromkeys(query.ledger.target_names), "lists": lists[key]},
        )
        entry["values"][row["target"]] = {name: row[name] for name in ("value", "per_token", "normalised")}
    return [entry | _text(documents, entry) for entry in found.values()]


def _lists(query: Query, n: int) -> dict[tuple[int, int], dict[str, dict[str, int]]]:
    """Where documents stand, by (dataset, document): {"best": {target: rank}, "worst": {target: rank}}, ranks from 1."""
    lists: dict[tuple[int, int], dict[str, dict[str, int]]] = {}
    for target in query.ledger.target_names:
        for kind, worst in (("best", False), ("worst", True)):
            leading = ranked(query, Level.document, target, worst=worst, n=n)
            for rank, row in enumerate(leading, start=1):
                # A best document has a positive value: with few documents the n best would hold the worst as well.
                if row["value"] < 0 if worst else row["value"] > 0:
                    own = lists.setdefault((row["dataset"], row["document"]), {"best": {}, "worst": {}})
                    own[kind][target] = rank
    return lists


def _text(documents: Documents, entry: dict[str, Any]) -> dict[str, Any]:
    dataset, document = entry["dataset"], entry["document"]
    text = documents.text(dataset, document, 0, 4 * TEXT_CHARACTERS + 64).strip()
    return {
        "source": documents.source(dataset, document),
        "metadata": documents.metadata(dataset, document),
        "text": shorten(printable_lines(text), TEXT_CHARACTERS),
    }
