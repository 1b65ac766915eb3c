"""What `--shapley-base drift` costs: scored steps at both base points, alternately, on one engine and one batch.

    python -m benchmarks.bases                     # ZeRO 1 and 2, data parallel 1 and 2, pipeline 2
    python -m benchmarks.bases --only "pp 2"       # one line

Processor time is that of all ranks together: a busy neighbour does not stretch it. What it does not show is idle time,
and under a pipeline that is the price: validation at other weights than training's cannot ride in front of it, so the
pipeline drains once more. The last two columns are that price in half-steps (benchmarks/schedule.py).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.pairs import Batch, Case, Pairs, alternate, median_ratio
from benchmarks.pipeline import (
    build_stage,
    microbatches,
    on_stages,
    random_microbatches,
    scored_step,
    scoring_of,
)
from benchmarks.schedule import timeline

VOCABULARY = 4096
LAYOUTS = {  # name -> (ZeRO stage, data-parallel ranks, pipeline stages)
    "ZeRO-1, dp 1": (1, 1, 1),
    "ZeRO-2, dp 1": (2, 1, 1),
    "ZeRO-1, dp 2": (1, 2, 1),
    "ZeRO-2, dp 2": (2, 2, 1),
    "ZeRO-1, pp 2": (1, 1, 2),
}


def measured(name: str, case: Case, pairs: int) -> dict[str, Any]:
    """Seconds of processor time of a scored step by base, summed over ranks, and their ratio."""
    _, dp, pp = LAYOUTS[name]
    ranks: list[Pairs] = on_stages(dp * pp, _both_bases, case, pairs, pp, pipeline=pp)
    cpu = [(sum(r.cpu[i][0] for r in ranks), sum(r.cpu[i][1] for r in ranks)) for i in range(pairs)]
    low, ratio, high = median_ratio(cpu)
    line = {
        "layout": name,
        "current_cpu_s": statistics.median(a for a, _ in cpu),
        "drift_cpu_s": statistics.median(b for _, b in cpu),
        "cpu_ratio": ratio,
        "cpu_low": low,
        "cpu_high": high,
        "wall_ratio": median_ratio(ranks[0].wall)[1],
        "pairs": pairs,
    }
    if pp > 1:
        validation, training = microbatches(case)
        halves = [timeline(validation, training, pp, flush=f, crosses=True).length for f in (False, True)]
        line |= {"half_steps_current": halves[0], "half_steps_drift": halves[1]}
    return line


def _both_bases(case: Case, pairs: int, stages: int) -> Pairs:
    import torch.distributed as dist

    from inrun_megatron.estimators import Estimator

    shapley, step = _under_pipeline(case) if stages > 1 else _data_parallel(case)

    def at(base: str) -> Callable[[int, Batch], None]:
        estimator = Estimator.of("first_order", base)

        def scored(iteration: int, batch: Batch) -> None:
            shapley.estimator = shapley.preparation.estimator = estimator
            step(iteration, batch)

        return scored

    try:
        return alternate(
            at("current"),
            at("drift"),
            batch=lambda iteration: random_microbatches(case, VOCABULARY, case.train, iteration),
            pairs=pairs,
            synchronise=dist.barrier,
        )
    finally:
        shapley.close()


def _under_pipeline(case: Case) -> tuple[Any, Callable[[int, Batch], None]]:
    shapley = scoring_of(build_stage(case, VOCABULARY), case, VOCABULARY)
    return shapley, lambda iteration, batch: scored_step(shapley, iteration, batch)


def _data_parallel(case: Case) -> tuple[Any, Callable[[int, Batch], None]]:
    import deepspeed
    import torch

    from inrun_megatron import InRunShapley, ShapleyTarget
    from inrun_megatron.config import ModelConfig
    from inrun_megatron.models import build_gpt, token_losses
    from inrun_megatron.training.distributed import Mpu

    heads = max(1, case.hidden // 64)
    config = ModelConfig(num_layers=case.layers, hidden_size=case.hidden, num_attention_heads=heads)
    model = build_gpt(config, vocab_size=VOCABULARY, seq_length=case.seq_length, seed=1)
    settings = {
        "train_micro_batch_size_per_gpu": case.micro_batch,
        "gradient_accumulation_steps": case.train // case.micro_batch,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": case.zero_stage},
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=Mpu())[0]
    validation = random_microbatches(case, VOCABULARY, case.validation, 0)
    target = ShapleyTarget("validation", validation, float(case.validation * case.seq_length))
    shapley = InRunShapley(engine, [target], token_losses)

    def step(iteration: int, batch: Batch) -> None:
        with shapley.step(iteration) as scored:
            for microbatch in batch:
                rows = microbatch["sample"]
                with scored.samples(rows, rows, rows):
                    losses = token_losses(engine, microbatch)
                    engine.backward(losses.mean())
                    engine.step()
        assert scored.result.scored

    return shapley, step


def _table(lines: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("layout", "current, CPU s", "drift", "ratio (quartiles)", "half-steps", "with drift"):
        table.add_column(column, justify="left" if column == "layout" else "right")
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
        measured(name, Case(name, hidden, layers, seq_length, train, validation, 2, zero), pairs)
        for name, (zero, _, _) in LAYOUTS.items()
        if only in name
    ]
    if as_json:
        print(json.dumps(lines))
        return
    title = f"A scored step at both base points: hidden {hidden}, {layers} layers, {train}:{validation} x {seq_length}"
    Console(width=max(120, Console().width)).print(_table(lines, title))


if __name__ == "__main__":
    typer.run(main)
