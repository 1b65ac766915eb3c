"""In which type to compute with buffers of which type."""

from __future__ import annotations

import torch
from torch import Tensor

LOW_PRECISION = (torch.float16, torch.bfloat16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of products and sums: fp32, in fp64 runs fp64."""
    return torch.float32 if dtype in LOW_PRECISION else dtype


def widened(tensor: Tensor) -> Tensor:
    """The tensor in the type to compute in; itself where it has it."""
    return tensor.to(wide(tensor.dtype))
