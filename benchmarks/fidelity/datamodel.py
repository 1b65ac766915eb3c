"""Item 3: the linear datamodeling score (Park et al., TRAK, arXiv 2303.14186, section 2.1).

Train on random halves of a small corpus (every row keeps its place, absent rows are left out of their steps). The score
of an attribution is Spearman's correlation, over the halves, of the summed values of the sequences that were there with
minus the target's loss; the mean over the targets. The corpus has a few sources, and each target is held-out text of one.

The same halves are trained once more from other weights in another order: how those losses rank the halves is what a
score of the data alone, that does not know this run's order, can reach.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import baselines, corpus
from .items import Item, Outcome, Table, bars, collect
from .statistics import spearman, spearman_difference
from .training import METHODS, Method, Recipe, ScoredRun, Targets, epochs, retrained, scored_run

BASELINE = "BM25 overlap"


@dataclass(frozen=True)
class Setting:
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=96, lr=3e-3))
    sources: int = 4  # of code and of prose each
    rows: int = 16  # of a source
    target_rows: int = 4
    halves: int = 100
    seed: int = 0

    def data(self) -> tuple[Tensor, Tensor, Targets]:
        sequences, targets = [], {}
        for domain in ("code", "prose"):
            for source in corpus.sources(domain)[: self.sources]:
                found = corpus.rows(
                    source.text, self.rows + self.target_rows, self.recipe.shape.sequence, self.seed
                )
                sequences.append(found[: self.rows])
                targets[source.name] = found[self.rows :]
        joined = torch.cat(sequences)
        return joined, epochs(len(joined), self.recipe, self.seed), targets


SMALL = Setting()
FULL = Setting(Recipe(steps=256, lr=3e-3), sources=8, rows=32, halves=200)


@dataclass(frozen=True)
class Job:
    setting: Setting
    sequences: Tensor
    order: Tensor
    targets: Targets
    seed: int
    halves: Tensor | None = None  # [m, N]
    method: Method | None = None


def retrain(job: Job) -> Tensor:
    """Target losses `[m, K]` of m halves."""
    torch.set_num_threads(1)
    assert job.halves is not None
    losses = [
        retrained(job.setting.recipe, job.sequences, job.order, job.targets, job.seed, half[job.order])
        for half in job.halves
    ]
    return torch.stack(losses)


def score(job: Job) -> ScoredRun:
    torch.set_num_threads(1)
    assert job.method is not None
    return scored_run(job.setting.recipe, job.sequences, job.order, job.targets, job.method, job.seed)


def run(pool: Executor, full: bool) -> Outcome:
    setting = FULL if full else SMALL
    sequences, order, targets = data = setting.data()
    samples = len(sequences)
    generator = torch.Generator().manual_seed(setting.seed)
    halves = torch.zeros(setting.halves, samples, dtype=torch.bool)
    for half in halves:
        half[torch.randperm(samples, generator=generator)[: samples // 2]] = True
    runs = collect(pool, score, [Job(setting, *data, setting.seed, method=method) for method in METHODS])
    other = (sequences, epochs(samples, setting.recipe, setting.seed + 1), targets, setting.seed + 1)
    jobs = [
        Job(setting, *trained, halves=part)
        for trained in ((*data, setting.seed), other)
        for part in halves.split(5)
    ]
    both = torch.cat(collect(pool, retrain, jobs)).numpy()
    losses, other_losses = both[: setting.halves], both[setting.halves :]  # [m, K] each

    scores: dict[str, Tensor] = {}
    for method, scored in zip(METHODS, runs, strict=True):
        scores |= {f"{method.name}, {rule}": sums for rule, sums in scored.by_rule(samples).items()}
        scores[f"{method.name}, trajectory credit"] = scored.by_sample(samples, "trajectory")
    last = runs[-1]
    scores["gradient dot, final checkpoint"] = baselines.gradient_dot(
        setting.recipe.shape, last.weights, sequences, targets
    )
    scores[BASELINE] = baselines.overlap(sequences, targets)
    scores["minus own loss"] = baselines.negative_loss(last.row_losses, order, samples, len(targets))
    return tabulate(
        {
            "targets": list(targets),
            "losses": losses.tolist(),
            "losses from another seed": other_losses.tolist(),
            "halves": halves.int().tolist(),
            "scores": {name: values.tolist() for name, values in scores.items()},
        }
    )


def tabulate(raw: dict[str, Any]) -> Outcome:
    """Table and plot of the figures as they are in the JSON file."""
    halves, losses = np.array(raw["halves"], dtype=float), np.array(raw["losses"])  # [m, N], [m, K]
    sums = {name: halves @ np.array(values) for name, values in raw["scores"].items()}
    sums["(the halves' losses from another seed)"] = -np.array(raw["losses from another seed"])
    table = [
        {
            "attribution": name,
            "LDS": spearman(values, -losses),
            f"less that of {BASELINE}": spearman_difference(values, sums[BASELINE], -losses),
        }
        for name, values in sums.items()
    ]
    title = (
        f"LDS over {len(halves)} halves of {halves.shape[1]} sequences, mean of {len(raw['targets'])} targets"
    )
    labels, figures = [row["attribution"] for row in table], [row["LDS"] for row in table]
    panel = partial(bars, labels=labels, figures=figures, title=title, reference=0.0)
    return Outcome([Table(title, table)], raw, [panel])


ITEM = Item("lds", "Do the values add up to what a model learns from half of the data?", run)
