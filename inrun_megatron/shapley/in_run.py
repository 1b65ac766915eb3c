"""InRunShapley: In-Run Data Shapley values while a DeepSpeed engine trains. What it is made of; a step is in scored_step.py."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ..defaults import default_base
from ..directions import Directions, stored_type
from ..engines import ZeroAdapter
from ..engines.inner import require_known
from ..errors import UserError
from ..parallel import Layout, wait_at_exit
from ..taps import Consumer, Taps, attach_taps
from .audit import AdditivityProbe
from .estimators import CREDITS, Estimator
from .passes import Microbatch, ModulePasses, Passes, TokenLoss, TrainingLoss, mean_loss
from .preparation import Preparation
from .refresh import RefreshSchedule, require_refresh
from .result import ShapleyTarget
from .row_watch import require_rows_apart
from .scored_step import ScoredStep


class Keeper(Protocol):
    """Whoever keeps the values of all steps: ``RunLedger``."""

    def during(self, iteration: int) -> AbstractContextManager[None]:
        """Step ``iteration`` happens inside; it is finished where no exception leaves the block."""

    def lost(self, iteration: int) -> None:
        """The optimizer has taken step ``iteration``, and an exception leaves its block."""


class InRunShapley:
    """In-Run Data Shapley values of every training sample, while a DeepSpeed engine trains.

    Args:
        engine: from ``deepspeed.initialize``; ZeRO 0-3, SGD, Adam or AdamW.
        targets: the validation targets.
        loss_fn: ``(module, microbatch) -> token losses [b, s]``.
        layout: process groups; default: Megatron's where initialised, else data parallel.
        estimator: ``first_order``, ``midpoint`` or ``simpson`` (estimators.py); the latter two need the step's
            microbatches beforehand: ``step(iteration, microbatches)``.
        base: ``current`` or ``drift``, for ``first_order``; default: ``drift``, under a pipeline ``current``.
        credit: ``step`` (the value of the step's own game) or ``trajectory`` (times the gradient's whole weight
            through the moments' decay over its weight in its own step).
        total_steps: last iteration of the run, where trajectory credit ends; None: no end.
        optimizer: ``auto`` (the step that is taken) or ``sgd`` (the paper's proxy).
        direction_dtype: what layers read is stored in ``fp32`` or, in half the memory, in ``bf16``; sums are fp32.
        training_loss: of a microbatch, as ``engine.backward`` gets it; default: the mean over its loss tokens.
        interval: score every ``interval``-th iteration.
        refresh: take the directions anew in every ``refresh``-th scored step and use them until then (refresh.py), with
            ``first_order``. Call ``expire_direction`` when a checkpoint is written, so that a run resumed from it
            scores alike.
        ledger: a ``LedgerWriter`` on ranks that write (``layout.writes_ledger``), else None.
        consumers: further consumers of the training passes' emissions, called after scoring.
        taps: taps that are in the model already; default: attach them.

    Raises:
        UserError: no target, another number of its microbatches on another rank, a num_tokens that is not its loss masks',
            an optimizer without a known Jacobian, a trainable parameter without a tap, an estimator, base or credit that
            does not exist.
    """

    def __init__(
        self,
        engine: Any,
        targets: Sequence[ShapleyTarget],
        loss_fn: TokenLoss,
        *,
        layout: Layout | None = None,
        estimator: str = "first_order",
        base: str | None = None,
        credit: str = "step",
        total_steps: int | None = None,
        optimizer: str = "auto",
        direction_dtype: str = "fp32",
        training_loss: TrainingLoss = mean_loss,
        interval: int = 1,
        refresh: int = 1,
        ledger: Any | None = None,
        consumers: Sequence[Consumer] = (),
        taps: Taps | None = None,
    ) -> None:
        wait_at_exit()
        if not targets:
            raise UserError("no target given; pass at least one --shapley-target NAME=PATH")
        if optimizer not in ("auto", "sgd"):
            raise UserError(f"optimizer {optimizer!r} is neither auto nor sgd")
        if credit not in CREDITS:
            raise UserError(f"credit {credit!r} is none of {', '.join(CREDITS)}")
        if interval < 1:
            raise UserError(f"interval {interval} is not a positive number of steps")
        require_refresh(refresh, estimator)
        _require_equal_shares(targets, engine.device)  # here, where no rank has failed alone
        self.engine = engine
        self.targets = tuple(targets)
        self.credit, self.total_steps = credit, total_steps
        self.layout = layout or Layout.current()
        self.estimator = Estimator.of(estimator, base or default_base(self.layout.pp_size))
        proxy = optimizer == "sgd"
        self.interval = interval
        self.refresh = RefreshSchedule(refresh, interval)
        self.ledger = ledger
        self.consumers = tuple(consumers)
        self.adapter = ZeroAdapter(engine, self.layout)
        _require_token_counts(targets, self.layout, engine.device)
        if not proxy:
            require_known(self.adapter.inner)
        self.taps = taps or attach_taps(engine.module)
        precise = any(p.dtype == torch.float64 for p in engine.module.parameters())
        stored = stored_type(direction_dtype, precise=precise)
        self.directions = Directions(
            self.adapter.groups,
            self.taps.sharding,
            self.layout,
            len(self.targets),
            dtype=torch.float64 if precise else torch.float32,
            stored=stored,
        )
        self.preparation = Preparation(
            self.adapter,
            self.directions,
            self.targets,
            self.estimator,
            proxy=proxy,
            training_loss=training_loss,
        )
        self.passes = self._make_passes(loss_fn)
        along = () if self.preparation.batch is None else (self.preparation.batch,)
        self.probe = AdditivityProbe(self.adapter, self.directions, *along)
        self.rows_apart: bool | None = None  # not looked at yet
        self.iteration = 0  # of the newest step
        self.keeper: Keeper | None = None
        self.closed = False
        self.running: int | None = None  # the step whose ``with`` block is open

    def _make_passes(self, loss_fn: Any) -> Passes:
        """Once nothing is refused any more."""
        return ModulePasses(self.engine, self.adapter, self.taps, loss_fn)

    @property
    def device(self) -> torch.device:
        """Where directions and dots lie."""
        return self.directions.device

    @contextmanager
    def step(self, iteration: int, microbatches: Sequence[Microbatch] | None = None) -> Iterator[ScoredStep]:
        """Everything of one optimizer step: its microbatches go through ``step.samples`` inside.

        Args:
            iteration: number of the step, from 1.
            microbatches: the step's microbatches of this rank on the device, for the path estimators.
        """
        iteration = operator.index(iteration)
        with self.kept(iteration):
            step = ScoredStep(self, iteration)
            if iteration % self.interval == 0:
                step.prepare(microbatches)
            yield step
            step.finish()

    @contextmanager
    def kept(self, iteration: int) -> Iterator[None]:
        """Around step ``iteration``: whoever keeps the values must know that it has begun, and whether it was finished."""
        if self.running is not None:
            raise UserError(
                f"step {iteration} begins inside step {self.running}: leave its `with` block first"
            )
        before = self.adapter.steps_taken
        with nullcontext() if self.keeper is None else self.keeper.during(iteration):
            self.running = iteration
            try:
                yield
            except BaseException:
                if self.keeper is not None and self.adapter.steps_taken != before:
                    self.keeper.lost(iteration)
                raise
            finally:
                self.running = None

    def require_rows_apart(self) -> None:
        """At the first scored step: see row_watch.py."""
        if self.rows_apart is None:
            first = self.targets[0].microbatches[0]
            self.rows_apart = require_rows_apart(self.passes, first, self.adapter.engine.module, self.device)
            self.taps.settled = True

    def expire_direction(self) -> None:
        """Let the next scored step take its own directions; on all ranks, when a checkpoint is written or loaded."""
        self.refresh.expire()

    def close(self) -> None:
        """Take taps and hooks out of the model and the optimizer. A ``RunLedger`` that keeps the values is closed before: later it
        says that those of another ``InRunShapley`` are not in it."""
        self.closed = True
        self.probe.remove()
        self.preparation.remove()
        self.taps.detach()


def _require_equal_shares(targets: Sequence[ShapleyTarget], device: torch.device) -> None:
    """Ranks with other numbers of validation microbatches would wait for each other, or mix up their sums."""
    counts = torch.tensor([len(target.microbatches) for target in targets], device=device)
    both = torch.stack([counts, -counts])
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    for target, most, least in zip(targets, both[0].tolist(), (-both[1]).tolist(), strict=True):
        if most != least:
            raise UserError(
                f"target {target.name} has {least} microbatches on one rank and {most} on another: give every rank the same "
                f"number (fill up with rows whose loss_mask is 0)"
            )


def _require_token_counts(targets: Sequence[ShapleyTarget], layout: Layout, device: torch.device) -> None:
    """Another denominator would scale all values of a target, and every audit with them."""
    for target in targets:
        if any("loss_mask" not in microbatch for microbatch in target.microbatches):
            raise UserError(
                f"a microbatch of target {target.name} has no loss_mask: give it one of shape [b, s], 1 where loss counts"
            )
    sums = torch.zeros(len(targets), dtype=torch.float64, device=device)
    for k, target in enumerate(targets):
        for microbatch in target.microbatches:
            sums[k] += microbatch["loss_mask"].sum(dtype=torch.float64).to(device)
    if layout.dp_size > 1:
        dist.all_reduce(sums, group=layout.dp_group)
    given = torch.tensor([float(target.num_tokens) for target in targets], dtype=torch.float64, device=device)
    off = (~((sums - given).abs() <= 0.5)).to(torch.int32)  # NaN is off, too
    dist.all_reduce(off, op=dist.ReduceOp.MAX)  # all ranks refuse, or none
    for target, wrong, tokens in zip(targets, off.tolist(), sums.tolist(), strict=True):
        if wrong:
            raise UserError(
                f"target {target.name} has {tokens:.12g} loss tokens in its loss masks over all ranks, but num_tokens is "
                f"{target.num_tokens:.12g} (here or on another rank): its values would be scaled by that; give num_tokens={tokens:.12g}"
            )
