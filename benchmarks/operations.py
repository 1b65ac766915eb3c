"""Which of torch's operations lie above the limit: each one's time in a scored step, less the ideal's share of a plain one.

    python -m benchmarks.operations                     # hidden 512, sequence 256, 16 : 1, one thread
    python -m benchmarks.operations --shapes --json

Plain and scored steps alternate under torch's profiler. An operation's time is without that of the operations inside it, and the
smallest over steps: what others on the machine take makes it longer, never shorter. An autograd function's own time is its Python.
The profiler takes time, too: the whole step beside them is slower than without.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Case
from benchmarks.output import answer, table_of
from benchmarks.pairs import WARM_UP, Step
from benchmarks.runs import on_ranks, side_by_side

WHOLE = "the whole step"
Times = dict[str, list[float]]
"""Milliseconds of each operation by step; a step that has not called it has none."""


@dataclass(frozen=True)
class Operation:
    """Smallest milliseconds over steps, and what lies above the ideal: ``scored - ideal * plain``."""

    name: str
    plain_ms: float
    scored_ms: float
    above_ms: float


def compare(plain: Times, scored: Times, ideal: float) -> list[Operation]:
    """All operations of either, those that lie furthest above the ideal first."""
    found = []
    for name in {**plain, **scored}:
        before, after = (min(times.get(name, [0.0])) for times in (plain, scored))
        found.append(Operation(name, before, after, after - ideal * before))
    return sorted(found, key=lambda operation: -operation.above_ms)


def profiled(step: Step, times: Times, shapes: bool) -> Step:
    """The step under torch's profiler."""

    def run(iteration: int, batch: list[dict[str, Any]]) -> None:
        with profile(activities=[ProfilerActivity.CPU], record_shapes=shapes) as profiler:
            step(iteration, batch)
        if iteration <= WARM_UP:
            return
        spent = [
            (event.key + (f" {event.input_shapes}" if shapes else ""), event.self_cpu_time_total / 1e3)
            for event in profiler.key_averages(group_by_input_shape=shapes)
        ]
        for name, milliseconds in [*spent, (WHOLE, sum(own for _, own in spent))]:
            times[name].append(milliseconds)

    return run


def measured(case: Case, pairs: int, vocab: int, shapes: bool) -> tuple[Times, Times]:
    """Of this rank, plain and scored."""
    times: tuple[Times, Times] = (defaultdict(list), defaultdict(list))
    with side_by_side(case, vocab) as both:
        plain, scored = (profiled(*own, shapes) for own in zip((both.plain, both.scored), times, strict=True))
        both.alternate(pairs, plain, scored)
    return times


def _table(found: list[Operation], title: str, least: float) -> Table:
    table = table_of(title, ("operation", "plain ms", "scored ms", "above the ideal ms"))
    for o in found:
        if abs(o.above_ms) >= least:
            table.add_row(o.name, f"{o.plain_ms:.1f}", f"{o.scored_ms:.1f}", f"{o.above_ms:+.1f}")
    return table


def main(
    hidden: Annotated[int, typer.Option(help="hidden size")] = 512,
    layers: Annotated[int, typer.Option(help="transformer layers")] = 4,
    seq_length: Annotated[int, typer.Option(help="tokens per sequence")] = 256,
    train: Annotated[int, typer.Option(help="training sequences per step")] = 16,
    validation: Annotated[int, typer.Option(help="validation sequences")] = 1,
    micro_batch: Annotated[int, typer.Option(help="sequences per microbatch")] = 4,
    vocab: Annotated[int, typer.Option(help="vocabulary size")] = 4096,
    pairs: Annotated[int, typer.Option(help="pairs of steps")] = 12,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    least: Annotated[float, typer.Option(help="milliseconds above or below the ideal to be listed")] = 1.0,
    shapes: Annotated[bool, typer.Option("--shapes", help="by the operands' shapes, too")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object with all of them")] = False,
) -> None:
    """List operations above the limit. Example: python -m benchmarks.operations --pairs 4"""
    case = Case("", hidden, layers, seq_length, train, validation, micro_batch, zero_stage=2)
    [(plain, scored)] = on_ranks(1, 1, 1, threads, measured, case, pairs, vocab, shapes)
    found = compare(plain, scored, case.ideal)
    setting = f"hidden {hidden}, sequence {seq_length}, {train} : {validation}, microbatch {micro_batch}, {threads} threads"
    record = {"setting": setting, "ideal": case.ideal, "operations": [asdict(o) for o in found]}
    title = f"Scored steps less {case.ideal:.4f} plain ones: {setting}"
    answer(record, lambda: _table(found, title, least), as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
