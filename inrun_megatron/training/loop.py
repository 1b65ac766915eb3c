"""The training loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from inrun_megatron.config import Config
from inrun_megatron.engines import pipeline
from inrun_megatron.engines.evaluating import loss_sums, over_ranks
from inrun_megatron.keeping.agreement import AgreedError
from inrun_megatron.losses import masked_mean
from inrun_megatron.models import token_losses
from inrun_megatron.models.pipeline import GPTPipeline
from inrun_megatron.parallel import Layout
from inrun_megatron.shapley.pipeline import PipelineStep
from inrun_megatron.shapley.scored_step import ScoredStep
from inrun_megatron.training import checkpoint
from inrun_megatron.training.batches import (
    Microbatch,
    StepLoader,
    evaluation_batches,
    to_device,
)
from inrun_megatron.training.checkpoint import Progress
from inrun_megatron.training.deepspeed_config import Batch
from inrun_megatron.training.engine import Trainer
from inrun_megatron.training.health import Health
from inrun_megatron.training.monitor import Monitor
from inrun_megatron.training.progress import ProgressBar, StepFigures
from inrun_megatron.training.reporting import DomainValues, Reporter
from inrun_megatron.training.scoring import Scoring
from inrun_megatron.training.signals import StopRequest, StopSignals


@dataclass
class Run:
    """Everything one rank's loop works with. `scoring` is None under --no-shapley."""

    config: Config
    batch: Batch
    trainer: Trainer
    layout: Layout
    train_data: Any
    validation_data: Any | None
    monitor: Monitor
    progress: Progress
    scoring: Scoring | None = None

    def train(self, signals: StopSignals) -> StopRequest | None:
        """From `progress` to --train-iters (or --exit-interval). Collective over the world.

        Returns what ended it before, saved, if something did. AgreedError where nothing is learned any more (health.py).
        """
        total, start = self.config.training.train_iters, self.progress.iteration
        bar = ProgressBar(total, start, self.config.logging.log_interval, enabled=dist.get_rank() == 0)
        loader = StepLoader(
            self.train_data,
            self.batch,
            dp_rank=self.layout.dp_rank,
            consumed_samples=self.progress.consumed_samples,
        )
        reporter = Reporter(self.config, bar, self.monitor, self._domain_values())
        health = Health(self.config)
        try:
            for iteration in range(start + 1, total + 1):
                last = iteration == total or _at(iteration, self.config.training.exit_interval)
                figures = self._step(iteration, loader, last, reporter)
                if (fault := health.fault(figures)) is not None:
                    self._give_up(iteration, fault)
                stop = signals.agreed(self.trainer.device)
                if stop is None:
                    self._evaluate(iteration, last, reporter)
                self._save(iteration, last or stop is not None)
                if stop is not None and iteration < total:
                    return stop
                if last:
                    break
        finally:
            loader.close()
            bar.close()
        return None

    def _domain_values(self) -> DomainValues | None:
        if self.scoring is None:
            return None
        return DomainValues(
            self.scoring.target_names, self.scoring.dataset_names, self.layout, self.trainer.device
        )

    def _step(self, iteration: int, loader: StepLoader, last: bool, reporter: Reporter) -> StepFigures:
        """One optimizer step: all its microbatches forward and backward, then the update."""
        started = time.perf_counter()
        microbatches = loader.next_step(more=not last)
        if self.scoring is not None:
            microbatches = [self.scoring.with_segments(microbatch) for microbatch in microbatches]
        lr = float(self.trainer.optimizer.param_groups[0]["lr"])
        here = [to_device(microbatch, self.trainer.device) for microbatch in microbatches]
        with self.scoring.step(iteration, here) if self.scoring else contextlib.nullcontext() as scored:
            train_loss = (self._train_pipeline if self._pipeline else self._train)(here, scored)
            self.progress.iteration = iteration
            self.progress.consumed_samples += self.batch.size
            if scored is not None:
                scored.train_loss = train_loss
                scored.consumed_samples = self.progress.consumed_samples
        self.trainer.biases.update()
        applied = bool(self.trainer.engine.was_step_applied())
        if applied:
            # As in Megatron-LM, a step that overflowed does not move the schedule.
            self.trainer.schedule.step(self.batch.size)
        figures = StepFigures(
            iteration=iteration,
            loss=train_loss,
            lr=lr,
            tokens=self.batch.size * self.config.data.seq_length,
            consumed_samples=self.progress.consumed_samples,
            seconds=time.perf_counter() - started,
            seconds_scoring=scored.result.seconds_scoring if scored is not None else 0.0,
            gradient_norm=self._gradient_norm(scored),
            targets=self._target_losses(scored),
            skipped=not applied,
        )
        reporter.step(figures, None if scored is None else scored.result, microbatches)
        return figures

    @property
    def _pipeline(self) -> bool:
        return self.layout.pp_size > 1

    def _train(self, microbatches: Sequence[Microbatch], scored: ScoredStep | None) -> float:
        """Forwards, backwards and the update; the training loss over all replicas."""
        engine = self.trainer.engine
        losses: list[torch.Tensor] = []
        for microbatch in microbatches:
            with _samples(scored, microbatch):
                loss = masked_mean(token_losses(engine, microbatch), microbatch["loss_mask"])
                engine.backward(loss)
                engine.step()
            losses.append(loss.detach())
        return self._mean_over_replicas(torch.stack(losses).mean())

    def _train_pipeline(self, microbatches: Sequence[Microbatch], scored: ScoredStep | None) -> float:
        """The same in DeepSpeed's 1F1B schedule."""
        if isinstance(scored, PipelineStep):
            return scored.train_batch(microbatches)
        engine = self.trainer.engine
        split = engine.module.loss_fn.split
        return float(pipeline.train_batch(engine, [split(microbatch) for microbatch in microbatches]))

    def _mean_over_replicas(self, loss: torch.Tensor) -> float:
        mean = loss.double()
        dist.all_reduce(mean, group=self.layout.dp_group)
        return float(mean) / self.layout.dp_size

    def _gradient_norm(self, scored: ScoredStep | None) -> float | None:
        """Before clipping; None where nothing needed it."""
        if scored is not None and scored.result.gradient_norm is not None:
            return scored.result.gradient_norm
        norm = self.trainer.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def _target_losses(self, scored: ScoredStep | None) -> dict[str, float]:
        if self.scoring is None or scored is None or scored.result.target_losses is None:
            return {}
        return dict(zip(self.scoring.target_names, scored.result.target_losses, strict=True))

    def _give_up(self, iteration: int, fault: str) -> None:
        """Raise AgreedError; what led there can be read in the ledger."""
        if self.scoring is not None:
            self.scoring.commits.now(iteration, None)
        raise AgreedError(fault)

    def _evaluate(self, iteration: int, last: bool, reporter: Reporter) -> None:
        """On the validation split, at the evaluation interval and at the end."""
        training = self.config.training
        if self.validation_data is None or not training.eval_iters or not training.eval_interval:
            return
        if last or _at(iteration, training.eval_interval):
            reporter.validation(iteration, self._validation_loss())

    def _validation_loss(self) -> float:
        """Per token of the validation split's first batches, nats. Collective over the world."""
        device, model = self.trainer.device, self.trainer.model
        batches = evaluation_batches(
            self.validation_data, self.batch, self.config.training.eval_iters, self.layout.dp_rank
        )
        microbatches = (to_device(microbatch, device) for microbatch in batches)
        if isinstance(model, GPTPipeline):
            sums = pipeline.loss_sums(self.trainer.engine, model.loss_fn, list(microbatches))
        else:
            sums = loss_sums(model, token_losses, microbatches, device)
        total, tokens = over_ranks(sums, self.layout).tolist()
        return float(total / max(tokens, 1.0))

    @property
    def saves(self) -> bool:
        """Whether checkpoints are written at all."""
        return self.config.checkpoint.save is not None and self.config.checkpoint.save_interval != 0

    def _save(self, iteration: int, last: bool) -> None:
        """Checkpoint and ledger. The ledger is committed first: see docs/ledger.md."""
        due = self.saves and (last or _at(iteration, self.config.checkpoint.save_interval))
        if self.scoring is not None:
            if due or last:
                self.scoring.commits.now(iteration, checkpoint.tag_of(iteration) if due else None)
                self.progress.ledger_step = iteration
            else:
                commit = _at(iteration, self.config.shapley.commit_interval)
                self.scoring.commits.after_step(iteration, commit)
        if due:
            checkpoint.save(self.config, self.trainer, self.progress)
            if self.scoring is not None:
                self.scoring.checkpointed()


def _at(iteration: int, interval: int | None) -> bool:
    return bool(interval) and iteration % int(interval or 1) == 0


@contextlib.contextmanager
def _samples(scored: ScoredStep | None, microbatch: Microbatch) -> Iterator[None]:
    """The rows of a microbatch, made known to scoring."""
    if scored is None:
        yield
        return
    with scored.samples(
        dataset=microbatch["dataset"],
        sample=microbatch["sample"],
        tokens=microbatch["loss_mask"],
        segments=microbatch.get("segments"),
    ):
        yield
