"""How figures look on a terminal: 100 columns, legible without colour (signs are printed, colour only repeats them)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from inrun_megatron.ledger.checks import Check

WIDTH = 100
MAXIMUM_WIDTH = 140


def console() -> Console:
    """stdout; 100 columns where there is no terminal, so that piped output does not depend on where it runs."""
    found = Console(highlight=False, soft_wrap=False)
    width = min(max(found.width, 60), MAXIMUM_WIDTH) if found.is_terminal else WIDTH
    return Console(highlight=False, width=width)


def table(columns: Sequence[str | tuple[str, str]]) -> Table:
    """An empty table; a column is its heading, or (heading, justification: left, right)."""
    made = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
    )
    for column in columns:
        heading, justify = (column, "right") if isinstance(column, str) else column
        made.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    return made


def checks_table(checks: Sequence[Check]) -> Table:
    """Checks or audits with their verdict in words."""
    made = table([("Check", "left"), ("Verdict", "left"), ("Detail", "left")])
    made.columns[2].no_wrap = False
    made.columns[2].overflow = "fold"
    for check in checks:
        verdict = Text("ok", style="green") if check.ok else Text("FAILED", style="bold red")
        if check.ok and check.note:
            verdict = Text("note", style="yellow")
        made.add_row(Text(check.name), verdict, Text(check.detail))
    return made


def signed(number: float | None, digits: int = 2) -> Text:
    """A number with its sign, coloured by it."""
    if number is None or not math.isfinite(number):
        return Text("-")
    style = "green" if number > 0 else "red" if number < 0 else ""
    return Text(f"{number:+.{digits}f}", style=style)


def decimals_of(*errors: float | None) -> int:
    """Decimals of a figure and its standard error: two, or as many (up to four) as leave the smallest error a digit."""
    known = [error for error in errors if error is not None and math.isfinite(error) and error > 0]
    return min(max(2, -math.floor(math.log10(min(known)))), 4) if known else 2


def with_error(mean: float, error: float | None, unit: float, digits: int | None = None) -> Text:
    """`+12.30 ± 0.45`, both divided by `unit`. digits: after the point, default as `decimals_of`."""
    if digits is None:
        digits = decimals_of(None if error is None else error / unit)
    text = signed(mean / unit, digits)
    text.append("" if error is None else f" ± {error / unit:.{digits}f}", style="default")
    return text


def scale_of(numbers: Iterable[float]) -> tuple[float, str]:
    """A power of ten in which the largest of `numbers` has two digits before the point: (unit, its name in a heading)."""
    largest = max((abs(number) for number in numbers if math.isfinite(number)), default=0.0)
    if largest < 1e-300:  # no power of ten below divides them
        return 1.0, ""
    exponent = math.floor(math.log10(largest)) - 1
    return (1.0, "") if exponent == 0 else (10.0**exponent, f"x 1e{exponent:+03d}")


def in_nats(name: str) -> str:
    """The second line of a heading: the unit of values with a scale's name."""
    return f"nats {name}".rstrip()


def scale_near(numbers: Iterable[float], scale: tuple[float, str]) -> tuple[float, str]:
    """`scale`, that of another table beside this one, where the largest of `numbers` then has one to four digits before
    the point; else their own."""
    known = list(numbers)
    largest = max((abs(number) for number in known if math.isfinite(number)), default=0.0)
    return scale if 1 <= largest / scale[0] < 1e4 else scale_of(known)


def figure(number: float | None, digits: int = 4) -> str:
    """A number with `digits` significant digits, `-` for none."""
    if number is None or not math.isfinite(number):
        return "-"
    return f"{number:.{digits}g}"


def print_json(record: Any) -> None:
    """One JSON object on stdout; numbers that are not finite become null."""
    print(json.dumps(json_ready(record), default=str))


def json_ready(value: Any) -> Any:
    """`value` with NaN and infinities as None, throughout."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: json_ready(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(entry) for entry in value]
    return value
