"""What stands out in a phase, for the summary and the page, which put it in words."""

from __future__ import annotations

from typing import Any

from inrun_megatron.report.phases import Phase
from inrun_megatron.report.query import Query

LARGE_SHARE = 0.05
"""A single sample with more than this share of a phase's sum of |values| is named."""


def finding(figures: dict[str, Any], target: str) -> dict[str, Any]:
    """By normalised means, which no single sample can rule: {target, best, harmful, largest}.

    best: the domain with the highest mean (None without samples). harmful: those below 0 by more than two standard errors,
    worst first. largest: the sample that makes up an unusual part of the raw sums, or None.

    figures: `phases`, `domains` and `largest`, as the summary and the page have them.
    """
    phase = figures["phases"][-1]["name"]
    rows = [row for row in figures["domains"] if row["target"] == target and row["phase"] == phase]
    harmful = [
        row
        for row in rows
        if row["normalised_standard_error"] is not None
        and row["normalised_mean"] + 2 * row["normalised_standard_error"] < 0
    ]
    largest = figures["largest"].get(target)
    return {
        "target": target,
        "best": max(rows, key=lambda row: row["normalised_mean"], default=None),
        "harmful": sorted(harmful, key=lambda row: row["normalised_mean"]),
        "largest": largest if largest is not None and largest["share"] > LARGE_SHARE else None,
    }


def largest_samples(query: Query, phase: Phase) -> dict[str, dict[str, Any]]:
    """For each target the sample with the largest |value| in `phase`, and its share of the phase's sum of |values|.

    A mean says little when one sample makes up much of it. It happens: Adam's first-order factor holds v from before
    the step, so a sample whose gradient is far larger than the recent ones counts in full, where the step itself
    would damp it.
    """
    scope = f"step BETWEEN {phase.first} AND {phase.last}"
    rows = query.rows(f"""
        WITH found AS (
            SELECT target, arg_max(struct_pack(step, dataset, sample, value), abs(value)) AS row
            FROM samples WHERE {scope} GROUP BY target
        ), sums AS (
            SELECT target, sum(absolute) AS absolute FROM cells WHERE {scope} GROUP BY target
        )
        SELECT f.target, f.row.step, f.row.dataset, d.name AS dataset_name, f.row.sample, f.row.value, s.absolute
        FROM found f JOIN sums s ON f.target = s.target JOIN datasets d ON f.row.dataset = d.dataset
        JOIN targets t ON f.target = t.target ORDER BY t.position
    """)
    largest = {}
    for row in rows:
        target, absolute = row.pop("target"), row.pop("absolute")
        largest[target] = row | {"share": abs(row["value"]) / absolute if absolute else 0.0}
    return largest
