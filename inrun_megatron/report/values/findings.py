"""What the last phase says of a target, for the summary and the page, which put it in words."""

from __future__ import annotations

from typing import Any

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
