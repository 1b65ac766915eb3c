"""The step protocol of in_run.py through DeepSpeed's pipeline, where a step is one ``train_batch``.

The validation microbatches of all targets run at the front of the 1F1B stream. Backwards run in order, so after its
last validation backward a stage has its part of every grad L_k, and must have its part of every direction before its
first training backward. Two figures have to cross stages in between, both as collectives that no stage waits for
earlier than it has to:

    tied embeddings   the halves of the first and the last stage are added before anything else is done with them
    norms             |grad L_k| over all stages, where the Jacobian clips by it (Adam; models without clipping and SGD
                      need none): started after the last validation backward, waited for at the first training backward

A stage starts them once it has sent the gradient of that backward and has what it needs for its next forward: the host may
have to wait for the other ranks where NCCL connects those of a group, which it does when they first use it, and a stage
before that still lacked the gradient could never come.

A step with an older direction (refresh.py) has nothing in front: its stream is that of plain training.

Weights that move (base drift, the path estimators) let nothing ride along: those passes are runs of the schedule of
their own (pipeline_passes.py), with a flush after each.

Both collectives wait for stage 0, which runs its last validation backward P - 2 half-steps of the schedule after the moment when
the last stage could start its first training backward (a half-step is a forward or a backward): nothing at P = 2, and
never the whole pipeline's flush of 2 (P - 1). No stage waits inside its validation part, so none holds up another.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..engines.evaluating import over_ranks
from ..engines.pipeline import PipelineAdapter, StageLoss
from ..errors import UserError
from ..losses import masked_sum
from ..taps import Pass
from .consumers import DirectionFiller, RowScorer
from .in_run import InRunShapley
from .passes import Microbatch, Passes, detached_pass
from .pipeline_passes import PipelinePasses
from .result import ShapleyTarget
from .scored_step import ScoredStep


class PipelineShapley(InRunShapley):
    """``InRunShapley`` for an engine around a DeepSpeed ``PipelineModule``.

    Args:
        engine: from ``deepspeed.initialize``; ZeRO 0 or 1.
        targets: as for InRunShapley, on every rank of the pipeline; microbatches have the engine's micro batch size,
            because stages exchange tensors of one shape (fill up with rows whose ``loss_mask`` is 0).
        loss: see StageLoss.
        options: the keywords of InRunShapley.

    Raises:
        UserError: as InRunShapley; microbatches of another size than the training ones.
    """

    def __init__(
        self, engine: Any, targets: Sequence[ShapleyTarget], loss: StageLoss, **options: Any
    ) -> None:
        size = int(engine.train_micro_batch_size_per_gpu())
        for target in targets:
            for microbatch in target.microbatches:
                rows = len(microbatch["loss_mask"])
                if rows != size:
                    raise UserError(
                        f"target {target.name} has a microbatch of {rows} rows, but the pipeline's are of {size}: "
                        f"stages exchange tensors of one shape; fill up with rows whose loss_mask is 0"
                    )
        self.loss = loss
        super().__init__(engine, targets, loss, **options)  # type: ignore[arg-type]  # for _make_passes
        self.preparation.hold([weight for weight, _ in self.pipeline.tied()])

    def _make_passes(self, loss_fn: StageLoss) -> Passes:
        self.pipeline = PipelineAdapter(self.engine)
        return PipelinePasses(self.pipeline, self.taps, loss_fn)

    @property
    def rides(self) -> bool:
        """Do the validation microbatches ride in front of the training ones? Only at the weights that these see."""
        return not self.estimator.moves

    @contextmanager
    def step(  # type: ignore[override]
        self, iteration: int, microbatches: Sequence[Microbatch] | None = None
    ) -> Iterator[PipelineStep]:
        """One optimizer step: ``step.train_batch(microbatches)`` inside.

        Args:
            iteration: number of the step, from 1.
            microbatches: as for ``train_batch``, for the path estimators.
        """
        iteration = operator.index(iteration)
        with self.kept(iteration):
            step = PipelineStep(self, iteration)
            if iteration % self.interval == 0:
                step.prepare(microbatches)
            yield step
            step.finish()

    def close(self) -> None:
        """Take taps, hooks and the schedule out of the engine."""
        super().close()
        self.pipeline.remove()


class PipelineStep(ScoredStep):
    """One ``train_batch``; made by ``PipelineShapley.step``."""

    owner: PipelineShapley

    def prepare(self, microbatches: Sequence[Microbatch] | None = None) -> None:
        """Score the coming ``train_batch``; the directions are filled on its way, or here where weights move."""
        if self.owner.rides:
            self._begin()
        else:
            super().prepare(microbatches)

    def samples(self, dataset: Any, sample: Any, tokens: Any, segments: Any = None) -> Any:
        raise UserError(
            "under a pipeline the engine runs the microbatches: call step.train_batch(microbatches)"
        )

    def train_batch(self, microbatches: Sequence[Microbatch]) -> float:
        """Forward, backward and optimizer step of all microbatches of this data-parallel replica.

        Args:
            microbatches: the same ones on every rank of the replica; each has ``dataset``, ``sample`` and
                ``loss_mask`` beside what ``loss.split`` reads, and ``segments [b, s]`` where rows are cut (see
                ``ScoredStep.samples``).

        Returns:
            The mean training loss over microbatches and replicas.
        """
        owner = self.owner
        stream = ScoringStream(self, microbatches) if self.result.scored or owner.consumers else None
        prepended = [] if stream is None else [owner.loss.split(m) for _, m in stream.validation]
        loss = owner.pipeline.train_batch(stream, [owner.loss.split(m) for m in microbatches], prepended)
        if stream is not None and self.result.scored and owner.rides and self.fresh:
            self._target_losses = over_ranks(stream.losses, owner.layout)
            self._terms = stream.terms
        return float(loss)


class ScoringStream:
    """What this stage does around the forwards and backwards of one scored ``train_batch``.

    Attributes:
        validation: (target, microbatch) of every prepended microbatch.
        prepended: how many there are.
        losses: this rank's share of L_k(w_t) ``[K]``.
        terms: this rank's part of the momentum and decay terms.
    """

    def __init__(self, step: PipelineStep, microbatches: Sequence[Microbatch]) -> None:
        owner = step.owner
        self.owner, self._scale = owner, step.loss_scale
        self._timed = step.scoring.running
        self.validation = [
            (k, microbatch)
            for k, target in enumerate(owner.targets)
            for microbatch in (target.microbatches if step.fresh and owner.rides else ())
        ]
        self.prepended = len(self.validation)
        self.losses = torch.zeros(len(owner.targets), dtype=torch.float64, device=owner.device)
        self.terms: tuple[Tensor, Tensor] | None = None
        last = {k: index for index, (k, _) in enumerate(self.validation)}
        self._passes = [
            detached_pass(DirectionFiller(owner.directions, k, last=index == last[k]), microbatch)
            for index, (k, microbatch) in enumerate(self.validation)
        ]
        self._scorers: list[RowScorer] = []
        for index, microbatch in enumerate(microbatches):
            consumers = owner.consumers
            if step.result.scored:
                identity = (microbatch["dataset"], microbatch["sample"], microbatch["loss_mask"])
                self._scorers.append(step.scorer(*identity, microbatch.get("segments")))
                consumers = (self._scorers[-1], *consumers)
            rows, positions = microbatch["loss_mask"].shape
            self._passes.append(Pass(consumers, microbatch=index, rows=rows, positions=positions))
        self._tied: list[tuple[list[Tensor], Tensor, dist.Work]] = []
        self._forwards = 0
        self._due = False  # is everything added up here, and nothing started that crosses stages?
        self._reduced = False
        self._squares: tuple[Tensor, dist.Work | None] | None = None
        if self.prepended:
            owner.directions.zero()

    # -- around the engine's instructions --------------------------------------------------------------

    @contextmanager
    def forward(self, index: int) -> Iterator[None]:
        self._forwards += 1
        self._start_directions()
        with self.owner.taps.during(self._passes[index]):
            if index >= self.prepended:
                yield
                return
            with self._timed(), self.owner.pipeline.detached_forward(self._validation_loss(index)):
                yield

    @contextmanager
    def backward(self, index: int) -> Iterator[None]:
        with self.owner.taps.during(self._passes[index]):  # for a checkpoint that runs the forward again
            if index >= self.prepended:
                if index == self.prepended and self.prepended:
                    with self._timed():
                        self._finish_directions()
                yield
                if self._scorers:
                    self._scorers[index - self.prepended].flush()
                return
            with self._timed():
                with self.owner.taps.untouched(), self.owner.pipeline.detached_backward():
                    yield
            self._due = index == self.prepended - 1
            if self.owner.layout.pp_rank == 0:  # which sends no gradient
                self._start_directions()

    def sent(self) -> None:
        if self._forwards == len(self._passes):  # there is no further forward to wait for
            self._start_directions()

    def _validation_loss(self, index: int) -> Any:
        """Loss of validation microbatch ``index`` on the last stage: its share of L_k."""
        owner = self.owner
        k, microbatch = self.validation[index]

        def share(outputs: Any, labels: Any) -> Tensor:
            losses = owner.loss.token_losses(outputs, labels).float()
            total = masked_sum(losses, microbatch["loss_mask"]) / owner.targets[k].num_tokens
            self.losses[k] += total.detach()
            return total

        return share

    # -- from gradients to directions ------------------------------------------------------------------

    def _start_directions(self) -> None:
        """After this stage's last validation backward: start what crosses stages; wait for no later stage."""
        if not self._due:
            return
        self._due, owner = False, self.owner
        with self._timed():
            for weight, group in owner.pipeline.tied():
                halves = owner.directions.sums(weight)
                both = torch.stack(halves)
                self._tied.append((halves, both, dist.all_reduce(both, group=group, async_op=True)))
            # The other half of a tied weight comes from an earlier stage, which may still be waiting for this one's
            # gradients; from a later stage it has come already.
            if not self._tied or owner.layout.pp_rank == 0:
                self._reduce()

    def _reduce(self) -> None:
        """Add the halves of tied weights, sum over this stage's ranks, start summing the norms."""
        owner, layout = self.owner, self.owner.layout
        for halves, both, work in self._tied:
            work.wait()
            for half, whole in zip(halves, both, strict=True):
                half.copy_(whole)
        self._tied.clear()  # views of sums that may be given up
        owner.preparation.reduce(self._scale)
        self._reduced = True
        if owner.preparation.needs_norms:
            squares = owner.directions.squares()
            if layout.dp_size > 1:
                dist.all_reduce(squares, group=layout.dp_group)
            self._squares = (squares, None)
            if layout.mp_size > 1:
                work = dist.all_reduce(squares, group=layout.mp_group, async_op=True)
                self._squares = (squares, work)

    def _finish_directions(self) -> None:
        """Before this stage's first training backward."""
        assert not self._due, "a gradient has been sent since, and a forward begun if there was one"
        if not self._reduced:
            self._reduce()
        norms = torch.zeros_like(self.losses)
        if self._squares is not None:
            squares, work = self._squares
            if work is not None:
                work.wait()
            norms = squares.sqrt()
        self.terms = self.owner.preparation.condition(norms)
