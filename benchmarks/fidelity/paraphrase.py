"""Item 6: which training passage does a paraphrase point at?

Ten passages (passages.toml) lie among other prose in the corpus. For each of them four targets: the passage itself, a
version with some words exchanged, one that says the same in other words, and another text on the same topic. The rank of
the passage among all training sequences by value towards that target; 1 is the best.
"""

from __future__ import annotations

import tomllib
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import baselines, corpus
from .items import Item, Outcome, Table, bars, collect
from .model import Shape
from .statistics import mean, median
from .training import DEFAULT, METHODS, Method, Recipe, Targets, epochs, scored_run

KINDS = ("exact", "partly", "fully", "topic")
SCORED = (METHODS[0], DEFAULT, METHODS[3])


@dataclass(frozen=True)
class Setting:
    recipe: Recipe = field(default_factory=lambda: Recipe(Shape(sequence=128), steps=80, lr=3e-3))
    others: int = 246  # sequences of other prose
    seed: int = 0

    def data(self) -> tuple[Tensor, Targets]:
        """The passages first; targets in the order of KINDS, each passage by passage."""
        passages = tomllib.loads((Path(__file__).parent / "passages.toml").read_text())["passage"]
        length = self.recipe.shape.sequence

        def row(text: str) -> Tensor:
            return corpus.rows(text, 1, length)

        targets = {f"{kind} {i}": row(p[kind]) for kind in KINDS for i, p in enumerate(passages)}
        others = corpus.rows(corpus.stream("prose"), self.others, length, self.seed)
        return torch.cat([*(row(p["exact"]) for p in passages), others]), targets


SMALL = Setting()
FULL = Setting(Recipe(Shape(layers=4, hidden=96, sequence=128), steps=600, lr=3e-3), others=1014)


@dataclass(frozen=True)
class Job:
    setting: Setting
    method: Method
    sequences: Tensor
    targets: Targets


def score(job: Job) -> dict[str, Tensor]:
    """Scores `[N, K]` by name; the baselines come with the default estimator's run."""
    torch.set_num_threads(1)
    setting, recipe, samples = job.setting, job.setting.recipe, len(job.sequences)
    order = epochs(samples, recipe, setting.seed)
    run = scored_run(recipe, job.sequences, order, job.targets, job.method, setting.seed)
    found = {f"{job.method.name}, {rule}": sums for rule, sums in run.by_rule(samples).items()}
    if job.method == DEFAULT:
        found["gradient dot, final checkpoint"] = baselines.gradient_dot(
            recipe.shape, run.weights, job.sequences, job.targets
        )
        found["BM25 overlap"] = baselines.overlap(job.sequences, job.targets)
    return found


def run(pool: Executor, full: bool) -> Outcome:
    setting = FULL if full else SMALL
    sequences, targets = setting.data()
    passages = len(targets) // len(KINDS)
    scores: dict[str, Tensor] = {}
    for found in collect(pool, score, [Job(setting, method, sequences, targets) for method in SCORED]):
        scores |= found
    rows: list[dict[str, Any]] = []
    ranks = {}
    for name, values in scores.items():
        own = torch.stack([values[k % passages, k] for k in range(len(targets))])
        rank = 1 + (values > own).sum(0)
        ranks[name] = rank.tolist()
        by_kind = rank.view(len(KINDS), passages).numpy()
        for kind, found_ranks in zip(KINDS, by_kind, strict=True):
            rows.append(
                {
                    "score": name,
                    "target": kind,
                    "median rank": median(found_ranks),
                    "first": int((found_ranks == 1).sum()),
                    "mean reciprocal rank": mean(1.0 / found_ranks),
                }
            )
    title = f"Rank of {passages} passages among {len(sequences)} sequences"
    panels = [
        partial(_panel, rows=[row for row in rows if row["target"] == kind], kind=kind) for kind in KINDS
    ]
    return Outcome([Table(title, rows)], {"ranks": ranks, "targets": list(targets)}, panels)


def _panel(axes, rows: list[dict], kind: str) -> None:
    labels, figures = [row["score"] for row in rows], [row["median rank"] for row in rows]
    bars(axes, labels, figures, f"{kind}: median rank (1 is best)", 1.0)
    axes.set_xlim(0, 1.05 * float(np.max([figure.high for figure in figures])))


ITEM = Item("paraphrase", "Does a paraphrase point at the passage that the model was trained on?", run)
