"""A model scored by all Triton kernels, and what any launch must respect: grids, and distances beyond int32.

Where there is no GPU they run in Triton's interpreter, which executes the kernel's own program block by block on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
from torch import Tensor

from inrun_megatron.dots import triton_blocks, triton_elementwise, triton_launch, triton_norms
from inrun_megatron.dots.segments import Segments
from inrun_megatron.taps import Pass
from tests.distributed import run_distributed
from tests.kernel_cases import (
    DEVICE,
    ROWS,
    TARGETS,
    VOCABULARY,
    S,
    add_parts,
    close,
    tensor,
    tokens_of,
)


def _score_a_model(rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    """Dots of every parameter of a small model: by torch's operations and by the kernels, whole rows and documents."""
    from inrun_megatron import Layout, attach_taps
    from inrun_megatron.directions import Directions
    from inrun_megatron.engines.shards import FlatGroup, Residence, Span
    from inrun_megatron.shapley.consumers import RowScorer

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(VOCABULARY, 16),
        torch.nn.LayerNorm(16),
        torch.nn.Linear(16, 8),
        torch.nn.RMSNorm(8),
    ).to(DEVICE)
    taps = attach_taps(model)
    spans, start = [], 0
    for parameter in model.parameters():
        spans.append(Span(parameter, start, parameter.numel()))
        start += parameter.numel()
    group = FlatGroup(Residence.REPLICATED, start, 0, start, spans, torch.device(DEVICE))
    directions = Directions([group], taps.sharding, Layout.data_parallel(), TARGETS)
    directions.shards()[0].normal_()
    ids = torch.randint(0, VOCABULARY, (ROWS, S), device=DEVICE)
    found = []
    for parts in (None, torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0] * 7, [0, 1, 2, 2, 2, 2, 2]])):
        segments = None if parts is None else Segments.of(parts)
        both = []
        for fused in (False, True):
            count = ROWS if segments is None else len(segments)
            dots = torch.zeros(count, TARGETS, dtype=torch.float64, device=DEVICE)
            scorer = RowScorer(directions, dots, segments)
            scorer.fused = fused
            with taps.during(Pass(consumers=(scorer,))):
                model(ids).square().sum().backward()
            scorer.flush()
            both.append(dots.cpu())
        found.append((both[0], both[1]))
    return found


def test_a_model_scored_by_the_kernels_has_the_values_of_torch() -> None:
    [cases] = run_distributed(
        _score_a_model, 1, env={"CUDA_VISIBLE_DEVICES": "0"} if DEVICE == "cuda" else None
    )
    for by_torch, by_kernels in cases:
        close(by_kernels, by_torch, 2e-6)


def test_directions_lie_further_apart_than_int32_counts() -> None:
    """With many targets of a large model: offsets to a target's direction are taken in int64."""
    features, far = 16, 2**29 + 2**7
    storage = torch.empty(
        4 * far, dtype=torch.bfloat16, device=DEVICE
    )  # pages that nobody touches cost nothing
    directions = [storage[k * far :][:features] for k in range(5) if k * far < 4 * far]
    for k, direction in enumerate(directions):
        direction.copy_(tensor(features, seed=k))
    b = tokens_of(1, features, torch.bfloat16)
    expected = torch.stack([(b.double().sum(0) * d.double()).sum(-1) for d in directions], dim=1)
    assert triton_launch.equally_spaced(directions)[1] == far and 4 * far > 2**31
    dots = torch.zeros_like(expected)
    add_parts(dots, [triton_elementwise.bias_dots(b, 1, directions)])
    close(dots, expected, 2e-6)
    ids = torch.zeros(b.shape[:2], dtype=torch.long, device=DEVICE)
    dots = torch.zeros_like(expected)
    tables = [d.view(1, -1) for d in directions]
    add_parts(dots, [triton_elementwise.embedding_dots(b, ids, 1, tables)])
    close(dots, expected, 2e-6)
    blocks = b.sum(0).view(ROWS, 1, features)
    dots = torch.zeros_like(expected)
    add_parts(dots, [triton_blocks.block_dots(blocks, tables)])
    close(dots, (blocks.double().flatten(1) @ torch.stack(directions).double().t()), 2e-6)


def test_grids_are_counted_as_triton_does() -> None:
    for size in range(1, 40):
        assert triton_launch.padded(size) == triton.next_power_of_2(size)
        assert all(triton_launch.blocks_of(size, block) == triton.cdiv(size, block) for block in (1, 3, 8))
    assert triton_launch.blocks_of(2**33 + 1, 2**12) == 2**21 + 1


def test_directions_of_several_storages_are_not_reached_from_the_first() -> None:
    """Equal gaps between addresses prove nothing; two storages of one size always have one."""
    storage = torch.arange(8.0, device=DEVICE)
    first, gap = triton_launch.equally_spaced([storage[0:2], storage[4:6]])
    assert first.data_ptr() == storage.data_ptr() and gap == 4
    for pair in ([storage[0:2], storage.clone()[4:6]], [storage[4:6], storage[0:2]]):
        first, gap = triton_launch.equally_spaced(pair)
        assert torch.equal(first, torch.stack(pair)) and gap == 2


def test_ids_of_int32_find_the_rows_of_a_large_vocabulary() -> None:
    features, last = 16, 2**27 + 3
    directions = [torch.empty(last + 1, features, dtype=torch.bfloat16, device=DEVICE)]
    directions[0][last] = tensor(features, dtype=torch.bfloat16)
    assert directions[0].numel() > 2**31
    b = tokens_of(0, features, torch.bfloat16)
    ids = torch.full(b.shape[:2], last, dtype=torch.int32, device=DEVICE)
    dots = torch.zeros(ROWS, 1, dtype=torch.float64, device=DEVICE)
    add_parts(dots, [triton_elementwise.embedding_dots(b, ids, 0, directions)])
    close(dots, (b.double() @ directions[0][last].double()).sum(1, keepdim=True), 2e-6)


def test_grids_are_no_larger_than_a_gpu_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """2^31 - 1 programs in the first dimension, 65535 in the others: norms of queries by head see many tokens."""
    grids = []

    class Launched:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *arguments, **constants: None

    monkeypatch.setattr(triton_norms, "_kernel", Launched())
    tokens = triton_norms.STRETCH * 65536
    x, rstd = torch.empty(2, tokens // 2, 1, dtype=torch.bfloat16), torch.empty(2, tokens // 2, 1)
    triton_norms.gradients(x, x, None, rstd)
    assert [grid[0] for grid in grids] == [65536] and all(n <= 65535 for n in grids[0][1:])
