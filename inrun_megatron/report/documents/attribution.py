"""Values of documents: the relation `document_rows`, one row per step, sample, document in it, and target.

Where a run was scored with --shapley-granularity document or token, a document's value is that of its own tokens in the
sample, added up from the ledger's segments. Where samples were scored whole, the sample's value is shared among its
documents in proportion to their tokens in it: an attribution by length, not a measurement.
"""

from __future__ import annotations

from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.query import Query

IN_WORDS = {
    "sample": "A sample's value is shared among its documents in proportion to their tokens in it.",
    "document": "A document's value is that of its own tokens in the samples it is part of.",
    "token": "A document's value is the sum of its own tokens' values.",
}
"""Where values of documents come from, by the ledger's granularity."""

CHUNK = 1 << 20
"""Samples that are resolved to documents at a time."""

_SHARED = """
CREATE TEMP VIEW document_rows AS
SELECT s.step, s.dataset, s.sample, p.document, s.target, p.tokens, p.share, s.value AS sample_value,
       s.value * p.share AS value, s.normalised * p.share AS normalised
FROM scored s JOIN places p ON s.dataset = p.dataset AND s.sample = p.sample WHERE {chosen}
"""

_MEASURED = """
CREATE TEMP TABLE document_rows AS
WITH own AS (
    SELECT s.step, s.dataset, s.sample, p.document, s.target, CAST(round(sum(s.tokens * p.share)) AS BIGINT) AS tokens,
           sum(s.value * p.share) AS value, sum(s.normalised * p.share) AS normalised
    FROM parts s JOIN places p
        ON s.dataset = p.dataset AND s.sample = p.sample AND s.segment BETWEEN p.first AND p.last
    WHERE {chosen} GROUP BY ALL
)
SELECT o.step, o.dataset, o.sample, o.document, o.target, o.tokens, CAST(NULL AS DOUBLE) AS share,
       s.value AS sample_value, o.value, o.normalised
FROM own o JOIN scored s ON o.step = s.step AND o.dataset = s.dataset AND o.sample = s.sample AND o.target = s.target
"""


def create_document_rows(
    query: Query,
    documents: Documents,
    chosen: str,
    dataset: int | None = None,
    document: int | None = None,
    sample: int | None = None,
) -> None:
    """(Re)create `document_rows`(step, dataset, sample, document, target, tokens, share, sample_value, value, normalised).

    chosen: condition on step and target. dataset, document, sample: of these only. tokens: the document's tokens in the sample, or
    its loss tokens where the ledger is by document or token; share: its share of the sample's value where that is shared,
    else null. Raises UserError when the data files are not there or have changed.
    """
    statement, kind = (_SHARED, "VIEW") if query.ledger.granularity == "sample" else (_MEASURED, "TABLE")
    query.run(f"DROP {kind} IF EXISTS document_rows")
    _create_places(query, documents, chosen, dataset, document, sample)
    query.run(statement.format(chosen=chosen))


def _create_places(
    query: Query,
    documents: Documents,
    chosen: str,
    dataset: int | None,
    document: int | None,
    sample: int | None,
) -> None:
    """The relation `places`: which documents the samples chosen, or their segments, are of."""
    query.run("DROP TABLE IF EXISTS places")
    measured = query.ledger.granularity != "sample"
    columns = (
        "first BIGINT, last BIGINT, document BIGINT, share DOUBLE"
        if measured
        else "document BIGINT, tokens BIGINT, share DOUBLE"
    )
    query.run(f"CREATE TEMP TABLE places(dataset SMALLINT, sample BIGINT, {columns})")
    only = "" if dataset is None else f" AND dataset = {dataset}"
    only += "" if sample is None else f" AND sample = {sample}"
    found = query.rows(f"SELECT DISTINCT dataset FROM ledger_values WHERE {chosen}{only} ORDER BY dataset")
    for index in [row["dataset"] for row in found]:
        samples = query.table(
            f"SELECT sample, max(segment) + 1 AS segments FROM ledger_values WHERE {chosen}{only} "
            f"AND dataset = {index} GROUP BY sample ORDER BY sample"
        )
        for start in range(0, samples.num_rows, CHUNK):
            part = samples.slice(start, CHUNK)
            numbers, counts = part["sample"].to_numpy(), part["segments"].to_numpy()
            if measured:
                query.register("new_places", documents.segments(index, numbers, counts))
            else:
                query.register("new_places", documents.shares(index, numbers))
            wanted = "" if document is None else f" WHERE document = {document}"
            query.run(f"INSERT INTO places SELECT * FROM new_places{wanted}")
