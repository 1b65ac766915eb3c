"""What the page says in words: the findings of the last phase, and what each check means."""

from __future__ import annotations

from typing import Any

CHECKS = {
    "commits": "Every commit record can be read.",
    "files": "Every committed file is there, with the bytes that were committed.",
    "uncommitted": "Files that no commit names; readers pass over them.",
    "rows": "Every value is finite and belongs to a known target, dataset, sample and step.",
    "duplicates": "No row is there twice.",
    "steps": "Rows add up to what each step recorded.",
    "datasets": "The training data are still those of the run.",
    "coverage": "Every trainable parameter took part in the scores.",
    "additivity": "The samples' values add up to what the optimizer's own gradient gives, step by step.",
    "efficiency": "The predicted loss change beside the measured one: its sign, and its scale to a factor of 2.",
}

LARGE_SHARE = 0.05
"""A single sample with more than this share of a phase's sum of |values| is named."""


def findings(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """For each target, by normalised means of the last phase: `best` domain, `harmful` ones (below 0 by more than two
    standard errors), worst first, and `largest`, the sample that makes up an unusual part of the raw sums (or None)."""
    phase = figures["phases"][-1]
    found = []
    for target in figures["targets"]:
        name = target["name"]
        rows = [row for row in figures["domains"] if row["target"] == name and row["phase"] == phase["name"]]
        largest = figures["largest"].get(name)
        harmful = [
            row
            for row in rows
            if row["normalised_standard_error"] is not None
            and row["normalised_mean"] + 2 * row["normalised_standard_error"] < 0
        ]
        found.append(
            {
                "target": name,
                "best": max(rows, key=lambda row: row["normalised_mean"], default=None),
                "harmful": sorted(harmful, key=lambda row: row["normalised_mean"]),
                "largest": largest if largest is not None and largest["share"] > LARGE_SHARE else None,
            }
        )
    return found
