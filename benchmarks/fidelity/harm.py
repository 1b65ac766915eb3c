"""Item 4: do the values find corrupted text that makes up 5% of a corpus?

Three kinds: bytes in random order, another language, one boilerplate text over and over. The score of a sequence is minus
its summed value towards clean held-out code and prose; AUROC is the chance that a corrupted sequence scores above a clean
one. Scores are ranks within a run, so that runs of several seeds can be pooled.

Text that looks bad need not be harmful: so each kind, and as many clean sequences, is also left out of its steps in a run
of its own, and what that does to the target stands beside the kind's values.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from . import baselines, corpus
from .items import Cell, Item, Outcome, Table, bars, collect
from .statistics import auroc, mean
from .training import DEFAULT, METHODS, Method, Recipe, Targets, epochs, retrained, scored_run

KINDS = ("shuffled", "language", "boilerplate")
SCORED = (METHODS[0], DEFAULT)


@dataclass(frozen=True)
class Setting:
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=240, lr=3e-3))
    rows: int = 960
    bad: int = 16  # of each kind
    target_rows: int = 32  # of code and of prose each
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
FULL = Setting(Recipe(steps=900, lr=3e-3), rows=2880, bad=48, seeds=8)


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
    found = {f"{job.method.name}, {rule}": -sums[:, 0] for rule, sums in run.by_rule(samples).items()}
    if job.method == DEFAULT:
        dots = baselines.gradient_dot(recipe.shape, run.weights, job.sequences, job.targets)
        found["gradient dot, final checkpoint"] = -dots[:, 0]
        found["BM25 overlap"] = -baselines.overlap(job.sequences, job.targets)[:, 0]
        found["own loss"] = -baselines.negative_loss(run.row_losses, order, samples, 1)[:, 0]
    return found


@dataclass(frozen=True)
class Without:
    """Training without the sequences of `left_out [N]`."""

    setting: Setting
    seed: int
    sequences: Tensor
    targets: Targets
    left_out: Tensor


def retrain(job: Without) -> float:
    """The target's final loss."""
    torch.set_num_threads(1)
    recipe = job.setting.recipe
    order = epochs(len(job.sequences), recipe, job.seed)
    present = ~job.left_out[order]
    return float(retrained(recipe, job.sequences, order, job.targets, job.seed, present)[0])


def groups(setting: Setting, kind: Tensor) -> dict[str, Tensor]:
    """Which sequences are of each kind, and the last ones of the clean, as many: `[N]` each."""
    found = {name: kind == i for i, name in enumerate(KINDS)}
    clean = torch.zeros_like(kind, dtype=torch.bool)
    clean[-setting.bad :] = True
    return found | {"clean, as many": clean}


def run(pool: Executor, full: bool) -> Outcome:
    setting = FULL if full else SMALL
    seeds = range(setting.seeds)
    data = [setting.data(seed) for seed in seeds]
    jobs = [Job(setting, seed, method, data[seed][0], data[seed][2]) for method in SCORED for seed in seeds]
    results = collect(pool, score, jobs)
    kinds = torch.cat([kind for _, kind, _ in data])
    pooled: dict[str, list[Tensor]] = {}  # name -> ranks [N] per seed
    for result in results:
        for name, values in result.items():
            ranks = torch.from_numpy(stats.rankdata(values.numpy())) / len(values)
            pooled.setdefault(name, []).append(ranks)
    rows = []
    for name, parts in pooled.items():
        joined = torch.cat(parts).numpy()
        row: dict[str, Any] = {"score": name}
        for i, kind in enumerate((*KINDS, "all")):
            bad = kinds >= 0 if kind == "all" else kinds == i
            row[kind] = auroc(joined[bad.numpy()], joined[(kinds < 0).numpy()])
        rows.append(row)
    share = setting.bad * len(KINDS) / setting.rows
    title = f"AUROC of {share:.0%} corrupted among {setting.rows} sequences, {setting.seeds} seeds"
    own = [result for job, result in zip(jobs, results, strict=True) if job.method == DEFAULT]
    effects = _effects(pool, setting, data, own)
    labels = [f"{row['score']}" for row in rows]
    panels = [
        partial(bars, labels=labels, figures=[row[kind] for row in rows], title=kind, reference=0.5)
        for kind in (*KINDS, "all")
    ]
    raw = {"kinds": kinds.tolist(), "ranks": {n: torch.cat(p).tolist() for n, p in pooled.items()}}
    removed = (
        "What leaving a kind out does to the target's loss (positive: it helped), and its values; nats x 1e-3"
    )
    return Outcome([Table(title, rows), Table(removed, effects)], raw, panels)


def _effects(
    pool: Executor,
    setting: Setting,
    data: list[tuple[Tensor, Tensor, Targets]],
    results: list[dict[str, Tensor]],
) -> list[dict[str, Cell]]:
    """A row for each kind: its effect and its summed values, mean over seeds and each seed's."""
    parts = [groups(setting, kind) for _, kind, _ in data]
    nobody = [torch.zeros_like(kind, dtype=torch.bool) for _, kind, _ in data]
    jobs = [
        Without(setting, seed, data[seed][0], data[seed][2], left_out)
        for seed, part in enumerate(parts)
        for left_out in (nobody[seed], *part.values())
    ]
    losses = torch.tensor(collect(pool, retrain, jobs)).view(len(data), -1)  # [seeds, 1 + groups]
    effects = 1e3 * (losses[:, 1:] - losses[:, :1])
    rows: list[dict[str, Cell]] = []
    for g, name in enumerate(parts[0]):
        row: dict[str, Cell] = {"left out": name, "effect": mean(effects[:, g].numpy())}
        row["by seed"] = " ".join(f"{effect:+.2f}" for effect in effects[:, g].tolist())
        for when in ("raw, whole run", "raw, last two thirds"):
            values = [
                -1e3 * float(result[f"{DEFAULT.name}, {when}"][part[name]].sum())
                for result, part in zip(results, parts, strict=True)
            ]
            row[f"values, {when.removeprefix('raw, ')}"] = mean(values)
        rows.append(row)
    return rows


ITEM = Item("harm", "Do the values find corrupted text?", run)
