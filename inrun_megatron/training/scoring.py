"""Scoring inside the training loop: set-up of InRunShapley and the hand-over of its rows to the ledger."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from inrun_megatron.config import Config
from inrun_megatron.data.megatron import document_ids
from inrun_megatron.ledger.belongs import ResumePoint, require_none_lost, require_own
from inrun_megatron.ledger.description import Starts
from inrun_megatron.ledger.run import step_of
from inrun_megatron.ledger.schema import COMMITS, DEFAULT_SUBDIRECTORY, DRIFT, RUN_FILE, RunDescription
from inrun_megatron.ledger.write import LedgerWriter, OpenLedger, create_ledger, open_ledger, rollback
from inrun_megatron.models import token_losses
from inrun_megatron.models.pipeline import GPTPipeline
from inrun_megatron.parallel import Layout
from inrun_megatron.shapley.in_run import InRunShapley
from inrun_megatron.shapley.pipeline import PipelineShapley
from inrun_megatron.shapley.result import ShapleyTarget, StepResult
from inrun_megatron.shapley.scored_step import ScoredStep
from inrun_megatron.taps import Coverage, attach_taps
from inrun_megatron.training import run_state
from inrun_megatron.training.arguments import to_mapping
from inrun_megatron.training.batches import Microbatch, to_device
from inrun_megatron.training.checkpoint import Progress
from inrun_megatron.training.commits import Commits
from inrun_megatron.training.distributed import all_ranks, rank0_then_all
from inrun_megatron.training.engine import Trainer

_PACKAGES = ("inrun-megatron", "torch", "deepspeed", "megatron-core", "numpy", "pyarrow")


def ledger_directory(config: Config) -> Path:
    """`--shapley-dir`, else shapley/ in the run directory."""
    if config.shapley.dir is not None:
        return Path(config.shapley.dir)
    assert config.checkpoint.save is not None
    return Path(config.checkpoint.save) / DEFAULT_SUBDIRECTORY


def versions() -> dict[str, str]:
    """Versions of what decides the values: Python and the packages."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _coverage(own: Coverage, layout: Layout) -> dict[str, Any]:
    """Coverage of the whole model. Collective over a pipeline."""
    stages: list[Any] = [own]
    if layout.pp_size > 1:
        stages = [None] * layout.pp_size
        dist.all_gather_object(stages, own, group=layout.pp_group)
    return Coverage.together(stages).to_dict()


def _say_what_is_repeated(removed: Sequence[str], step: int, iteration: int) -> None:
    """removed: by `rollback` to `step`. iteration: of the checkpoint."""
    last = max((step_of(Path(name)) for name in removed if name.startswith(f"{COMMITS}/")), default=0)
    if last > step:
        why = "are repeated" if step == iteration else "were trained again without scoring"
        print(
            f"the ledger's values of steps {step + 1} to {last} are taken back: these steps {why}",
            file=sys.stderr,
            flush=True,
        )


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
        datasets: Sequence[dict[str, Any]],
        progress: Progress,
        eod: int,
    ) -> None:
        self.config, self.layout, self._eod = config, layout, eod
        self.directory = ledger_directory(config)
        self.target_names = [target.name for target in targets]
        self.dataset_names = [str(dataset["name"]) for dataset in datasets]
        taps = attach_taps(trainer.model)
        if config.training.recompute_granularity is not None:
            trainer.recompute(config.training.recompute_num_layers, wrap=taps.capture)
        description = RunDescription(
            targets=[{"name": target.name, **target.description} for target in targets],
            datasets=list(datasets),
            configuration=to_mapping(config),
            versions=versions(),
            layout={"tp": layout.tp_size, "dp": layout.dp_size, "pp": layout.pp_size},
            coverage=_coverage(taps.coverage(), layout),
        )
        self._open: OpenLedger | None = all_ranks(lambda: self._open_ledger(description, progress))
        progress.ledger = rank0_then_all(lambda: None if self._open is None else self._open.run_id)
        self.writer: LedgerWriter | None = all_ranks(
            lambda: LedgerWriter(self.directory, layout.dp_rank) if layout.writes_ledger else None
        )
        self.commits = Commits(self.directory, self.writer, trainer.device)
        rows = config.shapley.micro_batch_size or config.training.micro_batch_size
        pipeline = layout.pp_size > 1

        def build() -> InRunShapley:
            # A pipeline's stages exchange tensors of one shape.
            shapley_targets = [
                ShapleyTarget(
                    name=target.name,
                    microbatches=[
                        to_device(microbatch, trainer.device)
                        for microbatch in target.microbatches(
                            rows, layout.dp_rank, layout.dp_size, full_size=pipeline
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

        self.shapley: InRunShapley = all_ranks(build)

    def _open_ledger(self, description: RunDescription, progress: Progress) -> OpenLedger | None:
        """Rank 0: a new ledger, or the loaded run's own, taken back to its checkpoint."""
        if dist.get_rank() != 0:
            return None
        config = self.config
        point = ResumePoint(progress.iteration, progress.ledger, progress.ledger_step)
        if (
            not (self.directory / RUN_FILE).exists()
            and run_state.in_place(config)
            and config.shapley.dir is None
        ):
            require_none_lost(self.directory, point)
        if config.checkpoint.load is None or not (self.directory / RUN_FILE).exists():
            return create_ledger(self.directory, description)
        ledger = open_ledger(self.directory, description)
        try:
            starts = Starts(self.directory, ledger.run)
            require_own(
                ledger,
                starts,
                point,
                save=None if config.shapley.dir is None else config.checkpoint.save,
                train_iters=config.training.train_iters,
            )
            kept = point.rows_up_to(ledger.run_id)
            _say_what_is_repeated(rollback(self.directory, kept), kept, progress.iteration)
            starts.append(progress.iteration, description, progress.ledger_step)
        except BaseException:
            ledger.close()
            raise
        return ledger

    def step(self, iteration: int, microbatches: Sequence[Microbatch]) -> Any:
        """`InRunShapley.step`: the context of one optimizer step."""
        return self.shapley.step(iteration, microbatches)

    def checkpointed(self) -> None:
        """A checkpoint was written: a run resumed from it has no direction, so this one drops its own, too."""
        self.shapley.expire_direction()

    def cut(self, microbatch: Microbatch) -> Microbatch:
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


class DomainValues:
    """Mean value per sample of each (target, dataset) since the last report, over all data-parallel ranks."""

    def __init__(self, scoring: Scoring, device: torch.device) -> None:
        self._scoring, self._device = scoring, device
        shape = (len(scoring.dataset_names), len(scoring.target_names) + 1)
        # per dataset: sum of values per target, then samples
        self._sums = torch.zeros(shape, dtype=torch.float64)

    def add(self, result: StepResult, datasets: torch.Tensor) -> None:
        """result.values [rows, K] of this rank; datasets [rows]."""
        if result.values is not None:
            rows = torch.cat(
                [result.values.double(), torch.ones(len(datasets), 1, dtype=torch.float64)], dim=1
            )
            self._sums.index_add_(0, datasets.cpu().long(), rows)

    def report(self) -> dict[str, float | None]:
        """`values/<target>/<dataset>`; starts anew. Collective over the data-parallel group."""
        sums = self._sums.to(self._device, copy=True)
        dist.all_reduce(sums, group=self._scoring.layout.dp_group)
        self._sums.zero_()
        figures: dict[str, float | None] = {}
        for row, dataset in zip(sums.tolist(), self._scoring.dataset_names, strict=True):
            *values, samples = row
            for target, value in zip(self._scoring.target_names, values, strict=True):
                figures[f"values/{target}/{dataset}"] = value / samples if samples else None
        return figures


class Audits:
    """Figures of the audits for log and monitors; `inrun verify` judges them from the ledger."""

    def __init__(self, target_names: Sequence[str]) -> None:
        self._names = list(target_names)
        self._previous: StepResult | None = None

    def step(self, step: ScoredStep | None) -> dict[str, float | None]:
        """Additivity of this step and efficiency of the one before, which needs this step's target losses."""
        result = None if step is None else step.result
        figures: dict[str, float | None] = {}
        before, self._previous = self._previous, result
        if result is None or not result.scored:
            return figures
        assert result.additivity_lhs is not None and result.additivity_rhs is not None
        for k, name in enumerate(self._names):
            left, right = result.additivity_lhs[k], result.additivity_rhs[k]
            scale = max(abs(left), abs(right))
            figures[f"audit/additivity/{name}"] = abs(left - right) / scale if scale else 0.0
            if before is None or not before.scored:
                continue
            # Both losses are known where both steps took their own directions.
            if before.target_losses and result.target_losses:
                assert before.step_sums
                # Between two losses at Phi(0) lie this batch and the *next* step's drift.
                drifting = result if result.base == DRIFT else before
                assert drifting.momentum_terms is not None and drifting.decay_terms is not None
                figures[f"audit/realised/{name}"] = before.target_losses[k] - result.target_losses[k]
                figures[f"audit/predicted/{name}"] = (
                    before.step_sums[k] + drifting.momentum_terms[k] + drifting.decay_terms[k]
                )
        return figures
