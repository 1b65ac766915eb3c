"""Item 2: remove one sample from its step, train to the end: does the value say what happens to the targets' losses?

A removed sample's gradient is missing from its own step; nothing else changes: the loss is still divided by the full
batch, and the step keeps its clip coefficient, as in the game. (The columns `clip moves` let it change: removing a sample
from a clipped step enlarges what is left of it.) The effect is the target's loss without the sample less the loss with
it, right after the step and 3, 10 and all remaining steps later: positive where the sample helped. Retraining is fp64,
so that rounding is no effect.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from . import corpus
from .items import Item, Outcome, Table, bars, collect
from .statistics import Figure, spearman
from .training import METHODS, Method, Recipe, ScoredRun, State, Targets, epochs, scored_run, target_losses

HORIZONS = (1, 4, 11, None)  # steps from the removal on, its own included; None: to the end of the run
HORIZON_NAMES = ("own step", "3 later", "10 later", "end of run")


@dataclass(frozen=True)
class Setting:
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=80, batch=8))
    points: int = 12  # steps at which samples are removed
    rows: int = 5  # samples removed at each, one at a time
    target_rows: int = 8
    seed: int = 0

    @property
    def steps(self) -> list[int]:
        """The steps of the removals: from the second on, evenly over the run."""
        return np.linspace(2, max(3, self.recipe.steps - 10), self.points).round().astype(int).tolist()

    def data(self) -> tuple[Tensor, Tensor, Targets]:
        """Code and prose in turn, each sequence once."""
        length, needed = self.recipe.shape.sequence, self.recipe.steps * self.recipe.batch
        half = [corpus.rows(corpus.stream(d), -(-needed // 2), length, self.seed) for d in ("code", "prose")]
        targets = {
            name: corpus.rows(corpus.stream(f"target_{name}"), self.target_rows, length, self.seed)
            for name in ("code", "prose")
        }
        sequences = torch.cat(half)
        return sequences, epochs(len(sequences), self.recipe, self.seed), targets


SMALL = Setting()
FULL = Setting(Recipe(steps=240, batch=16), points=24, rows=8)


@dataclass(frozen=True)
class Job:
    setting: Setting
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
    state = State.fresh(recipe, setting.seed, torch.float64)
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
    return scored_run(job.setting.recipe, job.sequences, job.order, job.targets, job.method, job.setting.seed)


def run(pool: Executor, full: bool) -> Outcome:
    setting = FULL if full else SMALL
    data = setting.data()
    runs = collect(pool, score, [Job(setting, *data, method=method) for method in METHODS])
    found = collect(pool, removals, [Job(setting, *data, step=step) for step in setting.steps])
    effects, moving = (torch.stack(parts).numpy() for parts in zip(*found, strict=True))
    rows, raw = [], {"steps": setting.steps, "effects": effects.tolist(), "clip moves": moving.tolist()}
    raw["values"] = {}
    for method, scored in zip(METHODS, runs, strict=True):
        for credit in ("step", "trajectory"):
            at = torch.tensor(setting.steps) - 1
            values = scored.credited(credit)[at, : setting.rows].numpy()  # [points, rows, K]
            raw["values"][f"{method.name}, {credit}"] = values.tolist()
            row = {"estimator": method.name, "credit": credit}
            for h, name in enumerate(HORIZON_NAMES):
                row[name] = _correlation(values, effects[:, :, h])
            row["own step, clip moves"] = _correlation(values, moving[:, :, 0])
            row["10 later, clip moves"] = _correlation(values, moving[:, :, 2])
            row["in a step, own"] = _correlation(_centred(values), _centred(effects[:, :, 0]))
            row["in a step, end"] = _correlation(_centred(values), _centred(effects[:, :, -1]))
            row["sum / own effect"] = float(values.sum() / effects[:, :, 0].sum())
            row["sum / end effect"] = float(values.sum() / effects[:, :, -1].sum())
            rows.append(row)
    count = effects.shape[0] * effects.shape[1]
    title = f"Spearman with the effect of {count} removals, mean of two targets"
    shown = [row for row in rows if row["estimator"] == "first_order, drift"]
    panels = [partial(_draw, rows=shown), partial(_scatter, values=values, effects=effects[:, :, -1])]
    return Outcome([Table(title, rows)], raw, panels)


def _correlation(values: np.ndarray, effects: np.ndarray) -> Figure:
    """Mean over targets of Spearman's correlation, of `[points, rows, K]`; removals are resampled."""
    targets = values.shape[-1]
    return spearman(values.reshape(-1, targets), effects.reshape(-1, targets))


def _centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean(1, keepdims=True)


def _draw(axes: Axes, rows: list[dict]) -> None:
    labels = [f"{row['credit']}, {name}" for row in rows for name in HORIZON_NAMES]
    figures = [row[name] for row in rows for name in HORIZON_NAMES]
    bars(axes, labels, figures, "first_order, drift: Spearman with the effect", 0.0)


def _scatter(axes: Axes, values: np.ndarray, effects: np.ndarray) -> None:
    for k, name in enumerate(("code", "prose")):
        axes.plot(values[..., k].ravel(), effects[..., k].ravel(), ".", label=name)
    axes.set_xscale("symlog", linthresh=1e-5)
    axes.set_yscale("symlog", linthresh=1e-5)
    axes.set_xlabel("value (simpson, trajectory credit)", fontsize=8)
    axes.set_ylabel("effect at the end of the run", fontsize=8)
    axes.legend(fontsize=7)


ITEM = Item("loo", "Does a sample's value say what leaving it out of its step does?", run)
