"""What values lose when directions are taken in every N-th step only; `python -m benchmarks.direction --refresh` runs it.

Small GPTs train on the demo's text (benchmarks/fidelity_settings.py). In windows of 16 steps every sample is valued with
the direction of its own step, and with the one that `--shapley-refresh N` would use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks.fidelity_settings import Experiment, Setting
from tests.oracle import OracleTrainer, Parameters, first_order_values, sample_gradients
from tests.oracle_optimizer import global_norm, scalar_part

REFRESHES = (2, 4, 8, 16)
WINDOW = 16
STARTS = (1, 33, 129)  # steps, each 1 more than a multiple of all refreshes


def _scalar(trainer: OracleTrainer) -> float:
    return scalar_part(trainer.optimizer, trainer.lr, trainer.state.steps)


def window_values(setting: Setting, seed: int) -> list[list[list[Tensor]]]:
    """Values [16 samples, K] by window, step and refresh; the first refresh is 1."""
    experiment = Experiment(setting, seed)
    trainer = experiment.trainer
    windows: list[list[list[Tensor]]] = []
    steps = tuple(start + i for start in STARTS for i in range(WINDOW))
    held: dict[int, tuple[list[Parameters], float]] = {}
    for step, batch in experiment.at(steps):
        offset = steps.index(step) % WINDOW
        if offset == 0:
            windows.append([])
        samples = sample_gradients(trainer.model, trainer.weights, batch)
        clip = trainer.optimizer.clip_coefficient(global_norm(samples.total()))
        own = trainer.directions(trainer.target_gradients()[1])
        assert own is not None
        row = [first_order_values(own, samples, clip)]
        for refresh in REFRESHES:
            if offset % refresh == 0:
                held[refresh] = own, _scalar(trainer)
            directions, then = held[refresh]
            row.append(first_order_values(directions, samples, clip * _scalar(trainer) / then))
        windows[-1].append(row)
    return windows


def pearson(left: Tensor, right: Tensor) -> Tensor:
    """By target, of [n, K] each."""
    left, right = left - left.mean(0), right - right.mean(0)
    return (left * right).sum(0) / (left.norm(dim=0) * right.norm(dim=0))


def figures(windows: list[list[list[Tensor]]]) -> list[list[dict[str, float]]]:
    """By window and refresh, the lower of two targets: Pearson with the values of fresh directions."""
    result = []
    for window in windows:
        found = []
        for i in range(1, len(REFRESHES) + 1):
            steps = torch.stack([pearson(row[i], row[0]) for row in window])
            pooled = pearson(torch.cat([row[i] for row in window]), torch.cat([row[0] for row in window]))
            found.append(
                {
                    "steps": float(steps.mean(0).min()),
                    "pooled": float(pooled.min()),
                }
            )
        result.append(found)
    return result


def report(settings: Mapping[str, Setting], seeds: int, as_json: bool) -> None:
    """Print the table, or every seed's figures as JSON."""
    found: dict[str, list[list[list[dict[str, float]]]]] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("training", total=len(settings) * seeds)
        for name, setting in settings.items():
            found[name] = []
            for seed in range(seeds):
                found[name].append(figures(window_values(setting, seed)))
                progress.advance(task)
    if as_json:
        axes = {"seeds": list(range(seeds)), "windows": STARTS, "refreshes": REFRESHES}
        print(json.dumps({"axes": axes, "pearson": found}))
        return
    table = Table(
        title=f"Pearson with values of fresh directions, lower of two targets, mean over {seeds} seeds"
    )
    columns = [f"steps {start}-{start + WINDOW - 1}" for start in STARTS]
    for column in ("shape", "refresh", *columns, *(f"pooled, {column}" for column in columns)):
        table.add_column(column)
    for name, runs in found.items():
        for i, refresh in enumerate(REFRESHES):
            cells = [
                f"{sum(run[w][i][key] for run in runs) / seeds:.3f}"
                for key in ("steps", "pooled")
                for w in range(len(STARTS))
            ]
            table.add_row(name, str(refresh), *cells)
        table.add_section()
    Console(width=140).print(table)
