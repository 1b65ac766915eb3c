"""The Triton kernels against a loop over segments in fp64.

Where there is no GPU they run in Triton's interpreter, which executes the kernel's own program block by block on the CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inrun_megatron.dots import cost, kernels, triton_blocks, triton_elementwise, triton_launch, triton_linear
from inrun_megatron.dots.segments import Segments
from inrun_megatron.dots.triton_launch import Parts
from tests.distributed import run_distributed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
S, ROWS, IN, OUT, VOCABULARY, TARGETS = 7, 3, 24, 40, 11, 3
TILE = triton_linear.Tile(
    16, 16, 16, 4
)  # smaller than every dimension but the tokens: several tiles, all with a ragged edge
Bounds = list[tuple[int, int, int]]
DOCUMENTS: Bounds = [(0, 0, 3), (0, 3, 7), (1, 0, 7), (2, 0, 1), (2, 1, 2), (2, 2, 7)]
TOKENS: Bounds = [(row, t, t + 1) for row in range(ROWS) for t in range(S)]


def _tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def _tokens(batch_dim: int, features: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return _tensor(*((S, ROWS) if batch_dim == 1 else (ROWS, S)), features, dtype=dtype, seed=seed)


def add_parts(dots: Tensor, parts: list[Tensor]) -> None:
    together = Parts(dots)
    for part in parts:
        together.append(part)
    together.settle()


def _cut(buffer: Tensor, batch_dim: int, bounds: Bounds | None) -> list[Tensor]:
    rows = [buffer.select(batch_dim, i).double() for i in range(buffer.shape[batch_dim])]
    return rows if bounds is None else [rows[i][lo:hi] for i, lo, hi in bounds]


def _close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def _linear_reference(
    a: Tensor, b: Tensor, directions: list[Tensor], batch_dim: int, bounds: Bounds | None
) -> tuple[Tensor, Tensor]:
    blocks = [y.t() @ x for x, y in zip(_cut(a, batch_dim, bounds), _cut(b, batch_dim, bounds), strict=True)]
    dots = torch.stack([torch.stack([(w * d.double()).sum() for d in directions]) for w in blocks])
    return torch.stack(blocks).sum(0), dots


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
    a, b = _tokens(batch_dim, IN, dtype), _tokens(batch_dim, OUT, dtype, seed=1)
    directions = list(_tensor(targets, OUT, IN, dtype=torch.float32 if precise else torch.bfloat16))
    assert triton_linear.fits(a, b, directions)
    grad, expected = _linear_reference(a, b, directions, batch_dim, bounds)
    for compute in (_in_one_kernel, triton_blocks.blocks_and_dots):
        dots = torch.zeros_like(expected)
        found, parts = compute(a, b, directions, batch_dim, bounds)
        add_parts(dots, [parts])
        _close(dots, expected, 2e-6)  # fp32 accumulation, whatever the buffers' precision
        assert found.dtype == dtype
        _close(found.double(), grad, {torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype])


def _in_one_kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
    return triton_linear.weight_gradient_and_dots(*arguments, by=TILE)


def test_parts_are_added_in_fp64() -> None:
    """One after another in fp32, ones would not move a sum of 2^24."""
    parts = torch.ones(1000, 1, 2, device=DEVICE)
    parts[0] = 2.0**24
    dots = torch.zeros(1, 1, dtype=torch.float64, device=DEVICE)
    add_parts(dots, [parts, parts])  # padded to two targets
    assert dots.item() == 2 * (2**24 + 999)


def test_parts_are_added_before_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "TOGETHER", 5)
    dots = torch.zeros(2, 1, dtype=torch.float64, device=DEVICE)
    parts = Parts(dots)
    seen = []
    for _ in range(4):
        parts.append(torch.ones(1, 2, 1, device=DEVICE))
        seen.append(dots.sum().item())
    parts.settle()
    assert seen == [0.0, 0.0, 6.0, 6.0] and dots.tolist() == [[4.0], [4.0]]


def test_blocks_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large weight only some segments' blocks are there at a time."""
    a, b = _tokens(1, IN, torch.bfloat16), _tokens(1, OUT, torch.bfloat16, seed=1)
    directions = list(_tensor(TARGETS, OUT, IN))
    for bounds in (None, DOCUMENTS):
        grad, expected = _linear_reference(a, b, directions, 1, bounds)
        for blocks in (1, 2):
            monkeypatch.setattr(triton_blocks, "CHUNK", blocks * OUT * IN)
            found, parts = triton_blocks.blocks_and_dots(a, b, directions, 1, bounds)
            dots = torch.zeros_like(expected)
            add_parts(dots, [parts])
            _close(dots, expected, 2e-6)
            _close(found.double(), grad, 4e-3)


def test_unaligned_buffers_are_not_for_the_copy_engine() -> None:
    a, b = _tokens(1, IN, torch.bfloat16), _tokens(1, OUT, torch.bfloat16)
    directions = list(_tensor(2, OUT, IN))
    assert triton_linear.fits(a, b, directions)
    storage = _tensor(S * ROWS * IN + 8, dtype=torch.bfloat16)
    assert not triton_linear.fits(storage[1 : 1 + a.numel()].view_as(a), b, directions)  # 2 bytes off
    assert not triton_linear.fits(_tokens(1, IN + 1, torch.bfloat16), b, directions)  # rows 2 bytes off
    assert not triton_linear.fits(a.transpose(0, 2).contiguous().transpose(0, 2), b, directions)
    shifted = _tensor(2 * OUT * IN + 1)
    assert not triton_linear.fits(
        a, b, [shifted[: OUT * IN].view(OUT, IN), shifted[-OUT * IN :].view(OUT, IN)]
    )


@pytest.mark.parametrize("form", ["fused", "blocks", "projection", "one row"])
def test_a_layer_by_every_form(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer's backward calls: dots and weight gradient, whichever form the rule picks."""
    for dim, bounds in ((1, None), (0, None), (1, DOCUMENTS)):
        a, b = _tokens(dim, IN, torch.bfloat16), _tokens(dim, OUT, torch.bfloat16, seed=1)
        if form == "one row":
            a, b, bounds = a.narrow(dim, 0, 1), b.narrow(dim, 0, 1), None
        directions = list(_tensor(TARGETS, OUT, IN, dtype=torch.bfloat16))
        monkeypatch.setattr(cost, "cheapest", lambda shape, rule, *forms: form)
        segments = None
        if bounds is not None:
            ids = torch.zeros(ROWS, S, dtype=torch.long)
            for number, (row, start, stop) in enumerate(bounds):
                ids[row, start:stop] = number
            segments = Segments.of(ids)
        rows = a.shape[dim]
        cut = [(i, 0, S) for i in range(rows)] if bounds is None else bounds
        grad, expected = _linear_reference(a, b, directions, dim, cut)
        dots = torch.zeros_like(expected)
        parts = Parts(dots)
        found = kernels.weight_gradient_and_dots(a, b, directions, dim, dots, segments, parts)
        parts.settle()
        # bf16 blocks of a single row are rounded before their dots, as the weight gradient is
        _close(dots, expected, 4e-3 if form == "one row" else 2e-6)
        _close(found.double(), grad, 4e-3)


def test_rows_of_any_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of plain models see [b, h], or more dimensions than two before the features."""
    monkeypatch.setattr(cost, "cheapest", lambda shape, rule, *forms: "blocks")
    directions = list(_tensor(TARGETS, OUT, IN))
    for shape in ((ROWS,), (ROWS, 2, 3)):
        a, b = _tensor(*shape, IN, dtype=torch.bfloat16), _tensor(*shape, OUT, dtype=torch.bfloat16)
        flat = [x.reshape(ROWS, -1, x.shape[-1]) for x in (a, b)]
        blocks = torch.einsum("bso,bsi->boi", flat[1].double(), flat[0].double())
        expected = torch.stack([(blocks * d.double()).sum((1, 2)) for d in directions], dim=1)
        dots = torch.zeros_like(expected)
        parts = Parts(dots)
        kernels.weight_gradient_and_dots(a, b, directions, 0, dots, None, parts)
        parts.settle()
        _close(dots, expected, 2e-6)


def test_linear_is_deterministic() -> None:
    a, b = _tokens(1, IN, torch.bfloat16), _tokens(1, OUT, torch.bfloat16, seed=1)
    directions = list(_tensor(TARGETS, OUT, IN))
    runs = []
    for _ in range(2):
        dots = torch.zeros(len(DOCUMENTS), TARGETS, dtype=torch.float64, device=DEVICE)
        grad, parts = _in_one_kernel(a, b, directions, 1, DOCUMENTS)
        add_parts(dots, [parts])
        runs.append((dots, grad))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def test_linear_default_tile() -> None:
    """The tile that is chosen without one given, larger than the whole weight."""
    a, b = _tokens(1, IN, torch.bfloat16), _tokens(1, OUT, torch.bfloat16, seed=1)
    directions = list(_tensor(1, OUT, IN))
    for bounds in (None, TOKENS):
        _, expected = _linear_reference(a, b, directions, 1, bounds)
        dots = torch.zeros_like(expected)
        add_parts(dots, [triton_linear.weight_gradient_and_dots(a, b, directions, 1, bounds)[1]])
        _close(dots, expected, 2e-6)


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
    b, x = _tokens(batch_dim, features, torch.bfloat16), _tokens(batch_dim, features, torch.bfloat16, seed=1)
    scales, shifts = list(_tensor(TARGETS, features)), list(_tensor(TARGETS, features, seed=2))
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
    normalised = _cut((wide - mean) * rstd, batch_dim, bounds)
    with_shift = kind != "rms"
    expected = torch.stack(
        [
            torch.stack(
                [
                    (y * xhat * d).sum() + (y * c).sum() * with_shift
                    for d, c in zip(scales, shifts, strict=True)
                ]
            )
            for y, xhat in zip(_cut(b, batch_dim, bounds), normalised, strict=True)
        ]
    )
    dots = torch.zeros_like(expected)
    parts = triton_elementwise.norm_dots(
        b, x, batch_dim, scales, shifts if with_shift else None, bounds, **statistics
    )
    add_parts(dots, [parts])
    _close(dots, expected, 3e-6)


@pytest.mark.usefixtures("short_stretches")
@pytest.mark.parametrize("bounds", [None, DOCUMENTS])
@pytest.mark.parametrize("batch_dim", [0, 1])
def test_bias(batch_dim: int, bounds: Bounds | None) -> None:
    b, directions = _tokens(batch_dim, OUT, torch.bfloat16), list(_tensor(TARGETS, OUT))
    expected = torch.stack(
        [torch.stack([(y.sum(0) * d).sum() for d in directions]) for y in _cut(b, batch_dim, bounds)]
    )
    dots = torch.zeros_like(expected)
    add_parts(dots, [triton_elementwise.bias_dots(b, batch_dim, directions, bounds)])
    _close(dots, expected, 2e-6)


@pytest.mark.usefixtures("short_stretches")
@pytest.mark.parametrize("bounds", [None, DOCUMENTS])
@pytest.mark.parametrize("batch_dim", [0, 1])
def test_embedding(batch_dim: int, bounds: Bounds | None) -> None:
    b, directions = _tokens(batch_dim, OUT, torch.bfloat16), list(_tensor(TARGETS, VOCABULARY, OUT))
    ids = torch.randint(0, VOCABULARY, b.shape[:2], generator=torch.Generator().manual_seed(0)).to(DEVICE)
    gathered = [_cut(d[ids], batch_dim, bounds) for d in directions]
    expected = torch.stack(
        [
            torch.stack([(y * gathered[k][g]).sum() for k in range(TARGETS)])
            for g, y in enumerate(_cut(b, batch_dim, bounds))
        ]
    )
    dots = torch.zeros_like(expected)
    add_parts(dots, [triton_elementwise.embedding_dots(b, ids, batch_dim, directions, bounds)])
    _close(dots, expected, 2e-6)


def _score_a_model(rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    """Dots of every parameter of a small model: by torch's operations and by the kernels, whole rows and documents."""
    from inrun_megatron import Layout, attach_taps
    from inrun_megatron.directions import Directions
    from inrun_megatron.engines.shards import FlatGroup, Residence, Span
    from inrun_megatron.scoring import RowScorer
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
            scorer.settle()
            both.append(dots.cpu())
        found.append((both[0], both[1]))
    return found


def test_a_model_scored_by_the_kernels_has_the_values_of_torch() -> None:
    [cases] = run_distributed(
        _score_a_model, 1, env={"CUDA_VISIBLE_DEVICES": "0"} if DEVICE == "cuda" else None
    )
    for by_torch, by_kernels in cases:
        _close(by_kernels, by_torch, 2e-6)


COMPILE = """
import os
import subprocess
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from inrun_megatron import triton_adam
from inrun_megatron.dots import triton_blocks, triton_elementwise, triton_linear

cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

def compiled(kernel, warps, types, constants):
    names = kernel.arg_names
    signature = {n: "constexpr" if n.isupper() else types.get(n, "*fp32" if n.endswith("_ptr") else "i32") for n in names}
    source = ASTSource(
        kernel, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr")},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})

for features, segments, ragged in ((2048, 4, False), (2048, 4, True), (8192, 4, False), (8192, 4, True), (2048, 40, True)):
    two = segments > triton_linear.SEGMENTS_PER_ACCUMULATOR
    tile = triton_linear.tile(features, features, two)
    linear = compiled(
        triton_linear._kernel, tile.warps,
        {"a_desc": f"tensordesc<bf16[{tile.tokens},1,{tile.into}]>", "b_desc": f"tensordesc<bf16[{tile.tokens},1,{tile.out}]>",
         "direction_desc": f"tensordesc<bf16[1,{tile.out},{tile.into}]>", "grad_ptr": "*bf16", "segments_ptr": "*i32"},
        {"TARGETS": 1, "BATCH_FIRST": False, "RAGGED": ragged, "TWO_ACCUMULATORS": two, "WIDEN": False,
         "BLOCK_OUT": tile.out, "BLOCK_IN": tile.into, "BLOCK_TOKENS": tile.tokens, "TILE_ROWS": 8,
         "STAGES": triton_linear.STAGES},
    )
    # The tensor cores multiply, the copy engine loads, and no register is spilled to the stack.
    cubin = Path(os.environ["TRITON_CACHE_DIR"], "kernel.cubin")
    cubin.write_bytes(linear.asm["cubin"])
    used = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    print("wgmma" in linear.asm["ptx"] and "cp.async.bulk.tensor" in linear.asm["ptx"] and "STACK:0" in used)
blocks = {"STRETCH": 128, "BLOCK_TOKENS": 32, "BLOCK_FEATURES": 128}
for kernel, types, constants in [
    (triton_elementwise._vector_kernel, {"b_ptr": "*bf16", "x_ptr": "*bf16", "segments_ptr": "*i32"},
     {"SCALE": True, "SHIFT": True, "MEAN": True, "STATISTICS": True}),
    (triton_elementwise._embedding_kernel, {"b_ptr": "*bf16", "ids_ptr": "*i64", "segments_ptr": "*i32"}, {}),
]:
    print(len(compiled(kernel, 4, types, {**constants, **blocks}).asm["cubin"]) > 0)
numbers = {n: "fp32" for n in ("gain", "eps", "seen", "fresh", "share", "momentum", "decay")}
for kernel, types, constants in [
    (triton_adam._condition_kernel, {**numbers, "clips_ptr": "*fp64"}, {"TERMS": True}),
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
    assert ran.stdout.split() == ["True"] * 11, ran.stderr
