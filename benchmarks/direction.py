"""How much of the validation gradient should stand in for a second moment that has seen nothing yet?

    python -m benchmarks.direction                      # the table in docs/algorithm.md
    python -m benchmarks.direction --json > direction.json
    python -m benchmarks.direction --refresh            # values from directions of earlier steps: benchmarks/refresh.py
    python -m benchmarks.direction --storage            # values from directions in bf16: benchmarks/storage.py

Compares AdamW's first-order values, with several shares of the clipped validation gradient in h (docs/algorithm.md),
with Monte Carlo Shapley values of the real step. Share 0 is the step's derivative; at the first step it is not defined,
and the package takes the whole gradient there, so the table starts at the second.
"""

from __future__ import annotations

import json
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.fidelity_settings import Experiment, Setting
from tests.montecarlo import OptimizerGame, compare, monte_carlo
from tests.oracle import OracleTrainer, Parameters, first_order_values
from tests.oracle_optimizer import STAND_IN, global_norm, jacobian_tensor

SHARES = (0.0, 0.1, 0.1**0.5, (1 / 3) ** 0.5, 1.0)
STEPS = (2, 3, 5, 8, 30)
SETTINGS = {"GPT-2": Setting("gpt2", 1e-3), "Llama": Setting("llama", 3e-4)}


def direction(trainer: OracleTrainer, slope: Parameters, share: float) -> Parameters:
    """d = J h, with `share` of the clipped validation gradient in J's second moment."""
    clip = trainer.optimizer.clip_coefficient(global_norm(slope))
    result = {}
    for name, gradient in slope.items():
        weight, moments = trainer.weights[name], trainer.state.moments[name]
        decay = trainer.optimizer.decay_of(name, weight)
        seen = share * clip * gradient
        steps = trainer.state.steps
        jacobian = jacobian_tensor(trainer.optimizer, trainer.lr, steps, weight, moments, decay, seen)
        result[name] = jacobian * gradient
    return result


def correlations(setting: Setting, seed: int, permutations: int) -> list[list[list[float]]]:
    """Pearson with the Monte Carlo values, [steps][shares][targets]."""
    experiment, result = Experiment(setting, seed), []
    trainer = experiment.trainer
    for _, batch in experiment.at(STEPS):
        game = OptimizerGame(trainer, batch, torch.float32)
        truth = monte_carlo(game, permutations)
        _, slopes = trainer.target_gradients()
        row = []
        for share in SHARES:
            directions = [direction(trainer, slope, share) for slope in slopes]
            row.append(compare(first_order_values(directions, game.samples, game.clip), truth.values).pearson)
        result.append(row)
    return result


def _table(found: dict[str, torch.Tensor]) -> Table:
    """Of [seeds, steps, shares, targets] by setting."""
    seeds = len(next(iter(found.values())))
    table = Table(title=f"Pearson, lower of two targets, mean over {seeds} seeds")
    for column in ("shape", "share in h", *(f"t={step}" for step in STEPS)):
        table.add_column(column)
    for name, values in found.items():
        for i, share in enumerate(SHARES):
            lowest = values[:, :, i].amin(-1).mean(0).tolist()
            used = " (used)" if share == STAND_IN else ""
            table.add_row(name, f"{share:.2g}{used}", *(f"{value:.3f}" for value in lowest))
        table.add_section()
    return table


def main(
    seeds: Annotated[int, typer.Option(min=1, help="seeds 0, 1, ... of weights and text")] = 5,
    permutations: Annotated[int, typer.Option(min=2, help="orders of the batch; even: they pair up")] = 40,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="values from older directions against those of fresh ones")
    ] = False,
    storage: Annotated[
        bool, typer.Option("--storage", help="values from directions in bf16 against exact ones")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print every seed's figures as JSON")] = False,
) -> None:
    """The share of the validation gradient in h against Monte Carlo Shapley values of the real AdamW step."""
    if permutations % 2:
        raise typer.BadParameter(
            "must be even: every order is followed by its reverse", param_hint="--permutations"
        )
    torch.set_num_threads(1)
    if refresh or storage:
        from benchmarks import refresh as older
        from benchmarks import storage as stored

        (older if refresh else stored).report(SETTINGS, seeds, as_json)
        return
    found: dict[str, torch.Tensor] = {}  # [seeds, steps, shares, targets]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Monte Carlo", total=len(SETTINGS) * seeds)
        for name, setting in SETTINGS.items():
            rows = []
            for seed in range(seeds):
                rows.append(correlations(setting, seed, permutations))
                progress.advance(task)
            found[name] = torch.tensor(rows)
    if as_json:
        figures = {name: values.tolist() for name, values in found.items()}
        axes = {"seeds": list(range(seeds)), "steps": STEPS, "shares": SHARES, "targets": ["code", "prose"]}
        print(json.dumps({"permutations": permutations, "axes": axes, "pearson": figures}))
        return
    Console().print(_table(found))


if __name__ == "__main__":
    typer.run(main)
