"""`inrun summary`: the answer a user came for, as figures (`build_summary`) and as printed text (`print_summary`)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa

from inrun_megatron.errors import UserError
from inrun_megatron.ledger.audits import check_additivity, check_coverage, check_efficiency
from inrun_megatron.ledger.checks import Check
from inrun_megatron.ledger.columns import numbers, places, taken
from inrun_megatron.ledger.read import Ledger
from inrun_megatron.report.documents.lookup import Documents, parse_moved
from inrun_megatron.report.documents.sums import Leading
from inrun_megatron.report.overview import describe_run, describe_steps, describe_targets
from inrun_megatron.report.phases import DEFAULT_CUTS, Phase, phases_of, whole_run
from inrun_megatron.report.query import Query
from inrun_megatron.report.summary.text import render
from inrun_megatron.report.tables import console, print_json
from inrun_megatron.report.values.domains import domain_figures
from inrun_megatron.report.values.ranking import Level, create_figures, ranked

SNIPPET_CHARACTERS = 160


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
    ledger = Ledger(run)
    if ledger.last_step < 1:
        raise UserError(f"{ledger.directory} has no committed step: no step is scored, or none committed yet")
    phases = phases_of(ledger.last_step, cuts)
    steps = ledger.steps()
    summary: dict[str, Any] = {
        "run": describe_run(ledger),
        "steps": describe_steps(ledger, steps),
        "targets": describe_targets(ledger, steps),
        "phases": [{"name": phase.name, "first": phase.first, "last": phase.last} for phase in phases],
    }
    with Query(ledger) as query:
        whole = [whole_run(ledger.last_step)]
        shown = whole + (phases if len(phases) > 1 else [])
        summary["domains"] = [figures.to_dict() for figures in domain_figures(query, shown)]
        summary["rows"] = query.rows(
            "SELECT count(*) AS rows, CAST(sum(CASE WHEN isfinite(value) THEN 0 ELSE 1 END) AS BIGINT) AS not_finite "
            "FROM ledger_values"
        )[0]
        summary["largest"] = largest_samples(query, phases[-1])
        summary["documents"], summary["documents_error"] = _documents(query, phases[-1], documents, moved)
        summary["audits"] = [check.to_dict() for check in audits_of(query, steps)]
    return summary


def audits_of(query: Query, steps: pa.Table) -> list[Check]:
    """The audits that need no pass over files and rows. steps: `Ledger.steps()`."""
    found = query.table("SELECT step, target, sum(absolute) AS absolute FROM cells GROUP BY step, target")
    run = query.ledger.run
    return [
        check_coverage(run),
        check_additivity(query.ledger.starts, steps, taken(numbers(found, "absolute"), places(steps, found))),
        check_efficiency(run, steps),
    ]


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


def _documents(
    query: Query, phase: Phase, n: int, moved: Sequence[str]
) -> tuple[dict[str, dict[str, list[dict[str, Any]]]] | None, str | None]:
    if n < 1:
        return None, None
    ledger = query.ledger
    try:
        documents = Documents(ledger, parse_moved(ledger, moved))
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


def with_text(documents: Documents, row: dict[str, Any]) -> dict[str, Any]:
    """A document's row with where it comes from and the beginning of its text."""
    dataset, document = row["dataset"], row["document"]
    return row | {
        "source": documents.source(dataset, document),
        "snippet": documents.snippet(dataset, document, SNIPPET_CHARACTERS),
    }


def with_place(documents: Documents, level: Level | str, row: dict[str, Any]) -> dict[str, Any]:
    """A sample's or document's row with source and beginning of its text; None for both where a sample's data files are
    not at hand, as figures of samples need none."""
    if level is Level.document:
        return with_text(documents, row)
    try:
        span = documents.spans(row["dataset"], row["sample"])[0]
        text = documents.snippet(row["dataset"], span.document, SNIPPET_CHARACTERS, span.start, span.end)
        return row | {"source": documents.source(row["dataset"], span.document), "snippet": text}
    except UserError:
        return row | {"source": None, "snippet": None}
