"""`inrun top`: the samples, documents or datasets with the highest or lowest values."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from inrun_megatron.commands.options import (
    DataOption,
    JsonOption,
    PhaseOption,
    RunArgument,
    StepsOption,
    TargetOption,
)
from inrun_megatron.commands.targets import chosen_targets
from inrun_megatron.errors import UserError
from inrun_megatron.ledger.read import Ledger
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.documents.sums import Leading
from inrun_megatron.report.phases import Phase, choose_steps, phases_of
from inrun_megatron.report.query import Query
from inrun_megatron.report.tables import (
    console,
    decimals_of,
    in_nats,
    print_json,
    scale_near,
    scale_of,
    signed,
    table,
)
from inrun_megatron.report.text import printable, shorten
from inrun_megatron.report.values.ranking import Level, RankBy, create_figures, level_of, ranked
from inrun_megatron.report.values.sources import with_place


def top(
    run: RunArgument,
    target: TargetOption = None,
    by: Annotated[
        str,
        typer.Option(
            metavar="LEVEL",
            help="sample, document, dataset, file, or a field kept by inrun prepare (source, url, language).",
        ),
    ] = "document",
    rank: Annotated[
        RankBy,
        typer.Option(
            help="What ranks: the sum, per sample, per token, or the sum of normalised or relative values."
        ),
    ] = RankBy.value,
    worst: Annotated[bool, typer.Option("--worst", help="The lowest first.")] = False,
    n: Annotated[int, typer.Option("-n", help="How many.")] = 10,
    steps: StepsOption = None,
    phase: PhaseOption = None,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """The most valuable samples, documents, datasets, files or sources; with --worst the most harmful.

    Example: inrun top runs/demo --target code --by document --worst --phase late

    Document values come from sample values: a sample's value is shared among its documents in proportion to their tokens
    in it, unless the run was scored with --shapley-granularity document or token; --by source and the like add documents
    up. Early steps rule sums over a whole run; look at a late phase (--phase late), or --rank normalised.
    """
    if n < 1:
        raise UserError(f"-n {n} shows nothing; give 1 or more")
    ledger = Ledger(run)
    targets = chosen_targets(ledger, target)
    chosen = choose_steps(steps, phase, ledger.last_step)
    level = level_of(by)
    documents = Documents(ledger, data)
    with Query(ledger) as query:
        if rank is RankBy.relative:
            query.require_relative(chosen.first, chosen.last)
        create_figures(query, level, chosen, documents, target, Leading(rank.name, n))
        found = {
            name: [_with_text(documents, level, row) for row in ranked(query, level, name, rank, worst, n)]
            for name in targets
        }
    if json:
        print_json(
            {
                "run": ledger.run_id,
                "by": by,
                "rank": rank.value,
                "worst": worst,
                "first_step": chosen.first,
                "last_step": chosen.last,
                "targets": found,
            }
        )
        return
    out = console()
    units = _units([row for rows in found.values() for row in rows], level)
    for name, rows in found.items():
        title = f"{'Worst' if worst else 'Best'} {by}s for target {name}"
        _print(out, rows, title, level, rank, chosen, units)
    if rank is RankBy.value and steps is None and phase is None and len(phases_of(ledger.last_step)) > 1:
        out.print(
            Text(
                "Early steps rule sums over a whole run: see --phase late, or --rank normalised.",
                style="bold",
            )
        )


def _with_text(documents: Documents, by: Level | str, row: dict[str, Any]) -> dict[str, Any]:
    return with_place(documents, by, row) if by in (Level.sample, Level.document) else row


def _each(by: Level | str) -> tuple[str, str]:
    """What stands beside the sum, and its heading. A document is part of samples, so that "per sample" says little of it."""
    return ("per_token", "Per token") if by is Level.document else ("mean", "Per sample")


def _units(rows: list[dict[str, Any]], by: Level | str) -> tuple[tuple[float, str], tuple[float, str]]:
    """Units of the sums and of what stands beside them: of all targets' tables, and one for both where it suits."""
    each = scale_of([row[_each(by)[0]] or 0.0 for row in rows])
    return scale_near([row["value"] for row in rows], each), each


def _print(
    out: Console,
    rows: list[dict[str, Any]],
    title: str,
    by: Level | str,
    rank: RankBy,
    phase: Phase,
    units: tuple[tuple[float, str], tuple[float, str]],
) -> None:
    each, heading = _each(by)
    (unit, name), (each_unit, each_name) = units
    texts = by in (Level.sample, Level.document)
    errors = [] if texts else [row["standard_error"] for row in rows]
    digits = decimals_of(*(None if error is None else error / each_unit for error in errors))
    columns: list[str | tuple[str, str]] = [
        (by.capitalize(), "left"),
        f"Value\n{in_nats(name)}",
        f"{heading}\n{in_nats(each_name)}",
        *([] if texts else ["± s.e.", "Negative", "Samples"]),
        "Relative" if rank is RankBy.relative else "Normalised",
        "Tokens",
    ]
    if texts:
        columns += [("From", "left"), ("Text", "left")]
    made = table(columns)
    if texts:
        made.columns[-1].ratio, made.expand = 1, True
    for row in rows:
        key = (
            shorten(row["dataset_name"], 20) if isinstance(by, Level) else shorten(printable(row["name"]), 40)
        )
        if texts:
            key += f":{row[by]}"
        cells: list[str | Text] = [
            Text(key),
            signed(row["value"] / unit),
            signed(None if row[each] is None else row[each] / each_unit, digits),
            *([] if texts else _spread(row, each_unit, digits)),
            signed(row["relative" if rank is RankBy.relative else "normalised"]),
            f"{row['tokens']:,}",
        ]
        if texts:
            cells += [Text(shorten(row["source"] or "-", 22, keep_end=True)), Text(row["snippet"] or "-")]
        made.add_row(*cells)
    out.print(Text(f"{title}, steps {phase.first}-{phase.last}, by {rank.value}", style="bold"))
    out.print(made)
    out.print()


def _spread(row: dict[str, Any], unit: float, digits: int) -> list[str | Text]:
    """Error of the mean, share of negative samples, samples."""
    error = row["standard_error"]
    return [
        "-" if error is None else f"{error / unit:.{digits}f}",
        f"{row['negative_share']:.0%}",
        f"{row['samples']:,}",
    ]
