"""What `--shapley-base drift` costs: scored steps at both base points, alternately, on one engine and one batch.

    python -m benchmarks.bases                     # ZeRO 1 and 2, data parallel 1 and 2, pipeline 2
    python -m benchmarks.bases --only "pp 2"       # one line

Processor time is that of all ranks together: a busy neighbour does not stretch it. What it does not show is idle time,
and under a pipeline that is the price: validation at other weights than training's cannot ride in front of it, so the
pipeline drains once more. The last two columns are that price in half-steps (benchmarks/schedule.py).
"""

from __future__ import annotations

import statistics
from typing import Annotated, Any

import typer
from rich.table import Table

from benchmarks.cases import Case
from benchmarks.output import answer, table_of
from benchmarks.pairs import Batch, Pairs, Step, alternate, median_ratio
from benchmarks.runs import batches_of, build_engine, on_ranks, scored_step, scoring_of, synchronise
from benchmarks.schedule import timeline

VOCABULARY = 4096
LAYOUTS = {  # name -> (ZeRO stage, data-parallel ranks, pipeline stages)
    "ZeRO-1, dp 1": (1, 1, 1),
    "ZeRO-2, dp 1": (2, 1, 1),
    "ZeRO-1, dp 2": (1, 2, 1),
    "ZeRO-2, dp 2": (2, 2, 1),
    "ZeRO-1, pp 2": (1, 1, 2),
}


def measured(case: Case, pairs: int) -> dict[str, Any]:
    """Seconds of processor time of a scored step by base, summed over ranks, and their ratio."""
    ranks: list[Pairs] = on_ranks(1, case.dp, case.pp, 1, _both_bases, case, pairs)
    cpu = [(sum(r.cpu[i][0] for r in ranks), sum(r.cpu[i][1] for r in ranks)) for i in range(pairs)]
    low, ratio, high = median_ratio(cpu)
    line = {
        "layout": case.name,
        "current_cpu_s": statistics.median(a for a, _ in cpu),
        "drift_cpu_s": statistics.median(b for _, b in cpu),
        "cpu_ratio": ratio,
        "cpu_low": low,
        "cpu_high": high,
        "wall_ratio": median_ratio(ranks[0].wall)[1],
        "pairs": pairs,
    }
    if case.pp > 1:
        counts = case.validation_microbatches, case.accumulation
        halves = [timeline(*counts, case.pp, flush=f, crosses=True).length for f in (False, True)]
        line |= {"half_steps_current": halves[0], "half_steps_drift": halves[1]}
    return line


def _both_bases(case: Case, pairs: int) -> Pairs:
    from inrun_megatron.shapley.estimators import Estimator

    shapley = scoring_of(build_engine(case, VOCABULARY), case, VOCABULARY)
    step = scored_step(shapley, case)

    def at(base: str) -> Step:
        estimator = Estimator.of("first_order", base)

        def scored(iteration: int, batch: Batch) -> None:
            shapley.estimator = shapley.preparation.estimator = estimator
            step(iteration, batch)

        return scored

    try:
        return alternate(
            at("current"),
            at("drift"),
            batch=batches_of(case, VOCABULARY),
            pairs=pairs,
            synchronise=synchronise,
        )
    finally:
        shapley.close()


def _table(lines: list[dict[str, Any]], title: str) -> Table:
    table = table_of(
        title, ("layout", "current, CPU s", "drift", "ratio (quartiles)", "half-steps", "with drift")
    )
    for line in lines:
        table.add_row(
            line["layout"],
            f"{line['current_cpu_s']:.3f}",
            f"{line['drift_cpu_s']:.3f}",
            f"{line['cpu_ratio']:.3f} ({line['cpu_low']:.3f}-{line['cpu_high']:.3f})",
            str(line.get("half_steps_current", "-")),
            str(line.get("half_steps_drift", "-")),
        )
    return table


def main(
    hidden: Annotated[int, typer.Option(help="hidden size")] = 256,
    layers: Annotated[int, typer.Option(help="transformer layers")] = 4,
    seq_length: Annotated[int, typer.Option(help="tokens per sequence")] = 256,
    train: Annotated[int, typer.Option(help="sequences per step and replica")] = 16,
    validation: Annotated[int, typer.Option(help="sequences of the target")] = 2,
    pairs: Annotated[int, typer.Option(help="pairs of steps counted")] = 7,
    only: Annotated[str, typer.Option(help="layouts whose name has this in it")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Measure what the drift base costs. Example: python -m benchmarks.bases --only "dp 1" --pairs 5"""
    lines = [
        measured(
            Case(name, hidden, layers, seq_length, dp * train, dp * validation, 2, zero, dp=dp, pp=pp), pairs
        )
        for name, (zero, dp, pp) in LAYOUTS.items()
        if only in name
    ]
    title = f"A scored step at both base points: hidden {hidden}, {layers} layers, {train}:{validation} x {seq_length}"
    answer(lines, lambda: _table(lines, title), as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
