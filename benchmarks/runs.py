"""One small training run in any layout, plain and scored: its ranks, engine, batches and steps.

Every rank is a process of its own on this machine, with Megatron's groups, gloo (NCCL with a GPU) and, where there are
several, one thread.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cases import Case
from benchmarks.pairs import Batch, Pairs, Step, alternate
from inrun_megatron.ports import free_port

DOCUMENT = 64  # tokens of a document where samples are cut


def on_ranks(tp: int, dp: int, pp: int, threads: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``work(*arguments)`` on ``tp * dp * pp`` new processes with Megatron's groups; the answers by rank."""
    world = tp * dp * pp
    with ProcessPoolExecutor(world, mp_context=multiprocessing.get_context("spawn")) as pool:
        layout = (world, tp, pp, free_port(), threads if world == 1 else 1)
        ranks = [pool.submit(_rank, rank, layout, work, arguments) for rank in range(world)]
        return [rank.result() for rank in ranks]


def _rank(
    rank: int, layout: tuple[int, int, int, int, int], work: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    warnings.simplefilter("ignore")  # of Megatron's missing extras, from every rank
    world, tp, pp, port, threads = layout
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed's messages; the figures alone belong to stdout
        start(tp, pp, threads)
        return work(*arguments)


def start(tp: int, pp: int, threads: int) -> None:
    """Process groups of this rank; the environment says which it is."""
    import deepspeed
    from megatron.core import parallel_state

    from inrun_megatron.models import cpu
    from inrun_megatron.training.distributed import release_shared_memory

    torch.set_num_threads(threads)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    release_shared_memory()
    parallel_state.initialize_model_parallel(tp, pp)
    cpu.install()
    cpu.seed_everything(
        1,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
    )


def build_engine(case: Case, vocab: int) -> Any:
    """This rank's engine: AdamW, clipping at 1."""
    import deepspeed

    from inrun_megatron.models import build_gpt
    from inrun_megatron.models.pipeline import build_pipeline
    from inrun_megatron.training.distributed import Mpu

    build = build_gpt if case.pp == 1 else build_pipeline
    model = build(case.config(), vocab_size=vocab, seq_length=case.seq_length, seed=1)
    settings = {
        "train_micro_batch_size_per_gpu": case.micro_batch,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": case.zero_stage},
        "steps_per_print": 10**9,
        "bf16": {"enabled": case.precision == "bf16"},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    return deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, mpu=Mpu() if case.pp == 1 else None
    )[0]


def random_microbatches(
    case: Case, vocab: int, rows: int, seed: int, *, size: int | None = None, device: Any = "cpu"
) -> Batch:
    """``rows`` sequences for this rank's replica in microbatches of ``size``; the same on all ranks of the replica."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (rows, case.seq_length + 1), generator=generator)
    positions = torch.arange(case.seq_length).expand(rows, -1).contiguous()
    on_device = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(rows, case.seq_length),
        "position_ids": positions,
    }
    batch = {name: column.to(device) for name, column in on_device.items()}
    batch |= {"dataset": torch.zeros(rows, dtype=torch.long), "sample": torch.arange(rows)}
    if case.granularity != "sample":
        batch["segments"] = positions if case.granularity == "token" else positions // DOCUMENT
    size = size or case.micro_batch
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, rows, size)]


def batches_of(case: Case, vocab: int, device: Any = "cpu") -> Callable[[int], Batch]:
    """This replica's training microbatches of any iteration."""
    from inrun_megatron.parallel import Layout

    rows, replica = case.train // case.dp, Layout.current().dp_rank
    return lambda iteration: random_microbatches(
        case, vocab, rows, iteration * case.dp + replica, device=device
    )


def plain_step(engine: Any, case: Case) -> Step:
    """A step of training without scoring."""
    from inrun_megatron.engines.pipeline import train_batch

    if case.pp > 1:
        split = engine.module.loss_fn.split
        return lambda iteration, batch: train_batch(engine, [split(m) for m in batch])

    def run(iteration: int, batch: Batch) -> None:
        for microbatch in batch:
            _forward_backward(engine, microbatch)

    return run


def _forward_backward(engine: Any, microbatch: dict[str, Any]) -> None:
    from inrun_megatron.models import token_losses

    losses = token_losses(engine, microbatch)
    engine.backward((losses * microbatch["loss_mask"]).sum() / microbatch["loss_mask"].sum())
    engine.step()


def scoring_of(engine: Any, case: Case, vocab: int) -> Any:
    """Scoring of the engine towards the case's targets."""
    from inrun_megatron import InRunShapley, PipelineShapley, ShapleyTarget
    from inrun_megatron.models import token_losses

    rows = ceil(case.validation / case.dp)
    size = case.micro_batch if case.pp > 1 else min(case.micro_batch, rows)
    rows = ceil(rows / size) * size if case.pp > 1 else rows
    targets = [
        ShapleyTarget(
            f"target{k}",
            random_microbatches(case, vocab, rows, 10**6 + k, size=size, device=engine.device),
            float(rows * case.dp * case.seq_length),
        )
        for k in range(case.targets)
    ]
    options: Any = {"estimator": case.estimator, "base": case.base, "direction_dtype": case.direction_dtype}
    if case.pp > 1:
        return PipelineShapley(engine, targets, engine.module.loss_fn, **options)
    return InRunShapley(engine, targets, token_losses, **options)


def scored_step(shapley: Any, case: Case) -> Step:
    """The same step with values of all samples."""

    def run(iteration: int, batch: Batch) -> None:
        result = scored_result(shapley, case, iteration, batch)
        assert result.scored, result.status

    return run


def scored_result(shapley: Any, case: Case, iteration: int, batch: Batch) -> Any:
    """What one scored step came to."""
    with shapley.step(iteration, batch) as step:
        if case.pp > 1:
            step.train_batch(batch)
        else:
            for m in batch:
                with step.samples(m["dataset"], m["sample"], m["loss_mask"], m.get("segments")):
                    _forward_backward(shapley.engine, m)
    return step.result


def synchronise() -> None:
    """All ranks, and what they started, are here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if dist.get_world_size() > 1:
        dist.barrier()


@dataclass(frozen=True)
class Measured:
    """Of one rank: seconds per pair of steps, MiB at the peak."""

    pairs: Pairs
    peak_rss_mb: float


@dataclass(frozen=True)
class SideBySide:
    """Two copies of one model on this rank, and a step of each kind."""

    case: Case
    vocab: int
    plain: Step
    scored: Step
    shapley: Any

    def alternate(self, pairs: int, plain: Step | None = None, scored: Step | None = None) -> Pairs:
        """Time pairs of steps, of both kinds or of what stands in for them."""
        return alternate(
            plain or self.plain,
            scored or self.scored,
            batch=batches_of(self.case, self.vocab, self.shapley.engine.device),
            pairs=pairs,
            synchronise=synchronise,
        )


@contextlib.contextmanager
def side_by_side(case: Case, vocab: int) -> Iterator[SideBySide]:
    """Both copies, the second with taps until the block is left."""
    plain, scored = build_engine(case, vocab), build_engine(case, vocab)
    shapley = scoring_of(scored, case, vocab)
    try:
        yield SideBySide(case, vocab, plain_step(plain, case), scored_step(shapley, case), shapley)
    finally:
        shapley.close()


def plain_and_scored(case: Case, pairs: int, vocab: int) -> Measured:
    """Alternate both kinds of steps on this rank; of a case without validation two plain ones, of two copies."""
    if case.validation:
        with side_by_side(case, vocab) as both:
            timed = both.alternate(pairs)
    else:
        first, second = (plain_step(build_engine(case, vocab), case) for _ in range(2))
        timed = alternate(first, second, batch=batches_of(case, vocab), pairs=pairs, synchronise=synchronise)
    return Measured(timed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
