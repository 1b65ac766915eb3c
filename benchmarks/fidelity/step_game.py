"""Item 1: estimators against Monte Carlo Shapley values of the real step.

The game is `tests/montecarlo.py`'s; gradients are the fp64 oracle's (`tests/oracle.py`), one sample at a time, and the
estimators are the package's own: `jacobian.write_point` finds the nodes, `jacobian.condition` makes the direction.

Truth is a Monte Carlo mean: `noise` is its standard error over the spread of the values, `ceiling` the Pearson
correlation that a perfect estimator could reach, `sqrt(1 - noise^2)`. At t = 1 every Adam update is lr * sign, so
almost every coordinate is a vote and the truth would need many times the permutations. Where an estimator misses its
goal after the first step, the truth is computed again, in fp64 and with more permutations: is it the estimator, or was
the truth not known well enough to tell?
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from benchmarks.fidelity_settings import Experiment, Kind, Setting
from inrun_megatron.optimizers import AdamStep, ProxyStep, SGDStep, Step
from inrun_megatron.optimizers.jacobian import condition, write_point
from inrun_megatron.shapley.estimators import Estimator
from tests.montecarlo import MonteCarlo, OptimizerGame, compare, monte_carlo
from tests.oracle import OptimizerSpec, OracleTrainer, target_gradient

from .items import Item, Outcome, Table, collect
from .routing import HeldRouting
from .statistics import median
from .training import METHODS, Method

STEPS = (1, 5, 30, 150)
GOALS = {"first_order, drift": 0.97, "midpoint": 0.998, "simpson": 0.998}
"""Lowest Pearson correlation after the first step, by estimator."""
RATES = (1.0, 3.0, 10.0)
OPTIMIZERS = {
    "AdamW": (OptimizerSpec("adamw", weight_decay=0.1, clip=1.0), 3e-4),
    "SGD, momentum 0.9": (OptimizerSpec("sgd", momentum=0.9, clip=1.0), 0.03),
}


@dataclass(frozen=True)
class Case:
    """One training run: the learning rate is `rate` times the optimizer's."""

    optimizer: str
    kind: Kind
    rate: float
    seed: int
    steps: tuple[int, ...]
    permutations: int
    again: int = 200
    """Permutations where a goal is missed."""
    held: bool = False
    """Tokens of the targets keep the experts of the empty game's weights, Phi(0); training goes on as ever."""


def measure(case: Case) -> list[dict[str, Any]]:
    """One record per step, target and method."""
    torch.set_num_threads(1)
    spec, lr = OPTIMIZERS[case.optimizer]
    experiment = Experiment(Setting(case.kind, lr * case.rate), case.seed)
    experiment.trainer.optimizer = spec
    found = []
    trainer = experiment.trainer
    model = trainer.model
    for step, batch in experiment.at(case.steps):
        if case.held:
            trainer.model = HeldRouting(model.shape)
        game = OptimizerGame(trainer, batch, torch.float32)
        truth = monte_carlo(game, case.permutations, case.seed)
        gradients = game.clip * torch.cat([part.flatten(1) for part in game.samples.stacked.values()], 1)
        values = {method.name: estimated(trainer, method, gradients) for method in METHODS}
        here = {name: _against(one, truth) for name, one in values.items()}
        if step > 1 and any(min(here[name]["pearson"]) < goal for name, goal in GOALS.items()):
            exact = OptimizerGame(trainer, batch, torch.float64)
            better = monte_carlo(exact, case.again, case.seed + 1)
            for name, one in values.items():
                here[name] |= {f"again_{key}": v for key, v in _against(one, better).items()}
        trainer.model = model
        for name, columns in here.items():
            for k, target in enumerate(trainer.targets):
                found.append(
                    {
                        "optimizer": case.optimizer,
                        "shape": case.kind,
                        "rate": case.rate,
                        "seed": case.seed,
                        "held": case.held,
                        "step": step,
                        "target": target.name,
                        "method": name,
                        **{key: column[k] for key, column in columns.items()},
                    }
                )
    return found


def _against(values: Tensor, truth: MonteCarlo) -> dict[str, list[float]]:
    """What `[n, K]` values come to, a list over targets by name; noise is the truth's own."""
    fit = compare(values, truth.values)
    spread = truth.values.sub(truth.values.mean(0)).norm(dim=0)
    return {
        "pearson": fit.pearson,
        "spearman": fit.spearman,
        "relative_rmse": ((values - truth.values).norm(dim=0) / truth.values.norm(dim=0)).tolist(),
        "sum_error": [abs(error) for error in fit.sum_error],
        "sum_over_utility": (values.sum(0) / truth.values.sum(0)).tolist(),
        "noise": (truth.standard_error.norm(dim=0) / spread).tolist(),
    }


def estimated(trainer: OracleTrainer, method: Method, gradients: Tensor) -> Tensor:
    """Values `[n, K]` at the trainer's state, of clipped gradients `[n, P]`."""
    estimator = Estimator.of(method.estimator, method.base)
    steps = [_step(trainer, name, method) for name in trainer.weights]
    sizes = [weight.numel() for weight in trainer.weights.values()]
    total = gradients.sum(0)
    paths = total.split(sizes) if estimator.follows_batch else [None] * len(sizes)
    slopes = total.new_zeros(len(trainer.targets), len(total))
    for node in estimator.nodes:
        at = torch.cat([weight.flatten() for weight in trainer.weights.values()])
        parts = at.split(sizes)
        if node.share is not None:
            for step, path, part in zip(steps, paths, parts, strict=True):
                write_point(step, node.share, path, part)
        moved = {n: p.view_as(w) for (n, w), p in zip(trainer.weights.items(), parts, strict=True)}
        for slope, target in zip(slopes, trainer.targets, strict=True):
            gradient = target_gradient(trainer.model, moved, target)[1]
            slope += node.weight * torch.cat([part.flatten() for part in gradient.values()])
    clips = [trainer.optimizer.clip_coefficient(float(slope.norm())) for slope in slopes]
    for step, path, *parts in zip(steps, paths, *(slope.split(sizes) for slope in slopes), strict=True):
        condition(step, parts, clips, [], path)
    return gradients @ slopes.T


def _step(trainer: OracleTrainer, name: str, method: Method) -> Step:
    """The coming step of one parameter."""
    spec, state, lr = trainer.optimizer, trainer.state, trainer.lr
    weights, moments = trainer.weights[name].flatten(), trainer.state.moments[name]
    if method.optimizer == "sgd":
        return ProxyStep(lr, weights)
    if spec.kind == "sgd":
        buffer = moments.first.flatten() if state.steps else None
        return SGDStep(lr, weights, spec.momentum, momentum_buffer=buffer)
    return AdamStep(
        lr,
        spec.beta1,
        spec.beta2,
        spec.eps,
        spec.decay_of(name, trainer.weights[name]),
        decoupled=True,
        bias_correction=True,
        t=state.steps + 1,
        weights=weights,
        exp_avg=moments.first.flatten(),
        exp_avg_sq=moments.second.flatten(),
    )


def run(pool: Executor, full: bool) -> Outcome:
    return tabulate(_records(pool, full, ("gpt2", "llama") if full else ("gpt2",)))


def run_experts(pool: Executor, full: bool) -> Outcome:
    """Twice: as it is, and with the routing of the targets held."""
    own, held = (_records(pool, full, ("experts",), held=held) for held in (False, True))
    outcome, other = tabulate(own), tabulate(held)
    for table in other.tables:
        table.title = f"Routing held. {table.title}"
    return Outcome([*outcome.tables, *other.tables], own + held, outcome.panels)


def _records(pool: Executor, full: bool, kinds: Sequence[Kind], held: bool = False) -> list[dict[str, Any]]:
    seeds, permutations = (range(5), 100) if full else (range(1), 30)
    cases = [
        Case(optimizer, kind, rate, seed, STEPS, permutations, held=held)
        for seed in seeds
        for kind in kinds
        for rate in RATES
        for optimizer in OPTIMIZERS
    ]
    return [record for found in collect(pool, measure, cases) for record in found]


def tabulate(records: list[dict[str, Any]]) -> Outcome:
    """Tables and plot of the records as they are in the JSON file."""
    tables = []
    for first, title in ((False, f"t = {STEPS[1]} and later"), (True, "t = 1")):
        rows = []
        for optimizer in OPTIMIZERS:
            for method in METHODS:
                here = [
                    r
                    for r in records
                    if (r["step"] == 1) == first and (r["optimizer"], r["method"]) == (optimizer, method.name)
                ]
                rows.append({"optimizer": optimizer, "estimator": method.name, **_summary(here)})
        tables.append(
            Table(f"Against Monte Carlo Shapley values, {title}: {len(here)} games and targets", rows)
        )
    rates = []
    for optimizer in OPTIMIZERS:
        for method in METHODS:
            row = {"optimizer": optimizer, "estimator": method.name}
            for rate in RATES:
                found = [
                    r["pearson"]
                    for r in records
                    if r["step"] > 1
                    and (r["optimizer"], r["method"], r["rate"]) == (optimizer, method.name, rate)
                ]
                row |= {f"{rate:g}x, median": statistics.median(found), f"{rate:g}x, lowest": min(found)}
            rates.append(row)
    tables.append(Table("Pearson by learning rate, after the first step", rates))
    rows = [_worst([r for r in records if r["step"] > 1 and r["method"] == m.name]) for m in METHODS]
    tables.append(Table("Where each estimator is least faithful", rows))
    missed = [r for r in records if r["pearson"] < GOALS.get(r["method"], -1.0) and r["step"] > 1]
    if missed:
        title = f"Goals missed: the same with {Case.again} permutations"
        tables.append(Table(title, [_missed(r) for r in missed]))
    return Outcome(tables, records, [partial(_draw, records=records, optimizer=name) for name in OPTIMIZERS])


def _summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    column = {key: [r[key] for r in records] for key in ("pearson", "spearman", "relative_rmse", "sum_error")}
    return {
        "Pearson": median(column["pearson"]),
        "lowest": min(column["pearson"]),
        "Spearman": median(column["spearman"]),
        "relative RMSE": median(column["relative_rmse"]),
        "sum error": median(column["sum_error"]),
        "largest": max(column["sum_error"]),
        "sum / utility": statistics.median(r["sum_over_utility"] for r in records),
        "noise of the truth": max(r["noise"] for r in records),
    }


def _worst(records: list[dict[str, Any]]) -> dict[str, Any]:
    worst = min(records, key=lambda r: r["pearson"])
    keys = ("method", "optimizer", "shape", "rate", "seed", "step", "target", "pearson", "noise")
    return {key: worst[key] for key in keys}


def _missed(record: dict[str, Any]) -> dict[str, Any]:
    keys = ("method", "optimizer", "shape", "rate", "seed", "step", "target", "pearson", "noise")
    renamed = {"again_pearson": "pearson again", "again_noise": "noise again"}
    again = {name: record[key] for key, name in renamed.items()}
    return {key: record[key] for key in keys} | again | {"sum / utility": record["again_sum_over_utility"]}


def _draw(axes: Axes, records: list[dict[str, Any]], optimizer: str) -> None:
    """1 - Pearson on a logarithmic axis, a dot per game and target after the first step."""
    for i, method in enumerate(METHODS):
        values = [
            1.0 - r["pearson"]
            for r in records
            if r["step"] > 1 and (r["optimizer"], r["method"]) == (optimizer, method.name)
        ]
        axes.plot(values, [i] * len(values), "|", markersize=12)
    axes.set_yticks(range(len(METHODS)), [method.name for method in METHODS], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_title(f"{optimizer}: 1 - Pearson", fontsize=9)


ITEM = Item("step", "Are the values the Shapley values of the real step?", run)
EXPERTS = Item("experts", "Are they where tokens choose their experts?", run_experts)
