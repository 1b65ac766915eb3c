"""The Monte Carlo estimator on games with a known answer, and the optimizer's game against steps done one by one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.montecarlo import OptimizerGame, compare, fidelity, monte_carlo, pearson, spearman
from tests.oracle import (
    GPTShape,
    OptimizerSpec,
    OracleTarget,
    OracleTrainer,
    random_parameters,
    random_rows,
    sample_gradients,
    split_batch,
    target_gradient,
)
from tests.oracle_optimizer import step_all

SHAPE = GPTShape("gpt2", num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=13, seq_length=6)


class PolynomialGame:
    """U_k(S) = a_k . x + x' Q_k x / 2 + sum_ijl T_k[ijl] x_i x_j x_l / 6, where x marks the players of S.

    Q and T are symmetric with zero diagonals, so an interaction of m players is shared equally among them:
    phi_i = a_i + sum_j Q_ij / 2 + sum_jl T_ijl / 2 / 3.
    """

    def __init__(self, players: int, seed: int, cubic: bool) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(2, *size, generator=generator, dtype=torch.float64)

        self.players = players
        self.linear, self.pairs = draw(players), draw(players, players)
        self.pairs = (self.pairs + self.pairs.transpose(1, 2)) / 2
        self.pairs.diagonal(dim1=1, dim2=2).zero_()
        cube = draw(players, players, players) * cubic
        cube = torch.stack([cube.permute(0, *order) for order in itertools.permutations((1, 2, 3))]).mean(0)
        same = torch.eye(players, dtype=torch.bool)
        repeated = same[:, :, None] | same[:, None, :] | same[None, :, :]  # [i, j, l] with an index twice
        self.triples = cube.masked_fill(repeated, 0.0)

    def start(self) -> None:
        self.members = torch.zeros(self.players, dtype=torch.float64)

    def add(self, player: int) -> None:
        self.members[player] = 1.0

    def utility(self) -> Tensor:
        x = self.members
        pairs = torch.einsum("kij,i,j->k", self.pairs, x, x) / 2
        return self.linear @ x + pairs + torch.einsum("kijl,i,j,l->k", self.triples, x, x, x) / 6

    def shapley(self) -> Tensor:
        """[n, K], in closed form."""
        return (self.linear + self.pairs.sum(2) / 2 + self.triples.sum((2, 3)) / 6).T


def test_antithetic_orders_are_exact_for_pairwise_games() -> None:
    game = PolynomialGame(7, seed=0, cubic=False)
    result = monte_carlo(game, 2, seed=1)
    torch.testing.assert_close(result.values, game.shapley(), rtol=1e-12, atol=1e-12)
    single = monte_carlo(game, 2, seed=1, antithetic=False)
    assert (single.values - game.shapley()).abs().max() > 0.1


@pytest.mark.parametrize("antithetic", [True, False])
def test_monte_carlo_converges_to_the_closed_form(antithetic: bool) -> None:
    game = PolynomialGame(6, seed=2, cubic=True)
    truth = game.shapley()
    result = monte_carlo(game, 2000, seed=3, antithetic=antithetic)
    errors = (result.values - truth) / result.standard_error
    assert errors.abs().max() < 4.0
    assert errors.square().mean().sqrt() > 0.3  # the standard error is not blown up either
    assert pearson(result.values[:, 0], truth[:, 0]) > 0.999
    assert result.evaluations <= 2**6
    assert (result.values[:, 0] - truth[:, 0].roll(1)).abs().max() > 0.5


def test_values_sum_to_the_utility_of_all_players() -> None:
    game = PolynomialGame(6, seed=4, cubic=True)
    result = monte_carlo(game, 4)
    game.start()
    for player in range(6):
        game.add(player)
    torch.testing.assert_close(result.values.sum(0), game.utility(), rtol=1e-12, atol=1e-12)


def make_trainer(spec: OptimizerSpec, steps: int) -> OracleTrainer:
    targets = [OracleTarget(f"target{k}", random_rows(SHAPE, 2 + k, 50 + k)) for k in range(2)]
    trainer = OracleTrainer(SHAPE, random_parameters(SHAPE), spec, 0.003, targets)
    trainer.run([split_batch(random_rows(SHAPE, 6, seed), 1, 1, 6) for seed in range(steps)])
    return trainer


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_utility_is_the_real_steps(kind: str) -> None:
    """U_k(S) of the flat game against parameter-wise steps and losses taken sequence by sequence."""
    spec = OptimizerSpec(kind, momentum=0.9, beta2=0.95, weight_decay=0.1, clip=0.3)  # type: ignore[arg-type]
    trainer = make_trainer(spec, 3)
    batch = split_batch(random_rows(SHAPE, 6, 9), 1, 3, 2)
    weights, state = dict(trainer.weights), trainer.state
    samples = sample_gradients(trainer.model, weights, batch)
    game = OptimizerGame(trainer, batch)
    assert game.clip < 1.0

    def losses(members: list[int]) -> Tensor:
        part = {name: game.clip * stack[members].sum(0) for name, stack in samples.stacked.items()}
        moved, _ = step_all(spec, trainer.lr, weights, part, state)
        return torch.tensor([target_gradient(trainer.model, moved, t)[0] for t in trainer.targets]).double()

    for members in ([], [2], [0, 3, 5], list(range(6))):
        game.start()
        for player in members:
            game.add(player)
        torch.testing.assert_close(game.utility(), losses([]) - losses(members), rtol=1e-5, atol=1e-6)
    assert trainer.state is state and all(trainer.weights[name] is weights[name] for name in weights)


def test_fidelity_tells_estimators_apart() -> None:
    trainer = make_trainer(OptimizerSpec("adamw", beta2=0.95, weight_decay=0.1, clip=1.0), 20)
    batch = split_batch(random_rows(SHAPE, 6, 9), 1, 1, 6)
    report = fidelity(trainer, batch, permutations=60)
    assert report.step == 21
    assert min(report.first_order.pearson + report.derivative.pearson) > 0.999
    assert max(map(abs, report.first_order.sum_error)) < 0.1
    assert max(report.proxy.pearson) < 0.997
    backwards = compare(-report.first_order.values, report.truth.values)
    assert max(backwards.pearson) < -0.9
    # Under a linear optimizer with a tiny step there is nothing left to be wrong about.
    linear = make_trainer(OptimizerSpec("sgd"), 2)
    linear.schedule = 1e-6
    exact = fidelity(linear, batch, permutations=4)
    assert min(exact.first_order.pearson) > 0.999999
    assert max(map(abs, exact.first_order.sum_error)) < 1e-4
    torch.testing.assert_close(exact.first_order.values, exact.truth.values, rtol=1e-3, atol=1e-12)


def test_single_precision_gives_the_same_correlations() -> None:
    trainer = make_trainer(OptimizerSpec("adamw", beta2=0.95), 5)
    batch = split_batch(random_rows(SHAPE, 6, 9), 1, 1, 6)
    double = monte_carlo(OptimizerGame(trainer, batch), 20)
    single = monte_carlo(OptimizerGame(trainer, batch, torch.float32), 20)
    assert pearson(double.values[:, 0], single.values[:, 0]) > 0.9999


def test_correlations() -> None:
    left = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert pearson(left, 2 * left - 7) == pytest.approx(1.0)
    assert pearson(left, torch.tensor([1.0, -1.0, -1.0, 1.0])) == pytest.approx(0.0)
    assert spearman(left, left.exp()) == pytest.approx(1.0)
    assert spearman(left, -left.exp()) == pytest.approx(-1.0)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert spearman(torch.tensor([0.0, 5.0, 5.0, 9.0]), left) == pytest.approx(0.9486832980505138)
