"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Run directory, or its ledger directory (shapley/).")
]
TargetOption = Annotated[str | None, typer.Option("--target", help="Target. Default: every target in turn.")]
StepsOption = Annotated[
    str | None, typer.Option("--steps", metavar="A:B", help="Only steps A to B, both included.")
]
PhaseOption = Annotated[
    str | None,
    typer.Option(
        "--phase",
        metavar="NAME|K/N",
        help="Only early, middle or late steps, as in the summary (late: the last two thirds), or the K-th of N equal parts.",
    ),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="NAME=PREFIX",
        help="Where a dataset's .bin/.idx lie now, if they have moved. Repeatable.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
