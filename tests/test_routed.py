"""Which token an expert sees, and the dots of its parts, against loops over tokens in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inrun_megatron.dots.late import LateDots
from inrun_megatron.dots.routed import FEW_PARTS, TOKENS_PER_PART, RoutedParts
from inrun_megatron.dots.segments import Segments
from inrun_megatron.taps.routing import Routed, Routing
from tests.small_models import SEQUENCE

ROWS, EXPERTS, TOPK = 3, 4, 2


def _map(tokens: int, experts: int = EXPERTS) -> Tensor:
    """A router's choices, bool [tokens, experts]: two for each token, never the last expert."""
    scores = torch.rand(tokens, experts)
    scores[:, -1] = -1.0
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, scores.topk(TOPK).indices, True)


def test_tokens_of_an_expert_are_those_that_megatron_gives_it() -> None:
    from megatron.core.transformer.moe.moe_utils import permute

    routed = _map(ROWS * SEQUENCE)
    hidden = torch.arange(len(routed)).unsqueeze(1).float()
    sizes = routed.sum(0).tolist()
    permuted, _, _ = permute(hidden, routed, num_out_tokens=sum(sizes))[:3]
    routing = Routing.of_map(routed, sizes)
    assert routing.tokens.tolist() == permuted[:, 0].long().tolist() and routing.total == len(routed)
    for expert, size in enumerate(sizes):
        own = Routed(routing, expert).of(routing.tokens)
        assert len(own) == size and routed[own, expert].all()
    # As [s, b] lies flat.
    assert torch.equal(routing.positions(ROWS) * ROWS + routing.rows(ROWS), routing.tokens)


@pytest.mark.parametrize("cut", ["rows", "one row", "documents", "tokens"])
@pytest.mark.parametrize("targets", [1, 5])
def test_dots_of_an_experts_parts(cut: str, targets: int) -> None:
    """Against a loop over tokens in fp64; an expert without a token has a zero gradient and no dots."""
    rows = 1 if cut == "one row" else ROWS
    positions = 40
    routed = _map(rows * positions)
    sizes = routed.sum(0).tolist()
    routing = Routing.of_map(routed, sizes)
    segments = None
    if cut == "documents":
        segments = Segments.of(torch.arange(positions).expand(rows, -1) // 17)
    elif cut == "tokens":
        segments = Segments.of(torch.arange(positions).repeat(rows, 1))
    part = routing.rows(rows)
    if segments is not None:
        part = segments.part_of(part, routing.positions(rows))
    count = rows if segments is None else len(segments)
    parts = RoutedParts(part, routing.owners, sizes, count)
    if count > 1:
        assert (
            (parts._on_host is None) == (sum(sizes) < TOKENS_PER_PART * EXPERTS * count) == (cut == "tokens")
        )
    assert (count > FEW_PARTS) == (cut in ("documents", "tokens"))
    dots = torch.zeros(count, targets, dtype=torch.float64)
    late, expected = LateDots(dots), torch.zeros_like(dots)
    for expert, size in enumerate(sizes):
        a, b = torch.randn(size, 6), torch.randn(size, 10)
        directions = list(torch.randn(targets, 10, 6).unbind())
        grad = parts.weight_gradient_and_dots(expert, a, b, directions, late)
        torch.testing.assert_close(grad, b.t() @ a, rtol=1e-5, atol=1e-5)
        own = Routed(routing, expert).of(part)
        for token in range(size):
            for k, direction in enumerate(directions):
                expected[own[token], k] += b[token].double() @ direction.double() @ a[token].double()
    late.flush()
    assert sizes[-1] == 0
    torch.testing.assert_close(dots, expected, rtol=1e-5, atol=1e-4)


def test_dots_of_an_experts_parts_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, as on a GPU: one matrix of uneven stretches, and of a single one."""
    from inrun_megatron.dots import linear

    monkeypatch.setattr(linear, "by_triton", lambda *tensors: True)
    routed = _map(ROWS * 48)
    routed[::ROWS] = False  # row 0 goes to the last expert alone
    routed[::ROWS, -1] = True
    sizes = routed.sum(0).tolist()
    routing = Routing.of_map(routed, sizes)
    row = routing.rows(ROWS)
    parts = RoutedParts(row, routing.owners, sizes, ROWS)
    dots = torch.zeros(ROWS, 2, dtype=torch.float64)
    late, expected = LateDots(dots), torch.zeros_like(dots)
    for expert, size in enumerate(sizes):
        a, b = torch.randn(size, 32).bfloat16(), torch.randn(size, 64).bfloat16()
        directions = list(torch.randn(2, 64, 32).bfloat16().unbind())
        grad = parts.weight_gradient_and_dots(expert, a, b, directions, late)
        torch.testing.assert_close(grad.float(), b.t().float() @ a.float(), rtol=1e-2, atol=1e-1)
        own = Routed(routing, expert).of(row)
        tokens = torch.stack([((b.double() @ d.double()) * a.double()).sum(1) for d in directions], dim=1)
        expected.index_add_(0, own, tokens)
    late.flush()
    # The block of a single stretch is training's own product, which is rounded to bf16.
    torch.testing.assert_close(dots, expected, rtol=1e-2, atol=5e-3 * float(expected.abs().max()))
