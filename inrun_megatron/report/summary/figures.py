"""`inrun summary`: the answer a user came for, as figures (`build_summary`) and as printed text (`print_summary`)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from inrun_megatron.errors import UserError
from inrun_megatron.ledger.checks import Check
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.documents.sums import Leading
from inrun_megatron.report.overview import (
    audits_of,
    committed_ledger,
    describe_run,
    describe_steps,
    describe_targets,
)
from inrun_megatron.report.phases import DEFAULT_CUTS, Phase, phases_of, with_whole_run
from inrun_megatron.report.query import Query
from inrun_megatron.report.summary.text import render
from inrun_megatron.report.tables import console, print_json
from inrun_megatron.report.values.domains import domain_figures
from inrun_megatron.report.values.findings import largest_samples
from inrun_megatron.report.values.ranking import Level, create_figures, ranked
from inrun_megatron.report.values.sources import with_text


def build_summary(
    run: Path | str,
    *,
    cuts: Sequence[Fraction] = DEFAULT_CUTS,
    documents: int = 3,
    moved: Sequence[str] = (),
) -> dict[str, Any]:
    """All figures of the summary, JSON-serialisable: run, steps, targets, phases, domains, largest, documents, audits.

    run: run directory or ledger directory. cuts: where phases end, as fractions of the run. documents: how many best
    and worst documents of each target; 0 for none. moved: `NAME=PREFIX` of datasets that have moved.

    `domains` has the whole run first, then each phase. `documents` maps a target to its `best` and `worst` in the last
    phase, or to None everywhere with the reason under `documents_error` when the data files are not at hand.

    Raises UserError when there is no ledger, nothing is committed yet, or a part cannot be read.
    """
    ledger = committed_ledger(run)
    phases = phases_of(ledger.last_step, cuts)
    steps = ledger.steps()
    summary: dict[str, Any] = {
        "run": describe_run(ledger),
        "steps": describe_steps(ledger, steps),
        "targets": describe_targets(ledger, steps),
        "phases": [phase.to_dict() for phase in phases],
    }
    with Query(ledger) as query:
        shown = with_whole_run(phases, ledger.last_step)
        summary["domains"] = [figures.to_dict() for figures in domain_figures(query, shown)]
        summary["rows"] = query.rows(
            "SELECT count(*) AS rows, CAST(sum(CASE WHEN isfinite(value) THEN 0 ELSE 1 END) AS BIGINT) AS not_finite "
            "FROM ledger_values"
        )[0]
        summary["largest"] = largest_samples(query, phases[-1])
        summary["documents"], summary["documents_error"] = _documents(query, phases[-1], documents, moved)
        summary["audits"] = [check.to_dict() for check in audits_of(query, steps)]
    return summary


def print_summary(
    run: Path | str,
    *,
    cuts: Sequence[Fraction] = DEFAULT_CUTS,
    documents: int = 3,
    moved: Sequence[str] = (),
    as_json: bool = False,
) -> None:
    """Print the summary of a run to stdout, or its figures as one JSON object. Arguments and errors as in
    `build_summary`."""
    summary = build_summary(run, cuts=cuts, documents=documents, moved=moved)
    if as_json:
        print_json(summary)
    else:
        audits = [Check(**audit) for audit in summary["audits"]]
        render(summary, audits, console())


def _documents(
    query: Query, phase: Phase, n: int, moved: Sequence[str]
) -> tuple[dict[str, dict[str, list[dict[str, Any]]]] | None, str | None]:
    if n < 1:
        return None, None
    ledger = query.ledger
    documents = Documents(ledger, moved)
    try:
        create_figures(query, Level.document, phase, documents, leading=Leading("value", n))
        found: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for target in ledger.target_names:
            found[target] = {}
            for kind, worst in (("best", False), ("worst", True)):
                rows = ranked(query, Level.document, target, worst=worst, n=n)
                found[target][kind] = [with_text(documents, row) for row in rows]
        return found, None
    except UserError as error:
        # Figures per domain need no data files: a ledger read on another machine still gives its answer.
        return None, str(error)
