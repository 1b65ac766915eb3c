"""`inrun summary`: the answer of a run on one page."""

from __future__ import annotations

from typing import Annotated

import typer

from inrun_megatron.commands.options import DataOption, JsonOption, RunArgument
from inrun_megatron.errors import UserError
from inrun_megatron.report.phases import parse_cuts
from inrun_megatron.report.summary.figures import print_summary


def summary(
    run: RunArgument,
    phases: Annotated[
        str, typer.Option(metavar="CUTS", help="Where phases end, as fractions of the run, with commas.")
    ] = "1/6,1/3",
    documents: Annotated[
        int,
        typer.Option("-n", "--documents", help="Best and worst documents of each target; 0: none."),
    ] = 3,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """What was trained, value per domain and target by phase, best and worst documents, audits.

    Example: inrun summary runs/demo --phases 1/6,1/3
    """
    if documents < 0:
        raise UserError(f"-n {documents} is no number of documents; give 0 or more")
    print_summary(run, cuts=parse_cuts(phases), documents=documents, moved=data or (), as_json=json)
