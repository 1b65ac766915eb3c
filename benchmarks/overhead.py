"""What scoring costs: plain and scored training steps, alternately in one process.

    python -m benchmarks.overhead                       # the table in docs/performance.md
    python -m benchmarks.overhead --json > overhead.json
    python -m benchmarks.overhead --pp 2                # through the pipeline: benchmarks/pipeline.py

Two copies of one model train side by side on the same batches: one is megatron-core + DeepSpeed as it is, the
other has taps and scores every sample against one target (benchmarks/pairs.py). The ideal is the validation pass
itself, ``1 + n_val / n_train`` when every step is scored.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.pairs import Case, Outcome, alternate, outcome


def cases(hidden: int, layers: int, micro_batch: int, zero_stage: int) -> list[Case]:
    """Training : validation 16:1 and 8:1, sequence 256 and 512."""
    return [
        Case(f"seq{s} {16 // v}:1", hidden, layers, s, 16, v, micro_batch, zero_stage)
        for s in (256, 512)
        for v in (1, 2)
    ]


def _start(threads: int) -> None:
    """A world of one rank unless a launcher made a larger one."""
    import deepspeed
    from megatron.core import parallel_state

    from inrun_megatron.models import cpu

    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    torch.set_num_threads(threads)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    parallel_state.initialize_model_parallel()
    cpu.install()
    cpu.seed_everything(1, tp_rank=0, dp_rank=parallel_state.get_data_parallel_rank())


def _engine(case: Case, vocab: int, bf16: bool) -> Any:
    import deepspeed

    from inrun_megatron.config import ModelConfig
    from inrun_megatron.models import build_gpt
    from inrun_megatron.training.distributed import Mpu

    heads = max(1, case.hidden // 64)
    config = ModelConfig(num_layers=case.layers, hidden_size=case.hidden, num_attention_heads=heads)
    model = build_gpt(config, vocab_size=vocab, seq_length=case.seq_length, seed=1)
    settings = {
        "train_micro_batch_size_per_gpu": case.micro_batch,
        "gradient_accumulation_steps": case.train // case.micro_batch,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": case.zero_stage},
        "steps_per_print": 10**9,
        "bf16": {"enabled": bf16},
    }
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, weight_decay=0.1, fused=not torch.cuda.is_available()
    )
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=Mpu())[0]


def _batch(case: Case, vocab: int, rows: int, device: torch.device) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, vocab, (rows, case.seq_length + 1), device=device)
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(rows, case.seq_length, device=device),
        "position_ids": torch.arange(case.seq_length, device=device).expand(rows, -1).contiguous(),
        "sample": torch.arange(rows),
    }


def _train(engine: Any, microbatches: list[dict[str, torch.Tensor]], step: Any = None) -> None:
    from inrun_megatron.models import token_losses

    for microbatch in microbatches:
        rows = microbatch["sample"]
        inside = contextlib.nullcontext() if step is None else step.samples(rows, rows, rows)
        with inside:
            losses = token_losses(engine, microbatch)
            engine.backward((losses * microbatch["loss_mask"]).sum() / microbatch["loss_mask"].sum())
            engine.step()


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(case: Case, *, pairs: int, vocab: int, bf16: bool, threads: int) -> Outcome:
    """Alternate plain and scored steps of one case."""
    _start(threads)
    from inrun_megatron import InRunShapley, ShapleyTarget
    from inrun_megatron.models import token_losses

    plain, scored = _engine(case, vocab, bf16), _engine(case, vocab, bf16)
    device = torch.device(plain.device)
    rows = min(case.micro_batch, case.validation)
    validation = [_batch(case, vocab, rows, device) for _ in range(case.validation // rows)]
    target = ShapleyTarget("validation", validation, float(case.validation * case.seq_length))
    shapley = InRunShapley(scored, [target], token_losses)

    def batch(iteration: int) -> list[dict[str, torch.Tensor]]:
        return [_batch(case, vocab, case.micro_batch, device) for _ in range(case.train // case.micro_batch)]

    def scored_step(iteration: int, microbatches: list[dict[str, torch.Tensor]]) -> None:
        with shapley.step(iteration) as step:
            _train(scored, microbatches, step)
        assert step.result.scored

    try:
        timed = alternate(
            lambda iteration, microbatches: _train(plain, microbatches),
            scored_step,
            batch=batch,
            pairs=pairs,
            synchronise=_synchronise,
        )
    finally:
        shapley.close()
    return outcome(case, timed, ideal=1.0 + case.validation / case.train)


# DeepSpeed prints to stdout while it builds its operators; the figures alone belong there.
def _quietly(case: Case, pairs: int, vocab: int, bf16: bool, threads: int) -> Outcome:
    with contextlib.redirect_stdout(sys.stderr):
        return measure(case, pairs=pairs, vocab=vocab, bf16=bf16, threads=threads)


def _in_new_process(*arguments: Any) -> Outcome:
    """A case in a process of its own, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_quietly, *arguments).result()


def _table(outcomes: list[Outcome], title: str) -> Table:
    table = Table(title=title)
    for column in (
        "case",
        "plain s",
        "scored s",
        "ratio (quartiles)",
        "ideal",
        "above",
        "CPU",
        "CPU ideal",
        "RSS MB",
    ):
        table.add_column(column, justify="left" if column == "case" else "right")
    for o in outcomes:
        table.add_row(
            o.name,
            f"{o.plain_s:.3f}",
            f"{o.scored_s:.3f}",
            f"{o.ratio:.3f} ({o.ratio_low:.3f}-{o.ratio_high:.3f})",
            f"{o.ideal:.4f}",
            f"{100 * o.above_ideal:+.1f}%",
            f"{o.cpu_ratio:.3f}",
            f"{o.cpu_ideal:.4f}",
            f"{o.peak_rss_mb:.0f}",
        )
    return table


def main(
    hidden: Annotated[int, typer.Option(help="hidden size")] = 512,
    layers: Annotated[int, typer.Option(help="transformer layers")] = 4,
    micro_batch: Annotated[int, typer.Option(help="sequences per microbatch")] = 4,
    zero_stage: Annotated[int, typer.Option(help="DeepSpeed ZeRO stage")] = 2,
    vocab: Annotated[int, typer.Option(help="vocabulary size")] = 4096,
    pairs: Annotated[int, typer.Option(help="pairs of steps counted per case")] = 9,
    threads: Annotated[int, typer.Option(help="CPU threads")] = os.cpu_count() or 1,
    bf16: Annotated[bool, typer.Option(help="train in bf16")] = False,
    pp: Annotated[int, typer.Option(help="pipeline stages, one rank and thread each (ZeRO 0 or 1)")] = 1,
    only: Annotated[str, typer.Option(help="run the cases whose name contains this")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Measure the overhead of scoring. Example: python -m benchmarks.overhead --hidden 256 --pairs 5"""
    if pp > 1:
        from benchmarks.pipeline import measure_pipeline, pipeline_cases

        micro_batch, threads, zero_stage = 2, pp, min(zero_stage, 1)
        chosen = [c for c in pipeline_cases(hidden, layers, zero_stage) if only in c.name]
        outcomes = [measure_pipeline(case, pp, pairs=pairs, vocab=vocab) for case in chosen]
    else:
        chosen = [c for c in cases(hidden, layers, micro_batch, zero_stage) if only in c.name]
        outcomes = [_in_new_process(case, pairs, vocab, bf16, threads) for case in chosen]
    setting = (
        f"hidden {hidden}, {layers} layers, vocabulary {vocab}, microbatch {micro_batch}, ZeRO-{zero_stage}, "
        f"{threads} threads" + (f", {pp} pipeline stages" if pp > 1 else "")
    )
    if as_json:
        print(json.dumps({"setting": setting, "cases": [asdict(o) for o in outcomes]}))
    else:
        Console(width=max(100, Console().width)).print(
            _table(outcomes, f"Scored over plain training steps: {setting}")
        )


if __name__ == "__main__":
    typer.run(main)
