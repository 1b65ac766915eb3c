"""Two runs side by side: do they agree about which samples or documents are worth something?

Documents are matched by origin (data/origin.py): the dataset they were first prepared in and their number there, whatever
the order, blend or curation of the runs. Samples are matched only between datasets that both runs cut and shuffled alike.

    Spearman     correlation of ranks, ties with their mean rank
    movers       the largest changes of rank, as shares of the shared rows: (rank in B - rank in A) / n
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from inrun_megatron.data.origin import Origin, origin_of
from inrun_megatron.errors import UserError
from inrun_megatron.ledger.read import Ledger
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.phases import Phase
from inrun_megatron.report.query import Query, limit, parquet_files, quoted
from inrun_megatron.report.summary.figures import with_place
from inrun_megatron.report.values.domains import domain_figures
from inrun_megatron.report.values.ranking import Level, create_figures
from inrun_megatron.report.values.scores import Measure, Per

DECILE = 0.1
_ORIGINS = pa.schema([("dataset", pa.int16()), ("origin", pa.string())])
_NUMBERS = pa.schema([("dataset", pa.int16()), ("document", pa.int64()), ("number", pa.int64())])


@dataclass(frozen=True)
class Side:
    """One of the two runs and the steps of it that count."""

    ledger: Ledger
    documents: Documents
    phase: Phase


def compare(
    a: Side, b: Side, targets: Sequence[str], level: Level, measure: Measure, per: Per, n: int
) -> dict[str, Any]:
    """Agreement per target, biggest movers and the datasets of both runs, JSON-serialisable.

    targets: names that both runs have. level: sample or document. n: movers in each direction.

    Raises UserError when the runs share no row of this level, or data files are missing.
    """
    column = level.value
    with tempfile.TemporaryDirectory(prefix="inrun-") as directory:
        files = [Path(directory, name) for name in ("a.parquet", "b.parquet")]
        domains = []
        found_origins = [_origins(side, level) for side in (a, b)]
        # Texts of the same lengths have the same .idx; older runs and curations say no more than that.
        by_content = all(origin.bin_digest is not None for side in found_origins for origin in side)
        for side, origins, file in zip((a, b), found_origins, files, strict=True):
            with Query(side.ledger) as query:
                if measure is Measure.relative:
                    query.require_relative(side.phase.first, side.phase.last)
                create_figures(query, level, side.phase, side.documents if level is Level.document else None)
                _export(query, _identities(origins, by_content), level, measure, per, file)
                domains.append(domain_figures(query, [side.phase]))
        with Query(b.ledger) as query:
            names = ", ".join(quoted(name) for name in targets)
            scores = [f"(SELECT * FROM {parquet_files([file])} WHERE target IN ({names}))" for file in files]
            query.run(
                f"CREATE TEMP TABLE shared AS SELECT a.target, a.dataset AS dataset_a, a.{column} AS {column}_a, "
                f"b.dataset AS dataset_b, b.{column} AS {column}_b, a.score AS a, b.score AS b "
                f"FROM {scores[0]} a JOIN {scores[1]} b USING (origin, number, target)"
            )
            counts = [
                {
                    row["target"]: row["n"]
                    for row in query.rows(f"SELECT target, count(*) AS n FROM {own} GROUP BY target")
                }
                for own in scores
            ]
            query.run(_RANKS)
            agreement = {row["target"]: row for row in query.rows(_AGREEMENT)}
            if not agreement:
                raise UserError(_nothing_shared(a, b, level))
            found = {
                name: {
                    **{key: value for key, value in agreement[name].items() if key != "target"},
                    "rows_a": counts[0][name],
                    "rows_b": counts[1][name],
                    "same_target": _same_target(a, b, name),
                    "movers": {
                        kind: [_mover(a, b, level, row) for row in query.rows(_movers(name, order, n))]
                        for kind, order in (("up", "DESC"), ("down", "ASC"))
                    },
                }
                for name in targets
                if name in agreement
            }
    return {"targets": found, "domains": _side_by_side(targets, *domains)}


def shared_targets(a: Ledger, b: Ledger, target: str | None) -> list[str]:
    """Targets that both runs have, or the one named. Raises UserError where there is none."""
    names = [name for name in a.target_names if name in b.target_names]
    if (target is not None and target not in names) or not names:
        wanted = "no target in common" if target is None else f"no target {target!r} in common"
        raise UserError(
            f"the runs have {wanted}: the first has {', '.join(a.target_names)}, the second {', '.join(b.target_names)}"
        )
    return names if target is None else [target]


def _export(
    query: Query, identities: tuple[pa.Table, pa.Table], level: Level, measure: Measure, per: Per, file: Path
) -> None:
    """Write the scores of one run with what identifies their rows: origin, number."""
    origins, numbers = identities
    query.register("origins", origins)
    query.register("numbers", numbers)
    key = level.value
    number = f"coalesce(n.number, f.{key})" if level is Level.document else f"f.{key}"
    join = (
        "LEFT JOIN numbers n ON f.dataset = n.dataset AND f.document = n.document"
        if level is Level.document
        else ""
    )
    divided = "/ sum(f.tokens)" if per is Per.token else ""
    kept = "HAVING sum(f.tokens) > 0" if per is Per.token else ""
    # A dataset that stands in the blend twice gives a document twice: its values are added.
    query.copy(
        f"COPY (SELECT o.origin, {number} AS number, f.target, min(f.dataset) AS dataset, min(f.{key}) AS {key}, "
        f"sum(f.{measure.value}) {divided} AS score FROM figures f JOIN origins o ON f.dataset = o.dataset {join} "
        f"GROUP BY ALL {kept}) TO {quoted(str(file))} (FORMAT parquet)"
    )


def _origins(side: Side, level: Level) -> list[Origin]:
    """The origin of each dataset; of samples, with how they were cut and shuffled in place of the .idx alone."""
    found = []
    for index, description in enumerate(side.ledger.datasets):
        if level is Level.sample:
            cut = description.get("index_sha256") or {}
            name = "/".join([str(description.get("idx_sha256")), *(str(cut[name]) for name in sorted(cut))])
            found.append(Origin(name, description.get("bin_digest")))
        else:
            file = side.documents.resolver.file(index)
            found.append(origin_of(file, side.documents.idx_sha256(index)))
    return found


def _identities(found: Sequence[Origin], by_content: bool) -> tuple[pa.Table, pa.Table]:
    """What makes rows of this run comparable: an origin per dataset; numbers there of documents of curated datasets."""
    origins: list[dict[str, Any]] = []
    numbers = [_NUMBERS.empty_table()]
    for index, origin in enumerate(found):
        if origin.numbers is not None:
            columns = [
                pa.array([index] * len(origin.numbers), pa.int16()),
                pa.array(range(len(origin.numbers)), pa.int64()),
                pa.array(origin.numbers, pa.int64()),
            ]
            numbers.append(pa.Table.from_arrays(columns, schema=_NUMBERS))
        name = f"{origin.idx_sha256}/{origin.bin_digest}" if by_content else origin.idx_sha256
        origins.append({"dataset": index, "origin": name})
    return pa.Table.from_pylist(origins, _ORIGINS), pa.concat_tables(numbers)


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


def _same_target(a: Side, b: Side, name: str) -> bool:
    """Are the two targets of this name the same sequences, wherever they lay? By what both descriptions say."""
    one, other = (side.ledger.targets[side.ledger.target_names.index(name)] for side in (a, b))
    return all(one[key] == other[key] for key in one.keys() & other.keys() if key != "path")


def _nothing_shared(a: Side, b: Side, level: Level) -> str:
    read = [", ".join(side.ledger.dataset_names) for side in (a, b)]
    if level is Level.sample:
        return (
            f"no sample is the same in both runs (they read {read[0]} and {read[1]}, cut or shuffled differently, or in "
            "other steps): compare by document"
        )
    return (
        f"no document was scored in both runs: they read {read[0]} and {read[1]}; they must share a dataset, as it is or "
        "through inrun curate (the .idx files differ), and steps that read the same documents"
    )
