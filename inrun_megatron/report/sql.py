"""The SQL of the reports, as plain SELECTs that DuckDB and Spark SQL both run (docs/ledger.md shows how).

They build on two relations, the committed rows of the ledger's tables:

    ledger_values(step, dataset, sample, segment, target, tokens, value)
    ledger_steps(step, target, realised)            realised as `Ledger.steps()` fills it in

Where rows are joined with a figure of their step, they are added up per step first if they can be: a join of cells is
thousands of times smaller than a join of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

LARGEST = 1e308
"""Values of this size and more count as infinite."""

IS_FINITE = f"value - value = 0 AND abs(value) < {LARGEST:g}"
"""Neither NaN nor infinite; `isfinite` is not in Spark. Only the difference sees NaN: Parquet's statistics of a part do not
count it, and by them DuckDB (2.0.0, duckdb/duckdb#25521) decides comparisons and `isnan` without a look at the values."""

SAMPLES = f"SELECT step, dataset, sample, target, tokens, value FROM ledger_values WHERE {IS_FINITE}"
"""One row per step, sample and target, of a ledger whose rows are whole samples."""

CUT_SAMPLES = f"""
SELECT step, dataset, sample, target, sum(CAST(tokens AS BIGINT)) AS tokens, sum(value) AS value
FROM ledger_values WHERE {IS_FINITE} GROUP BY step, dataset, sample, target
"""
"""The same of a ledger whose rows are segments of samples."""

CELLS = """
SELECT step, dataset, target, count(*) AS n, sum(CAST(tokens AS BIGINT)) AS tokens,
       sum(value) AS total, sum(abs(value)) AS absolute,
       sum(CASE WHEN value < 0 THEN 1 ELSE 0 END) AS negatives
FROM samples GROUP BY step, dataset, target
"""
"""What a dataset's samples of one step add up to."""

SCALES = """
SELECT c.step, c.target, CASE WHEN c.absolute > 0 THEN c.n / c.absolute ELSE 0 END AS factor,
       CASE WHEN abs(r.realised) > 0 AND r.realised - r.realised = 0 THEN 1 / abs(r.realised) ELSE NULL END AS per_change
FROM (SELECT step, target, sum(n) AS n, sum(absolute) AS absolute FROM cells GROUP BY step, target) c
LEFT JOIN ledger_steps r ON c.step = r.step AND c.target = r.target
"""
"""What a value is multiplied by to be normalised (`factor`) or relative (`per_change`)."""

SCORED = """
SELECT v.step, v.dataset, v.sample, v.target, v.tokens, v.value, v.value * s.factor AS normalised,
       v.value * s.per_change AS relative
FROM samples v JOIN scales s ON v.step = s.step AND v.target = s.target
"""

PARTS = f"""
SELECT v.step, v.dataset, v.sample, v.segment, v.target, v.tokens, v.value, v.value * s.factor AS normalised,
       v.value * s.per_change AS relative
FROM (SELECT * FROM ledger_values WHERE {IS_FINITE}) v JOIN scales s ON v.step = s.step AND v.target = s.target
"""
"""Like SCORED, one row per segment."""

DOMAINS = """
SELECT c.target, c.dataset, CAST(sum(c.tokens) AS BIGINT) AS tokens, CAST(sum(c.negatives) AS BIGINT) AS negatives,
       count(*) AS raw_steps, CAST(sum(c.n) AS BIGINT) AS raw_n, sum(CAST(c.n AS DOUBLE) * c.n) AS raw_n_squared,
       sum(c.total) AS raw, sum(c.total * c.total) AS raw_squared, sum(c.total * c.n) AS raw_products,
       CAST(sum(CASE WHEN s.factor > 0 THEN 1 ELSE 0 END) AS BIGINT) AS norm_steps,
       CAST(sum(CASE WHEN s.factor > 0 THEN c.n ELSE 0 END) AS BIGINT) AS norm_n,
       sum(CASE WHEN s.factor > 0 THEN CAST(c.n AS DOUBLE) * c.n ELSE 0 END) AS norm_n_squared,
       sum(c.total * s.factor) AS norm, sum(c.total * s.factor * c.total * s.factor) AS norm_squared,
       sum(c.total * s.factor * c.n) AS norm_products
FROM cells c JOIN scales s ON c.step = s.step AND c.target = s.target
WHERE c.step BETWEEN {first} AND {last}
GROUP BY c.target, c.dataset
"""
"""Sums that `values/domains.py` makes means and standard errors of: raw, and normalised over the steps whose values can be (at
learning rate 0 all are zero)."""


def rows_of(keys: Sequence[str], source: str) -> str:
    """Draws of which each is one row of `source`(step, keys, target, tokens, value): a sample, or its share in a
    document."""
    return (
        f"SELECT step, {', '.join(keys)}, target, 1 AS n, tokens, value AS total, "
        f"CASE WHEN value < 0 THEN 1 ELSE 0 END AS negatives FROM {source}"
    )


def moments(keys: Sequence[str], draws: str) -> str:
    """Sums over draws, per keys and target; moments of disjoint ranges of steps add up."""
    columns = ", ".join(f"c.{key}" for key in keys)
    return f"""
SELECT {columns}, c.target, count(*) AS draws, CAST(sum(c.n) AS BIGINT) AS samples,
       CAST(sum(CAST(c.tokens AS BIGINT)) AS BIGINT) AS tokens, min(c.step) AS first_step, max(c.step) AS last_step,
       sum(c.total) AS value, sum(c.total * c.total) AS squares, sum(c.total * c.n) AS products,
       sum(CAST(c.n AS DOUBLE) * c.n) AS counts, CAST(sum(c.negatives) AS BIGINT) AS negatives,
       sum(c.total * s.factor) AS normalised, sum(c.total * s.per_change) AS relative
FROM ({draws}) c JOIN scales s ON c.step = s.step AND c.target = s.target
GROUP BY {columns}, c.target
"""


def added(keys: Sequence[str], source: str) -> str:
    """Moments of several ranges of steps, added up."""
    columns = ", ".join((*keys, "target"))
    sums = ("draws", "samples", "tokens", "negatives")
    numbers = ("value", "squares", "products", "counts", "normalised", "relative")
    return (
        f"SELECT {columns}, min(first_step) AS first_step, max(last_step) AS last_step, "
        + ", ".join(f"CAST(sum({name}) AS BIGINT) AS {name}" for name in sums)
        + ", "
        + ", ".join(f"sum({name}) AS {name}" for name in numbers)
        + f" FROM {source} GROUP BY {columns}"
    )


def figures(columns: str, source: str) -> str:
    """Figures from moments `m`. The error of the mean takes draws as independent; none with fewer than two.

    se^2 = T / (T - 1) * sum_t (S_t - n_t mean)^2 / (sum n_t)^2, expanded; rounding may take the sum below 0.
    """
    mean = "m.value / m.samples"
    residual = f"m.squares - 2 * ({mean}) * m.products + ({mean}) * ({mean}) * m.counts"
    return f"""
SELECT {columns}, m.target, m.samples, m.tokens, m.first_step, m.last_step, m.value, {mean} AS mean,
       CASE WHEN m.draws > 1
            THEN sqrt(greatest({residual}, 0) * m.draws / (m.draws - 1)) / m.samples ELSE NULL END AS standard_error,
       m.negatives / CAST(m.samples AS DOUBLE) AS negative_share,
       CASE WHEN m.tokens > 0 THEN m.value / m.tokens ELSE NULL END AS per_token, m.normalised, m.relative
FROM {source}
"""
