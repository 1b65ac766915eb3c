"""What values/ tells beyond means: composition over training, distribution, documents. All heavy work is SQL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from inrun_megatron.report.documents.lookup import Documents, printable_lines, shorten
from inrun_megatron.report.documents.sums import Leading
from inrun_megatron.report.phases import Phase, whole_run
from inrun_megatron.report.query import Query
from inrun_megatron.report.values.ranking import Level, create_figures, ranked

COMPOSITION_BINS = 40
HISTOGRAM_WIDTH = 0.25
HISTOGRAM_END = 6.0
"""Normalised values beyond +-6 share the outermost bins."""


def composition(query: Query, last_step: int) -> list[dict[str, Any]]:
    """Value by domain over training: one entry per target, bin of steps and dataset.

    value: nats per token and scored step. share: of the sum over datasets of |normalised value|, so that each step
    weighs the same and the shares of a bin add up to 1 in absolute terms; the sign is kept.
    """
    bins = min(COMPOSITION_BINS, last_step)
    rows = query.rows(f"""
        SELECT c.target, t.position, CAST(floor((c.step - 1) * {bins} / {last_step}) AS INTEGER) AS bin, c.dataset,
               sum(c.total) AS total, sum(c.total * s.factor) AS normalised, count(DISTINCT c.step) AS steps
        FROM cells c JOIN scales s ON c.step = s.step AND c.target = s.target
        JOIN targets t ON c.target = t.target
        GROUP BY c.target, t.position, bin, c.dataset ORDER BY t.position, bin, c.dataset
    """)
    steps = query.rows(f"""
        SELECT CAST(floor((step - 1) * {bins} / {last_step}) AS INTEGER) AS bin, count(DISTINCT step) AS steps
        FROM cells GROUP BY bin
    """)
    steps_of = {row["bin"]: row["steps"] for row in steps}
    whole: dict[tuple[str, int], float] = {}
    for row in rows:
        key = (row["target"], row["bin"])
        whole[key] = whole.get(key, 0.0) + abs(row["normalised"])
    return [
        {
            "target": row["target"],
            "dataset": row["dataset"],
            "first_step": -(-row["bin"] * last_step // bins) + 1,
            "last_step": -(-(row["bin"] + 1) * last_step // bins),
            "value": row["total"] / steps_of[row["bin"]],
            "share": row["normalised"] / (whole[row["target"], row["bin"]] or 1.0),
        }
        for row in rows
    ]


def distribution(query: Query, phases: Sequence[Phase], last_step: int) -> list[dict[str, Any]]:
    """Histograms of the normalised values of samples, by phase, target and dataset: {phase, target, dataset, n, bins}
    with bins = [[index, samples]]; bin i holds values in [i, i + 1) * HISTOGRAM_WIDTH."""
    edge = round(HISTOGRAM_END / HISTOGRAM_WIDTH)
    cases = " ".join(f"WHEN step <= {phase.last} THEN {number}" for number, phase in enumerate(phases))
    rows = query.rows(f"""
        SELECT CASE {cases} END AS phase, v.target, t.position, v.dataset,
               CAST(greatest(least(floor(v.normalised / {HISTOGRAM_WIDTH}), {edge - 1}), {-edge}) AS INTEGER) AS bin,
               count(*) AS n
        FROM scored v JOIN targets t ON v.target = t.target
        GROUP BY ALL ORDER BY phase, t.position, v.dataset, bin
    """)
    names = [phase.name for phase in phases]
    found: dict[tuple[str, str, int], dict[int, int]] = {}
    for row in rows:
        for name in dict.fromkeys((whole_run(last_step).name, names[row["phase"]])):
            bins = found.setdefault((name, row["target"], row["dataset"]), {})
            bins[row["bin"]] = bins.get(row["bin"], 0) + row["n"]
    return [
        {
            "phase": phase,
            "target": target,
            "dataset": dataset,
            "n": sum(bins.values()),
            "bins": [[index, n] for index, n in sorted(bins.items())],
        }
        for (phase, target, dataset), bins in found.items()
    ]


def documents_of(
    query: Query, documents: Documents, phase: Phase, n: int, characters: int
) -> list[dict[str, Any]]:
    """The n best and n worst documents of each target in `phase`, each once, with their values towards every target.

    `lists` says where a document stands: {"best": {target: rank}, "worst": {target: rank}}, ranks from 1.
    """
    create_figures(query, Level.document, phase, documents, leading=Leading("value", n))
    lists: dict[tuple[int, int], dict[str, dict[str, int]]] = {}
    for target in query.ledger.target_names:
        for kind, worst in (("best", False), ("worst", True)):
            leading = ranked(query, Level.document, target, worst=worst, n=n)
            for rank, row in enumerate(leading, start=1):
                # A best document has a positive value: with few documents the n best would hold the worst as well.
                if row["value"] < 0 if worst else row["value"] > 0:
                    own = lists.setdefault((row["dataset"], row["document"]), {"best": {}, "worst": {}})
                    own[kind][target] = rank
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
            | {"values": {}, "lists": lists[key]},
        )
        entry["values"][row["target"]] = {name: row[name] for name in ("value", "per_token", "normalised")}
    return [entry | _text(documents, entry, characters) for entry in found.values()]


def _text(documents: Documents, entry: dict[str, Any], characters: int) -> dict[str, Any]:
    dataset, document = entry["dataset"], entry["document"]
    text = documents.text(dataset, document, 0, 4 * characters + 64).strip()
    return {
        "source": documents.source(dataset, document),
        "metadata": documents.metadata(dataset, document),
        "text": shorten(printable_lines(text), characters),
    }
