"""What values tell beyond means: which domains they come from over training, and how they are distributed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inrun_megatron.report.phases import Phase, whole_run
from inrun_megatron.report.query import Query

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
               sum(c.total) AS total, sum(c.total * s.factor) AS normalised
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
