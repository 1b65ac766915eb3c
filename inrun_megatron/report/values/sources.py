"""Rows of samples and documents with where they come from and how their text begins."""

from __future__ import annotations

from typing import Any

from inrun_megatron.errors import UserError
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.values.ranking import Level

SNIPPET_CHARACTERS = 160


def with_text(documents: Documents, row: dict[str, Any]) -> dict[str, Any]:
    """A document's row with where it comes from and the beginning of its text."""
    dataset, document = row["dataset"], row["document"]
    return row | {
        "source": documents.source(dataset, document),
        "snippet": documents.snippet(dataset, document, SNIPPET_CHARACTERS),
    }


def with_place(documents: Documents, level: Level | str, row: dict[str, Any]) -> dict[str, Any]:
    """A sample's or document's row with source and beginning of its text; None for both where a sample's data files are
    not at hand, as figures of samples need none."""
    if level is Level.document:
        return with_text(documents, row)
    try:
        span = documents.spans(row["dataset"], row["sample"])[0]
        text = documents.snippet(row["dataset"], span.document, SNIPPET_CHARACTERS, span.start, span.end)
        return row | {"source": documents.source(row["dataset"], span.document), "snippet": text}
    except UserError:
        return row | {"source": None, "snippet": None}
