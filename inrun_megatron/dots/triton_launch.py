"""What the Triton kernels have in common: how buffers, directions and segments are handed to them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter runs kernels on the CPU, for tests. Its tl.dot takes bf16 numbers for the integers they are
# stored as (triton 3.9, runtime/interpreter.py: create_dot), so kernels widen them there: exact, only slower.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def blocks_of(size: int, block: int) -> int:
    """How many blocks hold ``size``. (``triton.cdiv`` takes the host microseconds: docs/gpu.md.)"""
    return -(-size // block)


def padded(count: int) -> int:
    """The next power of 2, for which ``triton.next_power_of_2`` takes as long."""
    return 1 << (count - 1).bit_length()


@triton.jit
def of_target(first, target, stride):
    """Where another target's direction begins. In int64: directions lie a whole model's parameters apart."""
    return first + tl.cast(target, tl.int64) * stride


def features_together(buffer: Tensor) -> Tensor:
    """The buffer with its features next to each other, as kernels read them."""
    return buffer if buffer.stride(-1) == 1 else buffer.contiguous()


def equally_spaced(directions: Sequence[Tensor]) -> tuple[Tensor, int]:
    """The first direction, and how many elements further the next ones are; copied only if they are not so laid out.

    Directions are rows of one buffer (directions/), so that the kernels reach all of them from one address.
    """
    first, storage = directions[0], directions[0].untyped_storage().data_ptr()
    gap = directions[1].storage_offset() - first.storage_offset() if len(directions) > 1 else 0
    if gap >= 0 and all(
        d.is_contiguous()
        and d.untyped_storage().data_ptr() == storage  # two storages may lie anywhere, as long as they like
        and d.storage_offset() == first.storage_offset() + k * gap
        for k, d in enumerate(directions)
    ):
        return first, int(gap)
    stacked = torch.stack(list(directions))
    return stacked, stacked.stride(0)
