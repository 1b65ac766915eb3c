"""What scoring costs under DeepSpeed's pipeline; `python -m benchmarks.overhead --pp 2` runs it.

One rank per stage, each on one thread. As without the pipeline, plain and scored steps of two copies of one model
alternate. The ideal is the stream that scoring makes longer: with M training and V validation microbatches on P stages,

    (V + M + P - 1) / (M + P - 1)
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.pairs import Batch, Case, Outcome, Pairs, alternate, outcome


def pipeline_cases(hidden: int, layers: int, zero_stage: int) -> list[Case]:
    """One and two validation microbatches of two sequences before eight training ones."""
    return [
        Case(f"pp seq{s} {16 // v}:1", hidden, layers, s, 16, v, 2, zero_stage)
        for s in (256, 512)
        for v in (2, 4)
    ]


def microbatches(case: Case) -> tuple[int, int]:
    """V and M."""
    return case.validation // case.micro_batch, case.train // case.micro_batch


def ideal(case: Case, stages: int) -> float:
    """(V + M + P - 1) / (M + P - 1)."""
    validation, train = microbatches(case)
    return (validation + train + stages - 1) / (train + stages - 1)


def measure_pipeline(case: Case, stages: int, *, pairs: int, vocab: int) -> Outcome:
    """Let the stages alternate plain and scored steps: wall time of the first, processor time of all together."""
    ranks = on_stages(stages, _plain_and_scored, case, pairs, vocab)
    cpu = [
        (sum(rank.cpu[i][0] for rank in ranks), sum(rank.cpu[i][1] for rank in ranks)) for i in range(pairs)
    ]
    return outcome(case, ranks[0], ideal=ideal(case, stages), cpu=cpu)


def on_stages(
    stages: int, work: Callable[..., Any], *arguments: Any, pipeline: int | None = None
) -> list[Any]:
    """``work(*arguments)`` on one new process per stage, with Megatron's groups; the answers by rank.

    ``pipeline``: how many stages the ``stages`` processes make, if not one each; the rest is data parallelism.
    """
    groups = pipeline or stages
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(stages, mp_context=multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(_stage, rank, stages, groups, port, work, arguments) for rank in range(stages)]
        return [rank.result() for rank in ranks]


def _stage(
    rank: int,
    world: int,
    stages: int,
    port: int,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Any:
    import deepspeed
    from megatron.core import parallel_state

    from inrun_megatron.models import cpu

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed's messages; the figures alone belong to stdout
        torch.set_num_threads(1)
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        parallel_state.initialize_model_parallel(1, stages)
        cpu.install()
        cpu.seed_everything(
            1,
            tp_rank=0,
            dp_rank=parallel_state.get_data_parallel_rank(),
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        )
        return work(*arguments)


def build_stage(case: Case, vocab: int) -> Any:
    """This stage's engine: GPT-2 shape with tied embeddings, AdamW, clipping at 1."""
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


def random_microbatches(case: Case, vocab: int, rows: int, seed: int) -> Batch:
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


def scoring_of(engine: Any, case: Case, vocab: int) -> Any:
    """``PipelineShapley`` with one target of the case's validation sequences."""
    from inrun_megatron import PipelineShapley, ShapleyTarget

    validation = random_microbatches(case, vocab, case.validation, 0)
    target = ShapleyTarget("validation", validation, float(case.validation * case.seq_length))
    return PipelineShapley(engine, [target], engine.module.loss_fn)


def scored_step(shapley: Any, iteration: int, batch: Batch) -> None:
    with shapley.step(iteration) as step:
        step.train_batch(batch)
    assert step.result.scored


def _plain_and_scored(case: Case, pairs: int, vocab: int) -> Pairs:
    from inrun_megatron.engines.pipeline import train_batch

    plain, scored = build_stage(case, vocab), build_stage(case, vocab)
    shapley = scoring_of(scored, case, vocab)
    split = plain.module.loss_fn.split
    try:
        return alternate(
            lambda iteration, batch: train_batch(plain, [split(m) for m in batch]),
            lambda iteration, batch: scored_step(shapley, iteration, batch),
            batch=lambda iteration: random_microbatches(case, vocab, case.train, iteration),
            pairs=pairs,
            synchronise=dist.barrier,
        )
    finally:
        shapley.close()
