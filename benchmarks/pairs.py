"""Two ways to do one step, alternately in one process: what their times come to.

Steps alternate, and which of the two comes first does as well, so that a machine whose speed drifts slows both. The
ratio is the median over pairs of steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.cases import Case

WARM_UP = 2  # pairs that are not counted

Batch = list[dict[str, Any]]
Step = Callable[[int, Batch], object]
"""Does step ``iteration`` (from 1) on these microbatches."""


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
    fastest: list[float]  # of each process: its fastest scored step over its fastest plain one
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


def fastest_ratio(pairs: list[tuple[float, float]]) -> float:
    """The fastest second over the fastest first: what others on the machine take makes a step slower, never faster."""
    return min(b for _, b in pairs) / min(a for a, _ in pairs)


def outcome(case: Case, starts: Sequence[Sequence[Pairs]], peak_rss_mb: float) -> Outcome:
    """A line of the table from every start of the ranks, ``[starts, ranks]``: plain steps came first, scored ones second.

    Wall time is that of rank 0.
    """
    ideal = case.ideal
    wall = [pair for ranks in starts for pair in ranks[0].wall]
    cpu = [
        (sum(plain for plain, _ in own), sum(scored for _, scored in own))
        for ranks in starts
        for own in zip(*(rank.cpu for rank in ranks), strict=True)
    ]
    low, ratio, high = median_ratio(wall)
    plain_s, scored_s = (statistics.median(pair[i] for pair in wall) for i in (0, 1))
    return Outcome(
        name=case.name,
        ratio=ratio,
        ideal=ideal,
        above_ideal=ratio / ideal - 1.0,
        plain_s=plain_s,
        scored_s=scored_s,
        ratio_low=low,
        ratio_high=high,
        fastest=[fastest_ratio(ranks[0].wall) for ranks in starts],
        plain_cpu_s=statistics.median(plain for plain, _ in cpu),
        cpu_ratio=median_ratio(cpu)[1],
        cpu_ideal=case.work,
        pairs=len(wall),
        tokens_per_second=case.train * case.seq_length / scored_s,
        peak_rss_mb=peak_rss_mb,
        case=asdict(case),
    )
