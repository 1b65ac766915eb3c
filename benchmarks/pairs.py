"""Two ways to do one step, alternately in one process: what their times come to.

Steps alternate, and which of the two comes first does as well, so that a machine whose speed drifts slows both. The
ratio is the median over pairs of steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from inrun_megatron.defaults import default_base
from inrun_megatron.plan.costs import EstimatorCost, estimator_cost

WARM_UP = 2  # pairs that are not counted

Batch = list[dict[str, Any]]
Step = Callable[[int, Batch], None]
"""Does step ``iteration`` (from 1) on these microbatches."""


@dataclass(frozen=True)
class Case:
    """One line of a table; tokens per sequence, sequences per step (validation: of each target), ranks of each kind."""

    name: str
    hidden: int
    layers: int
    seq_length: int
    train: int
    validation: int
    micro_batch: int
    zero_stage: int
    tp: int = 1
    dp: int = 1
    pp: int = 1
    shape: str = "gpt2"
    precision: str = "fp32"
    targets: int = 1
    granularity: str = "sample"
    estimator: str = "first_order"
    base: str | None = None  # None: the layout's default
    direction_dtype: str = "fp32"
    dropout: float = 0.1  # of training; validation has none

    @property
    def accumulation(self) -> int:
        """Training microbatches of one replica and step."""
        steps, rest = divmod(self.train, self.micro_batch * self.dp)
        if rest:
            raise ValueError(
                f"{self.train} sequences a step are no multiple of {self.dp} replicas x {self.micro_batch}"
            )
        return steps

    @property
    def validation_microbatches(self) -> int:
        """Of one replica, all targets."""
        return self.targets * ceil(ceil(self.validation / self.dp) / self.micro_batch)

    @property
    def cost(self) -> EstimatorCost:
        """Passes that the estimator takes."""
        return estimator_cost(self.estimator, self.base or default_base(self.pp))

    @property
    def work(self) -> float:
        """The passes of a scored step over those of a plain one; a forward is a third of a pass."""
        cost = self.cost
        ratio = self.targets * ceil(self.validation / self.dp) * self.dp / self.train
        return 1 + cost.batch_passes + ratio * (cost.validation_passes + cost.loss_passes / 3)

    @property
    def ideal(self) -> float:
        """The ratio of times that could be had: of the work, through a pipeline of the half-steps of its stream."""
        cost = self.cost
        if self.pp == 1 or cost.moves:
            return self.work
        bubble = self.accumulation + self.pp - 1
        return (self.validation_microbatches + bubble) / bubble


@dataclass(frozen=True)
class Pairs:
    """Seconds of this process, wall and processor, per pair of steps: (first way, second way)."""

    wall: list[tuple[float, float]]
    cpu: list[tuple[float, float]]


@dataclass(frozen=True)
class Outcome:
    """What a case came to. Times in seconds per step (medians), memory in MiB of the whole process."""

    name: str
    ratio: float
    ideal: float
    above_ideal: float
    plain_s: float
    scored_s: float
    ratio_low: float  # quartiles of the ratio over pairs of steps
    ratio_high: float
    plain_cpu_s: float  # processor time of all ranks
    cpu_ratio: float  # the ratio of that, which a busy neighbour does not stretch
    cpu_ideal: float  # the work, 1 + n_val / n_train for one target and first_order; a pipeline's idle half-steps are in `ideal` alone
    pairs: int
    tokens_per_second: float
    peak_rss_mb: float
    case: dict[str, Any]


def alternate(
    first: Step,
    second: Step,
    *,
    batch: Callable[[int], Batch],
    pairs: int,
    synchronise: Callable[[], None],
) -> Pairs:
    """Time ``pairs`` pairs of steps after the warm-up.

    Args:
        batch: microbatches of step ``iteration``, the same for both; not timed.
        synchronise: returns when everything that was started is done; called before and after each step.
    """
    timed = Pairs([], [])
    for iteration in range(1, pairs + WARM_UP + 1):
        order = [first, second] if iteration % 2 else [second, first]
        microbatches = batch(iteration)
        spent = {way: _timed(way, iteration, microbatches, synchronise) for way in order}
        if iteration > WARM_UP:
            (wall, cpu), (other_wall, other_cpu) = spent[first], spent[second]
            timed.wall.append((wall, other_wall))
            timed.cpu.append((cpu, other_cpu))
    return timed


def _timed(
    step: Step, iteration: int, microbatches: Batch, synchronise: Callable[[], None]
) -> tuple[float, float]:
    """Wall and processor seconds."""
    synchronise()
    started = time.perf_counter(), time.process_time()
    step(iteration, microbatches)
    synchronise()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def median_ratio(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Median and quartiles of second / first."""
    ratios = sorted(b / a for a, b in pairs)
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return low, median, high


def outcome(case: Case, ranks: Sequence[Pairs], peak_rss_mb: float) -> Outcome:
    """A line of the table: plain steps came first, scored ones second. Wall time is that of rank 0."""
    timed, ideal = ranks[0], case.ideal
    cpu = [
        (sum(plain for plain, _ in own), sum(scored for _, scored in own))
        for own in zip(*(rank.cpu for rank in ranks), strict=True)
    ]
    low, ratio, high = median_ratio(timed.wall)
    plain_s, scored_s = (statistics.median(pair[i] for pair in timed.wall) for i in (0, 1))
    return Outcome(
        name=case.name,
        ratio=ratio,
        ideal=ideal,
        above_ideal=ratio / ideal - 1.0,
        plain_s=plain_s,
        scored_s=scored_s,
        ratio_low=low,
        ratio_high=high,
        plain_cpu_s=statistics.median(plain for plain, _ in cpu),
        cpu_ratio=median_ratio(cpu)[1],
        cpu_ideal=case.work,
        pairs=len(timed.wall),
        tokens_per_second=case.train * case.seq_length / scored_s,
        peak_rss_mb=peak_rss_mb,
        case=asdict(case),
    )
