"""Value per domain (dataset) and target, by phase.

Standard errors treat training steps, not samples, as the independent draws: the samples of one step share its direction
and its learning rate, so that they move together. With S_t the sum and n_t the number of a domain's samples in step t,
m = sum S_t / sum n_t and T steps (the usual error of a ratio of totals of T clusters):

    se^2 = T / (T - 1) * sum_t (S_t - n_t m)^2 / (sum n_t)^2

A step whose values are all zero, as at the learning rate 0 of a warm-up's first step, has no normalised values: the
normalised mean and its error leave it out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from inrun_megatron.report import sql
from inrun_megatron.report.phases import Phase
from inrun_megatron.report.query import Query


@dataclass(frozen=True)
class DomainFigures:
    """One dataset towards one target in one phase. Values in nats per token of the target; `normalised_*` as defined in
    report/query.py, without unit."""

    phase: str
    first_step: int
    last_step: int
    target: str
    dataset: int
    name: str
    steps: int
    samples: int
    tokens: int
    sum: float
    mean: float
    """Per sample."""
    standard_error: float | None
    """Of `mean`; None with fewer than two steps."""
    negative_share: float
    """Share of samples with a value below 0."""
    normalised_mean: float
    """0 where all values of the phase are."""
    normalised_standard_error: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def domain_figures(query: Query, phases: Sequence[Phase]) -> list[DomainFigures]:
    """Figures of every phase, target and dataset that has samples there; in run.json's order of targets and datasets."""
    return [figures for phase in phases for figures in _of_phase(query, phase)]


def _of_phase(query: Query, phase: Phase) -> list[DomainFigures]:
    sums = sql.DOMAINS.format(first=phase.first, last=phase.last)
    rows = query.rows(
        f"SELECT x.*, d.name FROM ({sums}) x JOIN datasets d ON x.dataset = d.dataset "
        "JOIN targets t ON x.target = t.target ORDER BY t.position, x.dataset"
    )
    return [
        DomainFigures(
            phase=phase.name,
            first_step=phase.first,
            last_step=phase.last,
            target=row["target"],
            dataset=row["dataset"],
            name=row["name"],
            steps=row["raw_steps"],
            samples=row["raw_n"],
            tokens=row["tokens"],
            sum=row["raw"],
            mean=row["raw"] / row["raw_n"],
            standard_error=_standard_error(row, "raw"),
            negative_share=row["negatives"] / row["raw_n"],
            normalised_mean=row["norm"] / row["norm_n"] if row["norm_n"] else 0.0,
            normalised_standard_error=_standard_error(row, "norm"),
        )
        for row in rows
    ]


def _standard_error(row: dict[str, Any], name: str) -> float | None:
    steps, n = row[f"{name}_steps"], row[f"{name}_n"]
    if steps < 2:
        return None
    mean = row[name] / n
    # sum_t (S_t - n_t m)^2, expanded; rounding may take it slightly below 0
    squares = (
        row[f"{name}_squared"] - 2 * mean * row[f"{name}_products"] + mean * mean * row[f"{name}_n_squared"]
    )
    return math.sqrt(max(squares, 0.0) * steps / (steps - 1)) / n
