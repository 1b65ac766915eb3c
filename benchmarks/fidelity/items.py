"""What an item of the evidence is: something that runs in a pool of processes, and gives tables and a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field
from typing import Any

from matplotlib.axes import Axes

from .statistics import Figure

Cell = str | int | float | Figure


@dataclass
class Table:
    """Rows of cells by column."""

    title: str
    rows: Sequence[Mapping[str, Cell]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        rows = [{k: asdict(v) if isinstance(v, Figure) else v for k, v in row.items()} for row in self.rows]
        return {"title": self.title, "rows": rows}


@dataclass
class Outcome:
    """Tables, everything they were made from (JSON), and one drawing function per panel of the plot."""

    tables: list[Table]
    raw: Any
    panels: Sequence[Callable[[Axes], None]]


@dataclass(frozen=True)
class Item:
    """One experiment; `run(pool, full)` may take the large setting."""

    name: str
    question: str
    run: Callable[[Executor, bool], Outcome]


def bars(axes: Axes, labels: Sequence[str], figures: Sequence[Figure], title: str, reference: float) -> None:
    """Horizontal bars with intervals, first on top, and a line where there is nothing to see."""
    values = [figure.value for figure in figures]
    below = [max(0.0, figure.value - figure.low) for figure in figures]
    above = [max(0.0, figure.high - figure.value) for figure in figures]
    axes.barh(range(len(values)), values, xerr=[below, above], color="#4878a8", capsize=2)
    axes.set_yticks(range(len(values)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(reference, color="black", linewidth=0.8)
    axes.set_title(title, fontsize=9)


def collect(pool: Executor, function: Callable[[Any], Any], jobs: Iterable[Any]) -> list[Any]:
    """Results in the order of the jobs; the first failure ends the benchmark."""
    return list(pool.map(function, jobs))
