"""The Triton kernels of norms, biases and embeddings against a loop over segments in fp64.

Where there is no GPU they run in Triton's interpreter, which executes the kernel's own program block by block on the CPU.
"""

from __future__ import annotations

import pytest
import torch

from inrun_megatron.dots import triton_elementwise, triton_norms
from inrun_megatron.dots.segments import Bounds
from inrun_megatron.shapley.consumers import norm_gradients
from inrun_megatron.taps import Emission, Pass, Sharding, Site
from tests.kernel_cases import (
    DEVICE,
    DOCUMENTS,
    OUT,
    ROWS,
    TARGETS,
    VOCABULARY,
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
    b, x = (buffer.transpose(0, 1).contiguous().transpose(0, 1) for buffer in (b, x))  # not contiguous
    for found, right in zip(triton_norms.gradients(b, x, given, rstd.float()), expected, strict=True):
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
