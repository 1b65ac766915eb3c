"""Every dot against a loop over rows in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from inrun_megatron.dots import cost, linear
from inrun_megatron.dots.elementwise import embedding_dots, embedding_gradient, row_gradients, vector_dots
from inrun_megatron.dots.late import LateDots
from inrun_megatron.dots.products import weight_gradient, weight_gradient_fp32
from inrun_megatron.dots.projection import token_dots

S, IN, OUT, TARGETS = 7, 12, 20, 3


def _buffers(rows: int, batch_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(rows)
    size = (S, rows) if batch_dim == 1 else (rows, S)
    a = torch.randn(*size, IN, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(*size, OUT, generator=generator, dtype=torch.float64).to(dtype)
    storage = torch.float64 if dtype == torch.float64 else torch.float32
    directions = [torch.randn(OUT, IN, generator=generator, dtype=storage) for _ in range(TARGETS)]
    return a, b, directions


def _reference(a: Tensor, b: Tensor, directions: list[Tensor], batch_dim: int) -> tuple[Tensor, Tensor]:
    rows = [
        b.select(batch_dim, i).double().t() @ a.select(batch_dim, i).double()
        for i in range(a.shape[batch_dim])
    ]
    dots = torch.stack([torch.stack([(w * d.double()).sum() for d in directions]) for w in rows])
    return torch.stack(rows).sum(0), dots


def blocks_and_dots(a: Tensor, b: Tensor, directions: list[Tensor], batch_dim: int, dots: Tensor) -> Tensor:
    late = LateDots(dots)
    grad = linear.blocks_and_dots(a, b, directions, batch_dim, late)
    late.flush()
    return grad


def weight_gradient_and_dots(
    a: Tensor, b: Tensor, directions: list[Tensor], batch_dim: int, dots: Tensor
) -> Tensor:
    late = LateDots(dots)
    grad = linear.weight_gradient_and_dots(a, b, directions, batch_dim, late)
    late.flush()
    return grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 8, 19])
@pytest.mark.parametrize("batch_dim", [0, 1])
def test_linear(rows: int, batch_dim: int, dtype: torch.dtype) -> None:
    a, b, directions = _buffers(rows, batch_dim, dtype)
    grad, expected = _reference(a, b, directions, batch_dim)
    start = torch.randn(rows, TARGETS, dtype=torch.float64)
    dots = start.clone()
    found = blocks_and_dots(a, b, directions, batch_dim, dots)
    assert found.dtype == dtype
    exact = {torch.float64: 1e-12, torch.float32: 3e-6}
    # One row of lower precision is scored from the product that training uses, rounding included.
    rounded = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
    tolerance = exact.get(dtype) or (rounded[dtype] if rows == 1 else 1e-5)
    scale = expected.abs().max()
    assert (dots - start - expected).abs().max() <= tolerance * scale
    torch.testing.assert_close(
        found.double(),
        grad,
        rtol=exact.get(dtype, rounded.get(dtype)),
        atol=1e-2 if dtype in rounded else 1e-5,
    )


@pytest.mark.parametrize("tokens", [(), (2, 3)], ids=["one a row", "in two dimensions"])
def test_linear_of_rows_without_a_sequence(tokens: tuple[int, ...]) -> None:
    """Such as a head on pooled features, ``[b, in]``, or tokens that lie in a plane."""
    a, b, directions = _buffers(9, 0, torch.float64)
    a, b = a[:, : max(1, len(tokens) * 3)], b[:, : max(1, len(tokens) * 3)]
    grad, expected = _reference(a, b, directions, 0)
    dots = torch.zeros(9, TARGETS, dtype=torch.float64)
    found = weight_gradient_and_dots(
        a.reshape(9, *tokens, IN), b.reshape(9, *tokens, OUT), directions, 0, dots
    )
    torch.testing.assert_close(found, grad)
    torch.testing.assert_close(dots, expected)


@pytest.mark.parametrize("rows", [1, 10])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_many_directions_of_one_buffer_are_read_together(
    rows: int, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they lie in a flat group; and one by one where they do not lie evenly."""
    a, b, _ = _buffers(rows, 1, torch.float32)
    buffer = torch.randn(6, OUT * IN + 10, generator=torch.Generator().manual_seed(0)).to(stored)
    together = [row[3 : 3 + OUT * IN].view(OUT, IN) for row in buffer]
    calls = []
    mv = torch.mv

    def counted(*arguments: Any) -> Tensor:
        calls.append(1)
        return mv(*arguments)

    monkeypatch.setattr(torch, "mv", counted)
    for directions, expected_calls in (
        (together, rows),
        (together[:3], 0),
        ([*together[:4], together[5]], 0),
        ([d.clone() for d in together], 0),
    ):
        calls.clear()
        dots = torch.zeros(rows, len(directions), dtype=torch.float64)
        found = blocks_and_dots(a, b, directions, 1, dots)
        grad, expected = _reference(a, b, directions, 1)
        # fp32's rounding is relative to the terms of a dot, not to their sum, which may nearly cancel.
        terms = _reference(a.abs(), b.abs(), [d.abs() for d in directions], 1)[1].max()
        assert (dots - expected).abs().max() < 1e-6 * terms
        torch.testing.assert_close(found.double(), grad, rtol=1e-5, atol=1e-5)
        assert len(calls) == expected_calls


def test_one_row_is_bitwise_the_plain_product() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        a, b, directions = _buffers(1, 1, dtype)
        found = weight_gradient_and_dots(a, b, directions, 1, torch.zeros(1, TARGETS, dtype=torch.float64))
        assert torch.equal(found, weight_gradient(a, b))


def test_several_rows_of_bf16_are_no_less_precise_than_the_plain_product() -> None:
    """Large rows that nearly cancel: rounding each block to bf16 before the sum would lose most of it."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(S, 2, IN, generator=generator).bfloat16()
    b = torch.randn(S, 2, OUT, generator=generator).bfloat16()
    a[:, 1] = a[:, 0]
    b[:, 1] = -b[:, 0] + 0.01 * torch.randn(S, OUT, generator=generator).bfloat16()
    exact = b.flatten(0, 1).double().t() @ a.flatten(0, 1).double()
    scored = blocks_and_dots(a, b, [torch.zeros(OUT, IN)], 1, torch.zeros(2, 1, dtype=torch.float64))
    blocks = b[:, 0].t() @ a[:, 0] + b[:, 1].t() @ a[:, 1]  # what summing bf16 blocks would give

    def error(grad: Tensor) -> float:
        return float((grad.double() - exact).norm() / exact.norm())

    assert error(scored) <= 1.05 * error(weight_gradient(a, b))
    assert error(blocks) > 5 * error(scored)


def test_weight_gradient_in_fp32_adds() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        a, b, directions = _buffers(4, 1, dtype)
        expected, _ = _reference(a, b, directions, 1)
        out = torch.ones(OUT, IN)
        weight_gradient_fp32(a, b, out)
        torch.testing.assert_close(out.double() - 1, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_dim", [0, 1])
def test_bias_and_norm(batch_dim: int) -> None:
    _, b, _ = _buffers(5, batch_dim, torch.float32)
    directions = [torch.randn(OUT) for _ in range(TARGETS)]
    dots = torch.zeros(5, TARGETS, dtype=torch.float64)
    vector_dots(row_gradients(b, batch_dim, torch.float32), directions, dots)
    for i in range(5):
        for k, direction in enumerate(directions):
            expected = (b.select(batch_dim, i).double() * direction.double()).sum()
            assert abs(dots[i, k] - expected) < 1e-4


def test_embedding() -> None:
    rows, vocabulary = 4, 9
    ids = torch.randint(0, vocabulary, (rows, S))
    b = torch.randn(rows, S, OUT)
    directions = [torch.randn(vocabulary, OUT) for _ in range(TARGETS)]
    dots = torch.zeros(rows, TARGETS, dtype=torch.float64)
    embedding_dots(b, ids, 0, directions, dots)
    for i in range(rows):
        gradient = torch.zeros(vocabulary, OUT)
        embedding_gradient(b[i], ids[i], gradient)
        for k, direction in enumerate(directions):
            assert abs(dots[i, k] - (gradient * direction).sum()) < 1e-4


@pytest.mark.parametrize("features", [(IN, OUT), (OUT, IN)])  # projected to either side
def test_projection(features: tuple[int, int]) -> None:
    a, b = torch.randn(S, 2, features[0]), torch.randn(S, 2, features[1])
    directions = [torch.randn(features[1], features[0]) for _ in range(TARGETS)]
    expected = torch.einsum("sbo,koi,sbi->sbk", b.double(), torch.stack(directions).double(), a.double())
    assert (token_dots(a, b, directions) - expected).abs().max() <= 3e-6 * expected.abs().max()


@pytest.mark.parametrize(("tokens", "form"), [(2, "projection"), (64, "blocks")])
def test_the_form_is_chosen_by_shape_and_changes_no_value(tokens: int, form: str) -> None:
    """Rows of a few tokens are projected, longer ones are blocks; both give the dots of the other."""
    rows, features = 16, 256
    a, b = torch.randn(tokens, rows, features), torch.randn(tokens, rows, features)
    directions = [torch.randn(features, features)]
    shape = cost.Shape(rows * tokens, rows, features, features, 1)
    assert cost.cheapest(shape, cost.cpu, "blocks", "projection") == form
    found, blocks = (torch.zeros(rows, 1, dtype=torch.float64) for _ in range(2))
    grad = weight_gradient_and_dots(a, b, directions, 1, found)
    expected = blocks_and_dots(a, b, directions, 1, blocks)
    assert (found - blocks).abs().max() <= 1e-5 * blocks.abs().max()
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-4)


def test_the_cost_of_blocks_grows_with_segments_and_that_of_projection_with_tokens() -> None:
    few, many = cost.Shape(1024, 8, 512, 512, 2), cost.Shape(1024, 64, 512, 512, 2)
    longer = cost.Shape(4096, 8, 512, 512, 2)
    for rule in (cost.cpu, cost.gpu):
        calls = 0.0 if rule is cost.cpu else 3 * cost.GPU_CALL
        assert rule("blocks", many) - calls == pytest.approx(8 * (rule("blocks", few) - calls))
        assert rule("blocks", longer) == rule("blocks", few)
        assert rule("projection", many) == rule("projection", few)
        assert rule("projection", longer) > rule("projection", few)
    # Read together, four directions move less than three that are read one by one.
    three, four = (cost.cpu("blocks", replace(few, targets=k)) for k in (3, 4))
    assert three * 3 / 4 < four < three


@pytest.mark.parametrize(
    ("length", "features", "form"),
    [
        (1024, 2048, "fused"),
        (1024, 768, "blocks"),  # too few tiles for the kernel
        (64, 2048, "projection"),
        (1, 768, "projection"),
    ],
)
def test_the_form_on_a_gpu(length: int, features: int, form: str) -> None:
    shape = cost.Shape(4096, 4096 // length, features, features, 1)
    forms: tuple[cost.Form, ...] = ("fused", "blocks", "projection")
    assert cost.cheapest(shape, cost.gpu, *forms) == form
    if form == "projection":  # with fp32 directions it costs sixteen times as much
        assert cost.gpu_wide(form, shape) == 16 * cost.gpu(form, shape)
