"""Values by sample, document or dataset: the relation `figures`, ranked or exported.

How values of documents come about is said in report/attribution.py.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from inrun_megatron.report.attribution import create_document_rows
from inrun_megatron.report.documents import Documents
from inrun_megatron.report.phases import Phase
from inrun_megatron.report.query import Query, quoted


class Level(StrEnum):
    """What values are added up by."""

    sample = "sample"
    document = "document"
    dataset = "dataset"


class Measure(StrEnum):
    """What ranks.

    value: the sum. mean: per sample. per-token: per token. normalised: the sum of normalised values.
    """

    value = "value"
    mean = "mean"
    per_token = "per-token"
    normalised = "normalised"


KEYS = {
    Level.sample: ["dataset", "dataset_name", "sample"],
    Level.document: ["dataset", "dataset_name", "document"],
    Level.dataset: ["dataset", "dataset_name"],
}

# samples: rows that contributed; tokens: loss tokens (documents: see attribution.py).
_FIGURES = """
    target, samples, tokens, first_step, last_step, value,
    value / samples AS mean, CASE WHEN tokens > 0 THEN value / tokens END AS per_token, normalised
"""

_SUMS = """
    count(*) AS samples, CAST(sum(CAST(tokens AS BIGINT)) AS BIGINT) AS tokens,
    min(step) AS first_step, max(step) AS last_step, sum(value) AS value, sum(normalised) AS normalised
"""


def create_figures(
    query: Query, level: Level, phase: Phase, documents: Documents | None = None, target: str | None = None
) -> None:
    """(Re)create the relation `figures`: one row per target and sample, document or dataset, over the steps of `phase`.

    Columns: KEYS[level], then target, samples, tokens, first_step, last_step, value, mean, per_token, normalised.
    level document needs `documents`. Raises UserError when the data files are not there or have changed.
    """
    chosen = f"step BETWEEN {phase.first} AND {phase.last}"
    if target is not None:
        chosen += f" AND target = {quoted(target)}"
    if level is Level.document:
        assert documents is not None
        create_document_rows(query, documents, chosen)
        grouped = (
            f"SELECT dataset, document, target, {_SUMS} FROM document_rows GROUP BY dataset, document, target"
        )
    else:
        keys = "dataset, sample, target" if level is Level.sample else "dataset, target"
        grouped = f"SELECT {keys}, {_SUMS} FROM scored WHERE {chosen} GROUP BY {keys}"
    columns = ", ".join(
        f"g.{key}" if key != "dataset_name" else "d.name AS dataset_name" for key in KEYS[level]
    )
    query.run("DROP TABLE IF EXISTS figures")
    query.run(
        f"CREATE TEMP TABLE figures AS SELECT {columns}, {_FIGURES} "
        f"FROM ({grouped}) g JOIN datasets d ON g.dataset = d.dataset"
    )


def ranked(
    query: Query,
    level: Level,
    target: str,
    measure: Measure = Measure.value,
    worst: bool = False,
    n: int = 10,
) -> list[dict[str, Any]]:
    """The n best (or worst) rows of `figures` towards `target`; ties in the order of the keys."""
    column = measure.name
    direction = "ASC" if worst else "DESC"
    keys = ", ".join(KEYS[level])
    return query.rows(
        f"SELECT * FROM figures WHERE target = {quoted(target)} "
        f"ORDER BY {column} {direction} NULLS LAST, {keys} LIMIT {n}"
    )
