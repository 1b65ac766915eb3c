"""Between host and device: the one read for which a scored step makes the host wait, and copies for which it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_host(*figures: Tensor) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """The figures as fp64 arrays of the same shapes, in a single copy."""
    flat = torch.cat([figure.detach().reshape(-1).double() for figure in figures]).cpu().numpy()
    parts = np.split(flat, np.cumsum([figure.numel() for figure in figures])[:-1])
    return [part.reshape(figure.shape) for part, figure in zip(parts, figures, strict=True)]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``, in a copy that the host does not wait for; itself on a CPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
