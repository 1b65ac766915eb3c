"""Detached passes through a DeepSpeed pipeline: runs of the 1F1B schedule without an optimizer step.

For what cannot ride in front of the training microbatches: validation at weights other than theirs, and the batch's own
gradient beforehand. Each run fills and drains the pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..directions import Directions
from ..engines.pipeline import PipelineAdapter, StageLoss, loss_sums
from ..taps import Pass, Taps
from .passes import Arriving, Microbatch, Task


class PipelinePasses:
    """Detached passes as runs of the 1F1B schedule without an optimizer step (see passes.Passes)."""

    def __init__(self, pipeline: PipelineAdapter, taps: Taps, loss: StageLoss) -> None:
        self._pipeline, self._taps, self._loss = pipeline, taps, loss

    def run(self, tasks: Sequence[Task], *, training: bool, arriving: Arriving | None = None) -> None:
        pairs = [self._loss.split(task.microbatch) for task in tasks]
        runs = [task.as_pass(arriving) for task in tasks]
        self._pipeline.run_detached(_DetachedStream(self, tasks, runs, training), pairs)

    @contextmanager
    def forward(self, task: Task, run: Pass, training: bool) -> Iterator[None]:
        """Around the forward of a task's microbatch on this stage."""

        def loss(outputs: Any, labels: Any) -> Tensor:
            return task.loss(self._loss.token_losses(outputs, labels).float())

        with self._taps.during(run), self._pipeline.detached_forward(loss, training=training):
            yield

    @contextmanager
    def backward(self, run: Pass, training: bool) -> Iterator[None]:
        """Around its backward, in which a checkpoint may run the forward again."""
        again = self._pipeline.detached_backward(training=training)
        with self._taps.during(run), self._taps.untouched(), again:
            yield

    def loss_sum(self, microbatches: Sequence[Microbatch]) -> Tensor:
        return loss_sums(self._pipeline.engine, self._loss, microbatches)[0]

    def join(self, directions: Directions) -> None:
        for weight, group in self._pipeline.tied():
            for half in directions.sums(weight):
                whole = half.contiguous()
                dist.all_reduce(whole, group=group)
                half.copy_(whole)


class _DetachedStream:
    """engines.pipeline.Stream of PipelinePasses."""

    prepended = 0

    def __init__(
        self, passes: PipelinePasses, tasks: Sequence[Task], runs: Sequence[Pass], training: bool
    ) -> None:
        self._passes, self._tasks, self._runs, self._training = passes, tasks, runs, training

    def forward(self, index: int) -> AbstractContextManager[None]:
        return self._passes.forward(self._tasks[index], self._runs[index], self._training)

    def backward(self, index: int) -> AbstractContextManager[None]:
        return self._passes.backward(self._runs[index], self._training)

    def sent(self) -> None:
        """Nothing follows from it."""
