"""How the cost of scoring grows: with layers, hidden size, sequence, targets and ranks, beside the formula of `inrun plan`.

    python -m benchmarks.growth --output /tmp/growth        # a table, and growth.png in that folder
    python -m benchmarks.growth --only targets --json

One size at a time is changed from a base case; each is a pair of plain and scored steps as in benchmarks/overhead.py, in
processor time of all ranks (ranks 1, 2 and 4 share this machine's cores, so that wall time would say nothing). The
formula is `inrun_megatron/plan/predict.py`'s with this machine's rates: operations per second such that the plain step
of the same case takes the time that it took, memory and network at the rates of `dots/cost.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.cases import Case
from benchmarks.output import answer
from benchmarks.overhead import measure_together
from benchmarks.pairs import Outcome
from inrun_megatron.dots.cost import CPU_MOVED
from inrun_megatron.plan import predict, times
from inrun_megatron.plan.job import Job

BASE = Case("base", 128, 4, 128, 16, 2, 4, 2)
AXES: dict[str, list[dict[str, int]]] = {
    "layers": [{"layers": n} for n in (2, 4, 8)],
    "hidden": [{"hidden": n} for n in (64, 128, 256, 512)],
    "sequence": [{"seq_length": n} for n in (64, 128, 256, 512)],
    "targets": [{"targets": n} for n in (1, 2, 4, 8, 16)],
    "ranks": [{"dp": n} for n in (1, 2, 4)],
}


@dataclass(frozen=True)
class Point:
    """One measured case and what the formula says; extra: scored over plain, less 1."""

    axis: str
    size: int
    limit: float
    predicted: float
    measured: Outcome

    @property
    def extra(self) -> float:
        return self.measured.cpu_ratio - 1.0


def job_of(case: Case, vocab: int) -> Job:
    """The plan's description of a case."""
    return Job(
        model=case.config(),
        vocab_size=vocab,
        seq_length=case.seq_length,
        world_size=case.tp * case.dp * case.pp,
        global_batch_size=case.train,
        micro_batch_size=case.micro_batch,
        tensor_parallel=case.tp,
        pipeline_parallel=case.pp,
        zero_stage=case.zero_stage,
        parameter_bytes=2 if case.precision == "bf16" else 4,
        targets=case.targets,
        target_sequences=case.validation,
        target_micro_batch_size=case.micro_batch,
        estimator=case.estimator,
        base=case.base,
        direction_dtype=case.direction_dtype,
    )


def predicted(case: Case, vocab: int, plain_cpu_s: float) -> float:
    """What scoring adds, as a share of a plain step that takes so many processor seconds of all ranks."""
    job = job_of(case, vocab)
    flops = predict.operations(job).training / plain_cpu_s  # of the cores that all ranks share
    return times.time(job, times.Hardware(flops, CPU_MOVED, CPU_MOVED)).scored_overhead


def measure_axis(axis: str, *, pairs: int, vocab: int) -> list[Point]:
    """The points of one axis."""
    sizes = [size for changes in AXES[axis] for size in changes.values()]
    found = [
        replace(BASE, name=f"{axis} {size}", **changes)  # type: ignore[arg-type]
        for size, changes in zip(sizes, AXES[axis], strict=True)
    ]
    outcomes = measure_together(found, pairs=pairs, vocab=vocab)
    return [
        Point(axis, size, own.cpu_ideal - 1, predicted(case, vocab, own.plain_cpu_s), own)
        for size, case, own in zip(sizes, found, outcomes, strict=True)
    ]


def plot(points: list[Point], path: Path) -> None:
    """One panel per axis: measured, the formula, and the limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = list(dict.fromkeys(point.axis for point in points))
    figure, panels = pyplot.subplots(
        1, len(axes), figsize=(3.2 * len(axes), 3.2), sharey=False, squeeze=False, layout="constrained"
    )
    for panel, axis in zip(panels[0], axes, strict=True):
        own = [point for point in points if point.axis == axis]
        sizes = [point.size for point in own]
        for label, style, values in (
            ("measured", "o-", [point.extra for point in own]),
            ("inrun plan", "s--", [point.predicted for point in own]),
            ("limit", ":", [point.limit for point in own]),
        ):
            panel.plot(sizes, [100 * value for value in values], style, label=label)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.set_ylim(bottom=0)
        panel.set_xlabel(axis)
    panels[0][0].set_ylabel("a scored step adds, % of a plain one")
    panels[0][0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _table(points: list[Point], title: str) -> Table:
    table = Table(title=title)
    for column in ("", "size", "plain CPU s", "adds", "inrun plan", "limit", "above the limit"):
        table.add_column(column, justify="right")
    for point in points:
        table.add_row(
            point.axis,
            str(point.size),
            f"{point.measured.plain_cpu_s:.3f}",
            f"{point.extra:+.1%}",
            f"{point.predicted:+.1%}",
            f"{point.limit:+.1%}",
            f"{(1 + point.extra) / (1 + point.limit) - 1:+.1%}",
        )
    return table


def main(
    output: Annotated[Path | None, typer.Option(help="folder for growth.png")] = None,
    only: Annotated[str, typer.Option(help=f"one of {', '.join(AXES)}")] = "",
    vocab: Annotated[int, typer.Option(help="vocabulary size")] = 512,
    pairs: Annotated[int, typer.Option(help="pairs of steps counted per case")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Measure how the cost grows. Example: python -m benchmarks.growth --only targets --output /tmp/growth"""
    if only and only not in AXES:
        raise typer.BadParameter(f"{only!r} is none of {', '.join(AXES)}", param_hint="--only")
    points = [
        point for axis in ([only] if only else AXES) for point in measure_axis(axis, pairs=pairs, vocab=vocab)
    ]
    if output is not None:
        plot(points, output / "growth.png")
    record = {"base": asdict(BASE), "points": [asdict(point) | {"extra": point.extra} for point in points]}
    title = f"Hidden {BASE.hidden}, {BASE.layers} layers, sequence {BASE.seq_length}, {BASE.train}:{BASE.validation}"
    answer(record, lambda: _table(points, title), as_json=as_json, width=100)


if __name__ == "__main__":
    typer.run(main)
