"""Buffers, segments and sums for tests of the Triton kernels, on the GPU where there is one."""

from __future__ import annotations

import torch
from torch import Tensor

from inrun_megatron.dots.late import LateDots
from inrun_megatron.dots.segments import Bounds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
S, ROWS, IN, OUT, VOCABULARY, TARGETS = 7, 3, 24, 40, 11, 3
DOCUMENTS = Bounds.of([(0, 0, 3), (0, 3, 7), (1, 0, 7), (2, 0, 1), (2, 1, 2), (2, 2, 7)])
TOKENS = Bounds.of((row, t, t + 1) for row in range(ROWS) for t in range(S))


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def tokens_of(batch_dim: int, features: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return tensor(*((S, ROWS) if batch_dim == 1 else (ROWS, S)), features, dtype=dtype, seed=seed)


def add_parts(dots: Tensor, parts: list[Tensor]) -> None:
    together = LateDots(dots)
    for part in parts:
        together.add_parts(part)
    together.flush()


def cut(buffer: Tensor, batch_dim: int, bounds: Bounds | None) -> list[Tensor]:
    rows = [buffer.select(batch_dim, i).double() for i in range(buffer.shape[batch_dim])]
    return rows if bounds is None else [rows[i][lo:hi] for i, lo, hi in bounds]


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
