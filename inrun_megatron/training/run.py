"""One run: resolve the configuration, set everything up, train."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from inrun_megatron.config import Config
from inrun_megatron.errors import UserError
from inrun_megatron.keeping.agreement import all_ranks
from inrun_megatron.ledger.files import make_directory, refused
from inrun_megatron.ledger.lock import DirectoryLock
from inrun_megatron.parallel import Layout
from inrun_megatron.training import checkpoint, datasets, distributed, run_state
from inrun_megatron.training.arguments import write_yaml
from inrun_megatron.training.checkpoint import Progress
from inrun_megatron.training.deepspeed_config import Batch, merge
from inrun_megatron.training.engine import Trainer, build_trainer
from inrun_megatron.training.exit_codes import FINISHED, STOPPED
from inrun_megatron.training.loop import Run
from inrun_megatron.training.monitor import Monitor, check_available
from inrun_megatron.training.run_state import Resume
from inrun_megatron.training.scoring import Scoring
from inrun_megatron.training.signals import StopSignals
from inrun_megatron.training.validation import check_fp16, check_pipeline, validate
from inrun_megatron.training.watchdog import Watchdog
from inrun_megatron.wording import counted


@dataclass(frozen=True)
class Resolved:
    """A checked configuration: flags and DeepSpeed JSON agree, and the ranks can share the work."""

    config: Config
    deepspeed: dict[str, Any]
    batch: Batch


def prepare(config: Config, world_size: int) -> Resolved:
    """Everything that can be found wrong without other ranks, data or a model. UserError."""
    data_parallel = validate(config, world_size)
    resolved, deepspeed, batch = merge(config, data_parallel)
    check_available(deepspeed)
    check_fp16(resolved)
    check_pipeline(resolved)
    datasets.check_arguments(config)
    _check_precision(resolved)
    return Resolved(config=resolved, deepspeed=deepspeed, batch=batch)


def _check_precision(config: Config) -> None:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    for name, wanted, supported in (
        ("fp16", config.training.fp16, accelerator.is_fp16_supported),
        ("bf16", config.training.bf16, accelerator.is_bf16_supported),
    ):
        if wanted and not supported():
            raise UserError(
                f"{name} is not supported by this machine's {accelerator.device_name()}: train without --{name} "
                f"(or without it in the DeepSpeed JSON)"
            )


def run(resolved: Resolved, signals: StopSignals | None = None) -> int:
    """Train as configured, from a checkpoint where there is one; returns the exit code. Collective over the world.

    signals: may have been listening for a while.
    """
    parallel = resolved.config.parallel
    distributed.meet(parallel)
    distributed.share_cores()
    # Its own limit comes first: the collective's error would name no rank.
    stall = 0.9 * 60 * parallel.distributed_timeout_minutes
    with Watchdog(parallel.heartbeat_timeout, stall) as watchdog:
        return _run(resolved, watchdog, signals or StopSignals())


def _run(resolved: Resolved, watchdog: Watchdog, signals: StopSignals) -> int:
    config, batch = resolved.config, resolved.batch
    # Whatever may be wrong with the input comes before DeepSpeed, which may compile for a minute.
    vocabulary = all_ranks(lambda: datasets.vocabulary(config))
    targets = all_ranks(lambda: datasets.targets(config, vocabulary))
    resume = run_state.to_resume(config)
    done = (
        {} if resume is None else {"iteration": resume.iteration, "consumed_samples": resume.consumed_samples}
    )
    data = datasets.build(config, batch, vocabulary, **done)
    distributed.initialise(config.parallel)
    layout = Layout.from_megatron()
    trainer = build_trainer(config, resolved.deepspeed, batch, vocabulary.vocab_size)

    progress = _load(config, trainer, resume, batch, data.order)
    scoring = None
    if config.shapley.enabled:
        scoring = Scoring(
            config,
            trainer,
            layout,
            targets=targets,
            datasets=data.table,
            progress=progress,
            eod=vocabulary.eod,
        )
    elif config.training.recompute_granularity is not None:
        trainer.recompute(config.training.recompute_num_layers)
    loop = Run(
        config=config,
        batch=batch,
        trainer=trainer,
        layout=layout,
        train_data=data.train,
        validation_data=data.validation,
        monitor=Monitor(resolved.deepspeed),
        progress=progress,
        scoring=scoring,
    )
    # Only now: a refused resume leaves the run's own as it was.
    with all_ranks(lambda: _own_checkpoints(loop)):
        # Where nothing is left to train, config.yaml stays that of the run that did.
        if progress.iteration < config.training.train_iters:
            all_ranks(lambda: _describe(config))
        watchdog.arm()
        with signals:
            stop = loop.train(signals)
            if scoring is not None:
                scoring.close()
    if stop is None:
        return FINISHED
    saved = f"saved {checkpoint.tag_of(progress.iteration)}" if loop.saves else "no checkpoint is configured"
    _say(f"stopped by {stop} after step {progress.iteration}: {saved}; exit code {STOPPED}")
    return STOPPED


def _load(config: Config, trainer: Trainer, resume: Resume | None, batch: Batch, order: str) -> Progress:
    """The progress of the checkpoint, once it is loaded, or of a beginning; order: of this start's data."""
    progress = Progress()
    if resume is not None:
        progress, as_it_is = checkpoint.load(config, trainer, resume)
        other = "" if as_it_is else ", written in another layout"
        _say(f"resumed from {resume.path}{other} after step {progress.iteration}")
        if resume.global_batch_size != batch.size:
            samples = counted(batch.size, "sample")
            _say(f"steps have {samples} from here on, {resume.global_batch_size:,} before")
        if progress.iteration >= config.training.train_iters:
            _say(f"nothing is left to train: --train-iters is {config.training.train_iters}")
        if resume.data != order:
            _say(
                "the training data is another one or in another order than the checkpoint's (files, weights, --split, --seed, "
                "--seq-length, or more epochs for more --train-iters): some samples come again, some never"
            )
    elif config.checkpoint.load is not None:
        why = " (--save-interval 0 writes none)" if config.checkpoint.save_interval == 0 else ""
        _say(f"--load {config.checkpoint.load} holds no checkpoint{why}: starting from the beginning")
    progress.data = order
    return progress


def _own_checkpoints(loop: Run) -> AbstractContextManager[object]:
    """The checkpoints' directory held by rank 0: without scoring no ledger's lock keeps a second run out."""
    if not loop.saves or dist.get_rank() != 0:
        return nullcontext()
    directory = Path(str(loop.config.checkpoint.save)) / run_state.DIRECTORY
    try:
        make_directory(directory)
    except OSError as error:
        raise refused(directory, error) from error
    return closing(DirectoryLock(directory, flag="--save"))


def _describe(config: Config) -> None:
    if config.checkpoint.save is not None and dist.get_rank() == 0:
        write_yaml(config, Path(config.checkpoint.save) / "config.yaml")


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)
