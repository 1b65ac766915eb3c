"""`inrun report`: the run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inrun_megatron.commands.options import DataOption, JsonOption, RunArgument
from inrun_megatron.errors import UserError
from inrun_megatron.report.page.figures import build_figures
from inrun_megatron.report.phases import parse_cuts
from inrun_megatron.report.tables import print_json


def report(
    run: RunArgument,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="Page to write. Default: RUN/report.html."),
    ] = None,
    png: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Also write the charts as PNG files into this directory."),
    ] = None,
    phases: Annotated[
        str, typer.Option(metavar="CUTS", help="Where phases end, as fractions of the run, with commas.")
    ] = "1/6,1/3",
    documents: Annotated[
        int, typer.Option("-n", "--documents", help="Best and worst documents of each target; 0: none.")
    ] = 25,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Read and check every file and row. Default: up to 20 million rows; the audits are always there.",
        ),
    ] = None,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """One HTML page on a run that works offline: losses, value by domain, phase and target, documents, audits, cost.

    Example: inrun report runs/demo --png runs/demo/charts

    With --json the figures go to stdout, and the page is written only if --output names it.
    """
    # The chart library is large; the other commands start without it.
    from inrun_megatron.report.page.html import write_page
    from inrun_megatron.report.page.png import write_png

    if documents < 0:
        raise UserError(f"-n {documents} is no number of documents; give 0 or more")
    figures = build_figures(
        run, cuts=parse_cuts(phases), documents=documents, moved=data or (), verify=verify
    )
    page = Path(output).expanduser() if output is not None else None if json else Path(run) / "report.html"
    if page is not None:
        write_page(figures, page)
    charts = write_png(figures, Path(png).expanduser()) if png is not None else []
    if json:
        print_json(figures)
        return
    assert page is not None
    typer.echo(f"{page}: {page.stat().st_size / 1e6:.1f} MB; open it in a browser")
    if png is not None:
        typer.echo(f"{png}: {len(charts)} charts")
