"""Values by sample, document, dataset, file or metadata field: the relation `figures`, ranked or exported.

How values of documents come about is said in report/documents/attribution.py, how they are summed in report/documents/moments.py.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from inrun_megatron.report import sql
from inrun_megatron.report.documents.groups import Groups
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.documents.moments import create_document_moments, create_group_moments
from inrun_megatron.report.documents.sums import Leading
from inrun_megatron.report.phases import Phase
from inrun_megatron.report.query import Query, limit, quoted


class Level(StrEnum):
    """What values are added up by."""

    sample = "sample"
    document = "document"
    dataset = "dataset"


class RankBy(StrEnum):
    """What ranks.

    value: the sum. mean: per sample. per-token: per token. normalised, relative: the sum of normalised or relative
    values (report/query.py).
    """

    value = "value"
    mean = "mean"
    per_token = "per-token"
    normalised = "normalised"
    relative = "relative"


KEYS = {
    Level.sample: ["dataset", "dataset_name", "sample"],
    Level.document: ["dataset", "dataset_name", "document"],
    Level.dataset: ["dataset", "dataset_name"],
}


def level_of(text: str) -> Level | str:
    """A level by its name; any other name is a field of the documents (`file`, or what `inrun prepare` kept)."""
    return Level(text) if text in Level.__members__ else text


def keys_of(level: Level | str) -> list[str]:
    """The columns of `figures` that name a row; a metadata field gives the column its own name."""
    return KEYS[level] if isinstance(level, Level) else ["name"]


def create_figures(
    query: Query,
    level: Level | str,
    phase: Phase,
    documents: Documents | None = None,
    target: str | None = None,
    leading: Leading | None = None,
) -> None:
    """(Re)create the relation `figures`: one row per target and sample, document, dataset or value of a metadata field,
    over the steps of `phase`.

    Columns: keys_of(level), then target, samples, tokens, first_step, last_step, value, mean, standard_error,
    negative_share, per_token, normalised, relative. `samples`: scored samples that it is part of; tokens: loss tokens
    (documents and fields: see documents/attribution.py). The error of the mean takes steps as independent draws, for
    samples and documents each scored sample. All levels but sample and dataset need `documents`. leading: documents that
    `ranked` would not show may be left out. Raises UserError when the data files are not there or have changed.
    """
    for kind in ("TABLE", "VIEW"):
        query.drop(kind, "figures")
    scope = f"step BETWEEN {phase.first} AND {phase.last}"
    if target is not None:
        scope += f" AND target = {quoted(target)}"
    if level is Level.dataset:
        keys, draws = ["dataset"], f"SELECT * FROM cells WHERE {scope}"
        source = f"({sql.moments(keys, draws)})"
    elif level is Level.sample:
        if _once(query, phase):
            _samples_as_they_are(query, scope)
            return
        keys = ["dataset", "sample"]
        source = f"({sql.moments(keys, sql.rows_of(keys, f'(SELECT * FROM samples WHERE {scope})'))})"
    elif isinstance(level, Level):
        assert documents is not None
        create_document_moments(query, phase, target, documents, leading)
        keys, source = ["dataset", "document"], "moments"
    else:
        assert documents is not None
        groups = Groups(query.ledger, documents, level)
        create_group_moments(query, phase, target, documents, groups)
        query.register("groups", groups.names())
        joined = sql.figures("g.name", "moments m JOIN groups g ON m.grp = g.grp")
        query.run(f"CREATE TEMP VIEW figures AS {joined}")
        return
    columns = ", ".join(["m.dataset", "d.name AS dataset_name", *(f"m.{key}" for key in keys[1:])])
    kind = "VIEW" if source == "moments" else "TABLE"
    query.run(
        f"CREATE TEMP {kind} figures AS "
        f"{sql.figures(columns, f'{source} m JOIN datasets d ON m.dataset = d.dataset')}"
    )


def ranked(
    query: Query,
    level: Level | str,
    target: str,
    measure: RankBy = RankBy.value,
    worst: bool = False,
    n: int = 10,
) -> list[dict[str, Any]]:
    """The n best (or worst) rows of `figures` towards `target`; ties in the order of the keys."""
    column = measure.name
    direction = "ASC" if worst else "DESC"
    keys = ", ".join(keys_of(level))
    return query.rows(
        f"SELECT * FROM figures WHERE target = {quoted(target)} "
        f"ORDER BY {column} {direction} NULLS LAST, {keys} LIMIT {limit(n)}"
    )


def _once(query: Query, phase: Phase) -> bool:
    """Was every sample scored at most once? So it is in a training run: a sample's number is its place in the order.

    Then nothing needs adding up, and a ranking passes over the rows once instead of grouping them all.
    """
    # Segments 0, values that are not finite included: every sample has one.
    scope = f"segment = 0 AND step BETWEEN {phase.first} AND {phase.last}"
    first = quoted(query.ledger.target_names[0])
    found = query.rows(
        f"SELECT coalesce(bool_and(n = samples), true) AS once FROM (SELECT count(*) AS n, count(DISTINCT sample) AS samples "
        f"FROM ledger_values WHERE {scope} AND target = {first} GROUP BY dataset)"
    )
    return bool(found[0]["once"])


def _samples_as_they_are(query: Query, scope: str) -> None:
    query.run(f"""
        CREATE TEMP VIEW figures AS
        SELECT s.dataset, d.name AS dataset_name, s.sample, s.target, CAST(1 AS BIGINT) AS samples,
               CAST(s.tokens AS BIGINT) AS tokens, s.step AS first_step, s.step AS last_step, s.value, s.value AS mean,
               CAST(NULL AS DOUBLE) AS standard_error, CASE WHEN s.value < 0 THEN 1.0 ELSE 0.0 END AS negative_share,
               CASE WHEN s.tokens > 0 THEN s.value / s.tokens END AS per_token, s.normalised, s.relative
        FROM (SELECT * FROM scored WHERE {scope}) s JOIN datasets d ON s.dataset = d.dataset
    """)
