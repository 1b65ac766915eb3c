"""The Triton kernels of norms, biases and embeddings against a loop over segments in fp64; a model scored by all kernels; and
their machine code.

Where there is no GPU they run in Triton's interpreter, which executes the kernel's own program block by block on the CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor

from inrun_megatron.dots import triton_blocks, triton_elementwise, triton_launch, triton_norms
from inrun_megatron.dots.segments import Bounds, Segments
from inrun_megatron.shapley.consumers import norm_gradients
from inrun_megatron.taps import Emission, Pass, Sharding, Site
from tests.distributed import run_distributed
from tests.kernel_cases import (
    DEVICE,
    DOCUMENTS,
    OUT,
    ROWS,
    TARGETS,
    VOCABULARY,
    S,
    add_parts,
    close,
    cut,
    tensor,
    tokens_of,
)


@pytest.fixture
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs share the tokens of a segment."""
    monkeypatch.setattr(triton_elementwise, "STRETCH", 3)


@pytest.mark.usefixtures("short_stretches")
@pytest.mark.parametrize("bounds", [None, DOCUMENTS])
@pytest.mark.parametrize("batch_dim", [0, 1])
@pytest.mark.parametrize("kind", ["layer", "rms", "normalised"])
def test_norm(kind: str, batch_dim: int, bounds: Bounds | None) -> None:
    features = triton_elementwise.BLOCK_FEATURES + 9
    b, x = (
        tokens_of(batch_dim, features, torch.bfloat16),
        tokens_of(batch_dim, features, torch.bfloat16, seed=1),
    )
    scales, shifts = list(tensor(TARGETS, features)), list(tensor(TARGETS, features, seed=2))
    wide = x.double()
    mean = wide.mean(-1, keepdim=True) if kind == "layer" else torch.zeros_like(wide[..., :1])
    rstd = (
        torch.ones_like(mean)
        if kind == "normalised"
        else (wide - mean).square().mean(-1, keepdim=True).rsqrt()
    )
    statistics = {
        "layer": {"mean": mean.float(), "rstd": rstd.float()},
        "rms": {"rstd": rstd.float()},
        "normalised": {},
    }[kind]
    normalised = cut((wide - mean) * rstd, batch_dim, bounds)
    with_shift = kind != "rms"
    expected = torch.stack(
        [
            torch.stack(
                [
                    (y * xhat * d).sum() + (y * c).sum() * with_shift
                    for d, c in zip(scales, shifts, strict=True)
                ]
            )
            for y, xhat in zip(cut(b, batch_dim, bounds), normalised, strict=True)
        ]
    )
    dots = torch.zeros_like(expected)
    parts = triton_elementwise.norm_dots(
        b, x, batch_dim, scales, shifts if with_shift else None, bounds, **statistics
    )
    add_parts(dots, [parts])
    close(dots, expected, 3e-6)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_norms(kind: str, dtype: torch.dtype) -> None:
    """What directions are filled with; several programs share the tokens, the last ones are not full."""
    shape = (triton_norms.STRETCH + 1, ROWS, triton_norms.BLOCK_FEATURES + 8)
    b, x = tensor(*shape, dtype=dtype), tensor(*shape, dtype=dtype, seed=1)
    wide = x.double()
    mean = wide.mean(-1, keepdim=True) if kind == "layer" else torch.zeros_like(wide[..., :1])
    rstd = (wide - mean).square().mean(-1, keepdim=True).rsqrt()
    expected = (b.double() * (wide - mean) * rstd).sum((0, 1)), b.double().sum((0, 1))
    given = mean.float() if kind == "layer" else None
    emission = Emission(
        Site("norm", "norm", Sharding.REPLICATED, 1),
        Pass(),
        torch.nn.Parameter(tensor(shape[-1])),
        b,
        x,
        mean=given,
        rstd=rstd.float(),
    )
    for fused in (True, False):
        for found, right in zip(norm_gradients(emission, fused=fused), expected, strict=True):
            assert found.dtype == torch.float32
            close(found, right, 1e-6)
    turned = [buffer.transpose(0, 1).contiguous().transpose(0, 1) for buffer in (b, x)]  # not contiguous
    for found, right in zip(triton_norms.gradients(*turned, given, rstd.float()), expected, strict=True):
        close(found, right, 1e-6)


@pytest.mark.usefixtures("short_stretches")
@pytest.mark.parametrize("bounds", [None, DOCUMENTS])
@pytest.mark.parametrize("batch_dim", [0, 1])
def test_bias(batch_dim: int, bounds: Bounds | None) -> None:
    b, directions = tokens_of(batch_dim, OUT, torch.bfloat16), list(tensor(TARGETS, OUT))
    expected = torch.stack(
        [torch.stack([(y.sum(0) * d).sum() for d in directions]) for y in cut(b, batch_dim, bounds)]
    )
    dots = torch.zeros_like(expected)
    add_parts(dots, [triton_elementwise.bias_dots(b, batch_dim, directions, bounds)])
    close(dots, expected, 2e-6)


@pytest.mark.usefixtures("short_stretches")
@pytest.mark.parametrize("bounds", [None, DOCUMENTS])
@pytest.mark.parametrize("batch_dim", [0, 1])
def test_embedding(batch_dim: int, bounds: Bounds | None) -> None:
    b, directions = tokens_of(batch_dim, OUT, torch.bfloat16), list(tensor(TARGETS, VOCABULARY, OUT))
    ids = torch.randint(0, VOCABULARY, b.shape[:2], generator=torch.Generator().manual_seed(0)).to(DEVICE)
    gathered = [cut(d[ids], batch_dim, bounds) for d in directions]
    expected = torch.stack(
        [
            torch.stack([(y * gathered[k][g]).sum() for k in range(TARGETS)])
            for g, y in enumerate(cut(b, batch_dim, bounds))
        ]
    )
    dots = torch.zeros_like(expected)
    add_parts(dots, [triton_elementwise.embedding_dots(b, ids, batch_dim, directions, bounds)])
    close(dots, expected, 2e-6)


def _score_a_model(rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    """Dots of every parameter of a small model: by torch's operations and by the kernels, whole rows and documents."""
    from inrun_megatron import Layout, attach_taps
    from inrun_megatron.directions import Directions
    from inrun_megatron.engines.shards import FlatGroup, Residence, Span
    from inrun_megatron.shapley.consumers import RowScorer
    from inrun_megatron.taps import Pass

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


COMPILE = r"""
import os
import re
import subprocess
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from inrun_megatron.optimizers import triton_adam
from inrun_megatron.dots import triton_blocks, triton_elementwise, triton_linear, triton_norms

cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

# A layer's are multiples of 16, which Triton looks for at every launch; Triton 3.6 spills a few registers without.
SIZES = ("features_in", "features_out", "tokens", "a_step", "b_step")

def compiled(kernel, warps, types, constants):
    names = kernel.arg_names
    signature = {n: "constexpr" if n.isupper() else types.get(n, "*fp32" if n.endswith("_ptr") else "i32") for n in names}
    source = ASTSource(
        kernel, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr") or n in SIZES},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    # Directions lie a model's parameters apart, and with several targets further than int32 counts.
    found = re.findall(r".*muli .*%\w+_target\b.* : i32.*", made.asm["ttir"])
    assert not found, f"an offset to a direction in int32: {found}"
    return made

for weights, segments, even, targets, precise in (
    (2**22, 4, True, 1, False), (2**26, 4, True, 1, False), (2**22, 4, True, 4, False), (2**26, 4, True, 4, False),
    (2**26, 4, True, 1, True), (2**22, 40, True, 1, False),
    (2**22, 4, False, 1, False), (2**26, 4, False, 1, False), (2**22, 40, False, 1, False),
):
    tile = triton_linear.tile(weights, segments, 4 if precise else 2)
    linear = compiled(
        triton_linear._kernel, tile.warps,
        {"a_desc": f"tensordesc<bf16[{tile.tokens},{tile.into}]>", "b_desc": f"tensordesc<bf16[{tile.tokens},{tile.out}]>",
         "direction_desc": f"tensordesc<{'fp32' if precise else 'bf16'}[1,{tile.out},{tile.into}]>",
         "grad_ptr": "*bf16", "segments_ptr": "*i32"},
        {"TARGETS": targets, "BATCH_FIRST": False, "EVEN": even, "EDGES": False, "WIDEN": False,
         "TWO_ACCUMULATORS": segments > triton_linear.SEGMENTS_PER_ACCUMULATOR,
         "BLOCK_OUT": tile.out, "BLOCK_IN": tile.into, "BLOCK_TOKENS": tile.tokens, "TILE_ROWS": 8, "STAGES": tile.stages},
    )
    # The tensor cores multiply, the copy engine loads, and no register is spilled to the stack.
    cubin = Path(os.environ["TRITON_CACHE_DIR"], "kernel.cubin")
    cubin.write_bytes(linear.asm["cubin"])
    used = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    fine = "wgmma" in linear.asm["ptx"] and "cp.async.bulk.tensor" in linear.asm["ptx"] and "STACK:0" in used
    # A processor's shared memory holds what a program needs; both factors are read there (what else is loaded from
    # it are directions), and the products run on while the next tiles are waited for.
    fine &= linear.metadata.shared <= 227 * 1024
    if even:
        fine &= linear.asm["ttgir"].count("ttg.local_load") == targets and "wait_group.sync.aligned 1" in linear.asm["ptx"]
    print(fine)
blocks = {"STRETCH": 128, "BLOCK_TOKENS": 32, "BLOCK_FEATURES": 128}
for kernel, types, constants in [
    (triton_elementwise._vector_kernel, {"b_ptr": "*bf16", "x_ptr": "*bf16", "segments_ptr": "*i32"},
     {"SCALE": True, "SHIFT": True, "MEAN": True, "STATISTICS": True}),
    (triton_norms._kernel, {"b_ptr": "*bf16", "x_ptr": "*bf16"}, {"MEAN": True}),
    (triton_elementwise._embedding_kernel, {"b_ptr": "*bf16", "ids_ptr": "*i64", "segments_ptr": "*i32"}, {}),
]:
    print(len(compiled(kernel, 4, types, {**constants, **blocks}).asm["cubin"]) > 0)
numbers = {n: "fp32" for n in ("gain", "eps", "seen", "fresh", "share", "momentum", "decay")}
for kernel, types, constants in [
    (triton_adam._condition_kernel, {**numbers, "clips_ptr": "*fp64", "out_ptr": "*bf16"}, {"TERMS": True}),
    (triton_adam._idle_kernel, {**numbers, "out_ptr": "*bf16"}, {}),
    (triton_adam._inner_kernel, {"direction_ptr": "*bf16"}, {}),
    (triton_blocks._kernel, {"direction_ptr": "*bf16", "grad_ptr": "*bf16"}, {"TARGETS": 1, "SUM": True, "ADD": False}),
]:
    made = compiled(kernel, 4, types, {**constants, "BLOCK": triton_adam.BLOCK})
    print(made.n_spills == 0 if hasattr(made, "n_spills") else len(made.asm["cubin"]) > 0)
"""


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """Triton's compiler makes machine code for an H100/H200 (sm_90) on any machine; the product runs on tensor cores."""
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert ran.stdout.split() == ["True"] * 16, ran.stderr


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
