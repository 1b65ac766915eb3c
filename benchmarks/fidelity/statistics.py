"""Correlations, AUROC and their bootstrap intervals, by scipy; every figure is `Figure(value, low, high)`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Array = np.ndarray
RESAMPLES = 1000


@dataclass(frozen=True)
class Figure:
    """A figure with its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    statistic: Callable[..., float], *samples: Sequence[float] | Array, paired: bool = True
) -> Figure:
    """Percentile interval over resampled cases; `paired` samples are resampled together."""
    arrays = tuple(np.asarray(sample, dtype=float) for sample in samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a resample may be constant: its nan is left out below
        result = stats.bootstrap(
            arrays,
            statistic,
            paired=paired and len(arrays) > 1,
            vectorized=False,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(0),
        )
        low, high = np.nanpercentile(result.bootstrap_distribution, [2.5, 97.5])
    return Figure(float(statistic(*arrays)), float(low), float(high))


def spearman(left: Sequence[float] | Array, right: Sequence[float] | Array) -> Figure:
    """Rank correlation of paired cases `[n]` or `[n, K]`: the mean over columns. Cases are resampled.

    Of `[g, r, K]`, g groups of r cases, whole groups are resampled: cases of one group are not independent draws.
    """
    one, other = (_grouped(side) for side in (left, right))
    return bootstrap(lambda g: _correlation(one, other, g), np.arange(len(one)))


def spearman_difference(left: Array, baseline: Array, right: Array) -> Figure:
    """`spearman(left, right)` less `spearman(baseline, right)`, of the same resamples."""
    one, base, other = (_grouped(side) for side in (left, baseline, right))
    return bootstrap(
        lambda g: _correlation(one, other, g) - _correlation(base, other, g), np.arange(len(one))
    )


def _grouped(side: Sequence[float] | Array) -> Array:
    array = np.asarray(side, dtype=float)
    return array if array.ndim == 3 else array.reshape(len(array), 1, -1)


def _correlation(one: Array, other: Array, groups: Array) -> float:
    chosen = groups.astype(int)
    ranks = [stats.rankdata(side[chosen].reshape(-1, side.shape[-1]), axis=0) for side in (one, other)]
    a, b = (rank - rank.mean(0) for rank in ranks)
    spread = np.sqrt((a * a).sum(0) * (b * b).sum(0))
    # A score that is the same for all says nothing about their order: 0.
    return float(np.divide((a * b).sum(0), spread, out=np.zeros_like(spread), where=spread > 0).mean())


def auroc(positive: Sequence[float] | Array, negative: Sequence[float] | Array) -> Figure:
    """The chance that a positive case has the larger score; ties count half."""

    def share(above: Array, below: Array) -> float:
        return float(stats.mannwhitneyu(above, below).statistic / (len(above) * len(below)))

    return bootstrap(share, positive, negative, paired=False)


def mean(values: Sequence[float] | Array) -> Figure:
    """Mean over cases; the interval is Student's, which does not shrink wrongly for a handful of seeds."""
    array = np.asarray(values, dtype=float)
    if len(array) < 2 or np.ptp(array) == 0:
        return Figure(float(array.mean()), float(array.min()), float(array.max()))
    low, high = stats.t.interval(0.95, len(array) - 1, loc=array.mean(), scale=stats.sem(array))
    return Figure(float(array.mean()), float(low), float(high))


def median(values: Sequence[float] | Array) -> Figure:
    """Median over cases."""
    return bootstrap(lambda a: float(np.median(a)), values)
