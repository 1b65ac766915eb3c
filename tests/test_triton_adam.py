"""The Triton kernels of Adam's elementwise work against torch's operations in fp64; without a GPU in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from inrun_megatron.optimizers import AdamStep, jacobian, triton_adam
from inrun_megatron.optimizers.jacobian import condition, write_point

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N = 2 * triton_adam.BLOCK + 77
CLIPS = (0.3, 1.0)
COUNTED = {
    "all": [(0, N)],
    "none": [],
    "some": [(5, 6), (100, triton_adam.BLOCK + 9), (N - 3, N)],
    "but the ends": [(1, N - 1)],
}


def _step(t: int, weight_decay: float = 0.1) -> AdamStep:
    seen = t > 1
    return AdamStep(
        lr=0.01,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        weight_decay=weight_decay,
        decoupled=True,
        bias_correction=True,
        t=t,
        weights=torch.randn(N),
        exp_avg=torch.randn(N) * 1e-2 * seen,
        exp_avg_sq=torch.rand(N) * 1e-4 * seen,
    )


def _on(step: AdamStep, *where: object) -> AdamStep:
    names = ("weights", "exp_avg", "exp_avg_sq")
    return replace(step, **{name: getattr(step, name).to(*where) for name in names})


def _close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (found.cpu() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("counted", COUNTED)
@pytest.mark.parametrize("t", [1, 7])
def test_condition(t: int, counted: str) -> None:
    step, shard = _step(t), 1e-3 * torch.randn(len(CLIPS), N + 5)
    clips = torch.tensor(CLIPS, dtype=torch.float64)
    expected = shard[:, 2 : 2 + N].double()
    momentum, decay = condition(_on(step, torch.float64), list(expected), clips, COUNTED[counted])
    own = shard.to(DEVICE)
    found = own[:, 2 : 2 + N]
    terms = triton_adam.condition(_on(step, DEVICE), list(found), clips.to(DEVICE), COUNTED[counted])
    for row, wanted in zip(
        found, expected, strict=True
    ):  # element by element: they differ by orders of magnitude
        torch.testing.assert_close(row.cpu().double(), wanted, rtol=2e-6, atol=1e-30)
    torch.testing.assert_close(own[:, :2].cpu(), shard[:, :2], rtol=0, atol=0)  # and nothing beside them
    torch.testing.assert_close(own[:, 2 + N :].cpu(), shard[:, 2 + N :], rtol=0, atol=0)
    size = shard.abs().max() * step.lr  # terms cancel: judged against what they are sums of
    assert (terms.cpu() - torch.stack((momentum, decay))).abs().max() <= 1e-6 * size * N**0.5


@pytest.mark.parametrize("fused", [False, True])
def test_directions_are_written_as_layers_read_them(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded on the way, into rows of another length; the terms are those of the gradients."""
    monkeypatch.setattr(jacobian, "_fused", lambda step, vector: fused)
    step, shard = _on(_step(7), DEVICE), 1e-3 * torch.randn(len(CLIPS), N).to(DEVICE)
    clips = torch.tensor(CLIPS, dtype=torch.float64, device=DEVICE)
    expected = shard.clone()
    terms = condition(step, list(expected), clips, COUNTED["some"])
    rows = torch.full((len(CLIPS), N + 9), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    out = [row[3 : 3 + N] for row in rows]
    found = condition(step, list(shard), clips, COUNTED["some"], out=out)
    for row, wanted in zip(out, expected, strict=True):
        torch.testing.assert_close(row.float(), wanted, rtol=2**-7, atol=0)
    assert rows[:, :3].isnan().all() and rows[:, 3 + N :].isnan().all(), "and nothing beside them"
    for own, wanted in zip(found, terms, strict=True):
        assert torch.equal(own, wanted)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("t", [1, 7])
def test_idle(t: int, weight_decay: float) -> None:
    step = _step(t, weight_decay)
    expected = torch.empty(N, dtype=torch.float64)
    write_point(_on(step, torch.float64), 0.0, None, expected)
    assert weight_decay or t > 1 or torch.equal(expected, step.weights.double())
    there = _on(step, DEVICE)
    # The interpreter cuts digits off where a GPU rounds.
    for dtype, tolerance in ((torch.float32, 2e-7), (torch.bfloat16, 2**-7)):
        out = torch.empty(N, dtype=dtype, device=DEVICE)
        triton_adam.idle(there, out)
        _close(out.double(), expected, tolerance)
    triton_adam.idle(there, there.weights)  # where layers use the optimizer's own
    _close(there.weights.double(), expected, 2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inner_products(dtype: torch.dtype) -> None:
    directions, vector = torch.randn(3, N).to(dtype), torch.randn(N)
    found = triton_adam.inner_products(list(directions.to(DEVICE)), vector.to(DEVICE))
    _close(found, directions.double() @ vector.double(), 1e-6)


def test_estimators_reach_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    step, rows = _on(_step(7), DEVICE), 1e-3 * torch.randn(2, N).to(DEVICE)
    clips = torch.tensor(CLIPS, dtype=torch.float64, device=DEVICE)
    found = []
    for fused in (False, True):
        monkeypatch.setattr(jacobian, "_fused", lambda step, vector, fused=fused: fused)
        directions, there = rows.clone(), torch.empty_like(rows[0])
        terms = condition(step, list(directions), clips, COUNTED["some"])
        write_point(step, 0.0, None, there)
        found.append((directions, there, *terms))
    for by_torch, by_kernels in zip(*found, strict=True):
        assert not torch.equal(by_torch, by_kernels)
        torch.testing.assert_close(by_kernels, by_torch, rtol=2e-6, atol=1e-9)
