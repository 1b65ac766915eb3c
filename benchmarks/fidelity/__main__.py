"""What the values predict: seven experiments, with tables, plots and intervals (docs/evidence.md).

    python -m benchmarks.fidelity                    # the small setting of all seven
    python -m benchmarks.fidelity --only lds         # one of them
    python -m benchmarks.fidelity --full             # more steps, seeds and retrainings: hours

Each item leaves NAME.json (settings, tables with 95% intervals, every figure behind them) and NAME.png in the output folder.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes below: read when torch is imported
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOG_LEVEL", "WARNING")

import matplotlib
import typer
from rich.console import Console
from rich.table import Table as RichTable

matplotlib.use("Agg")
from matplotlib import pyplot

from . import curation, datamodel, harm, paraphrase, removal, step_game
from .items import Cell, Item, Outcome, Table

ITEMS = {
    item.name: item
    for item in (
        step_game.ITEM,
        step_game.EXPERTS,
        removal.ITEM,
        datamodel.ITEM,
        harm.ITEM,
        curation.ITEM,
        paraphrase.ITEM,
    )
}


def show(console: Console, table: Table) -> None:
    """Print a table."""
    printed = RichTable(title=table.title, title_justify="left")
    for column in table.rows[0]:
        printed.add_column(column)
    for row in table.rows:
        printed.add_row(*map(_text, row.values()))
    console.print(printed)


def _text(cell: Cell) -> str:
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def write(item: Item, outcome: Outcome, setting: str, seconds: float, output: Path) -> None:
    """NAME.json and NAME.png."""
    output.mkdir(parents=True, exist_ok=True)
    record = {
        "item": item.name,
        "question": item.question,
        "setting": setting,
        "seconds": round(seconds, 1),
        "tables": [table.as_json() for table in outcome.tables],
        "raw": outcome.raw,
    }
    (output / f"{item.name}.json").write_text(json.dumps(record, allow_nan=True) + "\n")
    panels = outcome.panels
    figure, axes = pyplot.subplots(1, len(panels), figsize=(max(8.5, 5.5 * len(panels)), 4.8), squeeze=False)
    for one, draw in zip(axes[0], panels, strict=True):
        draw(one)
    figure.suptitle(item.question)
    figure.tight_layout()
    figure.savefig(output / f"{item.name}.png", dpi=120 if len(panels) < 4 else 90)
    pyplot.close(figure)


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(ITEMS)}; repeatable")] = None,
    full: Annotated[bool, typer.Option("--full", help="the large setting")] = False,
    output: Annotated[Path, typer.Option(help="folder of the JSON files and plots")] = Path("runs/fidelity"),
    workers: Annotated[int, typer.Option(min=1, help="processes")] = os.cpu_count() or 1,
) -> None:
    """What the values predict, measured."""
    unknown = sorted(set(only or ()) - set(ITEMS))
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)} is none of {', '.join(ITEMS)}", param_hint="--only")
    console = Console(width=180)
    setting = "full" if full else "small"
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for name in only or ITEMS:
            item, started = ITEMS[name], time.perf_counter()
            console.rule(f"{name}: {item.question}")
            outcome = item.run(pool, full)
            seconds = time.perf_counter() - started
            write(item, outcome, setting, seconds, output)
            for table in outcome.tables:
                show(console, table)
            console.print(f"{seconds:.0f} s, {output / name}.json and .png")


if __name__ == "__main__":
    typer.run(main)
