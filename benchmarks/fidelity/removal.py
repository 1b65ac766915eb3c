"""Item 2: remove one sample from its step, train to the end: does the value say what happens to the targets' losses?

A removed sample's gradient is missing from its own step; nothing else changes: the loss is still divided by the full
batch, and the step keeps its clip coefficient, as in the game. (The columns `clip moves` let it change: removing a sample
from a clipped step enlarges what is left of it.) The effect is the target's loss without the sample less the loss with
it, right after the step and 3, 10 and all remaining steps later: positive where the sample helped. Retraining is fp64,
so that rounding is no effect.
"""

from __future__ import annotations

import itertools
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from . import corpus
from .items import Cell, Item, Outcome, Table, bars, collect
from .statistics import Figure, median, spearman
from .training import METHODS, Method, Recipe, ScoredRun, State, Targets, epochs, scored_run, target_losses

HORIZONS = (1, 4, 11, None)  # steps from the removal on, its own included; None: to the end of the run
HORIZON_NAMES = ("own step", "3 later", "10 later", "end of run")
CREDITS = ("step", "trajectory")


@dataclass(frozen=True)
class Setting:
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=80, batch=8))
    points: int = 20  # steps at which samples are removed
    rows: int = 4  # samples removed at each, one at a time
    target_rows: int = 8
    seeds: int = 2

    @property
    def steps(self) -> list[int]:
        """The steps of the removals: from the second on, evenly over the run."""
        return np.linspace(2, max(3, self.recipe.steps - 10), self.points).round().astype(int).tolist()

    def data(self, seed: int) -> tuple[Tensor, Tensor, Targets]:
        """Code and prose in turn, each sequence once."""
        length, needed = self.recipe.shape.sequence, self.recipe.steps * self.recipe.batch
        half = [corpus.rows(corpus.stream(d), -(-needed // 2), length, seed) for d in ("code", "prose")]
        targets = {
            name: corpus.rows(corpus.stream(f"target_{name}"), self.target_rows, length, seed)
            for name in ("code", "prose")
        }
        sequences = torch.cat(half)
        return sequences, epochs(len(sequences), self.recipe, seed), targets


SMALL = Setting()
FULL = Setting(Recipe(steps=240, batch=16), points=24, rows=8, seeds=3)


@dataclass(frozen=True)
class Job:
    setting: Setting
    seed: int
    sequences: Tensor
    order: Tensor
    targets: Targets
    step: int = 0
    method: Method | None = None


def removals(job: Job) -> tuple[Tensor, Tensor]:
    """Effects of removing each of the first `rows` samples of one step, `[rows, horizons, K]`.

    First with the clip coefficient of that step as it was, then (up to 10 steps later) with the one that the optimizer
    would take without the sample.
    """
    torch.set_num_threads(1)
    setting, recipe = job.setting, job.setting.recipe
    state = State.fresh(recipe, job.seed, torch.float64)
    for _ in state.train(recipe, job.sequences, job.order, stop=job.step - 1):
        pass
    trained = state.copy(recipe)
    for _ in trained.train(recipe, job.sequences, job.order, stop=job.step):
        pass
    last = recipe.steps
    stops = [last if horizon is None else min(last, job.step + horizon - 1) for horizon in HORIZONS]
    kept = _losses(job, state.copy(recipe), None, stops, None)
    fixed, moving = [], []
    for row in range(setting.rows):
        fixed.append(_losses(job, state.copy(recipe), row, stops, trained.clip) - kept)
        moving.append(_losses(job, state.copy(recipe), row, stops[:-1], None) - kept[:-1])
    return torch.stack(fixed), torch.stack(moving)


def _losses(job: Job, state: State, removed: int | None, stops: list[int], clip: float | None) -> Tensor:
    """Target losses after each of the steps `stops`, `[stops, K]`."""
    present = torch.ones_like(job.order, dtype=torch.bool)
    if removed is not None:
        present[job.step - 1, removed] = False
    found = {}
    for t in state.train(
        job.setting.recipe, job.sequences, job.order, present, stop=max(stops), first_clip=clip
    ):
        if t in stops:
            found[t] = target_losses(state.model, job.targets)
    return torch.stack([found[stop] for stop in stops])


def score(job: Job) -> ScoredRun:
    torch.set_num_threads(1)
    assert job.method is not None
    return scored_run(job.setting.recipe, job.sequences, job.order, job.targets, job.method, job.seed)


def run(pool: Executor, full: bool) -> Outcome:
    setting = FULL if full else SMALL
    seeds = range(setting.seeds)
    data = [setting.data(seed) for seed in seeds]
    jobs = [Job(setting, seed, *data[seed], method=method) for method in METHODS for seed in seeds]
    runs = iter(collect(pool, score, jobs))
    steps = [(seed, step) for seed in seeds for step in setting.steps]
    found = collect(pool, removals, [Job(setting, seed, *data[seed], step=step) for seed, step in steps])
    effects, moving = (torch.stack(parts) for parts in zip(*found, strict=True))
    values = {}
    at = torch.tensor(setting.steps) - 1
    for method in METHODS:
        scored = [next(runs) for _ in seeds]
        for credit in CREDITS:
            rows = torch.cat([one.credited(credit)[at, : setting.rows] for one in scored])
            values[f"{method.name}, {credit}"] = rows.tolist()
    return tabulate(
        {"groups": steps, "effects": effects.tolist(), "clip moves": moving.tolist(), "values": values}
    )


def tabulate(raw: dict[str, Any]) -> Outcome:
    """Tables and plot of the figures as they are in the JSON file.

    Arrays are `[groups, rows, horizons, K]`; a group is what was removed, one at a time, from one step of one run.
    """
    groups, effects, moving = raw["groups"], np.array(raw["effects"]), np.array(raw["clip moves"])
    step = np.array([step for _, step in groups])
    # Three parts of the run with about as many removals each.
    third = np.searchsorted(np.quantile(step, [1 / 3, 2 / 3]), step)
    orders, whens, sizes = [], [], []
    for method, credit in itertools.product(METHODS, CREDITS):
        values = np.array(raw["values"][f"{method.name}, {credit}"])
        named: dict[str, Cell] = {"estimator": method.name, "credit": credit}
        by_horizon = [(name, effects[:, :, h]) for h, name in enumerate(HORIZON_NAMES)]
        order = named | {name: spearman(values, effect) for name, effect in by_horizon}
        order["own step, clip moves"] = spearman(values, moving[:, :, 0])
        order["10 later, clip moves"] = spearman(values, moving[:, :, 2])
        order["in a step, own"] = spearman(_centred(values), _centred(effects[:, :, 0]))
        order["in a step, end"] = spearman(_centred(values), _centred(effects[:, :, -1]))
        orders.append(order)
        when = dict(named)
        for name, h in (("own step", 0), ("end of run", -1)):
            for part, word in enumerate(("first", "second", "last")):
                inside = third == part
                when[f"{name}, {word} third"] = spearman(values[inside], effects[inside][:, :, h])
        whens.append(when)
        size = named | {f"{name}: effect / value": _slope(values, effect) for name, effect in by_horizon}
        sizes.append(size | {f"{name}: error": _error(values, effect) for name, effect in by_horizon})
    count = (
        f"{effects.shape[0] * effects.shape[1]} removals in {len(groups)} steps of {1 + groups[-1][0]} runs"
    )
    tables = [
        Table(f"Spearman with the effect of {count}, mean of two targets; steps are resampled", orders),
        Table("The same by the part of the run in which the samples were removed", whens),
        Table("Size, median over steps: effect for a value of 1, and |value - effect| / |effect|", sizes),
    ]
    shown = [row for row in orders if row["estimator"] == "first_order, drift"]
    drawn = [row for row in sizes if row["estimator"] == "first_order, drift"]
    panels = [
        partial(_draw, rows=shown),
        partial(_draw_sizes, rows=drawn),
        partial(_scatter, values=np.array(raw["values"]["midpoint, step"]), effects=effects),
    ]
    return Outcome(tables, raw, panels)


def _slope(values: np.ndarray, effects: np.ndarray) -> Figure:
    """Median over groups of the least-squares factor from values to effects."""
    return median((values * effects).sum((1, 2)) / (values * values).sum((1, 2)))


def _error(values: np.ndarray, effects: np.ndarray) -> Figure:
    """Median over groups of the relative error as it stands, without a factor."""
    return median(np.sqrt(((values - effects) ** 2).sum((1, 2)) / (effects**2).sum((1, 2))))


def _centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean(1, keepdims=True)


def _draw(axes: Axes, rows: list[dict]) -> None:
    labels = [f"{row['credit']}, {name}" for row in rows for name in HORIZON_NAMES]
    figures = [row[name] for row in rows for name in HORIZON_NAMES]
    bars(axes, labels, figures, "first_order, drift: Spearman with the effect", 0.0)


def _draw_sizes(axes: Axes, rows: list[dict]) -> None:
    labels = [f"{row['credit']}, {name}" for row in rows for name in HORIZON_NAMES]
    figures = [row[f"{name}: effect / value"] for row in rows for name in HORIZON_NAMES]
    bars(axes, labels, figures, "first_order, drift: effect / value (1: the right size)", 1.0)


def _scatter(axes: Axes, values: np.ndarray, effects: np.ndarray) -> None:
    for h in (0, -1):
        axes.plot(values.ravel(), effects[:, :, h].ravel(), ".", markersize=3, label=HORIZON_NAMES[h])
    axes.set_xscale("symlog", linthresh=1e-4)
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.set_xlabel("value (midpoint, step credit)", fontsize=8)
    axes.set_ylabel("effect of the removal", fontsize=8)
    axes.legend(fontsize=7)


ITEM = Item("loo", "Does a sample's value say what leaving it out of its step does?", run)
