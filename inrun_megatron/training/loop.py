"""The training loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from inrun_megatron.config import Config
from inrun_megatron.engines.evaluating import evaluating
from inrun_megatron.engines.pipeline import evaluate as evaluate_pipeline
from inrun_megatron.engines.pipeline import train_batch as train_pipeline_batch
from inrun_megatron.losses import masked_mean, masked_sum
from inrun_megatron.models import token_losses
from inrun_megatron.parallel import Layout
from inrun_megatron.shapley.pipeline import PipelineStep
from inrun_megatron.training import checkpoint
from inrun_megatron.training.batches import (
    Microbatch,
    StepLoader,
    evaluation_batches,
    to_device,
)
from inrun_megatron.training.checkpoint import Progress
from inrun_megatron.training.deepspeed_config import Batch
from inrun_megatron.training.distributed import AgreedError
from inrun_megatron.training.engine import Trainer
from inrun_megatron.training.health import Health
from inrun_megatron.training.monitor import Monitor
from inrun_megatron.training.progress import ProgressBar, StepFigures
from inrun_megatron.training.signals import StopRequest, StopSignals

if TYPE_CHECKING:
    from inrun_megatron.shapley.scored_step import ScoredStep
    from inrun_megatron.training.scoring import Scoring


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
        reporter, health = _Reporter(self, bar), Health(self.config)
        try:
            for iteration in range(start + 1, total + 1):
                last = iteration == total or _at(iteration, self.config.training.exit_interval)
                figures = self._step(iteration, loader, last, reporter)
                if (fault := health.fault(figures)) is not None:
                    if self.scoring is not None:  # what led there can be read
                        self.scoring.commits.now(iteration, None)
                    raise AgreedError(fault)
                stop = signals.agreed(self.trainer.device)
                if stop is None:
                    self._evaluate(iteration, last, bar)
                self._save(iteration, last or stop is not None)
                if stop is not None and iteration < total:
                    return stop
                if last:
                    break
        finally:
            loader.close()
            bar.close()
        return None

    def _step(self, iteration: int, loader: StepLoader, last: bool, reporter: _Reporter) -> StepFigures:
        """One optimizer step: all its microbatches forward and backward, then the update."""
        started = time.perf_counter()
        microbatches = loader.next_step(more=not last)
        if self.scoring is not None:
            microbatches = [self.scoring.cut(microbatch) for microbatch in microbatches]
        engine = self.trainer.engine
        lr = float(self.trainer.optimizer.param_groups[0]["lr"])
        here = [to_device(microbatch, self.trainer.device) for microbatch in microbatches]
        with self.scoring.step(iteration, here) if self.scoring else contextlib.nullcontext() as scored:
            train_loss = (self._train_pipeline if self._pipeline else self._train)(here, scored)
            self.progress.iteration = iteration
            self.progress.consumed_samples += self.batch.size
            if scored is not None:
                scored.train_loss = train_loss
                scored.consumed_samples = self.progress.consumed_samples
        applied = bool(engine.was_step_applied())
        if applied:
            # As in Megatron-LM, a step that overflowed does not move the schedule.
            self.trainer.schedule.step(self.batch.size)
        figures = StepFigures(
            iteration=iteration,
            loss=train_loss,
            lr=lr,
            tokens=self.batch.size * self.config.data.seq_length,
            seconds=time.perf_counter() - started,
            seconds_scoring=scored.result.seconds_scoring if scored is not None else 0.0,
            gradient_norm=self._gradient_norm(scored),
            targets=self._target_losses(scored),
            skipped=not applied,
        )
        reporter.report(figures, scored, microbatches)
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
        return float(train_pipeline_batch(engine, [split(microbatch) for microbatch in microbatches]))

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

    def _evaluate(self, iteration: int, last: bool, bar: ProgressBar) -> None:
        """Loss per token on the validation split, at the evaluation interval and at the end."""
        training = self.config.training
        if self.validation_data is None or not training.eval_iters or not training.eval_interval:
            return
        if not (last or _at(iteration, training.eval_interval)):
            return
        microbatches = (
            to_device(microbatch, self.trainer.device)
            for microbatch in evaluation_batches(
                self.validation_data, self.batch, training.eval_iters, self.layout.dp_rank
            )
        )
        if self._pipeline:
            sums = self._pipeline_sums(microbatches)
        else:
            sums = torch.zeros(2, dtype=torch.float64, device=self.trainer.device)
            with evaluating(self.trainer.model), torch.no_grad():
                for microbatch in microbatches:
                    losses, mask = token_losses(self.trainer.model, microbatch), microbatch["loss_mask"]
                    sums += torch.stack([masked_sum(losses, mask), mask.float().sum()])
            dist.all_reduce(sums, group=self.layout.dp_group)
        loss = float(sums[0] / sums[1].clamp(min=1.0))
        bar.write(f"step {iteration}: validation loss {loss:.4f}")
        self.monitor.write(iteration, {"validation/loss": loss})

    def _pipeline_sums(self, microbatches: Iterator[Microbatch]) -> torch.Tensor:
        """(loss, loss tokens) summed over microbatches and replicas."""
        model = self.trainer.model
        split = model.loss_fn.split
        sums = evaluate_pipeline(
            self.trainer.engine, [split(microbatch) for microbatch in microbatches], model.loss_fn.sums
        )
        if self.layout.tp_rank > 0:  # all tensor-parallel ranks of the last stage have the same sums
            sums.zero_()
        dist.all_reduce(sums)
        return sums

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


class _Reporter:
    """Passes a step's figures to the progress bar, and every --log-interval steps to the monitors."""

    def __init__(self, run: Run, bar: ProgressBar) -> None:
        self._run, self._bar = run, bar
        self._audits = self._domains = None
        if run.scoring is not None:
            from inrun_megatron.training.scoring import Audits, DomainValues

            self._audits = Audits(run.scoring.target_names)
            self._domains = DomainValues(run.scoring, run.trainer.device)

    def report(
        self, figures: StepFigures, scored: ScoredStep | None, microbatches: Sequence[Microbatch]
    ) -> None:
        run, iteration = self._run, figures.iteration
        self._bar.step(figures)
        audits: dict[str, float | None] = {} if self._audits is None else self._audits.step(scored)
        if audits and iteration % run.config.shapley.audit_interval == 0:
            run.monitor.write(iteration, audits)
            self._bar.write(_audit_line(iteration, audits))
        if not run.monitor.enabled:
            return
        if self._domains is not None and scored is not None:
            self._domains.add(scored.result, torch.cat([m["dataset"] for m in microbatches]))
        if iteration % run.config.logging.log_interval:
            return
        out: dict[str, float | None] = {
            "train/loss": figures.loss,
            "train/lr": figures.lr,
            "train/grad_norm": figures.gradient_norm,
            "train/tokens_per_second": figures.tokens / figures.seconds,
            "train/consumed_samples": float(run.progress.consumed_samples),
        }
        out |= {f"targets/{name}": loss for name, loss in figures.targets.items()}
        if self._domains is not None:
            out["train/scoring_share"] = figures.seconds_scoring / figures.seconds
            out |= self._domains.report()
        run.monitor.write(iteration, out)


def _at(iteration: int, interval: int | None) -> bool:
    return bool(interval) and iteration % int(interval or 1) == 0


def _audit_line(iteration: int, audits: dict[str, float | None]) -> str:
    """One line with the audits of every target."""
    parts = []
    for name in (
        key.removeprefix("audit/additivity/") for key in audits if key.startswith("audit/additivity/")
    ):
        text = f"{name}: additivity off by {audits[f'audit/additivity/{name}']:.1e}"
        realised, predicted = audits.get(f"audit/realised/{name}"), audits.get(f"audit/predicted/{name}")
        if realised is not None and predicted is not None:
            text += f", loss fell by {realised:+.1e} in one step (predicted {predicted:+.1e})"
        parts.append(text)
    return f"step {iteration}: audit | " + " | ".join(parts)


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
