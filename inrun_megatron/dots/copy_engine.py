"""What a GPU's copy engine (tensor descriptors) reads: matrices with addresses and steps of 16 bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

ALIGNMENT = 16
SHARED = 227 * 1024
"""Bytes of shared memory that a program has on an H100 or a B200, and that the largest tiles nearly fill."""


def fits(activation: Tensor, output_grad: Tensor, directions: Sequence[Tensor], batch_dim: int) -> bool:
    """Whether it reads all that the kernel of triton_linear.py needs (arguments as there)."""
    first = directions[0]
    width = first.shape[-1] * first.element_size()
    gap = directions[1].data_ptr() - first.data_ptr() if len(directions) > 1 else 0
    return (
        _has_one(activation.device)
        and first.is_contiguous()
        and not (first.data_ptr() % ALIGNMENT or width % ALIGNMENT or gap % ALIGNMENT)
        and all(as_matrix(buffer, batch_dim) is not None for buffer in (activation, output_grad))
    )


@lru_cache
def _has_one(device: torch.device) -> bool:
    """Since compute capability 9.0; on older GPUs tiles would go through registers, which do not suffice.

    Capability 12 (RTX 50, RTX PRO) has it too, but 99 KiB of shared memory, for which the tiles are too large.
    """
    if device.type != "cuda":
        return True
    gpu = torch.cuda.get_device_properties(device)
    return gpu.major >= 9 and getattr(gpu, "shared_memory_per_block_optin", 0) >= SHARED


def as_matrix(buffer: Tensor, batch_dim: int) -> tuple[Tensor, int] | None:
    """A buffer's rows in one matrix, without a copy.

    Two dimensions, because a tile of three that is reshaped goes through registers before it is multiplied.

    Args:
        buffer: ``[s, b, h]``, or with the b rows along another ``batch_dim``.
        batch_dim: dimension that counts the rows.

    Returns:
        With rows first ``[b s, h]``, else ``[s, b h]`` (larger where rows lie apart), and how many matrix rows, else columns,
        one row is after the other; None if the copy engine cannot read it.
    """
    if buffer.dim() != 3 or buffer.stride(-1) != 1 or buffer.data_ptr() % ALIGNMENT:
        return None
    rows, tokens, features = buffer.shape[batch_dim], buffer.shape[1 - batch_dim], buffer.shape[-1]
    pitch, step = buffer.stride(1 - batch_dim), buffer.stride(batch_dim) if rows > 1 else 0
    if pitch < features or pitch * buffer.element_size() % ALIGNMENT:
        return None
    if batch_dim == 0:
        if step % pitch:
            return None
        height = (rows - 1) * step // pitch + tokens
        return buffer.as_strided((height, features), (pitch, 1)), step // pitch
    width = (rows - 1) * step + features
    # A tile of a further row begins at its column; Triton's interpreter asks for whole 16 bytes there, too.
    if width > pitch or step * buffer.element_size() % ALIGNMENT:
        return None
    return buffer.as_strided((tokens, width), (pitch, 1)), step
