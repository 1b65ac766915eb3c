"""Item 5: drop what has negative value, train again on as many tokens: how soon is the baseline's final loss reached?

The first run's values towards held-out code and prose decide; other held-out text judges. The second run has the same
weights, schedule and number of tokens, drawn from what was kept. The control drops as many sequences at random. Two
corpora: a third of it shuffled characters, and real text alone.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import corpus
from .items import Item, Outcome, Table, bars, collect
from .statistics import mean
from .training import DEFAULT, Recipe, State, Targets, epochs, scored_run, target_losses

CORPORA = {"a third shuffled": ("code", "prose", "shuffled"), "real text": ("code", "prose")}
RULES = (
    "negative, raw, whole run",
    "negative, raw, last two thirds",
    "negative, normalised, last two thirds",
    "at random, as many",
)


@dataclass(frozen=True)
class Setting:
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=150, lr=3e-3))
    rows: int = 960
    target_rows: int = 32  # of code and of prose each
    judge_rows: int = 32
    every: int = 5  # steps between looks at the judging loss
    seeds: int = 3

    def data(self, name: str, seed: int) -> tuple[Tensor, Targets, Targets]:
        """Sequences, what values are towards, and what judges."""
        length, domains = self.recipe.shape.sequence, CORPORA[name]
        parts = [corpus.rows(corpus.stream(d), self.rows // len(domains), length, seed) for d in domains]
        held_out = [
            corpus.rows(corpus.stream(f"target_{d}"), self.target_rows + self.judge_rows, length, seed)
            for d in ("code", "prose")
        ]
        target = torch.cat([rows[: self.target_rows] for rows in held_out])
        judge = torch.cat([rows[self.target_rows :] for rows in held_out])
        return torch.cat(parts), {"held out": target}, {"judge": judge}


SMALL = Setting()
FULL = Setting(Recipe(steps=400, lr=3e-3), rows=2400, seeds=6)


@dataclass(frozen=True)
class Job:
    setting: Setting
    seed: int
    sequences: Tensor
    targets: Targets
    judges: Targets


def curate(job: Job) -> dict[str, dict[str, float]]:
    """By rule: share kept, final loss less the baseline's, steps to the baseline's final loss over the run's."""
    torch.set_num_threads(1)
    setting, recipe, samples = job.setting, job.setting.recipe, len(job.sequences)
    order = epochs(samples, recipe, job.seed)
    run = scored_run(recipe, job.sequences, order, job.targets, DEFAULT, job.seed)
    goal = _curve(job, order)[-1]
    sums = run.by_rule(samples)
    keep = {rule: (sums[rule.removeprefix("negative, ")][:, 0] >= 0).nonzero()[:, 0] for rule in RULES[:-1]}
    generator = torch.Generator().manual_seed(job.seed)
    keep[RULES[-1]] = torch.randperm(samples, generator=generator)[: len(keep[RULES[-2]])]
    found = {}
    for rule, kept in keep.items():
        curve = _curve(job, kept[epochs(len(kept), recipe, job.seed)])
        found[rule] = {
            "kept": len(kept) / samples,
            "final loss": float(curve[-1] - goal),
            "steps": _reached(curve, goal, setting.every) / recipe.steps,
        }
    return found


def _curve(job: Job, order: Tensor) -> np.ndarray:
    """The judging loss after every `every`-th step of a plain run."""
    setting, recipe = job.setting, job.setting.recipe
    state = State.fresh(recipe, job.seed)
    losses = [
        float(target_losses(state.model, job.judges)[0])
        for t in state.train(recipe, job.sequences, order)
        if t % setting.every == 0
    ]
    return np.array(losses)


def _reached(curve: np.ndarray, goal: float, every: int) -> float:
    """The step at which the loss first is at the goal, between looks by a line; infinite if never."""
    below = np.flatnonzero(curve <= goal)
    if not len(below):
        return float("inf")
    i = int(below[0])
    if i == 0:
        return float(every)
    back = (goal - curve[i]) / (curve[i - 1] - curve[i])
    return float((i + 1 - back) * every)


def run(pool: Executor, full: bool) -> Outcome:
    setting = FULL if full else SMALL
    seeds = range(setting.seeds)
    jobs = [Job(setting, seed, *setting.data(name, seed)) for name in CORPORA for seed in seeds]
    results = collect(pool, curate, jobs)
    rows, raw, panels = [], {}, []
    for i, name in enumerate(CORPORA):
        here = results[i * len(seeds) : (i + 1) * len(seeds)]
        raw[name] = here
        figures = []
        for rule in RULES:
            steps = [result[rule]["steps"] for result in here]
            reached = [value for value in steps if np.isfinite(value)]
            row: dict[str, Any] = {
                "corpus": name,
                "dropped": rule,
                "kept": mean([result[rule]["kept"] for result in here]),
                "final loss, less the baseline's": mean([result[rule]["final loss"] for result in here]),
                "steps to its loss / steps": mean(reached) if reached else "never",
                "seeds that reach it": f"{len(reached)} of {len(steps)}",
            }
            rows.append(row)
            figures.append(row["final loss, less the baseline's"])
        panels.append(
            partial(
                bars,
                labels=list(RULES),
                figures=figures,
                title=f"{name}: final loss, less the baseline's",
                reference=0.0,
            )
        )
    title = f"Curation, {setting.seeds} seeds: mean and 95% interval (Student)"
    return Outcome([Table(title, rows)], raw, panels)


ITEM = Item("curation", "Does training on what has positive value get further with as many tokens?", run)
