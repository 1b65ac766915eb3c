"""Monte Carlo Shapley values of a batch under the real optimizer step, to judge estimators against.

The game: U_k(S) = L_k(Phi(0)) - L_k(Phi(c g_S)), with the optimizer state, learning rate and clip coefficient c of the
step fixed, and g_S the sum of the gradients of the samples in S (arXiv 2406.11011, section 4, for one step).

Legend: n players (samples), K targets, P elements of all parameters in one flat vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tests.oracle import (
    GlobalBatch,
    OracleTrainer,
    Parameters,
    first_order_values,
    sample_gradients,
)
from tests.oracle_optimizer import Moments, global_norm, step_tensor


class Game(Protocol):
    """A cooperative game whose coalitions grow one player at a time."""

    players: int

    def start(self) -> None:
        """Empty the coalition."""

    def add(self, player: int) -> None:
        """Add one player to the coalition."""

    def utility(self) -> Tensor:
        """[K] of the present coalition, relative to the empty one."""


@dataclass(frozen=True)
class MonteCarlo:
    """Estimated Shapley values [n, K], their standard errors [n, K], and the utilities computed."""

    values: Tensor
    standard_error: Tensor
    evaluations: int


def monte_carlo(game: Game, permutations: int, seed: int = 0, *, antithetic: bool = True) -> MonteCarlo:
    """Mean marginal contribution over random orders of the players.

    `antithetic` follows every order by its reverse, which is exact for games of pairwise interactions
    (Mitchell et al., JMLR 23(43), 2022, section 3.2). Coalitions met before are not evaluated again; every order
    meets the full one, and those of one and of n - 1 players come back often. The values' sum is U of all players.
    """
    assert permutations % 2 == 0 or not antithetic, f"{permutations} orders do not pair up"
    generator = torch.Generator().manual_seed(seed)
    known: dict[int, Tensor] = {}
    blocks = []  # independent estimates, each [n, K]
    for _ in range(permutations // 2 if antithetic else permutations):
        order = torch.randperm(game.players, generator=generator).tolist()
        orders = [order, order[::-1]] if antithetic else [order]
        blocks.append(torch.stack([_marginals(game, one, known) for one in orders]).mean(0))
    estimates = torch.stack(blocks)  # [blocks, n, K]
    error = (
        estimates.std(0) / len(blocks) ** 0.5 if len(blocks) > 1 else torch.full_like(blocks[0], torch.inf)
    )
    return MonteCarlo(estimates.mean(0), error, len(known))


def _marginals(game: Game, order: list[int], known: dict[int, Tensor]) -> Tensor:
    """[n, K] of one order. `known` holds utilities by coalition, a bit for each player."""
    game.start()
    coalition, marginals, before = 0, {}, torch.zeros(())
    for player in order:
        game.add(player)
        coalition |= 1 << player
        if coalition not in known:
            known[coalition] = game.utility()
        marginals[player] = known[coalition] - before
        before = known[coalition]
    return torch.stack([marginals[player] for player in range(game.players)])


class OptimizerGame:
    """The game of one training step: a coalition costs one vector addition, one step and one validation forward.

    Taken at the trainer's present weights and optimizer state, without moving it.
    """

    def __init__(
        self, trainer: OracleTrainer, batch: GlobalBatch, dtype: torch.dtype = torch.float64
    ) -> None:
        samples = sample_gradients(trainer.model, trainer.weights, batch)
        clip = trainer.optimizer.clip_coefficient(global_norm(samples.total()))
        weights, moments = trainer.weights, trainer.state.moments
        self.samples, self.clip = samples, clip
        self.players = len(samples.sample)
        self._model, self._spec, self._lr = trainer.model, trainer.optimizer, trainer.lr
        self._steps = trainer.state.steps
        self._sizes = {name: value.shape for name, value in weights.items()}
        self._gradients = clip * torch.cat([stack.flatten(1) for stack in samples.stacked.values()], 1).to(
            dtype
        )
        self._weights = _flat(weights).to(dtype)  # [P]
        self._moments = Moments(
            _flat({name: state.first for name, state in moments.items()}).to(dtype),
            _flat({name: state.second for name, state in moments.items()}).to(dtype),
        )
        self._decay = _flat(
            {n: torch.full_like(w, trainer.optimizer.decay_of(n, w)) for n, w in weights.items()}
        ).to(dtype)
        # One forward serves all targets: rows of all, and each row's weights in its target's mean.
        self._rows = {
            key: torch.cat([target.rows[key] for target in trainer.targets])
            for key in ("tokens", "labels", "position_ids")
        }
        self._shares = torch.block_diag(
            *[
                target.rows["loss_mask"].to(dtype).flatten()[None] / target.num_tokens
                for target in trainer.targets
            ]
        )  # [K, rows * s]
        self.start()
        self._resting = self._losses()

    def start(self) -> None:
        self._coalition = torch.zeros_like(self._weights)

    def add(self, player: int) -> None:
        self._coalition = self._coalition + self._gradients[player]

    def utility(self) -> Tensor:
        return self._resting - self._losses()

    @torch.inference_mode()
    def _losses(self) -> Tensor:
        """L_k(Phi(c g_S)), [K]."""
        weights, _ = step_tensor(
            self._spec, self._lr, self._steps, self._weights, self._coalition, self._moments, self._decay
        )
        losses = self._model.token_losses(self._views(weights), self._rows)
        return self._shares @ losses.flatten()

    def _views(self, flat: Tensor) -> Parameters:
        parts = flat.split([size.numel() for size in self._sizes.values()])
        return {name: part.view(size) for (name, size), part in zip(self._sizes.items(), parts, strict=True)}


@dataclass(frozen=True)
class Fidelity:
    """How an estimator's values [n, K] compare with Monte Carlo's; lists have one entry per target.

    `sum_error` is (sum of values - true utility of the batch) / sum of absolute Monte Carlo values.
    """

    values: Tensor
    pearson: list[float]
    spearman: list[float]
    sum_error: list[float]


@dataclass(frozen=True)
class FidelityReport:
    """Estimators against Monte Carlo at one point in training.

    `first_order` takes Adam's J at the validation gradient, `derivative` at zero gradient, `proxy` is the SGD proxy.
    """

    step: int
    truth: MonteCarlo
    first_order: Fidelity
    derivative: Fidelity
    proxy: Fidelity


def fidelity(
    trainer: OracleTrainer,
    batch: GlobalBatch,
    permutations: int = 200,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> FidelityReport:
    """Compare at the trainer's present state, which is left as it is. Adam needs one step before it."""
    game = OptimizerGame(trainer, batch, dtype)
    truth = monte_carlo(game, permutations, seed)
    _, slopes = trainer.target_gradients()

    def against_truth(proxy: bool, at_zero: bool) -> Fidelity:
        directions = trainer.directions(slopes, proxy=proxy, at_zero=at_zero)
        assert directions is not None, f"step {trainer.state.steps + 1} has no derivative at zero gradient"
        return compare(first_order_values(directions, game.samples, game.clip), truth.values)

    return FidelityReport(
        step=trainer.state.steps + 1,
        truth=truth,
        first_order=against_truth(proxy=False, at_zero=False),
        derivative=against_truth(proxy=False, at_zero=True),
        proxy=against_truth(proxy=True, at_zero=False),
    )


def compare(values: Tensor, truth: Tensor) -> Fidelity:
    """An estimator's values [n, K] against the true ones [n, K]."""
    values, truth = values.double(), truth.double()
    targets = range(truth.shape[1])
    error = (values.sum(0) - truth.sum(0)) / truth.abs().sum(0)
    return Fidelity(
        values,
        [pearson(values[:, k], truth[:, k]) for k in targets],
        [spearman(values[:, k], truth[:, k]) for k in targets],
        error.tolist(),
    )


def pearson(left: Tensor, right: Tensor) -> float:
    """Linear correlation of two vectors [n]."""
    left, right = left.double() - left.double().mean(), right.double() - right.double().mean()
    return float((left @ right) / (left.norm() * right.norm()))


def spearman(left: Tensor, right: Tensor) -> float:
    """Rank correlation of two vectors [n]; equal elements share their mean rank."""
    return pearson(_ranks(left), _ranks(right))


def _ranks(values: Tensor) -> Tensor:
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return below + (equal - 1) / 2


def _flat(tensors: Parameters) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


__all__ = [
    "Fidelity",
    "FidelityReport",
    "Game",
    "MonteCarlo",
    "OptimizerGame",
    "compare",
    "fidelity",
    "monte_carlo",
    "pearson",
    "spearman",
]
