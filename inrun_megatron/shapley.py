"""InRunShapley: the step protocol. One scored step reads as the algorithm in docs/algorithm.md.

1. direction     validation forward and backward of every target, parameters detached      (preparation.py)
2. reduce        over data- and tensor-parallel ranks; times the optimizer's Jacobian on its shards
3. score         the training microbatches run as usual, the taps add up per-row partial dots
4. sum           one all-reduce of [samples, targets] over the ranks of a replica of the model
5. settle        times the clip coefficient c_t; rows are dropped if the step was skipped
6. audit         <d, G_t> from the optimizer's own gradient; momentum and decay terms

With ``refresh=N`` steps 1 and 2 happen in every N-th scored step only (refresh.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .audit import AdditivityProbe
from .defaults import default_base
from .direction import Directions, stored_type
from .engines import ZeroAdapter
from .engines.inner import require_known
from .errors import UserError
from .estimators import CREDITS, Estimator, credit_factor
from .host import to_host
from .ledger.schema import CURRENT, DRIFT, StepRecord
from .parallel import Layout
from .passes import Microbatch, ModulePasses, Passes, TokenLoss, TrainingLoss, mean_loss
from .preparation import Preparation
from .refresh import RefreshSchedule, require_refresh
from .result import ShapleyTarget, StepResult
from .rows import StepRows
from .scoring import RowScorer
from .taps import Consumer, Pass, Taps, attach_taps


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
        UserError: no target, an optimizer without a known Jacobian, a trainable parameter without a tap, an
            estimator, base or credit that does not exist.
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
        if not targets:
            raise UserError("no target given; pass at least one --shapley-target NAME=PATH")
        if optimizer not in ("auto", "sgd"):
            raise UserError(f"optimizer {optimizer!r} is neither auto nor sgd")
        if credit not in CREDITS:
            raise UserError(f"credit {credit!r} is none of {', '.join(CREDITS)}")
        if interval < 1:
            raise UserError(f"interval {interval} is not a positive number of steps")
        require_refresh(refresh, estimator)
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
        self.passes: Passes = ModulePasses(engine, self.adapter, self.taps, loss_fn)
        self._probe = AdditivityProbe(self.adapter, self.directions)

    @property
    def device(self) -> torch.device:
        return self.directions.device

    @contextmanager
    def step(self, iteration: int, microbatches: Sequence[Microbatch] | None = None) -> Iterator[ScoredStep]:
        """Everything of one optimizer step: its microbatches go through ``step.samples`` inside.

        Args:
            iteration: number of the step, from 1.
            microbatches: the step's microbatches of this rank on the device, for the path estimators.
        """
        step = ScoredStep(self, iteration)
        if iteration % self.interval == 0:
            step.prepare(microbatches)
        yield step
        step.settle()

    def expire_direction(self) -> None:
        """Let the next scored step take its own directions; on all ranks, when a checkpoint is written."""
        self.refresh.expire()

    def close(self) -> None:
        """Take taps and hooks out of the model and the optimizer."""
        self._probe.remove()
        self.taps.detach()


class ScoredStep:
    """One optimizer step; made by ``InRunShapley.step``.

    Attributes:
        result: what the step came to; complete after the ``with`` block.
        train_loss, consumed_samples: set by the loop if the ledger should know them.
    """

    def __init__(self, owner: InRunShapley, iteration: int) -> None:
        self.owner = owner
        self.iteration = iteration
        self.result = StepResult()
        self.train_loss: float | None = None
        self.consumed_samples: int | None = None
        self._started = time.perf_counter()
        self._rows = StepRows(len(owner.targets), owner.device)
        self._scorers: list[RowScorer] = []
        self._target_losses: Tensor | None = None  # [K], on the device until the step is settled
        self._terms: tuple[Tensor, Tensor] | None = None
        self._loss_scale = 1.0
        self._factor = 1.0  # of values from an older direction
        # Read before engine.step(), which may move the schedule on.
        self._lr = float(owner.adapter.inner.param_groups[0]["lr"])

    def prepare(self, microbatches: Sequence[Microbatch] | None = None) -> None:
        """Steps 1 and 2."""
        started = time.perf_counter()
        self._begin()
        if not self.fresh:
            self.result.seconds_scoring += time.perf_counter() - started
            return
        prepared = self.owner.preparation.run(self.owner.passes, microbatches)
        self._target_losses, self._terms = prepared.target_losses, prepared.terms
        self.result.seconds_scoring += time.perf_counter() - started

    def _begin(self) -> None:
        """What must be read before the step; the additivity probe watches it."""
        owner, result = self.owner, self.result
        result.status = "scored"
        start = owner.estimator.start
        result.base = CURRENT if start is None or start.share is None else DRIFT
        remaining = None if owner.total_steps is None else max(1, owner.total_steps - self.iteration + 1)
        result.credit_factor = credit_factor(owner.preparation.coming_step().reach(), remaining)
        self._loss_scale = owner.adapter.loss_scale()
        gains = owner.preparation.gains()
        if owner.refresh.due(self.iteration):
            owner.refresh.taken(self.iteration, gains)
            result.direction_age = 0
        else:
            self._factor = owner.refresh.factor(gains)
            result.direction_age = owner.refresh.age(self.iteration)
        owner._probe.arm()

    @property
    def fresh(self) -> bool:
        """Does this step take its own directions?"""
        return self.result.direction_age == 0

    @contextmanager
    def samples(self, dataset: Any, sample: Any, tokens: Any, segments: Any = None) -> Iterator[None]:
        """Forward and backward of one microbatch happen inside.

        Args:
            dataset, sample: identity of each row, ``[b]``.
            tokens: loss mask ``[b, s]``, or, of whole rows, their loss tokens ``[b]``.
            segments: ``[b, s]`` integers that change where a row is cut into parts with values of their own
                (documents, tokens); every layer must keep rows and positions. Default: whole rows.
        """
        owner = self.owner
        consumers: tuple[Consumer, ...] = owner.consumers
        if self.result.scored:
            consumers = (self.scorer(dataset, sample, tokens, segments), *consumers)
        run = Pass(consumers=consumers, microbatch=len(self._rows) - 1) if consumers else None
        with owner.taps.during(run):
            yield

    def scorer(self, dataset: Any, sample: Any, tokens: Any, segments: Any = None) -> RowScorer:
        """What takes the dots of a further microbatch (arguments as of ``samples``)."""
        rows = self._rows.add(dataset, sample, tokens, segments)
        self._scorers.append(RowScorer(self.owner.directions, rows.dots, rows.segments))
        return self._scorers[-1]

    def settle(self) -> None:
        """Steps 4 to 6, after ``engine.step()``."""
        owner, result = self.owner, self.result
        started = time.perf_counter()
        if result.scored and not owner.adapter.step_applied():
            result.status = "skipped: overflow"
            owner.refresh.expire()
        nothing = torch.empty(0, dtype=torch.float64, device=owner.device)
        norm = owner.adapter.gradient_norm()
        clip = owner.adapter.clip_coefficients(torch.zeros((), device=owner.device) if norm is None else norm)
        losses = nothing if self._target_losses is None else self._target_losses
        scores, figures = nothing, nothing
        if result.scored:
            scores, figures = self._sum_scores(clip)
        else:
            owner._probe.disarm()
        # Nothing was read from the device until here, and everything is read at once.
        read = to_host(nothing if norm is None else norm, clip, losses, scores, figures)
        result.gradient_norm = None if norm is None else float(read[0])
        result.clip_coefficient = float(read[1])
        result.target_losses = None if self._target_losses is None else read[2].tolist()
        if result.scored:
            self._settle_scores(torch.from_numpy(read[3]), read[4].tolist())
            if not result.scored:  # what spoiled this step's values may be in its directions
                owner.refresh.expire()
        result.seconds_scoring += time.perf_counter() - started
        self._append()

    def _sum_scores(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """Values of all parts ``[parts, K]``; and over all ranks ``[4, K]``: sums, ``<d, c_t G_t>``, the drift terms."""
        owner, layout = self.owner, self.owner.layout
        expected = owner.adapter.gradient_accumulation_steps
        if len(self._rows) != expected:
            raise UserError(
                f"step {self.iteration} saw {len(self._rows)} microbatches, but the engine accumulates {expected}; "
                f"put all microbatches of one optimizer step inside one `with shapley.step(...)`"
            )
        for scorer in self._scorers:
            scorer.settle()
        scores = self._rows.dots()
        terms = self._terms or (torch.zeros_like(scores[0]), torch.zeros_like(scores[0]))
        if layout.mp_size > 1:
            dist.all_reduce(scores, group=layout.mp_group)
        # DeepSpeed averages gradients over data-parallel ranks: g_i carries the 1/DP.
        scores *= clip * self._factor / (layout.dp_size * self._loss_scale)
        # Additivity and the drift terms need sums over all ranks; one small all-reduce for both.
        figures = torch.stack(
            [
                scores.sum(0) if layout.writes_ledger else torch.zeros_like(scores[0]),
                owner._probe.collect() * self._factor,
                *terms,
            ]
        )
        dist.all_reduce(figures)
        return scores, figures

    def _settle_scores(self, scores: Tensor, figures: list[list[float]]) -> None:
        """What ``_sum_scores`` made, on the host."""
        result, clip = self.result, self.result.clip_coefficient
        sums, optimizer_side, momentum, decay = figures
        if not all(math.isfinite(x) for x in sums):
            result.status = "skipped: values are not finite"  # a NaN loss in fp32 or bf16
            return
        assert result.credit_factor is not None and clip is not None
        factor = result.credit_factor if self.owner.credit == "trajectory" else 1.0
        result.parts, result.places = scores * factor, self._rows.places()
        result.values = self._rows.of_samples(result.parts)
        result.step_sums, result.sums = sums, [x * factor for x in sums]
        result.additivity_lhs = [x / clip for x in sums]
        result.additivity_rhs = [x / clip for x in optimizer_side]
        if self.fresh:
            result.momentum_terms, result.decay_terms = momentum, decay

    def _append(self) -> None:
        owner, result = self.owner, self.result
        if owner.ledger is None or result.status == "off":
            return
        rows = 0
        if result.scored:
            assert result.values is not None and result.parts is not None and result.places is not None
            dataset, sample, tokens = (column.numpy() for column in self._rows.joined())
            owner.ledger.append(
                self.iteration,
                dataset,
                sample,
                tokens,
                result.parts.numpy(),
                segment=result.places[1].numpy(),
            )
            rows = len(result.values) * owner.layout.dp_size
        if owner.ledger.writer == 0:
            owner.ledger.append_step(
                StepRecord(
                    step=self.iteration,
                    status=result.status,
                    consumed_samples=self.consumed_samples,
                    samples=rows,
                    lr=self._lr,
                    train_loss=self.train_loss,
                    grad_norm=result.gradient_norm,
                    clip_coefficient=result.clip_coefficient,
                    credit_factor=result.credit_factor,
                    base=result.base,
                    direction_age=result.direction_age,
                    target_loss=result.target_losses,
                    sum_values=result.sums,
                    momentum_term=result.momentum_terms,
                    decay_term=result.decay_terms,
                    additivity_lhs=result.additivity_lhs,
                    additivity_rhs=result.additivity_rhs,
                    seconds_total=time.perf_counter() - self._started,
                    seconds_scoring=result.seconds_scoring,
                )
            )
