"""Item 4: do the values find corrupted text that makes up 5% of a corpus?

Three kinds: bytes in random order, another language, one boilerplate text over and over. The score of a sequence is minus
its summed value towards clean held-out code and prose; AUROC is the chance that a corrupted sequence scores above a clean
one. Scores are ranks within a run, so that runs of several seeds can be pooled.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial

import torch
from scipy import stats
from torch import Tensor

from . import baselines, corpus
from .items import Item, Outcome, Table, bars, collect
from .statistics import auroc
from .training import DEFAULT, METHODS, Method, Recipe, Targets, epochs, scored_run

KINDS = ("shuffled", "language", "boilerplate")
SCORED = (METHODS[0], DEFAULT, METHODS[3])


@dataclass(frozen=True)
class Setting:
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=90, lr=3e-3))
    rows: int = 480
    bad: int = 8  # of each kind
    target_rows: int = 8  # of code and of prose each
    seeds: int = 3

    def data(self, seed: int) -> tuple[Tensor, Tensor, Targets]:
        """Sequences, each one's kind (-1: clean, else of KINDS), and the target."""
        length = self.recipe.shape.sequence
        half = [corpus.rows(corpus.stream(d), self.rows // 2, length, seed) for d in ("code", "prose")]
        sequences = torch.cat(half)[torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed))]
        kind = torch.full((self.rows,), -1)
        kind[: self.bad * len(KINDS)] = torch.arange(len(KINDS)).repeat_interleave(self.bad)
        sequences[kind == 0] = corpus.shuffled_tokens(sequences[kind == 0], seed)
        sequences[kind == 1] = corpus.wrong_language(self.bad, length, seed)
        sequences[kind == 2] = corpus.boilerplate(self.bad, length)
        held_out = [
            corpus.rows(corpus.stream(f"target_{d}"), self.target_rows, length, seed)
            for d in ("code", "prose")
        ]
        return sequences, kind, {"clean": torch.cat(held_out)}


SMALL = Setting()
FULL = Setting(Recipe(steps=300, lr=3e-3), rows=1600, bad=27, seeds=8)


@dataclass(frozen=True)
class Job:
    setting: Setting
    seed: int
    method: Method
    sequences: Tensor
    targets: Targets


def score(job: Job) -> dict[str, Tensor]:
    """Suspicion of every sequence, `[N]`, by name; the baselines come with the default estimator's run."""
    torch.set_num_threads(1)
    recipe, samples = job.setting.recipe, len(job.sequences)
    order = epochs(samples, recipe, job.seed)
    run = scored_run(recipe, job.sequences, order, job.targets, job.method, job.seed)
    name, third = job.method.name, recipe.steps // 3 + 1
    found = {
        f"{name}, whole run": -run.by_sample(samples)[:, 0],
        f"{name}, last two thirds": -run.by_sample(samples, first_step=third)[:, 0],
    }
    if job.method == DEFAULT:
        dots = baselines.gradient_dot(recipe.shape, run.weights, job.sequences, job.targets)
        found["gradient dot, final checkpoint"] = -dots[:, 0]
        found["BM25 overlap"] = -baselines.overlap(job.sequences, job.targets)[:, 0]
        found["own loss"] = -baselines.negative_loss(run.row_losses, order, samples, 1)[:, 0]
    return found


def run(pool: Executor, full: bool) -> Outcome:
    setting = FULL if full else SMALL
    seeds = range(setting.seeds)
    data = [setting.data(seed) for seed in seeds]
    jobs = [Job(setting, seed, method, data[seed][0], data[seed][2]) for method in SCORED for seed in seeds]
    results = collect(pool, score, jobs)
    pooled: dict[str, list[Tensor]] = {}  # name -> ranks [N] per seed
    for result in results:
        for name, values in result.items():
            ranks = torch.from_numpy(stats.rankdata(values.numpy())) / len(values)
            pooled.setdefault(name, []).append(ranks)
    kinds = torch.cat([kind for _, kind, _ in data])
    rows = []
    for name, parts in pooled.items():
        ranks = torch.cat(parts).numpy()
        row = {"score": name}
        for i, kind in enumerate((*KINDS, "all")):
            bad = kinds >= 0 if kind == "all" else kinds == i
            row[kind] = auroc(ranks[bad.numpy()], ranks[(kinds < 0).numpy()])
        rows.append(row)
    share = setting.bad * len(KINDS) / setting.rows
    title = f"AUROC of {share:.0%} corrupted among {setting.rows} sequences, {setting.seeds} seeds"
    labels = [f"{row['score']}" for row in rows]
    panels = [
        partial(bars, labels=labels, figures=[row[kind] for row in rows], title=kind, reference=0.5)
        for kind in (*KINDS, "all")
    ]
    raw = {"kinds": kinds.tolist(), "ranks": {n: torch.cat(p).tolist() for n, p in pooled.items()}}
    return Outcome([Table(title, rows)], raw, panels)


ITEM = Item("harm", "Do the values find corrupted text?", run)
