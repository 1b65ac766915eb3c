"""Detached passes: forwards and backwards whose gradients go to taps' consumers, and to no engine.

Parameters are detached in the taps, so that no ``AccumulateGrad`` node runs and neither ``.grad`` nor a ZeRO bucket is
touched. A pass is a list of tasks; how their microbatches are run is the engine's matter (``ModulePasses`` calls the
module, pipeline.py has the 1F1B form).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ..directions import Directions
from ..engines import ZeroAdapter
from ..engines.evaluating import evaluating, loss_sums
from ..errors import UserError
from ..losses import masked_mean
from ..taps import Consumer, Pass, Taps

Microbatch = Mapping[str, Tensor]
TokenLoss = Callable[[nn.Module, Microbatch], Tensor]
"""``(module, microbatch) -> token losses [b, s]``, unreduced; masked tokens are weighted by ``loss_mask``."""
Arriving = Callable[[nn.Parameter], None]
"""Waits until a parameter's weights, which may be on their way, have come (engines/lookahead.py)."""
TrainingLoss = Callable[[Tensor, Microbatch], Tensor]
"""``(token losses [b, s], microbatch) -> scalar``: what ``engine.backward`` is given for the microbatch."""


def detached_pass(consumer: Consumer, microbatch: Microbatch, arriving: Arriving | None = None) -> Pass:
    """The pass of one microbatch, whose parameters get no gradients."""
    rows, positions = microbatch["loss_mask"].shape
    return Pass((consumer,), detached=True, rows=rows, positions=positions, arriving=arriving)


@dataclass(frozen=True)
class Task:
    """One microbatch of a detached pass.

    Attributes:
        microbatch: what the loss function reads.
        consumer: called with every emission of its backward.
        loss: token losses ``[b, s]`` fp32 -> the scalar to differentiate, without loss scale.
    """

    microbatch: Microbatch
    consumer: Consumer
    loss: Callable[[Tensor], Tensor]

    def as_pass(self, arriving: Arriving | None) -> Pass:
        """As the taps see it."""
        return detached_pass(self.consumer, self.microbatch, arriving)


class Passes(Protocol):
    """How one rank runs detached passes. Every method is a collective over the replica's ranks."""

    def run(self, tasks: Sequence[Task], *, training: bool, arriving: Arriving | None = None) -> None:
        """Forward and backward of every task, gradients times the loss scale; ``training``: dropout on.

        ``arriving`` is called before a layer reads a parameter.
        """
        ...

    def loss_sum(self, microbatches: Sequence[Microbatch]) -> Tensor:
        """Sum of the unmasked token losses, dropout off, no gradients; fp64, this rank's part (evaluating.over_ranks)."""
        ...

    def join(self, directions: Directions) -> None:
        """Once all passes into ``directions`` have run: add what other stages hold of the same (tied) weights."""
        ...


class ModulePasses:
    """Passes through an engine's module, ZeRO 0-3."""

    def __init__(self, engine: Any, adapter: ZeroAdapter, taps: Taps, loss_fn: TokenLoss) -> None:
        self._module: nn.Module = engine.module
        self._adapter, self._taps, self._loss_fn = adapter, taps, loss_fn

    def run(self, tasks: Sequence[Task], *, training: bool, arriving: Arriving | None = None) -> None:
        try:
            with nullcontext() if training else evaluating(self._module):
                for task in tasks:
                    self._run(task, arriving)
        finally:
            self._adapter.release_gathered_weights()

    def _run(self, task: Task, arriving: Arriving | None) -> None:
        scale = self._adapter.loss_scale()
        run = task.as_pass(arriving)
        with self._taps.during(run):
            try:
                losses = self._loss_fn(self._module, task.microbatch).float()
            except (RuntimeError, ValueError, IndexError) as error:
                if run.expanded and not isinstance(error, UserError):
                    raise UserError(
                        f"the model failed ({str(error).strip().splitlines()[0]}) with an output [b, s, h] of embedding "
                        f"{run.expanded[0]}, whose ids are the same for all rows: give it ids [b, s]"
                    ) from error
                raise
            _require_token_losses(losses, task.microbatch)
            loss = task.loss(losses)
            with self._taps.untouched(loss):
                (loss if scale == 1.0 else loss * scale).backward()

    def loss_sum(self, microbatches: Sequence[Microbatch]) -> Tensor:
        try:
            return loss_sums(self._module, self._loss_fn, microbatches, self._adapter.groups[0].device)[0]
        finally:
            self._adapter.release_gathered_weights()

    def join(self, directions: Directions) -> None:
        """One rank's module holds both uses of a tied weight."""


def _require_token_losses(losses: Tensor, microbatch: Microbatch) -> None:
    """Raise UserError where losses do not lie as their mask does: a mean, say, or one that would be broadcast."""
    wanted = list(microbatch["loss_mask"].shape)
    if list(losses.shape) != wanted:
        raise UserError(
            f"loss_fn returned losses of shape {list(losses.shape)} for a loss_mask of shape {wanted}: return the losses of all "
            f"tokens, unreduced, in the shape of the mask"
        )


def mean_loss(losses: Tensor, microbatch: Microbatch) -> Tensor:
    """Mean over the microbatch's loss tokens (Megatron's convention); 0 where it has none."""
    return masked_mean(losses, microbatch["loss_mask"])
