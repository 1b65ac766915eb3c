"""What a benchmark prints: a table for people, or one JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table


def table_of(title: str, columns: Sequence[str]) -> Table:
    """An empty table; the first column names its rows, the others hold figures."""
    table = Table(title=title)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def answer(record: object, table: Callable[[], Table], *, as_json: bool, width: int = 120) -> None:
    """Print one of the two; ``width``: of the table at the least."""
    if as_json:
        print(json.dumps(record))
    else:
        Console(width=max(width, Console().width)).print(table())
