"""Which tensors Triton's kernels serve. Where there is no GPU, Triton need not be installed: kernels are imported late."""

from __future__ import annotations

import importlib.util

from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None


def by_triton(*tensors: Tensor) -> bool:
    """Whether all of them lie where kernels run."""
    return HAS_TRITON and all(tensor.is_cuda for tensor in tensors)
