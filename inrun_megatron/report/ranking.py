"""Values by sample, document or dataset: the relation `figures`, ranked or exported.

A sample's value belongs to all tokens of its row. It is shared among the documents that the row was cut from in
proportion to their tokens in it; the shares add up to the sample's value. Exact values per document need the per-token
terms, which the ledger does not hold at this granularity.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from inrun_megatron.report.documents import Documents
from inrun_megatron.report.phases import Phase
from inrun_megatron.report.query import Query, quoted

CHUNK = 1 << 20
"""Samples that are resolved to documents at a time."""


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

# samples: rows that contributed; tokens: loss tokens (documents: their tokens in those rows).
_FIGURES = """
    target, samples, tokens, first_step, last_step, value,
    value / samples AS mean, CASE WHEN tokens > 0 THEN value / tokens END AS per_token, normalised
"""

_SUMS = """
    count(*) AS samples, CAST(sum(CAST({tokens} AS BIGINT)) AS BIGINT) AS tokens,
    min(step) AS first_step, max(step) AS last_step,
    sum(value * {share}) AS value, sum(normalised * {share}) AS normalised
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
        _create_spans(query, documents, chosen)
        sums = _SUMS.format(tokens="p.tokens", share="p.share")
        grouped = f"""
            SELECT s.dataset, p.document, s.target, {sums}
            FROM scored s JOIN spans p ON s.dataset = p.dataset AND s.sample = p.sample
            WHERE {chosen} GROUP BY s.dataset, p.document, s.target
        """
    else:
        keys = "dataset, sample, target" if level is Level.sample else "dataset, target"
        sums = _SUMS.format(tokens="tokens", share="1")
        grouped = f"SELECT {keys}, {sums} FROM scored WHERE {chosen} GROUP BY {keys}"
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


def _create_spans(query: Query, documents: Documents, chosen: str) -> None:
    """The relation `spans`(dataset, sample, document, tokens, share) of the samples chosen; shares of a sample sum to 1."""
    query.run("DROP TABLE IF EXISTS spans")
    query.run(
        "CREATE TEMP TABLE spans(dataset SMALLINT, sample BIGINT, document BIGINT, tokens BIGINT, share DOUBLE)"
    )
    for dataset in query.rows(f"SELECT DISTINCT dataset FROM scored WHERE {chosen} ORDER BY dataset"):
        index = dataset["dataset"]
        samples = query.table(
            f"SELECT DISTINCT sample FROM ledger_values WHERE {chosen} AND dataset = {index} ORDER BY sample"
        )["sample"].to_numpy()
        for start in range(0, len(samples), CHUNK):
            query.register("new_spans", documents.shares(index, samples[start : start + CHUNK]))
            query.run("INSERT INTO spans SELECT * FROM new_spans")
