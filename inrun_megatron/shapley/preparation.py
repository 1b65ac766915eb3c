"""Steps 1 and 2 of a scored step: the directions, before its first training microbatch.

    batch gradient   path estimators only: forward and backward of the coming batch, parameters detached
    nodes            the weights moved to each of the estimator's nodes, the validation gradient there
    reduce           sums over data- and tensor-parallel ranks
    condition        times the Jacobian, on the optimizer's shards; then to where the layers read it

Weights, moments, counters and random generators are afterwards what they were before, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from ..directions import Directions
from ..engines import ZeroAdapter, rng
from ..engines.evaluating import buffers_kept, over_ranks
from ..engines.inner import coming_step, is_adam
from ..engines.lookahead import Lookahead
from ..engines.shards import Piece
from ..engines.step_counters import StepCounters
from ..errors import UserError
from ..losses import masked_sum
from ..optimizers import Step
from ..optimizers.jacobian import condition, write_point
from .consumers import DirectionFiller
from .estimators import Estimator, Node
from .passes import Microbatch, Passes, Task, TrainingLoss

if TYPE_CHECKING:
    from .result import ShapleyTarget

Move = Callable[[Node], None]


@dataclass(frozen=True)
class Prepared:
    """What preparing a step came to.

    Attributes:
        target_losses: L_k at the base point (see ``StepResult.base``), nats per token, ``[K]``.
        terms: this rank's part of the momentum and decay terms, ``[K]`` each: the loss change that the step would make
            to first order if the batch's gradient were zero.
        path_norm: of the gradient that path estimators integrated along, before clipping, fp64 scalar; else None.
    """

    target_losses: Tensor
    terms: tuple[Tensor, Tensor]
    path_norm: Tensor | None


class Preparation:
    """Fills ``directions`` for the coming step.

    Args:
        adapter: of the engine.
        directions: to fill.
        targets: the validation targets.
        estimator: nodes and Jacobian.
        proxy: the paper's SGD proxy under any optimizer.
        training_loss: of a microbatch, for the batch's gradient.

    Attributes:
        batch: of path estimators, ``c G`` that the coming step was integrated along, on the shards; else None.
    """

    def __init__(
        self,
        adapter: ZeroAdapter,
        directions: Directions,
        targets: Sequence[ShapleyTarget],
        estimator: Estimator,
        *,
        proxy: bool,
        training_loss: TrainingLoss,
    ) -> None:
        self.adapter, self.directions, self.targets = adapter, directions, targets
        self.estimator, self.proxy, self.training_loss = estimator, proxy, training_loss
        self.batch = directions.like(1) if estimator.follows_batch else None
        self._lookahead = Lookahead(adapter)
        self.counters = StepCounters(adapter.inner)

    def remove(self) -> None:
        """Take the hooks out of the optimizer."""
        self.counters.remove()

    def hold(self, parameters: Sequence[Parameter]) -> None:
        """Do not send the sums of these early: ``passes.join`` still adds to them."""
        for vectors in (self.directions, self.batch):
            if vectors is not None:
                vectors.hold(parameters)

    def run(self, passes: Passes, microbatches: Sequence[Microbatch] | None) -> Prepared:
        """Collective over the world.

        Args:
            passes: how microbatches are run.
            microbatches: this replica's microbatches of the coming step; read by path estimators only.

        Raises:
            UserError: a path estimator was given no microbatches, or not as many as the engine accumulates.
        """
        losses = None
        # A model may draw in evaluation mode, too; training must not notice.
        with rng.kept(self.directions.device):
            if self.estimator.start is None:
                with rng.kept(self.directions.device):  # the path's pass is to draw what the real one will
                    losses = self._losses(passes)
            path, path_norm = None, None
            if self.estimator.follows_batch:
                path, path_norm = self._path(passes, microbatches)
            self.directions.zero()
            with self._moving(path) as move:
                for node in self.estimator.nodes:
                    move(node)
                    found = self._add_gradients(passes, node)
                    if node is self.estimator.start:
                        losses = found
        passes.join(self.directions)
        self.reduce(self.adapter.loss_scale())
        assert losses is not None
        return Prepared(losses, self.condition(path=path), path_norm)

    # -- gradients -----------------------------------------------------------------------------------

    def _add_gradients(self, passes: Passes, node: Node) -> Tensor:
        """Add ``weight * grad L_k`` of a node, whose weights are in place; returns the L_k."""
        sums = torch.zeros(len(self.targets), dtype=torch.float64, device=self.directions.device)

        def loss(k: int, microbatch: Microbatch) -> Callable[[Tensor], Tensor]:
            def share(losses: Tensor) -> Tensor:
                part = masked_sum(losses, microbatch["loss_mask"]) / self.targets[k].num_tokens
                sums[k] += part.detach()
                return part * node.weight

            return share

        last = node is self.estimator.nodes[-1]
        tasks = [
            Task(
                microbatch,
                DirectionFiller(self.directions, k, last=last and i == len(target.microbatches)),
                loss(k, microbatch),
            )
            for k, target in enumerate(self.targets)
            for i, microbatch in enumerate(target.microbatches, start=1)
        ]
        passes.run(tasks, training=False, arriving=self._lookahead.arriving if self.estimator.moves else None)
        return over_ranks(sums, self.adapter.layout)

    def _losses(self, passes: Passes) -> Tensor:
        """L_k at the weights as they are, by forwards alone."""
        sums = torch.stack([passes.loss_sum(t.microbatches) / t.num_tokens for t in self.targets])
        return over_ranks(sums, self.adapter.layout)

    def _path(self, passes: Passes, microbatches: Sequence[Microbatch] | None) -> tuple[Directions, Tensor]:
        """``c G`` of the coming step in the layout of a direction, from a pass of its own over the batch; and ``|G|``."""
        expected, batch = self.adapter.gradient_accumulation_steps, self.batch
        assert batch is not None
        if microbatches is None or len(microbatches) != expected:
            given = "none" if microbatches is None else str(len(microbatches))
            raise UserError(
                f"estimator {self.estimator.name} needs the step's {expected} microbatches beforehand, {given} given: "
                f"call step(iteration, microbatches)"
            )
        batch.zero()

        def loss(microbatch: Microbatch) -> Callable[[Tensor], Tensor]:
            return lambda losses: self.training_loss(losses, microbatch) / expected

        # The real pass draws the same dropout masks, and is the one that moves running means.
        with rng.kept(self.directions.device), buffers_kept(self.adapter.engine.module):
            tasks = [
                Task(m, DirectionFiller(batch, 0, last=i == expected), loss(m))
                for i, m in enumerate(microbatches, start=1)
            ]
            passes.run(tasks, training=True)
        passes.join(batch)
        batch.reduce()
        # DeepSpeed averages gradients over data-parallel ranks, or adds them up.
        scale = 1.0 / (self.adapter.gradient_divisor * self.adapter.coming_unscale())
        for shard in batch.shards():
            shard.mul_(scale)
        norm = batch.norms()[0]
        clip = self.adapter.clip_coefficients(norm)
        for shard in batch.shards():
            shard.mul_(clip)
        return batch, norm

    # -- moving --------------------------------------------------------------------------------------

    @contextmanager
    def _moving(self, path: Directions | None) -> Iterator[Move]:
        if not self.estimator.moves:
            yield lambda node: None
            return
        shards = None if path is None else path.shards()
        with self._lookahead.moving() as move:

            def to(node: Node) -> None:
                share = node.share
                assert share is not None

                def write(group: int, piece: Piece, out: Tensor) -> None:
                    along = None if shards is None else _part(shards[group][0], piece)
                    write_point(self._step(piece), share, along, out)

                move(write)

            yield to

    def _step(self, piece: Piece) -> Step:
        adapter = self.adapter
        group = adapter.param_group(piece)
        return coming_step(adapter.inner, group, piece.tensor, self.proxy, self.counters)

    def coming_steps(self) -> list[Step]:
        """The coming step of one tensor of every parameter group of the optimizer, for what all of a group share."""
        first = {
            piece.param_group: piece for group in self.adapter.groups for piece in reversed(group.pieces)
        }
        return [self._step(first[index]) for index in sorted(first)]

    # -- directions ----------------------------------------------------------------------------------

    @property
    def needs_norms(self) -> bool:
        """Does the Jacobian depend on the norm of a target's gradient? Adam's does, through the clipped stand-in h."""
        return self.adapter.clip_threshold > 0.0 and not self.proxy and is_adam(self.adapter.inner)

    def reduce(self, scale: float) -> None:
        """Sum the directions over ranks and take the loss scale out."""
        self.directions.reduce()
        if scale != 1.0:
            for shard in self.directions.shards():
                shard.div_(scale)

    def condition(self, norms: Tensor | None = None, path: Directions | None = None) -> tuple[Tensor, Tensor]:
        """Times the Jacobian, on the shards; then to where the layers read it.

        Args:
            norms: ``[K]``, of the targets' gradients over all ranks; default: computed here if they are needed.
            path: c G for path estimators.

        Returns:
            ``Prepared.terms``.
        """
        directions = self.directions
        if norms is None:
            nothing = torch.zeros(len(self.targets), dtype=torch.float64, device=directions.device)
            norms = directions.norms() if self.needs_norms else nothing
        leaving = directions.leaving()
        terms = self._multiply(self.adapter.clip_coefficients(norms), path, leaving)
        directions.publish(leaving)
        return terms

    def _multiply(
        self, clips: Tensor, path: Directions | None, leaving: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """The shards times the Jacobian, into those of ``leaving`` that are there; returns the terms."""
        directions = self.directions
        momentum_terms = torch.zeros(len(self.targets), dtype=torch.float64, device=directions.device)
        decay_terms = torch.zeros_like(momentum_terms)
        along = None if path is None else path.shards()
        for index, (group, shard) in enumerate(zip(self.adapter.groups, directions.shards(), strict=True)):
            out = leaving[index]
            for piece in group.pieces:
                momentum, decay = condition(
                    self._step(piece),
                    [_part(row, piece) for row in shard],
                    clips,
                    directions.counting.ranges(index, piece.start, piece.numel),
                    None if along is None else _part(along[index][0], piece),
                    None if out is None else [_part(row, piece) for row in out],
                )
                momentum_terms += momentum
                decay_terms += decay
        return momentum_terms, decay_terms


def _part(shard: Tensor, piece: Piece) -> Tensor:
    return shard[piece.start : piece.start + piece.numel]
