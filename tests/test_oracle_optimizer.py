"""The oracle's optimizers: their steps against torch.optim, their Jacobians against autograd, differences and formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.oracle import OptimizerSpec, OptimizerState, random_parameters
from tests.oracle_cases import EACH_OPTIMIZER, GPT2, OPTIMIZERS, batch_loss, make_batch, make_trainer
from tests.oracle_optimizer import Moments, jacobian_tensor, step_all, step_tensor


@EACH_OPTIMIZER
def test_steps_equal_torch_optim(spec: OptimizerSpec) -> None:
    """Six steps of the trainer, with clipping and weight-decay groups, against torch's optimizers."""
    trainer = make_trainer(GPT2, spec)
    leaves = {name: value.clone().requires_grad_() for name, value in trainer.weights.items()}
    groups = [
        {"params": [p for n, p in leaves.items() if p.ndim > 1], "weight_decay": spec.weight_decay},
        {"params": [p for n, p in leaves.items() if p.ndim == 1], "weight_decay": 0.0},
    ]
    if spec.kind == "sgd":
        options = {"momentum": spec.momentum, "dampening": spec.dampening, "nesterov": spec.nesterov}
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=1.0, **options)  # type: ignore[arg-type]
    else:
        kind = torch.optim.Adam if spec.kind == "adam" else torch.optim.AdamW
        optimizer = kind(groups, lr=1.0, betas=(spec.beta1, spec.beta2), eps=spec.eps)
    clipped = []
    for step in range(1, 7):
        batch = make_batch(GPT2, seed=step)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / step
        optimizer.zero_grad()
        batch_loss(trainer.model, leaves, batch).backward()
        if spec.clip:
            torch.nn.utils.clip_grad_norm_(leaves.values(), spec.clip)
        optimizer.step()
        clipped.append(trainer.step(batch).clip_coefficient)
        worst = max((trainer.weights[name] - leaf).abs().max().item() for name, leaf in leaves.items())
        assert worst < 1e-12, f"step {step}"
    assert (max(clipped) < 1.0) == bool(spec.clip)


@EACH_OPTIMIZER
@pytest.mark.parametrize("steps", [0, 4])
def test_jacobian_is_the_derivative_of_the_step(spec: OptimizerSpec, steps: int) -> None:
    """J at zero gradient by autograd and by central differences, with a state from before the step."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(20, generator=generator, dtype=torch.float64)
    moments = Moments(
        torch.randn(20, generator=generator, dtype=torch.float64),
        torch.rand(20, generator=generator, dtype=torch.float64) + 0.1,
    )
    decay = spec.weight_decay

    def step(gradient: Tensor) -> Tensor:
        return step_tensor(spec, 0.01, steps, weight, gradient, moments, decay)[0]

    zero = torch.zeros_like(weight, requires_grad=True)
    (slope,) = torch.autograd.grad(step(zero).sum(), zero)
    difference = (step(torch.full_like(weight, 1e-5)) - step(torch.full_like(weight, -1e-5))) / 2e-5
    jacobian = jacobian_tensor(spec, 0.01, steps, weight, moments, decay)
    torch.testing.assert_close(jacobian, -slope, rtol=1e-12, atol=0)
    torch.testing.assert_close(jacobian, -difference, rtol=1e-7, atol=0)


def test_adamw_jacobian_is_the_published_formula() -> None:
    spec, lr, t = OptimizerSpec("adamw", beta2=0.95, weight_decay=0.3), 0.01, 5
    weight, second = (
        torch.linspace(-1, 1, 9, dtype=torch.float64),
        torch.linspace(0.1, 2, 9, dtype=torch.float64),
    )
    moments = Moments(weight.flip(0), second)
    expected = lr * (1 - 0.9) / (1 - 0.9**t) / ((0.95 * second / (1 - 0.95**t)).sqrt() + 1e-8)
    torch.testing.assert_close(
        jacobian_tensor(spec, lr, t - 1, weight, moments, 0.3), expected, rtol=1e-14, atol=0
    )
    # Elements whose gradient was always zero: the derivative is large, but no NaN.
    unseen = Moments(torch.zeros(9), torch.zeros(9))
    for kind in ("adam", "adamw"):
        still = OptimizerSpec(kind)
        assert jacobian_tensor(still, lr, t - 1, weight, unseen, 0.0).isfinite().all()


@pytest.mark.parametrize("steps", [0, 4])
def test_direction_at_the_target_is_the_step_on_the_validation_gradient(steps: int) -> None:
    """Without decay and with momentum at rest, J h is what AdamW's own step on h moves; at the first step too."""
    spec = OptimizerSpec("adamw", beta2=0.95)
    generator = torch.Generator().manual_seed(2)
    weight, slope = (torch.randn(20, generator=generator, dtype=torch.float64) for _ in range(2))
    second = torch.rand(20, generator=generator, dtype=torch.float64) * (steps > 0)
    moments = Moments(torch.zeros(20, dtype=torch.float64), second)
    moved = weight - step_tensor(spec, 0.01, steps, weight, slope, moments, 0.0)[0]
    jacobian = jacobian_tensor(spec, 0.01, steps, weight, moments, 0.0, slope)
    torch.testing.assert_close(jacobian * slope, moved, rtol=1e-12, atol=1e-15)
    at_zero = jacobian_tensor(spec, 0.01, steps, weight, moments, 0.0)
    assert ((at_zero * slope).abs() > 1.001 * moved.abs()).any()


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_the_two_jacobians_agree_where_the_target_gradient_is_small(kind: str) -> None:
    weight, second = (
        torch.linspace(-1, 1, 9, dtype=torch.float64),
        torch.linspace(0.1, 2, 9, dtype=torch.float64),
    )
    moments = Moments(weight.flip(0), second)
    spec = OptimizerSpec(kind, momentum=0.9, weight_decay=0.3)  # type: ignore[arg-type]
    at_zero = jacobian_tensor(spec, 0.01, 4, weight, moments, 0.3)
    near = jacobian_tensor(spec, 0.01, 4, weight, moments, 0.3, torch.full_like(weight, 1e-7))
    far = jacobian_tensor(spec, 0.01, 4, weight, moments, 0.3, torch.ones_like(weight))
    torch.testing.assert_close(near, at_zero, rtol=1e-10, atol=0)
    assert torch.allclose(far, at_zero, rtol=1e-6) == (kind == "sgd")


def test_state_is_not_changed_by_a_step_taken_from_it() -> None:
    parameters = random_parameters(GPT2)
    state = OptimizerState.initial(parameters)
    gradients = {name: torch.ones_like(value) for name, value in parameters.items()}
    first, _ = step_all(OPTIMIZERS["adamw"], 0.1, parameters, gradients, state)
    second, after = step_all(OPTIMIZERS["adamw"], 0.1, parameters, gradients, state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (state.steps, after.steps) == (0, 1)
