"""Two runs side by side: do they agree about which samples or documents are worth something?

Spearman     correlation of ranks, ties with their mean rank
movers       the largest changes of rank, as shares of the shared rows: (rank in B - rank in A) / n
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inrun_megatron.errors import UserError
from inrun_megatron.report.comparison.matching import (
    Side,
    export_scores,
    identities,
    nothing_shared,
    origins_of,
    same_target,
)
from inrun_megatron.report.query import Query, limit, parquet_files, quoted
from inrun_megatron.report.values.domains import domain_figures
from inrun_megatron.report.values.ranking import Level, create_figures
from inrun_megatron.report.values.scores import Measure, Per
from inrun_megatron.report.values.sources import with_place

DECILE = 0.1


def compare(
    a: Side, b: Side, targets: Sequence[str], level: Level, measure: Measure, per: Per, n: int
) -> dict[str, Any]:
    """Agreement per target, biggest movers and the datasets of both runs, JSON-serialisable.

    targets: names that both runs have. level: sample or document. n: movers in each direction.

    Raises UserError when the runs share no row of this level, or data files are missing.
    """
    with tempfile.TemporaryDirectory(prefix="inrun-") as directory:
        files = [Path(directory, name) for name in ("a.parquet", "b.parquet")]
        origins = [origins_of(side, level) for side in (a, b)]
        # Texts of the same lengths have the same .idx; older runs and curations say no more than that.
        by_content = all(origin.bin_digest is not None for own in origins for origin in own)
        domains = []
        for side, own, file in zip((a, b), origins, files, strict=True):
            with Query(side.ledger) as query:
                if measure is Measure.relative:
                    query.require_relative(side.phase.first, side.phase.last)
                create_figures(query, level, side.phase, side.documents if level is Level.document else None)
                export_scores(query, identities(own, by_content), level, measure, per, file)
                domains.append(domain_figures(query, [side.phase]))
        with Query(b.ledger) as query:
            rows_a, rows_b = _create_ranks(query, files, targets, level)
            agreement = {row.pop("target"): row for row in query.rows(_AGREEMENT)}
            if not agreement:
                raise UserError(nothing_shared(a, b, level))
            found = {
                name: {
                    **agreement[name],
                    "rows_a": rows_a[name],
                    "rows_b": rows_b[name],
                    "same_target": same_target(a, b, name),
                    "movers": {
                        kind: [_mover(a, b, level, row) for row in query.rows(_movers(name, order, n))]
                        for kind, order in (("up", "DESC"), ("down", "ASC"))
                    },
                }
                for name in targets
                if name in agreement
            }
    return {"targets": found, "domains": _side_by_side(targets, *domains)}


def _create_ranks(
    query: Query, files: Sequence[Path], targets: Sequence[str], level: Level
) -> tuple[dict[str, int], dict[str, int]]:
    """Create `ranks`: the rows that both files of scores have, with their ranks in each. Returns how many rows either has, by
    target."""
    names, key = ", ".join(quoted(name) for name in targets), level.value
    a, b = (f"(SELECT * FROM {parquet_files([file])} WHERE target IN ({names}))" for file in files)
    query.run(
        f"CREATE TEMP TABLE shared AS SELECT a.target, a.dataset AS dataset_a, a.{key} AS {key}_a, "
        f"b.dataset AS dataset_b, b.{key} AS {key}_b, a.score AS a, b.score AS b "
        f"FROM {a} a JOIN {b} b USING (origin, number, target)"
    )
    query.run(_RANKS)
    rows_a, rows_b = (
        {
            row["target"]: row["n"]
            for row in query.rows(f"SELECT target, count(*) AS n FROM {own} GROUP BY target")
        }
        for own in (a, b)
    )
    return rows_a, rows_b


_RANKS = """
CREATE TEMP TABLE ranks AS SELECT *, (rank_b - rank_a) / n AS change FROM (
    SELECT *, count(*) OVER (PARTITION BY target) AS n,
           rank() OVER (PARTITION BY target ORDER BY a) + (count(*) OVER (PARTITION BY target, a) - 1) / 2.0 AS rank_a,
           rank() OVER (PARTITION BY target ORDER BY b) + (count(*) OVER (PARTITION BY target, b) - 1) / 2.0 AS rank_b
    FROM shared WHERE isfinite(a) AND isfinite(b))
"""

# As many at the top as at the bottom, whatever n: a tenth, rounded up.
_TOP = f"rank_{{}} > (1 - {DECILE}) * n"
_BOTTOM = f"rank_{{}} < {DECILE} * n + 1"


def _overlap(condition: str) -> str:
    """Of the rows that A puts there, the share that B puts there as well."""
    a, b = condition.format("a"), condition.format("b")
    return f"count(*) FILTER ({a} AND {b}) / nullif(count(*) FILTER ({a}), 0)"


_AGREEMENT = f"""
SELECT target, count(*) AS shared,
       CASE WHEN count(DISTINCT a) > 1 AND count(DISTINCT b) > 1 THEN corr(rank_a, rank_b) END AS spearman,
       CASE WHEN count(DISTINCT a) > 1 AND count(DISTINCT b) > 1 THEN corr(a, b) END AS pearson,
       avg(CASE WHEN sign(a) = sign(b) THEN 1.0 ELSE 0.0 END) AS same_sign,
       {_overlap(_TOP)} AS top_decile, {_overlap(_BOTTOM)} AS bottom_decile
FROM ranks GROUP BY target
"""


def _movers(target: str, order: str, n: int) -> str:
    sign = ">" if order == "DESC" else "<"
    return (
        f"SELECT * FROM ranks WHERE target = {quoted(target)} AND change {sign} 0 "
        f"ORDER BY change {order}, rank_a, dataset_a LIMIT {limit(n)}"
    )


def _mover(a: Side, b: Side, level: Level, row: dict[str, Any]) -> dict[str, Any]:
    """A mover with where it is in both runs, and its text."""
    key = level.value
    mover = {
        "score_a": row["a"],
        "score_b": row["b"],
        "percentile_a": row["rank_a"] / row["n"],
        "percentile_b": row["rank_b"] / row["n"],
        "change": row["change"],
    }
    for name, side in (("a", a), ("b", b)):
        dataset, number = row[f"dataset_{name}"], row[f"{key}_{name}"]
        place = with_place(side.documents, level, {"dataset": dataset, key: number})
        mover |= {
            f"dataset_{name}": side.ledger.dataset_names[dataset],
            f"{key}_{name}": number,
            f"source_{name}": place["source"],
        }
        # The text is the same in both; either run's data will do.
        mover["snippet"] = mover.get("snippet") or place["snippet"]
    return mover


def _side_by_side(targets: Sequence[str], a: Sequence[Any], b: Sequence[Any]) -> list[dict[str, Any]]:
    """Normalised mean of each dataset, by name, in both runs."""
    both = [{(own.target, own.name): own for own in side} for side in (a, b)]
    rows = []
    for target in targets:
        for name in dict.fromkeys(own.name for side in (a, b) for own in side if own.target == target):
            row: dict[str, Any] = {"target": target, "name": name}
            for letter, known in zip("ab", both, strict=True):
                own = known.get((target, name))
                row |= {
                    f"samples_{letter}": None if own is None else own.samples,
                    f"normalised_mean_{letter}": None if own is None else own.normalised_mean,
                    f"standard_error_{letter}": None if own is None else own.normalised_standard_error,
                    f"negative_share_{letter}": None if own is None else own.negative_share,
                }
            rows.append(row)
    return rows
