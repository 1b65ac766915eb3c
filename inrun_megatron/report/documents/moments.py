"""Moments of documents, or of groups of them, over a phase: the relation `moments` that figures are made of.

They are summed outside SQL (sums.py, group_sums.py), a range of steps at a time, so that memory does not grow with
the run; attribution.py has the same attribution as SQL, for single documents and samples.
"""

from __future__ import annotations

from inrun_megatron.ledger.schema import VALUES
from inrun_megatron.report import sql
from inrun_megatron.report.documents.group_sums import group_sums
from inrun_megatron.report.documents.groups import Groups
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.documents.sums import Leading, document_sums, draws_at_a_time
from inrun_megatron.report.phases import Phase
from inrun_megatron.report.query import RANGE_ROWS, Query

DOCUMENT = ["dataset", "document"]
GROUP = ["grp"]

_NO_CELLS = "SELECT step, {keys}, target, n, tokens, total, negatives FROM cells WHERE false"

_NEW_MOMENTS = """
SELECT dataset, document, CAST(target AS VARCHAR) AS target, draws, draws AS samples, tokens, first_step, last_step, value,
       squares, value AS products, CAST(draws AS DOUBLE) AS counts, negatives, normalised, relative
FROM new_moments
"""
"""Each draw is one sample."""

_GROUP_DRAWS = """
SELECT step, grp, target, CAST(sum(n) AS BIGINT) AS n, CAST(sum(tokens) AS BIGINT) AS tokens, sum(total) AS total,
       CAST(sum(negatives) AS BIGINT) AS negatives
FROM group_draws GROUP BY step, grp, target
"""


def create_document_moments(
    query: Query, phase: Phase, target: str | None, documents: Documents, leading: Leading | None
) -> None:
    """(Re)create `moments`, one row per document and target; `leading`: documents that are not asked for may be left
    out."""
    _create(query, "moments", DOCUMENT)
    _create(query, "partial_moments", DOCUMENT)
    targets = query.ledger.target_names if target is None else [target]
    ranges = ranges_of_steps(query, phase, draws_at_a_time(len(targets)) * len(query.ledger.target_names))
    for first, last in ranges:
        only = leading if len(ranges) == 1 else None
        for sums in document_sums(query, documents, targets, first, last, only):
            into = "moments" if sums.whole and len(ranges) == 1 else "partial_moments"
            query.register("new_moments", sums.table)
            query.run(f"INSERT INTO {into} BY NAME {_NEW_MOMENTS}")
    _finish(query, DOCUMENT)


def create_group_moments(
    query: Query, phase: Phase, target: str | None, documents: Documents, groups: Groups
) -> None:
    """(Re)create `moments`, one row per group (`grp`) and target."""
    _create(query, "moments", GROUP)
    _create(query, "partial_moments", GROUP)
    targets = query.ledger.target_names if target is None else [target]
    query.drop("TABLE", "group_draws")
    query.run(f"CREATE TEMP TABLE group_draws AS {_NO_CELLS.format(keys='CAST(0 AS BIGINT) AS grp')}")
    for first, last in ranges_of_steps(query, phase, RANGE_ROWS):
        for table in group_sums(query, documents, groups, targets, first, last):
            query.register("new_draws", table)
            query.run("INSERT INTO group_draws BY NAME SELECT * FROM new_draws")
        query.run(f"INSERT INTO partial_moments BY NAME {sql.moments(GROUP, _GROUP_DRAWS)}")
        query.run("DELETE FROM group_draws")
    _finish(query, GROUP)


def ranges_of_steps(query: Query, phase: Phase, rows: int) -> list[tuple[int, int]]:
    """Ranges of steps with about `rows` rows of the ledger each."""
    samples = query.rows("SELECT CAST(sum(n) AS BIGINT) AS n FROM cells")[0]["n"]
    # Where samples are cut, one has a row for each segment.
    cut = 1.0 if not samples else max(1.0, sum(part.rows for part in query.ledger.parts(VALUES)) / samples)
    return list(query.step_ranges(phase.first, phase.last, max(1, int(rows / cut))))


def _create(query: Query, name: str, keys: list[str]) -> None:
    """An empty relation of moments."""
    columns = "dataset, CAST(0 AS BIGINT) AS document" if keys == DOCUMENT else "CAST(0 AS BIGINT) AS grp"
    query.drop("TABLE", name)
    query.run(f"CREATE TEMP TABLE {name} AS {sql.moments(keys, _NO_CELLS.format(keys=columns))}")


def _finish(query: Query, keys: list[str]) -> None:
    """What was summed in several ranges of steps, or in several places, is added up."""
    query.run(f"INSERT INTO moments BY NAME {sql.added(keys, 'partial_moments')}")
    query.run("DROP TABLE partial_moments")
