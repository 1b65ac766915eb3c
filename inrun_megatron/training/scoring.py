"""Scoring inside the training loop: InRunShapley as the flags ask for it, and its rows on their way to the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from inrun_megatron.config import Config
from inrun_megatron.data.megatron import document_ids
from inrun_megatron.keeping.agreement import all_ranks, rank0_then_all
from inrun_megatron.keeping.commits import Commits
from inrun_megatron.keeping.description import coverage_of_model
from inrun_megatron.ledger.belongs import ResumePoint
from inrun_megatron.ledger.write import LedgerWriter, OpenLedger
from inrun_megatron.models import token_losses
from inrun_megatron.models.pipeline import GPTPipeline
from inrun_megatron.parallel import Layout
from inrun_megatron.shapley.in_run import InRunShapley
from inrun_megatron.shapley.pipeline import PipelineShapley
from inrun_megatron.shapley.result import ShapleyTarget
from inrun_megatron.shapley.scored_step import ScoredStep
from inrun_megatron.taps import Taps, attach_taps
from inrun_megatron.training.batches import Microbatch, to_device
from inrun_megatron.training.checkpoint import Progress
from inrun_megatron.training.engine import Trainer
from inrun_megatron.training.ledger import describe, ledger_directory, open_run_ledger


class Scoring:
    """InRunShapley and its ledger for one run. Every method is a collective over the world.

    targets: `inrun_megatron.data.targets.Target`s. datasets: the training data's table, as plain mappings.
    progress: of the checkpoint that was loaded; the ledger is rolled back to it, and named in it. eod: the end-of-document token.
    """

    def __init__(
        self,
        config: Config,
        trainer: Trainer,
        layout: Layout,
        *,
        targets: Sequence[Any],
        datasets: Sequence[Mapping[str, Any]],
        progress: Progress,
        eod: int,
    ) -> None:
        self.config, self.layout, self._eod = config, layout, eod
        self.target_names = [target.name for target in targets]
        self.dataset_names = [str(dataset["name"]) for dataset in datasets]
        taps = attach_taps(trainer.model)
        if config.training.recompute_granularity is not None:
            trainer.recompute(config.training.recompute_num_layers, wrap=taps.capture)
        coverage = coverage_of_model(taps.coverage(), layout)
        description = describe(config, layout, targets=targets, datasets=datasets, coverage=coverage)
        point = ResumePoint(progress.iteration, progress.ledger, progress.ledger_step)
        self._open: OpenLedger | None = all_ranks(
            lambda: open_run_ledger(config, description, point) if dist.get_rank() == 0 else None
        )
        progress.ledger = rank0_then_all(lambda: None if self._open is None else self._open.run_id)
        directory = ledger_directory(config)
        self.writer: LedgerWriter | None = all_ranks(
            lambda: LedgerWriter(directory, layout.dp_rank) if layout.writes_ledger else None
        )
        self.commits = Commits(directory, self.writer, trainer.device)
        self.shapley: InRunShapley = all_ranks(lambda: self._build(trainer, targets, taps))

    def _build(self, trainer: Trainer, targets: Sequence[Any], taps: Taps) -> InRunShapley:
        config, layout = self.config, self.layout
        rows = config.shapley.micro_batch_size or config.training.micro_batch_size
        full_size = layout.pp_size > 1  # a pipeline's stages exchange tensors of one shape
        shapley_targets = [
            ShapleyTarget(
                name=target.name,
                microbatches=[
                    to_device(microbatch, trainer.device)
                    for microbatch in target.microbatches(
                        rows, layout.dp_rank, layout.dp_size, full_size=full_size
                    )
                ],
                num_tokens=float(target.num_tokens),
            )
            for target in targets
        ]
        options: dict[str, Any] = {
            "layout": layout,
            "estimator": config.shapley.estimator,
            "base": config.shapley.base,
            "credit": config.shapley.credit,
            "total_steps": config.training.train_iters,
            "optimizer": config.shapley.optimizer,
            "interval": config.shapley.interval,
            "refresh": config.shapley.refresh,
            "direction_dtype": config.shapley.direction_dtype,
            "ledger": self.writer,
            "taps": taps,
        }
        if isinstance(trainer.model, GPTPipeline):
            return PipelineShapley(trainer.engine, shapley_targets, trainer.model.loss_fn, **options)
        return InRunShapley(trainer.engine, shapley_targets, token_losses, **options)

    def step(self, iteration: int, microbatches: Sequence[Microbatch]) -> AbstractContextManager[ScoredStep]:
        """`InRunShapley.step`: the context of one optimizer step."""
        return self.shapley.step(iteration, microbatches)

    def checkpointed(self) -> None:
        """A checkpoint was written: a run resumed from it has no direction, so this one drops its own, too."""
        self.shapley.expire_direction()

    def with_segments(self, microbatch: Microbatch) -> Microbatch:
        """The microbatch with `segments` [b, s] where --shapley-granularity cuts its rows."""
        tokens = microbatch["tokens"]
        if self.config.shapley.granularity == "document":
            return {**microbatch, "segments": document_ids(tokens, self._eod)}
        if self.config.shapley.granularity == "token":
            return {**microbatch, "segments": torch.arange(tokens.shape[1]).repeat(len(tokens), 1)}
        return microbatch

    def close(self) -> None:
        """Take the taps out of the model and give the ledger directory free."""
        self.shapley.close()
        self.commits.close()
        if self._open is not None:
            self._open.close()
