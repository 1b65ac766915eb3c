"""Where the time of a scored step goes, by phase: what the validation pass is, and what lies above it.

    python -m benchmarks.profile                    # one rank, ZeRO-2
    python -m benchmarks.profile --dp 2             # ZeRO-2 over two ranks; --tp 2, --pp 2 likewise
    python -m benchmarks.profile --tp 2 --json

Plain and scored steps alternate as in benchmarks/overhead.py, with timers around the parts of the scored ones. A part's time
is without that of the parts inside it. Times are of rank 0: processor time of its process, and wall time beside it,
which also holds what it waited for others. Each is the median over steps.

The training pass computes weight gradients with and without scoring. Those of scored steps come out of the dots: what plain
products of the same buffers take is measured beside and left out of ``dots``.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.table import Table

from benchmarks.cases import Case
from benchmarks.output import answer, table_of
from benchmarks.pairs import WARM_UP, Batch, Pairs
from benchmarks.runs import on_ranks, side_by_side

Seconds = tuple[float, float]  # wall, processor


class Phases:
    """Exclusive seconds per phase of the step that is running."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._inside: list[list[float]] = []

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter(), time.process_time()
        self._inside.append([0.0, 0.0])
        try:
            yield
        finally:
            whole = time.perf_counter() - began[0], time.process_time() - began[1]
            nested = self._inside.pop()
            for i in range(2):
                self.spent[name][i] += whole[i] - nested[i]
                if self._inside:
                    self._inside[-1][i] += whole[i]

    def around(self, owner: Any, attribute: str, name: str) -> None:
        """Time every call of ``owner.attribute`` as ``name``."""
        original = getattr(owner, attribute)

        @functools.wraps(original)
        def run(*arguments: Any, **options: Any) -> Any:
            with self.timed(name):
                return original(*arguments, **options)

        setattr(owner, attribute, run)


@dataclass(frozen=True)
class Profile:
    """Of one rank: pairs of whole steps, and seconds of each phase by scored step."""

    pairs: Pairs
    phases: list[dict[str, Seconds]]
    products: list[Seconds]  # plain weight gradients of the scored layers, measured beside


def _instrument(phases: Phases, shapley: Any, case: Case) -> None:
    from inrun_megatron.shapley import consumers
    from inrun_megatron.shapley.pipeline import ScoringStream

    preparation, directions = shapley.preparation, shapley.directions
    phases.around(directions, "zero", "zero the sums")
    phases.around(directions, "reduce", "reduce")
    phases.around(directions, "norms" if case.pp == 1 else "squares", "norms")
    phases.around(preparation, "_multiply", "condition")
    phases.around(directions, "publish", "publish")
    phases.around(directions._flat, "wait", "wait for directions")
    phases.around(shapley.probe, "_before_step", "audit")
    shapley.probe._hook.remove()
    shapley.probe._hook = shapley.adapter.inner.register_step_pre_hook(shapley.probe._before_step)
    phases.around(consumers.DirectionFiller, "__call__", "validation: fill directions")
    phases.around(consumers.RowScorer, "__call__", "dots with weight gradients")
    if case.pp == 1:
        phases.around(shapley.passes, "run", "validation: forward and backward")
        return
    for direction in ("forward", "backward"):
        original = getattr(ScoringStream, direction)

        def around(stream: Any, index: int, *, original: Callable[..., Any] = original) -> Any:
            @contextmanager
            def both() -> Iterator[None]:
                if index < stream.prepended:
                    with phases.timed("validation: forward and backward"), original(stream, index):
                        yield
                else:
                    with original(stream, index):
                        yield

            return both()

        setattr(ScoringStream, direction, around)


def profile(case: Case, pairs: int, vocab: int) -> Profile:
    """Both kinds of steps on this rank, the scored ones with timers; a function for `on_ranks`."""
    from inrun_megatron.dots.products import weight_gradient
    from inrun_megatron.shapley.scored_step import ScoredStep

    phases = Phases()
    found: list[dict[str, tuple[float, float]]] = []
    products = []
    buffers: list[tuple[Any, Any]] = []
    with side_by_side(case, vocab) as both:
        _instrument(phases, both.shapley, case)
        phases.around(ScoredStep, "finish", "finish")
        both.shapley.consumers = (
            lambda e: (
                buffers.append((e.activation, e.output_grad))
                if e.site.kind == "linear" and not e.run.detached and len(found) == WARM_UP
                else None
            ),
        )

        def timed(iteration: int, batch: Batch) -> None:
            phases.spent.clear()
            both.scored(iteration, batch)
            found.append({name: (spent[0], spent[1]) for name, spent in phases.spent.items()})

        whole = both.alternate(pairs, scored=timed)
    for _ in range(pairs):
        began = time.perf_counter(), time.process_time()
        for activation, output_grad in buffers:
            weight_gradient(activation, output_grad)
        products.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return Profile(whole, found[WARM_UP:], products)


def lines(case: Case, found: Profile) -> dict[str, Any]:
    """Milliseconds by phase (wall, processor), and the whole steps'."""

    def median(values: list[float]) -> float:
        return 1e3 * statistics.median(values)

    names = list(dict.fromkeys(name for step in found.phases for name in step))
    phases = {
        name: [median([step.get(name, (0.0, 0.0))[i] for step in found.phases]) for i in range(2)]
        for name in names
    }
    products = [median([product[i] for product in found.products]) for i in range(2)]
    with_dots = phases.pop("dots with weight gradients")
    phases["dots"] = [whole - own for whole, own in zip(with_dots, products, strict=True)]
    pairs = (found.pairs.wall, found.pairs.cpu)
    steps = {
        name: [median([pair[i] for pair in own]) for own in pairs]
        for i, name in enumerate(("plain", "scored"))
    }
    known = [sum(phase[i] for phase in phases.values()) for i in range(2)]
    # What timers around single parts do not see: taps instead of fused modules, their bookkeeping, colder caches.
    phases["everything else"] = [steps["scored"][i] - steps["plain"][i] - known[i] for i in range(2)]
    return {"case": asdict(case), "work": case.work, "ideal": case.ideal, "steps": steps, "phases": phases}


def _table(record: dict[str, Any]) -> Table:
    steps, case = record["steps"], record["case"]
    plain, scored = steps["plain"], steps["scored"]
    table = table_of(
        f"TP {case['tp']}, DP {case['dp']}, PP {case['pp']}, ZeRO-{case['zero_stage']}, hidden {case['hidden']}, "
        f"sequence {case['seq_length']}: scored over plain {scored[0] / plain[0]:.3f} wall (ideal {record['ideal']:.3f}), "
        f"{scored[1] / plain[1]:.3f} processor (ideal {record['work']:.3f})",
        ("phase", "processor ms", "% of a plain step", "wall ms", "% of a plain step"),
    )
    for name, (wall, cpu) in {"plain step": plain, "scored step": scored, **record["phases"]}.items():
        table.add_row(
            name, f"{cpu:.1f}", f"{100 * cpu / plain[1]:.1f}", f"{wall:.1f}", f"{100 * wall / plain[0]:.1f}"
        )
    return table


def main(
    hidden: Annotated[int, typer.Option(help="hidden size")] = 512,
    layers: Annotated[int, typer.Option(help="transformer layers")] = 4,
    seq_length: Annotated[int, typer.Option(help="tokens per sequence")] = 256,
    train: Annotated[int, typer.Option(help="training sequences per step")] = 16,
    validation: Annotated[int, typer.Option(help="validation sequences")] = 2,
    tp: Annotated[int, typer.Option(help="tensor-parallel ranks")] = 1,
    dp: Annotated[int, typer.Option(help="data-parallel ranks")] = 1,
    pp: Annotated[int, typer.Option(help="pipeline stages")] = 1,
    zero_stage: Annotated[int | None, typer.Option(help="DeepSpeed ZeRO stage; default 2, PP 1")] = None,
    vocab: Annotated[int, typer.Option(help="vocabulary size")] = 4096,
    threads: Annotated[int, typer.Option(help="CPU threads of a single rank")] = 1,
    pairs: Annotated[int, typer.Option(help="pairs of steps counted")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Time the phases of a scored step. Example: python -m benchmarks.profile --tp 2 --pairs 5"""
    stage = (1 if pp > 1 else 2) if zero_stage is None else zero_stage
    case = Case(
        "profile",
        hidden,
        layers,
        seq_length,
        train,
        validation,
        2 if pp > 1 else 4,
        stage,
        tp=tp,
        dp=dp,
        pp=pp,
    )
    record = lines(case, on_ranks(tp, dp, pp, threads, profile, case, pairs, vocab)[0])
    answer(record, lambda: _table(record), as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
