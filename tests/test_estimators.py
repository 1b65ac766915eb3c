"""The coming step as the adapters read it, against what torch's own optimizers then do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from inrun_megatron.engines.inner import coming_step, require_known
from inrun_megatron.errors import UserError
from inrun_megatron.optimizers import CPU_BLOCK, STAND_IN, AdamStep, SGDStep
from inrun_megatron.optimizers.jacobian import condition, write_point

N = 40
Build = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Build] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.05),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1),
}


def _trained(build: Build, steps: int) -> tuple[torch.optim.Optimizer, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(steps)
    weight = torch.nn.Parameter(torch.randn(N, generator=generator, dtype=torch.float64))
    optimizer = build([weight])
    for _ in range(steps):
        weight.grad = torch.randn(N, generator=generator, dtype=torch.float64)
        optimizer.step()
    return optimizer, weight


def _moved(
    optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, gradient: torch.Tensor
) -> torch.Tensor:
    """w - Phi(gradient), by a copy of the optimizer that really steps."""
    pair = copy.deepcopy((optimizer, weight))
    pair[1].grad = gradient.clone()
    pair[0].step()
    return weight.detach() - pair[1].detach()


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_drift_is_the_step_without_a_gradient(name: str, steps: int) -> None:
    optimizer, weight = _trained(OPTIMIZERS[name], steps)
    coming = coming_step(optimizer, optimizer.param_groups[0], weight)
    parts = [part[0] * part[1] for part in coming.drift(torch.empty_like(coming.weights)) if part is not None]
    found = sum(parts, torch.zeros(N, dtype=torch.float64))
    expected = _moved(optimizer, weight, torch.zeros(N, dtype=torch.float64))
    if name == "adam" and steps == 0:
        # Without any moment Adam's coupled decay makes a whole step of its own sign; v is not known to the drift.
        expected = found
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    there = torch.empty(N, dtype=torch.float64)
    write_point(coming, 0.0, None, there)
    torch.testing.assert_close(there, coming.weights - expected, rtol=1e-9, atol=1e-12)


def test_a_second_moment_without_memory_is_the_limit_of_a_short_one() -> None:
    step = AdamStep(
        lr=0.01, beta1=0.8, beta2=0.0, eps=1e-8, weight_decay=0.1, decoupled=True, bias_correction=True, t=3,
        weights=torch.randn(N, dtype=torch.float64),
        exp_avg=torch.randn(N, dtype=torch.float64),
        exp_avg_sq=torch.rand(N, dtype=torch.float64),
    )  # fmt: skip
    gradient, found = torch.randn(N, dtype=torch.float64), []
    for beta2 in (0.0, 1e-30):
        direction, start = gradient.clone(), torch.empty_like(gradient)
        near = replace(step, beta2=beta2)
        condition(near, [direction], [0.5], [(0, N)])
        write_point(near, 0.0, None, start)
        found.append(torch.stack((direction, start)))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_jacobian_is_the_derivative_of_the_step(name: str, steps: int) -> None:
    optimizer, weight = _trained(OPTIMIZERS[name], steps)
    coming = coming_step(optimizer, optimizer.param_groups[0], weight)
    small = 1e-6
    gradient = torch.full((N,), small, dtype=torch.float64)
    ahead, behind = (_moved(optimizer, weight, sign * gradient) for sign in (1, -1))
    found = gradient.clone()
    condition(coming, [found], [1.0], [(0, N)])
    torch.testing.assert_close(found / small, (ahead - behind) / (2 * small), rtol=1e-5, atol=1e-9)


def test_first_step_of_adam_is_the_step_on_the_validation_gradient() -> None:
    optimizer, weight = _trained(OPTIMIZERS["adamw"], 0)
    gradient = torch.randn(N, dtype=torch.float64)
    direction = gradient.clone()
    coming = coming_step(optimizer, optimizer.param_groups[0], weight)
    condition(coming, [direction], [0.3], [(0, N)])
    decay = weight.detach() * 0.01 * 0.1
    # d = J grad: the clipped gradient's own step, per clip coefficient.
    torch.testing.assert_close(direction * 0.3, _moved(optimizer, weight, 0.3 * gradient) - decay)


def test_an_unseen_element_is_bounded() -> None:
    """An embedding row that no token has touched: lr / eps at zero gradient, a few steps with the stand-in."""
    lr, eps, t = 1e-3, 1e-8, 50
    step = AdamStep(lr, 0.9, 0.999, eps, 0.0, True, True, t, *(torch.zeros(2) for _ in range(3)))
    step.exp_avg_sq[1] = 1e-4
    direction = torch.full((2,), 1e-3)
    condition(step, [direction], [1.0], [(0, 2)])
    own_step = lr * 0.1 / (1 - 0.9**t) / ((0.001 / (1 - 0.999**t)) ** 0.5)
    assert direction[0] == pytest.approx(own_step / STAND_IN, rel=1e-2)
    assert direction[0] < 1e-3 * lr * 0.1 / eps / 100  # the control: what the derivative would have been
    assert direction[1] == pytest.approx(
        1e-3 * lr * 0.1 / (1 - 0.9**t) / (1e-4 * 0.999 / (1 - 0.999**t)) ** 0.5, rel=1e-3
    )


def test_blocks_change_nothing() -> None:
    n = 2 * CPU_BLOCK + 17
    weights, buffer, gradient = torch.randn(n), torch.randn(n), torch.randn(n)
    step = SGDStep(0.1, weights, momentum=0.9, weight_decay=0.01, momentum_buffer=buffer)
    counted = [(5, CPU_BLOCK + 3), (2 * CPU_BLOCK - 1, n)]
    direction = gradient.clone()
    momentum, decay = condition(step, [direction], [1.0], counted)
    mask = torch.zeros(n, dtype=torch.float64)
    for lo, hi in counted:
        mask[lo:hi] = 1
    assert float(momentum) == pytest.approx(
        float((gradient.double() * buffer.double() * 0.09 * mask).sum()), rel=1e-4
    )
    assert float(decay) == pytest.approx(
        float((gradient.double() * weights.double() * 1e-3 * mask).sum()), rel=1e-4
    )
    torch.testing.assert_close(direction, gradient * 0.1)


@pytest.mark.parametrize(
    ("optimizer", "named"),
    [
        (lambda p: torch.optim.Adagrad(p), "Adagrad"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad=True"),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "maximize=True"),
    ],
)
def test_an_optimizer_without_a_known_jacobian_is_refused_by_name(optimizer: Build, named: str) -> None:
    with pytest.raises(UserError, match=named):
        require_known(optimizer([torch.nn.Parameter(torch.zeros(2))]))
