"""One optimizer step with values. It reads as the algorithm in docs/algorithm.md.

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
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError
from ..host import Stopwatch, to_host
from ..ledger.schema import CURRENT, DRIFT
from ..taps import Consumer, Pass
from .consumers import RowScorer
from .credit import credit_of_groups
from .passes import Microbatch
from .records import append
from .result import StepResult
from .rows import StepRows
from .step_checks import (
    raise_anywhere,
    refusal,
    refuse_stages_credits,
    require_one_factor,
    require_one_step,
    require_the_path,
    same_on_all,
)

if TYPE_CHECKING:
    from .in_run import InRunShapley


class ScoredStep:
    """One optimizer step; made by ``InRunShapley.step``.

    Attributes:
        result: what the step came to; complete after the ``with`` block.
        train_loss, consumed_samples: set by the loop if the ledger should know them.
        scoring: how long scoring takes.
    """

    def __init__(self, owner: InRunShapley, iteration: int) -> None:
        self.owner = owner
        self.iteration = owner.iteration = iteration
        self.result = StepResult()
        self.train_loss: float | None = None
        self.consumed_samples: int | None = None
        self._started = time.perf_counter()
        self.scoring = Stopwatch(owner.device)
        self._rows = StepRows(len(owner.targets), owner.device)
        self._scorers: list[RowScorer] = []
        self._microbatches = 0
        self._target_losses: Tensor | None = None  # [K], on the device until the step is finished
        self._terms: tuple[Tensor, Tensor] | None = None
        self._path_norm: Tensor | None = None  # of the gradient that was integrated along
        self.loss_scale, self._unscale = 1.0, 1.0  # of the backward, and what the optimizer divides by
        self._steps_before = 0  # of the engine
        self._early = 0  # microbatches until the engine stepped, if further ones went through samples()
        self._factor = 1.0  # of values from an older direction
        self._samples = 0  # of all replicas, whose microbatches may differ in size
        self._refused: str | None = None  # why the ledger cannot take this rank's samples
        # Read before engine.step(), which may move the schedule on.
        self._lr = float(owner.adapter.inner.param_groups[0]["lr"])

    def prepare(self, microbatches: Sequence[Microbatch] | None = None) -> None:
        """Steps 1 and 2."""
        with self.scoring.running():
            self._begin()
            if not self.fresh:
                return
            prepared = self.owner.preparation.run(self.owner.passes, microbatches)
            self._target_losses, self._terms = prepared.target_losses, prepared.terms
            self._path_norm = prepared.path_norm

    def _begin(self) -> None:
        """What must be read before the step; the additivity probe watches it."""
        owner, result = self.owner, self.result
        owner.taps.require_unchanged()
        owner.adapter.require_unchanged()
        owner.require_rows_apart()
        result.status = "scored"
        start = owner.estimator.start
        result.base = CURRENT if start is None or start.share is None else DRIFT
        coming = owner.preparation.coming_steps()
        remaining = None if owner.total_steps is None else max(1, owner.total_steps - self.iteration + 1)
        result.credit_factor = credit_of_groups(coming, remaining, owner.credit)
        self.loss_scale, self._unscale = owner.adapter.loss_scale(), owner.adapter.coming_unscale()
        self._steps_before = owner.adapter.steps_taken
        gains = [step.gain for step in coming]
        if owner.refresh.due(self.iteration):
            owner.refresh.taken(self.iteration, gains)
            result.direction_age = 0
        else:
            self._factor = owner.refresh.factor(gains)
            result.direction_age = owner.refresh.age(self.iteration)
        owner.probe.arm()

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
        scorer = self.scorer(dataset, sample, tokens, segments) if self.result.scored else None
        if scorer is not None:
            consumers = (scorer, *consumers)
        if not self._early and owner.adapter.steps_taken != self._steps_before:
            self._early = self._microbatches
        run = self._pass(consumers, len(sample), tokens) if consumers else None
        self._microbatches += 1
        with owner.taps.during(run):
            yield
        if scorer is not None:
            scorer.flush()

    def _pass(self, consumers: tuple[Consumer, ...], rows: int, tokens: Any) -> Pass:
        mask = torch.as_tensor(tokens).shape
        return Pass(
            consumers,
            microbatch=self._microbatches,
            rows=rows,
            positions=mask[1] if len(mask) == 2 else None,
            apart=bool(self.owner.rows_apart),
        )

    def _require_seen(self) -> None:
        """Raise UserError where a microbatch went past the taps, so that its values would be 0."""
        unseen = [index for index, scorer in enumerate(self._scorers, 1) if not scorer.seen]
        if unseen and self.owner.layout.pp_size == 1:  # a stage may hold nothing that trains
            raise UserError(
                f"no layer was seen in microbatch {unseen[0]} of step {self.iteration}: its forward belongs inside `with "
                f"step.samples(...)`, and its backward, too"
            )

    def scorer(self, dataset: Any, sample: Any, tokens: Any, segments: Any = None) -> RowScorer:
        """What takes the dots of a further microbatch (arguments as of ``samples``); to be flushed after its backward."""
        self.owner.directions.rewind()
        rows = self._rows.add(dataset, sample, tokens, segments)
        # Of this rank alone, perhaps: all raise it at the step's end.
        self._refused = self._refused or refusal(self.owner.ledger, self.iteration, rows)
        self._scorers.append(RowScorer(self.owner.directions, rows.dots, rows.segments))
        return self._scorers[-1]

    def finish(self) -> None:
        """Steps 4 to 6, after ``engine.step()``."""
        owner, result = self.owner, self.result
        if result.status == "off":  # nothing is read that plain training does not read
            result.gradient_norm = owner.adapter.norm_on_host()
            return
        if result.scored:
            require_one_step(
                self.iteration,
                seen=len(self._rows),
                accumulated=owner.adapter.gradient_accumulation_steps,
                steps=owner.adapter.steps_taken - self._steps_before,
                early=self._early,
            )
            owner.probe.require_unchanged(self.iteration)
            self._require_seen()
        with self.scoring.running():
            if result.scored and not owner.adapter.step_applied():
                result.status = "skipped: overflow"
                owner.refresh.expire()
            norm = owner.adapter.gradient_norm(self.loss_scale / self._unscale)
            clip = owner.adapter.clip_coefficients(
                torch.zeros((), device=owner.device) if norm is None else norm
            )
            scores = figures = along = samples = tokens = None
            if result.scored:
                scores, figures, along, samples = self._sum_scores(clip)
                tokens = self._rows.unread()
            else:
                owner.probe.disarm()
        # Nothing was read from the device until here, and everything is read at once.
        read = to_host(
            norm=norm,
            path_norm=self._path_norm,
            clip=clip,
            losses=self._target_losses,
            scores=scores,
            figures=figures,
            along=along,
            samples=samples,
            tokens=tokens,
        )
        started = time.perf_counter()
        self._fill_result(read)
        result.seconds_scoring = self.scoring.read() + time.perf_counter() - started
        append(
            self, self._rows, samples=self._samples, lr=self._lr, seconds=time.perf_counter() - self._started
        )

    def _fill_result(self, read: dict[str, Any]) -> None:
        """From what ``finish`` read."""
        result = self.result
        result.gradient_norm = float(read["norm"]) if "norm" in read else None
        result.clip_coefficient = float(read["clip"])
        result.target_losses = read["losses"].tolist() if "losses" in read else None
        if not result.scored:
            return
        if "path_norm" in read:
            require_the_path(
                self.iteration,
                self.owner.estimator.name,
                integrated=float(read["path_norm"]),
                stepped=result.gradient_norm,
                along=float(read["along"]),
            )
        if math.isnan(samples := float(read["samples"])):
            raise_anywhere(self._refused)
        self._samples = round(samples)
        self._rows.read(read["tokens"])
        self._fill_values(torch.from_numpy(read["scores"]), read["figures"].tolist())
        if not result.scored:  # what spoiled this step's values may be in its directions
            self.owner.refresh.expire()

    def _sum_scores(self, clip: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Values of all parts ``[parts, K]``; over all ranks ``[4, K]``: sums, ``<d, c_t G_t>``, the drift terms, with stages
        four rows more, sums of this step's factors and of their squares; of path estimators, ``<p, c_t G_t> / |p|^2``
        with the p that was integrated along: 1 if it is what is stepped; and the number of samples of all replicas, NaN if the
        ledger refuses those of one."""
        owner, layout = self.owner, self.owner.layout
        for scorer in self._scorers:  # of backwards that ran outside their ``samples`` block
            scorer.flush()
        scores = self._rows.dots()
        terms = self._terms or (torch.zeros_like(scores[0]), torch.zeros_like(scores[0]))
        if layout.mp_size > 1:
            dist.all_reduce(scores, group=layout.mp_group)
        # DeepSpeed averages gradients over data-parallel ranks (or adds them up): g_i carries the 1/DP.
        scores *= clip * self._factor / (owner.adapter.gradient_divisor * self._unscale)
        products, targets = owner.probe.collect(), len(owner.targets)
        rows = [
            scores.sum(0) if layout.writes_ledger else torch.zeros_like(scores[0]),
            products[:targets] * self._factor,
            *terms,
        ]
        if layout.pp_size > 1:  # a stage knows the factors of its own parameter groups
            credit = self.result.credit_factor or 0.0
            factors = (self._factor, self._factor**2, credit, credit**2)
            rows += [torch.full_like(scores[0], factor) for factor in factors]
        own = float(self._rows.samples if layout.writes_ledger else 0) if self._refused is None else math.nan
        # All of them, and the path, need sums over all ranks: one small all-reduce.
        sums = torch.cat([*rows, products[targets:], scores.new_full((1,), own)])
        dist.all_reduce(sums)
        figures = sums[: len(rows) * targets].view(len(rows), targets)
        if self._path_norm is None:
            return scores, figures, None, sums[-1]
        path = self._path_norm * owner.adapter.clip_coefficients(self._path_norm)
        return scores, figures, sums[-2] / path.square(), sums[-1]

    def _fill_values(self, scores: Tensor, figures: list[list[float]]) -> None:
        """What ``_sum_scores`` made, on the host."""
        result, clip = self.result, self.result.clip_coefficient
        sums, optimizer_side, momentum, decay, *factors = figures
        if factors:
            self._compare_factors([row[0] for row in factors])
        # A NaN loss in fp32 or bf16; or c_t is 0: the gradient is finite, and its norm is not.
        if clip == 0.0 or not all(math.isfinite(x) for x in sums):
            result.status = "skipped: values are not finite"
            return
        assert clip is not None
        factor = 1.0
        if self.owner.credit == "trajectory":
            assert result.credit_factor is not None
            factor = result.credit_factor
        result.parts, result.places = scores * factor, self._rows.places()
        result.values = self._rows.of_samples(result.parts)
        result.step_sums, result.sums = sums, [x * factor for x in sums]
        result.additivity_lhs = [x / clip for x in sums]
        result.additivity_rhs = [x / clip for x in optimizer_side]
        if self.fresh:
            result.momentum_terms, result.decay_terms = momentum, decay

    def _compare_factors(self, sums: list[float]) -> None:
        """Stages must have scaled values alike. ``sums``: over ranks, of the stale direction's factor, its square, and those
        of the credit factor, which is not known where stages differ in it."""
        owner, ranks = self.owner, dist.get_world_size()
        require_one_factor(ranks, sums[:2], owner.refresh.every)
        if not same_on_all(ranks, *sums[2:]):
            if owner.credit == "trajectory":
                refuse_stages_credits()
            self.result.credit_factor = None
