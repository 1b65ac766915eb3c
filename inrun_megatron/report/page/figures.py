"""All figures of `inrun report`, JSON-serialisable: what the page, the PNG files and `--json` show."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from inrun_megatron.ledger.checks import setting
from inrun_megatron.ledger.read import Ledger
from inrun_megatron.report.overview import audits_of, committed_ledger, describe_run, describe_steps
from inrun_megatron.report.page.documents import best_and_worst
from inrun_megatron.report.page.losses import (
    explained,
    explained_curve,
    loss_curve,
    target_series,
    training_curve,
)
from inrun_megatron.report.page.timing import timing
from inrun_megatron.report.phases import DEFAULT_CUTS, Phase, phases_of, with_whole_run
from inrun_megatron.report.query import Query
from inrun_megatron.report.values.distribution import composition, distribution
from inrun_megatron.report.values.domains import domain_figures
from inrun_megatron.report.values.findings import finding, largest_samples

VERIFY_ROWS = 20_000_000
"""Ledgers with more rows are verified only when asked: reading and hashing every row takes minutes."""


def build_figures(
    run: Path | str,
    *,
    cuts: Sequence[Fraction] = DEFAULT_CUTS,
    documents: int = 25,
    moved: Sequence[str] = (),
    verify: bool | None = None,
) -> dict[str, Any]:
    """Figures of a run.

    run: run directory or ledger directory. cuts: where phases end, as fractions of the run. documents: how many best and
    worst documents of each target; 0 for none. moved: `NAME=PREFIX` of datasets that have moved. verify: check files and
    rows as `inrun verify` does; None: up to VERIFY_ROWS rows.

    Raises UserError when there is no ledger, nothing is committed yet, or a part cannot be read.
    """
    ledger = committed_ledger(run)
    last, steps = ledger.last_step, ledger.steps()
    phases = phases_of(last, cuts)
    shown = with_whole_run(phases, last)
    figures: dict[str, Any] = {
        "run": describe_run(ledger) | {"estimator": setting(ledger.run, "estimator", group="shapley")},
        "steps": describe_steps(ledger, steps),
        "phases": [phase.to_dict() for phase in shown],
        "datasets": [_dataset(index, dataset) for index, dataset in enumerate(ledger.datasets)],
        "targets": [_target(ledger, steps, target, phases) for target in ledger.targets],
        "training": training_curve(ledger, steps),
        "timing": timing(ledger, steps),
    }
    with Query(ledger) as query:
        figures["rows"] = query.rows(
            "SELECT count(*) FILTER (isfinite(value)) AS rows, count(*) FILTER (NOT isfinite(value)) AS not_finite "
            "FROM ledger_values"
        )[0]
        figures["domains"] = [entry.to_dict() for entry in domain_figures(query, shown)]
        figures["composition"] = composition(query, last)
        figures["distribution"] = distribution(query, phases, last)
        figures["largest"] = largest_samples(query, phases[-1])
        figures |= best_and_worst(query, phases[-1], documents, moved)
        rows = figures["rows"]["rows"]
        full = rows <= VERIFY_ROWS if verify is None else verify
        checks = ledger.verify() if full else audits_of(query, steps)
    figures["audits"] = {"full": full, "checks": [check.to_dict() for check in checks]}
    figures["findings"] = [finding(figures, target["name"]) for target in figures["targets"]]
    return figures


def _dataset(index: int, dataset: dict[str, Any]) -> dict[str, Any]:
    known = {name: dataset.get(name) for name in ("path_prefix", "documents", "samples", "weight")}
    return {"index": index, "name": str(dataset.get("name", index))} | known


def _target(ledger: Ledger, steps: Any, target: dict[str, Any], phases: Sequence[Phase]) -> dict[str, Any]:
    name = str(target["name"])
    series = target_series(ledger, steps, name)
    return {
        "name": name,
        "sequences": target.get("sequences"),
        "path": target.get("path"),
        "explained": explained(series, phases, ledger.last_step),
        "explained_curve": explained_curve(series),
        "curve": loss_curve(series, phases),
    }
