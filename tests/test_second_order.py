"""The paper's second-order value as a reference: a Hessian-vector product, fp64, plain attention."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tests.layouts import LayoutCase
from tests.oracle import OracleTarget, OracleTrainer, Parameters, dot, sample_gradients
from tests.oracle_optimizer import OptimizerSpec


def hessian_vector(trainer: OracleTrainer, target: OracleTarget, vector: Parameters) -> Parameters:
    """H v of the target's loss at the trainer's weights, by differentiating <grad L, v>."""
    leaves = {name: value.clone().requires_grad_() for name, value in trainer.weights.items()}
    losses = trainer.model.token_losses(leaves, target.rows)
    loss = (losses * target.rows["loss_mask"].to(losses.dtype)).sum() / target.num_tokens
    slopes = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    product = torch.stack([(s * vector[n]).sum() for n, s in zip(leaves, slopes, strict=True)]).sum()
    found = torch.autograd.grad(product, list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def second_order(trainer: OracleTrainer, batch: list, target: OracleTarget, slope: Parameters) -> Tensor:
    """arXiv 2406.11011, Theorem 4, with positive = the loss falls: ``lr <grad L, g_i> - lr^2 / 2 <g_i, H G>``."""
    samples = sample_gradients(trainer.model, trainer.weights, batch)
    bent = hessian_vector(trainer, target, samples.total())
    values = []
    for i in range(len(samples.sample)):
        own = {name: stack[i] for name, stack in samples.stacked.items()}
        values.append(trainer.lr * dot(slope, own) - trainer.lr**2 / 2 * dot(own, bent))
    return torch.stack(values)


def test_midpoint_converges_to_the_papers_second_order_value() -> None:
    """Under SGD they differ by O(lr^3): halving the learning rate divides the difference by eight."""
    case = LayoutCase(1, 1, False, 0, 2, "gpt2", "sgd", steps=1)
    (batch,) = case.batches()
    gaps, firsts = [], []
    for lr in (0.02, 0.01, 0.005, 0.0025):
        shared = (case.model(), case.parameters(), OptimizerSpec("sgd"), lr, case.targets()[:1])
        midpoint = OracleTrainer(*shared, estimator="midpoint")
        _, (slope,) = midpoint.target_gradients()
        reference = second_order(midpoint, batch, case.targets()[0], slope)
        values = midpoint.step(batch).values
        first = OracleTrainer(*shared).step(batch).values
        assert values is not None and first is not None
        gaps.append(float((values[:, 0] - reference).abs().max()))
        firsts.append(float((first[:, 0] - reference).abs().max()))
    ratios = [before / after for before, after in itertools.pairwise(gaps)]
    print("midpoint - second order:", [f"{gap:.1e}" for gap in gaps], "ratios", [f"{r:.2f}" for r in ratios])
    assert all(7.5 < ratio < 9.0 for ratio in ratios[1:]), ratios
    assert all(gap < first / 10 for gap, first in zip(gaps[1:], firsts[1:], strict=True))
