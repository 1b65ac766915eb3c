"""The reference that every distributed layout must match: fp64, one process, one backward per sample.

Nothing here is sharded, fused or batched. Sample i's gradient g_i is the gradient of its own share of the loss,
so that sum_i g_i = G, the gradient the optimizer receives before clipping; its value towards target k is
phi_i = c <d_k, g_i> with d_k = J * grad L_k(w) and c the step's clip coefficient.

Legend: n samples of the global batch, K targets, b rows of a microbatch, s tokens. A global batch is
[data-parallel rank][accumulation step] of microbatches, and its n samples are numbered in that order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracle_gpt import (
    GPTShape,
    Microbatch,
    OracleGPT,
    Parameters,
    parameter_shapes,
    random_parameters,
    with_padded_vocab,
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
    "cuts",
    "dot",
    "masked_sum",
    "merge_shards",
    "parameter_shapes",
    "random_parameters",
    "random_rows",
    "sample_gradients",
    "split_batch",
    "split_documents",
    "split_parameters",
    "target_gradient",
    "with_padded_vocab",
]

GlobalBatch = list[list[Microbatch]]


@dataclass(frozen=True)
class OracleTarget:
    """A validation target: all its sequences [N, s] under the microbatch keys (tokens, labels, ...)."""

    name: str
    rows: Microbatch

    @classmethod
    def from_microbatches(cls, name: str, microbatches: Sequence[Microbatch]) -> OracleTarget:
        """Join microbatches, of all data-parallel ranks; rows whose loss mask is all zero change nothing."""
        keys = ("tokens", "labels", "loss_mask", "position_ids")
        return cls(name, {key: torch.cat([batch[key] for batch in microbatches]) for key in keys})

    @property
    def num_tokens(self) -> float:
        """Sum of the loss mask, the denominator of L_k."""
        return float(self.rows["loss_mask"].double().sum())


@dataclass(frozen=True)
class SampleGradients:
    """g_i of every sample of a global batch, before clipping, and who the samples are."""

    stacked: Parameters  # name -> [n, *parameter shape]
    dataset: Tensor  # [n]
    sample: Tensor  # [n]
    loss: float  # the training loss: mean over microbatches of their token means

    def total(self) -> Parameters:
        """G = sum_i g_i."""
        return {name: stack.sum(0) for name, stack in self.stacked.items()}


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
        self._lr = lr

    @property
    def lr(self) -> float:
        """Learning rate of the coming step."""
        return self._lr(self.state.steps + 1) if callable(self._lr) else self._lr

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


def sample_gradients(model: OracleGPT, parameters: Parameters, batch: GlobalBatch) -> SampleGradients:
    """g_i of every sample, each by a forward and a backward of that sample alone.

    The loss of a microbatch is the mean over its loss tokens; microbatches are averaged over accumulation steps and
    data-parallel ranks. So sample i's share is sum_t(loss_it * mask_it) / (tokens of its microbatch * number of
    microbatches).
    """
    leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    microbatches = [microbatch for replica in batch for microbatch in replica]
    columns: dict[str, list[Tensor]] = {name: [] for name in leaves}
    dataset, sample, loss = [], [], 0.0
    for microbatch in microbatches:
        tokens = microbatch["loss_mask"].double().sum()
        assert tokens > 0, "a microbatch without loss tokens has no loss"
        rows = len(microbatch["tokens"])
        for row in _rows(microbatch):
            share = masked_sum(model, leaves, row) / (tokens * len(microbatches))
            loss += share.item()
            for name, gradient in zip(leaves, _gradients(share, leaves), strict=True):
                columns[name].append(gradient)
        missing = torch.full((rows,), -1)
        dataset.append(microbatch.get("dataset", missing))
        sample.append(microbatch.get("sample", missing))
    stacked = {name: torch.stack(column) for name, column in columns.items()}
    return SampleGradients(stacked, torch.cat(dataset), torch.cat(sample), loss)


def target_gradient(
    model: OracleGPT, parameters: Parameters, target: OracleTarget
) -> tuple[float, Parameters]:
    """L_k and its gradient: the mean over all loss tokens of the target, added up sequence by sequence."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    loss = 0.0
    for row in _rows(target.rows):
        share = masked_sum(model, leaves, row) / target.num_tokens
        loss += share.item()
        for name, gradient in zip(leaves, _gradients(share, leaves), strict=True):
            total[name] += gradient
    return loss, total


def first_order_values(directions: list[Parameters], samples: SampleGradients, clip: float) -> Tensor:
    """phi = c <d_k, g_i>, [n, K]."""
    columns = []
    for direction in directions:
        parts = [samples.stacked[name].flatten(1) @ direction[name].flatten() for name in direction]
        columns.append(clip * torch.stack(parts).sum(0))
    return torch.stack(columns, dim=1) if columns else torch.zeros(len(samples.sample), 0)


def dot(left: Parameters, right: Parameters) -> Tensor:
    """<left, right> over all parameters, a scalar tensor."""
    return torch.stack([(left[name] * right[name]).sum() for name in left]).sum()


def split_batch(rows: Microbatch, dp_size: int, accumulation: int, micro_batch_size: int) -> GlobalBatch:
    """Lay consecutive samples [n, ...] out as Megatron's sequential pretraining sampler does.

    Accumulation step a, data-parallel rank r, row j is sample (a * dp_size + r) * micro_batch_size + j.
    """
    expected = dp_size * accumulation * micro_batch_size
    assert len(rows["tokens"]) == expected, f"{len(rows['tokens'])} rows, {expected} expected"

    def microbatch(replica: int, step: int) -> Microbatch:
        first = (step * dp_size + replica) * micro_batch_size
        return {key: value[first : first + micro_batch_size] for key, value in rows.items()}

    return [[microbatch(replica, step) for step in range(accumulation)] for replica in range(dp_size)]


def random_rows(
    shape: GPTShape, count: int, seed: int, *, masked: bool = True, first_sample: int = 0, dataset: int = 0
) -> Microbatch:
    """`count` random sequences under all microbatch keys; with `masked`, loss masks of varying length."""
    generator = torch.Generator().manual_seed(seed)
    s = shape.seq_length
    text = torch.randint(shape.vocab_size, (count, s + 1), generator=generator)
    mask = torch.ones(count, s)
    if masked:
        lengths = torch.randint(1, s + 1, (count, 1), generator=generator)
        mask = (torch.arange(s)[None] < lengths).float()
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "loss_mask": mask,
        "position_ids": torch.arange(s).repeat(count, 1),
        "dataset": torch.full((count,), dataset),
        "sample": torch.arange(first_sample, first_sample + count),
    }


def _rows(batch: Microbatch) -> list[Microbatch]:
    """Microbatches of one row each."""
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["tokens"]))]


def split_documents(row: Microbatch) -> list[Microbatch]:
    """A microbatch of one row as sequences of their own, one for each run of equal `documents` [1, s]; without them
    the row."""
    if "documents" not in row:
        return [row]
    names = ("tokens", "labels", "loss_mask", "position_ids")
    return [{name: row[name][:, begin:end] for name in names} for begin, end in cuts(row["documents"][0])]


def cuts(parts: Tensor) -> list[tuple[int, int]]:
    """(first position, position after the last) of every run of equal integers in [s]."""
    edges = [0, *(t for t in range(1, len(parts)) if parts[t] != parts[t - 1]), len(parts)]
    return list(itertools.pairwise(edges))


def masked_sum(model: OracleGPT, parameters: Parameters, row: Microbatch) -> Tensor:
    """Sum of the row's token losses over its mask. Where the attention is cut at `documents`, each is run by itself."""
    sums = []
    for document in split_documents(row):
        losses = model.token_losses(parameters, document)
        sums.append((losses * document["loss_mask"].to(losses.dtype)).sum())
    return torch.stack(sums).sum()


def _gradients(loss: Tensor, leaves: Parameters) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(leaves.values()))
