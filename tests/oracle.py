"""The reference that every distributed layout must match: fp64, one process, one backward per sample.

Nothing here is sharded, fused or batched. Sample i's gradient g_i is the gradient of its own share of the loss,
so that sum_i g_i = G, the gradient the optimizer receives before clipping; its value towards target k is
phi_i = c <d_k, g_i> with d_k = J * grad L_k(w) and c the step's clip coefficient.

Legend: n samples of the global batch, K targets, b rows of a microbatch, s tokens. A global batch is
[data-parallel rank][accumulation step] of microbatches, and its n samples are numbered in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracle_batches import GlobalBatch, random_rows, split_batch
from tests.oracle_gpt import (
    GPTShape,
    Microbatch,
    OracleGPT,
    Parameters,
    parameter_shapes,
    random_parameters,
    with_padded_vocab,
)
from tests.oracle_gradients import (
    OracleTarget,
    SampleGradients,
    balancing,
    cuts,
    dot,
    expert_loads,
    first_order_values,
    masked_sum,
    rows_of,
    sample_gradients,
    split_documents,
    target_gradient,
)
from tests.oracle_optimizer import (
    OptimizerSpec,
    OptimizerState,
    global_norm,
    jacobian_all,
    scalar_part,
    step_all,
    with_stand_in,
)
from tests.oracle_shards import merge_shards, split_parameters

__all__ = [
    "GPTShape",
    "GlobalBatch",
    "Microbatch",
    "OptimizerSpec",
    "OptimizerState",
    "OracleGPT",
    "OracleRun",
    "OracleStep",
    "OracleTarget",
    "OracleTrainer",
    "Parameters",
    "SampleGradients",
    "balancing",
    "cuts",
    "dot",
    "expert_loads",
    "first_order_values",
    "masked_sum",
    "merge_shards",
    "parameter_shapes",
    "random_parameters",
    "random_rows",
    "rows_of",
    "sample_gradients",
    "split_batch",
    "split_documents",
    "split_parameters",
    "target_gradient",
    "with_padded_vocab",
]


@dataclass(frozen=True)
class OracleStep:
    """What one training step gave. `values` is None where the step is not scored (see OracleTrainer, at_zero)."""

    step: int  # counted from 1
    train_loss: float
    target_losses: Tensor  # [K], before the step (first_order at the drift point and simpson: at Phi(0))
    gradient_norm: float
    clip_coefficient: float
    values: Tensor | None  # [n, K]
    drift: Tensor  # [K]: <grad L_k, w - Phi(0)>, the momentum and weight-decay terms together
    dataset: Tensor  # [n]
    sample: Tensor  # [n]
    gradient: Parameters  # G, before clipping
    directions: list[Parameters] | None  # K times d_k

    def by_sample(self) -> dict[tuple[int, int], Tensor]:
        """(dataset, sample) -> values [K]; a sample that occurs twice in the batch is an AssertionError."""
        assert self.values is not None, f"step {self.step} is not scored"
        keys = list(zip(self.dataset.tolist(), self.sample.tolist(), strict=True))
        assert len(set(keys)) == len(keys), "the batch holds a sample twice"
        return dict(zip(keys, self.values, strict=True))


@dataclass(frozen=True)
class OracleRun:
    """T steps, the weights and the optimizer state after them."""

    steps: list[OracleStep]
    weights: Parameters
    state: OptimizerState

    @property
    def values(self) -> list[Tensor | None]:
        """[T] of [n, K]."""
        return [step.values for step in self.steps]

    @property
    def losses(self) -> list[float]:
        return [step.train_loss for step in self.steps]

    @property
    def clip_coefficients(self) -> list[float]:
        return [step.clip_coefficient for step in self.steps]


class OracleTrainer:
    """Trains in fp64 and values every sample of every step.

    Args:
        shape, parameters: the model, by full parameters (copied to fp64).
        optimizer, lr: hyperparameters; `lr` is a number or a function of the step, counted from 1.
        targets: the K validation targets.
        proxy: the paper's SGD proxy (arXiv 2406.11011, Theorem 3) under any optimizer: d = lr * grad L_k.
        estimator, base: as InRunShapley's; the path estimators' J is (Phi(0) - Phi(c G)) / (c G), as it stands.
        at_zero: take Adam's J at zero gradient, the exact derivative of the step, instead of at the validation
            gradient (oracle_optimizer.py); Adam's first step is then not scored.
        refresh: first_order takes directions in steps 1, 1 + refresh, ...; those between use the last ones, times what J's
            scalar part has become since.
        frozen: names of parameters that do not train.
    """

    def __init__(
        self,
        shape: GPTShape,
        parameters: Parameters,
        optimizer: OptimizerSpec,
        lr: float | Callable[[int], float],
        targets: Sequence[OracleTarget],
        *,
        proxy: bool = False,
        at_zero: bool = False,
        estimator: str = "first_order",
        base: str = "current",
        refresh: int = 1,
        frozen: Collection[str] = (),
    ) -> None:
        copies = {name: value.detach().double().clone() for name, value in parameters.items()}
        self.model = OracleGPT(shape, frozen={name: copies.pop(name) for name in frozen})
        self.weights = copies
        self.optimizer = optimizer
        self.state = OptimizerState.initial(self.weights)
        self.targets = list(targets)
        self.proxy = proxy
        self.at_zero = at_zero
        self.estimator, self.base = estimator, base
        self.refresh = refresh
        self._held: tuple[list[Parameters] | None, float] = (None, 1.0)
        self.schedule = lr

    @property
    def lr(self) -> float:
        """Learning rate of the coming step."""
        return self.schedule(self.state.steps + 1) if callable(self.schedule) else self.schedule

    def run(self, batches: Sequence[GlobalBatch]) -> OracleRun:
        steps = [self.step(batch) for batch in batches]
        return OracleRun(steps, self.weights, self.state)

    def step(self, batch: GlobalBatch) -> OracleStep:
        """Value the samples of `batch` at the present weights, then take the step."""
        samples = sample_gradients(self.model, self.weights, batch)
        gradient = samples.total()
        norm = global_norm(gradient)
        clip = self.optimizer.clip_coefficient(norm)
        clipped = {name: clip * value for name, value in gradient.items()}
        zero = {name: torch.zeros_like(value) for name, value in gradient.items()}
        resting = self._after(zero)
        moved = {name: self.weights[name] - resting[name] for name in resting}
        losses, slopes = self.node_gradients(resting, self._after(clipped))
        if self.estimator == "first_order":
            directions = self._of_the_last_refresh(self.directions(slopes))
        else:
            directions = []
            for slope in slopes:
                jacobian = self.path_jacobian(clipped, slope)
                directions.append({name: jacobian[name] * value for name, value in slope.items()})
        values = None if directions is None else first_order_values(directions, samples, clip)
        result = OracleStep(
            step=self.state.steps + 1,
            train_loss=samples.loss,
            target_losses=losses,
            gradient_norm=norm,
            clip_coefficient=clip,
            values=values,
            drift=torch.stack([dot(slope, moved) for slope in slopes]) if slopes else torch.zeros(0),
            dataset=samples.dataset,
            sample=samples.sample,
            gradient=gradient,
            directions=directions,
        )
        self.weights, self.state = step_all(self.optimizer, self.lr, self.weights, clipped, self.state)
        return result

    def _of_the_last_refresh(self, own: list[Parameters] | None) -> list[Parameters] | None:
        now = self.lr if self.proxy else scalar_part(self.optimizer, self.lr, self.state.steps)
        if self.state.steps % self.refresh == 0:
            self._held = (own, now)
        held, then = self._held
        if held is None or held is own:
            return own
        return [{name: value * (now / then) for name, value in direction.items()} for direction in held]

    def _after(self, clipped: Parameters, state: OptimizerState | None = None) -> Parameters:
        """Phi(g): the weights after a step with this clipped gradient."""
        if self.proxy:
            return {name: value - self.lr * clipped[name] for name, value in self.weights.items()}
        return step_all(self.optimizer, self.lr, self.weights, clipped, state or self.state)[0]

    def path_jacobian(self, clipped: Parameters, slope: Parameters) -> Parameters:
        """(Phi(0) - Phi(c G)) / (c G) as it stands; 0 where G is exactly 0, and with it every g_i.

        Phi's second moment has seen the stand-in for its steps so far (docs/algorithm.md) beside what it has seen.
        """
        state = self.state
        if self.optimizer.adaptive and not self.proxy:
            state = with_stand_in(self.optimizer, state, slope)
        zero = {name: torch.zeros_like(value) for name, value in clipped.items()}
        start, end = self._after(zero, state), self._after(clipped, state)
        return {
            name: torch.where(value == 0, 0.0, (start[name] - end[name]) / value)
            for name, value in clipped.items()
        }

    def node_gradients(self, resting: Parameters, arrived: Parameters) -> tuple[Tensor, list[Parameters]]:
        """L_k [K] before the step and the weighted mean of grad L_k over the estimator's nodes."""
        if self.estimator == "first_order" and self.base == "current":
            return self.target_gradients()
        nodes = {
            "first_order": [(0.0, 1.0)],
            "midpoint": [(0.5, 1.0)],
            "simpson": [(0.0, 1 / 6), (0.5, 4 / 6), (1.0, 1 / 6)],
        }[self.estimator]
        own, losses = self.weights, self.target_gradients()[0]
        total = [{name: torch.zeros_like(value) for name, value in own.items()} for _ in self.targets]
        try:
            for share, weight in nodes:
                self.weights = {n: (1 - share) * resting[n] + share * arrived[n] for n in own}
                here, slopes = self.target_gradients()
                losses = here if share == 0.0 else losses
                for sums, slope in zip(total, slopes, strict=True):
                    for name in sums:
                        sums[name] += weight * slope[name]
        finally:
            self.weights = own
        return losses, total

    def target_gradients(self) -> tuple[Tensor, list[Parameters]]:
        """L_k [K] and grad L_k of every target at the present weights."""
        pairs = [target_gradient(self.model, self.weights, target) for target in self.targets]
        return torch.tensor([loss for loss, _ in pairs], dtype=torch.float64), [slope for _, slope in pairs]

    def directions(
        self, slopes: list[Parameters], *, proxy: bool | None = None, at_zero: bool | None = None
    ) -> list[Parameters] | None:
        """d_k of every target from its gradient; None where the step is not scored. Keywords override the trainer's."""
        if self.proxy if proxy is None else proxy:
            return [{name: self.lr * value for name, value in slope.items()} for slope in slopes]
        zero = self.at_zero if at_zero is None else at_zero
        directions = []
        for slope in slopes:
            at = None if zero else slope
            jacobian = jacobian_all(self.optimizer, self.lr, self.weights, self.state, at)
            if jacobian is None:
                return None
            directions.append({name: jacobian[name] * value for name, value in slope.items()})
        return directions
