"""What values lose when directions are stored in bf16; `python -m benchmarks.direction --storage` runs it.

Small GPTs train on the demo's text (benchmarks/fidelity_settings.py); at some steps every sample is valued with the
direction of its step in fp64 and with the same direction rounded once to bf16.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.fidelity_settings import Experiment, Setting
from benchmarks.refresh import pearson
from tests.oracle import first_order_values, sample_gradients
from tests.oracle_optimizer import global_norm

STEPS = (1, 5, 30, 150)


def differences(setting: Setting, seed: int) -> list[tuple[float, float]]:
    """By step (1 - Pearson, largest difference over the largest value), the worse of two targets."""
    experiment, found = Experiment(setting, seed), []
    trainer = experiment.trainer
    for _, batch in experiment.at(STEPS):
        samples = sample_gradients(trainer.model, trainer.weights, batch)
        clip = trainer.optimizer.clip_coefficient(global_norm(samples.total()))
        own = trainer.directions(trainer.target_gradients()[1])
        assert own is not None
        rounded = [{n: value.to(torch.bfloat16).double() for n, value in d.items()} for d in own]
        exact, stored = (first_order_values(d, samples, clip) for d in (own, rounded))
        worst = ((stored - exact).abs().amax(0) / exact.abs().amax(0)).max()
        found.append((1.0 - float(pearson(stored, exact).min()), float(worst)))
    return found


def report(settings: Mapping[str, Setting], seeds: int, as_json: bool) -> None:
    """Print the table, or every seed's figures as JSON."""
    found = {name: [differences(s, seed) for seed in range(seeds)] for name, s in settings.items()}
    if as_json:
        print(json.dumps({"axes": {"seeds": list(range(seeds)), "steps": STEPS}, "differences": found}))
        return
    table = Table(title=f"bf16 against exact directions, the worst of two targets and {seeds} seeds")
    for column in ("shape", "", *(f"t={step}" for step in STEPS)):
        table.add_column(column)
    for name, runs in found.items():
        for i, what in enumerate(("1 - Pearson", "largest difference / largest value")):
            table.add_row(name, what, *(f"{max(run[t][i] for run in runs):.1e}" for t in range(len(STEPS))))
    Console(width=120).print(table)
