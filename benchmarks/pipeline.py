"""What scoring costs under DeepSpeed's pipeline; `python -m benchmarks.overhead --pp 2` runs it.

One rank per stage, each on one thread. As without the pipeline, plain and scored steps of two copies of one model
alternate. The ideal is the stream that scoring makes longer: with M training and V validation microbatches on P stages,

    (V + M + P - 1) / (M + P - 1)
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import socket
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.overhead import Case, Outcome


def pipeline_cases(hidden: int, layers: int, zero_stage: int) -> list[Case]:
    """One and two validation microbatches of two sequences before eight training ones."""
    return [
        Case(f"pp seq{s} {16 // v}:1", hidden, layers, s, 16, v, 2, zero_stage)
        for s in (256, 512)
        for v in (2, 4)
    ]


def ideal(case: Case, stages: int) -> float:
    """(V + M + P - 1) / (M + P - 1)."""
    train, validation = case.train // case.micro_batch, case.validation // case.micro_batch
    return (validation + train + stages - 1) / (train + stages - 1)


def measure_pipeline(case: Case, stages: int, *, pairs: int, vocab: int) -> Outcome:
    """Spawn the stages, let them alternate plain and scored steps, and return what the first one saw."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(stages, mp_context=multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(_stage, rank, stages, port, case, pairs, vocab) for rank in range(stages)]
        first, *_ = [rank.result() for rank in ranks]
        return first


def _engine(case: Case, vocab: int) -> Any:
    import deepspeed

    from inrun_megatron.config import ModelConfig
    from inrun_megatron.models.pipeline import build_pipeline

    heads = max(1, case.hidden // 64)
    config = ModelConfig(num_layers=case.layers, hidden_size=case.hidden, num_attention_heads=heads)
    model = build_pipeline(config, vocab_size=vocab, seq_length=case.seq_length, seed=1)
    settings = {
        "train_micro_batch_size_per_gpu": case.micro_batch,
        "gradient_accumulation_steps": case.train // case.micro_batch,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": case.zero_stage},
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def _microbatches(case: Case, vocab: int, rows: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """The same on every stage."""
    tokens = torch.randint(
        0, vocab, (rows, case.seq_length + 1), generator=torch.Generator().manual_seed(seed)
    )
    batch = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(rows, case.seq_length),
        "position_ids": torch.arange(case.seq_length).expand(rows, -1).contiguous(),
        "dataset": torch.zeros(rows, dtype=torch.long),
        "sample": torch.arange(rows),
    }
    size = case.micro_batch
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, rows, size)]


def _stage(rank: int, stages: int, port: int, case: Case, pairs: int, vocab: int) -> Outcome:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(stages)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with contextlib.redirect_stdout(sys.stderr):
        return _alternate(case, stages, pairs, vocab)


def _alternate(case: Case, stages: int, pairs: int, vocab: int) -> Outcome:
    import deepspeed
    from megatron.core import parallel_state

    from inrun_megatron import PipelineShapley, ShapleyTarget
    from inrun_megatron.models import cpu

    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    parallel_state.initialize_model_parallel(1, stages)
    cpu.install()
    cpu.seed_everything(1, tp_rank=0, dp_rank=0, pp_rank=parallel_state.get_pipeline_model_parallel_rank())
    plain, scored = _engine(case, vocab), _engine(case, vocab)
    loss = scored.module.loss_fn
    validation = _microbatches(case, vocab, case.validation, 0)
    target = ShapleyTarget("validation", validation, float(case.validation * case.seq_length))
    shapley = PipelineShapley(scored, [target], loss)
    times: list[tuple[float, float]] = []
    cpu_ratios: list[float] = []
    for iteration in range(1, pairs + 3):
        batches = _microbatches(case, vocab, case.train, iteration)

        def plain_step(batches: list = batches) -> None:
            plain.train_batch(iter([loss.split(m) for m in batches]))

        def scored_step(number: int = iteration, batches: list = batches) -> None:
            with shapley.step(number) as step:
                step.train_batch(batches)
            assert step.result.scored

        order = [plain_step, scored_step] if iteration % 2 else [scored_step, plain_step]
        spent = {work: _timed(work) for work in order}
        if iteration > 2:
            times.append((spent[plain_step][0], spent[scored_step][0]))
            cpu_ratios.append(spent[scored_step][1] / spent[plain_step][1])
    shapley.close()
    ratios = sorted(b / a for a, b in times)
    ratio, best = statistics.median(ratios), ideal(case, stages)
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratio] * 3
    scored_s = statistics.median(b for _, b in times)
    return Outcome(
        name=case.name,
        ratio=ratio,
        ideal=best,
        above_ideal=ratio / best - 1.0,
        plain_s=statistics.median(a for a, _ in times),
        scored_s=scored_s,
        ratio_low=quartiles[0],
        ratio_high=quartiles[2],
        cpu_ratio=statistics.median(cpu_ratios),
        pairs=len(times),
        tokens_per_second=case.train * case.seq_length / scored_s,
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        case=asdict(case),
    )


def _timed(work: Any) -> tuple[float, float]:
    """Wall and processor seconds of this stage, from a common start to a common end."""
    dist.barrier()
    started = time.perf_counter(), time.process_time()
    work()
    dist.barrier()
    return time.perf_counter() - started[0], time.process_time() - started[1]
