"""What a flush between validation and training would cost in a pipeline, and what the stream without one costs.

    python -m benchmarks.flush                                  # counted in half-steps, no processes
    python -m benchmarks.flush --measure --stages 2 --stages 4  # the same scored step on a real PipelineEngine, both ways

Measured: one model, one scoring object and one batch; only the schedule differs (benchmarks/schedule.py). A machine
with fewer cores than stages has no idle stages, because another one computes meanwhile. So every forward and every
backward of a stage is followed by a pause in which it holds no core (--pause-ms; 0 for real compute alone): idle time
then shows on any machine, and a half-step is about as long as the pause.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Annotated, Any

import torch.distributed as dist
import typer
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass
from rich.table import Table

from benchmarks.cases import Case
from benchmarks.output import answer
from benchmarks.pairs import Batch, Pairs, alternate, median_ratio
from benchmarks.runs import batches_of, build_engine, on_ranks, scored_step, scoring_of
from benchmarks.schedule import FlushedSchedule, timeline

VOCABULARY = 256


def counted(validation: int, training: int, stages: int) -> dict[str, Any]:
    """Half-steps of a scored step both ways; the ideal is without anything that crosses stages."""
    in_front = timeline(validation, training, stages, flush=False, crosses=True)
    flushed = timeline(validation, training, stages, flush=True, crosses=True)
    return {
        "stages": stages,
        "ideal": timeline(validation, training, stages, flush=False, crosses=False).length,
        "in_front": in_front.length,
        "flushed": flushed.length,
        "waits": in_front.waits,
    }


def measured(case: Case, stages: int, *, pairs: int, pause: float) -> dict[str, Any]:
    """Seconds of a scored step both ways, on the first stage: the least, which a busy neighbour stretched least."""
    timed: Pairs = on_ranks(1, 1, stages, 1, _both_ways, replace(case, pp=stages), pairs, pause)[0]
    low, ratio, high = median_ratio(timed.wall)
    in_front, flushed = (min(pair[i] for pair in timed.wall) for i in (0, 1))
    return {
        "in_front_s": in_front,
        "flushed_s": flushed,
        "least_ratio": flushed / in_front,
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "pairs": pairs,
    }


def _both_ways(case: Case, pairs: int, pause: float) -> Pairs:
    shapley = scoring_of(build_engine(case, VOCABULARY), case, VOCABULARY)
    engine, validation, training = shapley.engine, case.validation_microbatches, case.accumulation
    scored = scored_step(shapley, case)
    in_front = engine._train_schedule
    engine._INSTRUCTION_MAP = {
        kind: _then_pause(run, pause) if kind in (ForwardPass, BackwardPass) else run
        for kind, run in engine._INSTRUCTION_MAP.items()
    }

    def flushed_step(iteration: int, batch: Batch) -> None:
        engine._train_schedule = lambda: FlushedSchedule(
            validation, training, engine.num_stages, engine.stage_id
        )
        try:
            scored(iteration, batch)
        finally:
            engine._train_schedule = in_front

    try:
        return alternate(
            scored,
            flushed_step,
            batch=batches_of(case, VOCABULARY),
            pairs=pairs,
            synchronise=dist.barrier,
        )
    finally:
        shapley.close()


def _then_pause(run: Callable[..., None], seconds: float) -> Callable[..., None]:
    def paused(engine: Any, **instruction: Any) -> None:
        run(engine, **instruction)
        time.sleep(seconds)

    return paused


def _table(lines: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    measured = "in_front_s" in lines[0]
    columns = ["stages", "ideal", "in front", "stage waits", "flushed", "flush costs"]
    columns += ["least s", "flushed", "ratio", "counted", "median (quartiles)"] if measured else []
    for column in columns:
        table.add_column(column, justify="right")
    for line in lines:
        cells = [
            str(line["stages"]),
            str(line["ideal"]),
            str(line["in_front"]),
            " ".join(str(wait) for wait in line["waits"]),
            str(line["flushed"]),
            f"{line['flushed'] - line['in_front']:+d}",
        ]
        if measured:
            cells += [
                f"{line['in_front_s']:.3f}",
                f"{line['flushed_s']:.3f}",
                f"{line['least_ratio']:.3f}",
                f"{line['flushed'] / line['in_front']:.3f}",
                f"{line['ratio']:.2f} ({line['ratio_low']:.2f}-{line['ratio_high']:.2f})",
            ]
        table.add_row(*cells)
    return table


def main(
    stages: Annotated[list[int] | None, typer.Option(help="pipeline sizes; default 2, 3, 4, 8")] = None,
    validation: Annotated[int, typer.Option(help="validation microbatches")] = 2,
    training: Annotated[int, typer.Option(help="training microbatches")] = 8,
    measure: Annotated[bool, typer.Option(help="time it on a real PipelineEngine as well")] = False,
    pause_ms: Annotated[float, typer.Option(help="pause after each forward and backward")] = 50.0,
    hidden: Annotated[int, typer.Option(help="hidden size")] = 64,
    seq_length: Annotated[int, typer.Option(help="tokens per sequence")] = 32,
    layers: Annotated[int, typer.Option(help="transformer layers, a multiple of the stages")] = 4,
    pairs: Annotated[int, typer.Option(help="pairs of steps counted")] = 9,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Count and measure the flush. Example: python -m benchmarks.flush --measure --stages 2 --pairs 5"""
    lines = [counted(validation, training, size) for size in stages or (2, 3, 4, 8)]
    case = Case("flush", hidden, layers, seq_length, 2 * training, 2 * validation, 2, 1)
    if measure:
        for line in lines:
            line |= measured(case, line["stages"], pairs=pairs, pause=pause_ms / 1e3)
    title = f"Half-steps of a scored step: {validation} validation and {training} training microbatches"
    record = {"case": asdict(case), "pause_ms": pause_ms, "lines": lines}
    answer(record, lambda: _table(lines, title), as_json=as_json, width=130)


if __name__ == "__main__":
    typer.run(main)
