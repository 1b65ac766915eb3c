"""Dots that are added up late: what layers left is still theirs, and all of it is counted once."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from inrun_megatron.dots import late as late_dots
from inrun_megatron.dots.late import LateDots
from inrun_megatron.shapley.consumers import RowScorer
from inrun_megatron.taps import Pass
from inrun_megatron.taps.bias import bias
from inrun_megatron.taps.emission import Call, Sharding, Site
from inrun_megatron.taps.norm import NormCall, norm

S, H, TARGETS = 5, 12, 2


@pytest.mark.parametrize("together", [1, 7, 4096])
def test_running_dots_of_several_layers_and_accumulators(
    monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """An accumulator of rows 0 to 2, and one of rows 3 and 4; some layers have one row more to theirs."""
    monkeypatch.setattr(late_dots, "RUNNING_TOGETHER", together)
    start = torch.randn(5, TARGETS, dtype=torch.float64)
    late, expected = LateDots(start.clone()), start.clone()
    for cuts in ((0, 3, 5), (0, 3, 5), (0, 4, 5)):
        for first, stop in pairwise(cuts):
            rows = torch.randn(stop - first, TARGETS)
            expected[first:stop] += rows
            late.add_running(first, list(rows.cumsum(0).flatten().unbind()))
    late.flush()
    late.flush()  # adds nothing more
    torch.testing.assert_close(late.dots, expected, rtol=0, atol=1e-5)


def test_vectors_of_many_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_dots, "VECTORS_TOGETHER", 2)
    expected = torch.zeros(3, TARGETS, dtype=torch.float64)
    late = LateDots(expected.clone())
    for features in (4, 7, 5):
        gradients, directions = torch.randn(3, features), torch.randn(TARGETS, features)
        expected = expected + gradients.double() @ directions.double().t()
        late.add_vectors(gradients, list(directions))
    late.flush()
    torch.testing.assert_close(late.dots, expected)


def _scored(forward: Any, parameters: list[Parameter], rows: int) -> tuple[Tensor, list[list[Tensor]]]:
    """Dots of one backward of ``forward(x, run)``, and the directions."""
    by_parameter = {id(p): [torch.randn(H, dtype=p.dtype) for _ in range(TARGETS)] for p in parameters}
    dots = torch.zeros(rows, TARGETS, dtype=torch.float64)
    scorer = RowScorer(SimpleNamespace(of=lambda p: by_parameter[id(p)]), dots)  # type: ignore[arg-type]
    x = torch.randn(S, rows, H, dtype=parameters[0].dtype, requires_grad=True)
    forward(x, Pass((scorer,), rows=rows, positions=S)).square().sum().backward()
    scorer.flush()
    return dots, list(by_parameter.values())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rms", [False, True])
def test_one_rows_vectors_are_those_of_training_and_stay_so(rms: bool, reentrant: bool) -> None:
    """The layers are used three times, and recomputed: autograd adds to gradients that the scorer has looked at."""
    scale, shift, added = (Parameter(torch.randn(H, dtype=torch.float64)) for _ in range(3))
    own = Site("norm", "norm", Sharding.REPLICATED, 1)

    def block(x: Tensor, run: Pass) -> Tensor:
        y = norm(x, NormCall(own, run, scale, None if rms else shift, rms=rms))
        return y + bias(Call(Site("bias", "bias", Sharding.COLUMN, 1), run, added), y)

    def forward(x: Tensor, run: Pass) -> Tensor:
        for _ in range(3):
            x = checkpoint(block, x, run, use_reentrant=reentrant)
        return x

    parameters = [scale, added] if rms else [scale, shift, added]
    dots, directions = _scored(forward, parameters, 1)
    gradients = [p.grad for p in parameters if p.grad is not None]
    expected = torch.zeros(TARGETS, dtype=torch.float64)
    for gradient, vectors in zip(gradients, directions, strict=True):
        expected += torch.stack([(gradient * vector).sum() for vector in vectors])
    torch.testing.assert_close(dots[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_vectors_gradient_is_the_plain_modules(rows: int) -> None:
    """Of one row bit for bit."""
    plain = torch.nn.LayerNorm(H)
    scale, shift = (Parameter(p.detach().clone()) for p in (plain.weight, plain.bias))
    site = Site("norm", "norm", Sharding.REPLICATED, 1)
    seed = torch.random.get_rng_state()
    _scored(lambda x, run: norm(x, NormCall(site, run, scale, shift)), [scale, shift], rows)
    torch.random.set_rng_state(seed)
    for _ in range(2 * TARGETS):
        torch.randn(H)
    plain(torch.randn(S, rows, H, requires_grad=True)).square().sum().backward()
    assert torch.equal(scale.grad, plain.weight.grad) and torch.equal(shift.grad, plain.bias.grad)  # type: ignore[arg-type]
