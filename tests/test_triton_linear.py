"""The Triton kernels of linear layers, and the choice between them, against a loop over segments in fp64.

Where there is no GPU they run in Triton's interpreter, which executes the kernel's own program block by block on the CPU.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from inrun_megatron.dots import copy_engine, cost, kernels, triton_blocks, triton_linear
from inrun_megatron.dots import late as late_dots
from inrun_megatron.dots.late import LateDots
from inrun_megatron.dots.segments import Bounds, Segments, whole_rows
from tests.kernel_cases import (
    DEVICE,
    DOCUMENTS,
    IN,
    OUT,
    ROWS,
    TARGETS,
    TOKENS,
    S,
    add_parts,
    close,
    cut,
    tensor,
    tokens_of,
)

ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # the interpreter cuts digits off
# Smaller than every dimension but the tokens: several tiles, all with a ragged edge.
TILE = triton_linear.Tile(16, 16, tokens=16, stages=2, warps=4)
_in_one_kernel = partial(triton_linear.weight_gradient_and_dots, by=TILE)


def _linear_reference(
    a: Tensor, b: Tensor, directions: list[Tensor], batch_dim: int, bounds: Bounds | None
) -> tuple[Tensor, Tensor]:
    blocks = [y.t() @ x for x, y in zip(cut(a, batch_dim, bounds), cut(b, batch_dim, bounds), strict=True)]
    dots = torch.stack([torch.stack([(w * d.double()).sum() for d in directions]) for w in blocks])
    return torch.stack(blocks).sum(0), dots


def _require_the_reference(
    compute: Any, a: Tensor, b: Tensor, directions: list[Tensor], batch_dim: int, bounds: Bounds | None
) -> None:
    """Dots to fp32 accumulation, whatever the buffers' precision; the weight gradient to their rounding."""
    grad, expected = _linear_reference(a, b, directions, batch_dim, bounds)
    dots = torch.zeros_like(expected)
    found, parts = compute(a, b, directions, batch_dim, bounds)
    add_parts(dots, [parts])
    close(dots, expected, 2e-6)
    assert found.dtype == a.dtype
    close(found.double(), grad, ROUNDING[a.dtype])


@pytest.mark.parametrize("targets", [1, TARGETS])
@pytest.mark.parametrize("precise", [False, True], ids=["bf16 directions", "fp32 directions"])
@pytest.mark.parametrize(
    ("batch_dim", "bounds", "dtype"),
    [
        (1, None, torch.bfloat16),
        (0, None, torch.float16),
        (1, DOCUMENTS, torch.bfloat16),
        (0, DOCUMENTS, torch.bfloat16),
        (1, TOKENS, torch.bfloat16),  # more segments than share an accumulator
        (0, TOKENS, torch.float16),
    ],
)
def test_linear(
    batch_dim: int, bounds: Bounds | None, dtype: torch.dtype, precise: bool, targets: int
) -> None:
    a, b = tokens_of(batch_dim, IN, dtype), tokens_of(batch_dim, OUT, dtype, seed=1)
    directions = list(tensor(targets, OUT, IN, dtype=torch.float32 if precise else torch.bfloat16))
    assert copy_engine.fits(a, b, directions, batch_dim)
    for compute in (_in_one_kernel, triton_blocks.blocks_and_dots):
        _require_the_reference(compute, a, b, directions, batch_dim, bounds)


def test_parts_are_added_in_fp64() -> None:
    """One after another in fp32, ones would not move a sum of 2^24."""
    parts = torch.ones(1000, 1, 2, device=DEVICE)
    parts[0] = 2.0**24
    dots = torch.zeros(1, 1, dtype=torch.float64, device=DEVICE)
    add_parts(dots, [parts, parts])  # padded to two targets
    assert dots.item() == 2 * (2**24 + 999)


def test_parts_are_added_before_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_dots, "TOGETHER", 5)
    dots = torch.zeros(2, 1, dtype=torch.float64, device=DEVICE)
    late = LateDots(dots)
    seen = []
    for _ in range(4):
        late.add_parts(torch.ones(1, 2, 1, device=DEVICE))
        seen.append(dots.sum().item())
    late.flush()
    assert seen == [0.0, 0.0, 6.0, 6.0] and dots.tolist() == [[4.0], [4.0]]


def test_blocks_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large weight only some segments' blocks are there at a time."""
    a, b = tokens_of(1, IN, torch.bfloat16), tokens_of(1, OUT, torch.bfloat16, seed=1)
    directions = list(tensor(TARGETS, OUT, IN))
    for bounds in (None, DOCUMENTS):
        for blocks in (1, 2):
            monkeypatch.setattr(triton_blocks, "CHUNK", blocks * OUT * IN)
            _require_the_reference(triton_blocks.blocks_and_dots, a, b, directions, 1, bounds)


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("rows", [3, 10], ids=["running dots", "own accumulators"])
@pytest.mark.parametrize("batch_dim", [0, 1])
def test_whole_steps_of_tokens(batch_dim: int, rows: int, targets: int) -> None:
    """Rows of whole steps, which one loop goes through; with whole steps and a rest; a row of each kind."""
    steps = 3 * TILE.tokens

    def buffer(features: int, seed: int) -> Tensor:
        shape = (steps, rows, features) if batch_dim == 1 else (rows, steps, features)
        return tensor(*shape, dtype=torch.bfloat16, seed=seed)

    a, b = buffer(IN, 0), buffer(OUT, 1)
    directions = list(tensor(targets, OUT, IN, dtype=torch.bfloat16))
    rests = Bounds.of((row, *part) for row in range(rows) for part in ((0, 5), (5, steps)))
    mixed = Bounds.of([(0, 0, 20), (0, 20, steps), *((row, 0, steps) for row in range(1, rows))])
    for bounds in (None, whole_rows(rows, steps), rests, mixed):
        _require_the_reference(_in_one_kernel, a, b, directions, batch_dim, bounds)


@pytest.mark.parametrize(("targets", "edge"), [(1, 0), (3, 8)])
@pytest.mark.parametrize("name", ["LARGE", "SMALL", "SMALL, fp32 directions", "OWN_ACCUMULATORS"])
def test_tiles_that_are_used(name: str, targets: int, edge: int) -> None:
    """On a GPU the small tiles of the other tests miss what these run on: its largest products, and more steps than it holds."""
    by: triton_linear.Tile = getattr(triton_linear, name.split(",")[0])
    rows = 9 if name == "OWN_ACCUMULATORS" else 3
    steps = (2 * by.stages + 1) * by.tokens
    a, b = (tensor(steps, rows, size + edge, dtype=torch.bfloat16, seed=size) for size in (by.into, by.out))
    kept = torch.float32 if "fp32" in name else torch.bfloat16
    directions = list(tensor(targets, by.out + edge, by.into + edge, dtype=kept))
    documents = Bounds.of((row, *part) for row in range(rows) for part in ((0, 5), (5, steps)))
    for bounds in (None, documents):
        grad, expected = _linear_reference(a, b, directions, 1, bounds)
        dots = torch.zeros_like(expected)
        found, parts = triton_linear.weight_gradient_and_dots(a, b, directions, 1, bounds, by=by)
        add_parts(dots, [parts])
        close(dots, expected, 1e-5)
        close(found.double(), grad, ROUNDING[a.dtype])


@pytest.mark.parametrize("batch_dim", [0, 1])
def test_buffers_that_are_parts_of_larger_ones(batch_dim: int) -> None:
    """Rows that lie apart, as slices of another tensor: what lies between them counts for nothing, whatever it is."""
    steps, features = 2 * TILE.tokens, 3 * TILE.into // 2  # an edge within the last tile
    shape = (steps, ROWS, 2 * features) if batch_dim == 1 else (ROWS, steps, 2 * features)
    whole = [tensor(*shape, dtype=torch.bfloat16, seed=seed) for seed in range(2)]
    for buffer in whole:
        buffer[..., features:] = torch.nan
    a, b = (buffer[..., :features] for buffer in whole)
    directions = list(tensor(1, features, features, dtype=torch.bfloat16))
    assert copy_engine.fits(a, b, directions, batch_dim)
    for bounds in (None, Bounds.of((row, *part) for row in range(ROWS) for part in ((0, 5), (5, steps)))):
        _require_the_reference(_in_one_kernel, a, b, directions, batch_dim, bounds)


def test_what_the_copy_engine_reads() -> None:
    a, b = tokens_of(1, IN, torch.bfloat16), tokens_of(1, OUT, torch.bfloat16)
    directions = list(tensor(2, OUT, IN))
    assert copy_engine.fits(a, b, directions, 1)
    storage = tensor(S * ROWS * IN + 8, dtype=torch.bfloat16)
    assert not copy_engine.fits(storage[1 : 1 + a.numel()].view_as(a), b, directions, 1)  # 2 bytes off
    assert not copy_engine.fits(tokens_of(1, IN + 1, torch.bfloat16), b, directions, 1)  # rows 2 bytes off
    assert not copy_engine.fits(a.transpose(0, 2).contiguous().transpose(0, 2), b, directions, 1)
    assert not copy_engine.fits(
        a.transpose(0, 1).contiguous().transpose(0, 1), b, directions, 1
    )  # tokens within rows
    # A layer of few outputs, such as a router: its tokens lie 32 bytes apart, a token's rows 8.
    full, few = (tensor(S, 4, features, dtype=torch.bfloat16) for features in (IN, 4))
    assert not copy_engine.fits(full, few, list(tensor(1, 4, IN)), 1)
    with pytest.raises(ValueError, match="copy engine"):
        triton_linear.weight_gradient_and_dots(
            a.transpose(0, 1).contiguous().transpose(0, 1), b, directions, 1
        )
    shifted = tensor(2 * OUT * IN + 1)
    assert not copy_engine.fits(
        a, b, [shifted[: OUT * IN].view(OUT, IN), shifted[-OUT * IN :].view(OUT, IN)], 1
    )
    for dim in (0, 1):  # one row, whatever its step is called
        row = tokens_of(dim, IN, torch.bfloat16).narrow(dim, 1, 1)
        matrix = copy_engine.as_matrix(row, dim)
        assert matrix is not None and torch.equal(matrix[0], row.flatten(0, 1)) and matrix[1] == 0


@pytest.mark.parametrize(
    ("capability", "shared", "fits"),
    [
        ((8, 0), 163, False),  # A100
        ((9, 0), 227, True),  # H100, H200
        ((10, 0), 227, True),  # B200
        ((12, 0), 99, False),  # RTX PRO 6000 Blackwell: the tiles take up to 161 KiB there
    ],
)
def test_gpus_that_have_a_copy_engine_and_room_for_tiles(
    capability: tuple[int, int], shared: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    major, minor = capability
    gpu = SimpleNamespace(major=major, minor=minor, shared_memory_per_block_optin=shared * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert copy_engine._has_one.__wrapped__(torch.device("cuda", 0)) == fits


@pytest.mark.parametrize("form", ["fused", "blocks", "projection", "one row"])
def test_a_layer_by_every_form(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer's backward calls: dots and weight gradient, whichever form the rule picks."""
    for dim, bounds in ((1, None), (0, None), (1, DOCUMENTS)):
        a, b = tokens_of(dim, IN, torch.bfloat16), tokens_of(dim, OUT, torch.bfloat16, seed=1)
        if form == "one row":
            a, b, bounds = a.narrow(dim, 0, 1), b.narrow(dim, 0, 1), None
        directions = list(tensor(TARGETS, OUT, IN, dtype=torch.bfloat16))
        monkeypatch.setattr(cost, "cheapest", lambda shape, rule, *forms: form)
        segments = None
        if bounds is not None:
            ids = torch.zeros(ROWS, S, dtype=torch.long)
            for number, (row, start, stop) in enumerate(bounds):
                ids[row, start:stop] = number
            segments = Segments.of(ids)
        rows = a.shape[dim]
        cut = whole_rows(rows, S) if bounds is None else bounds
        grad, expected = _linear_reference(a, b, directions, dim, cut)
        dots = torch.zeros_like(expected)
        late = LateDots(dots)
        found = kernels.weight_gradient_and_dots(a, b, directions, dim, late, segments)
        late.flush()
        # bf16 blocks of a single row are rounded before their dots, as the weight gradient is
        close(dots, expected, 4e-3 if form == "one row" else 2e-6)
        close(found.double(), grad, ROUNDING[torch.bfloat16])


def test_rows_of_any_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of plain models see [b, h], or more dimensions than two before the features."""
    monkeypatch.setattr(cost, "cheapest", lambda shape, rule, *forms: "blocks")
    directions = list(tensor(TARGETS, OUT, IN))
    for shape in ((ROWS,), (ROWS, 2, 3)):
        a, b = tensor(*shape, IN, dtype=torch.bfloat16), tensor(*shape, OUT, dtype=torch.bfloat16)
        flat = [x.reshape(ROWS, -1, x.shape[-1]) for x in (a, b)]
        blocks = torch.einsum("bso,bsi->boi", flat[1].double(), flat[0].double())
        expected = torch.stack([(blocks * d.double()).sum((1, 2)) for d in directions], dim=1)
        dots = torch.zeros_like(expected)
        late = LateDots(dots)
        kernels.weight_gradient_and_dots(a, b, directions, 0, late, None)
        late.flush()
        close(dots, expected, 2e-6)


def test_linear_is_deterministic() -> None:
    a, b = tokens_of(1, IN, torch.bfloat16), tokens_of(1, OUT, torch.bfloat16, seed=1)
    directions = list(tensor(TARGETS, OUT, IN))
    runs = []
    for _ in range(2):
        dots = torch.zeros(len(DOCUMENTS), TARGETS, dtype=torch.float64, device=DEVICE)
        grad, parts = _in_one_kernel(a, b, directions, 1, DOCUMENTS)
        add_parts(dots, [parts])
        runs.append((dots, grad))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def test_linear_default_tile() -> None:
    """The tile that is chosen without one given, larger than the whole weight."""
    a, b = tokens_of(1, IN, torch.bfloat16), tokens_of(1, OUT, torch.bfloat16, seed=1)
    directions = list(tensor(1, OUT, IN))
    for bounds in (None, TOKENS):
        _require_the_reference(triton_linear.weight_gradient_and_dots, a, b, directions, 1, bounds)
