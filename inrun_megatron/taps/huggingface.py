"""The tap for Hugging Face's Conv1D, the linear layer of GPT-2, whose weight lies as ``[in, out]``.

Their other layers need none of their own: see own_forward.py and vectors.py. Upstream: transformers/pytorch_utils.py.
"""

from __future__ import annotations

from typing import Any

from transformers.pytorch_utils import Conv1D

from .attach import Taps, register, require_forward
from .plain import tap_linear


@register(Conv1D)
def _conv1d(taps: Taps, module: Any, name: str) -> None:
    require_forward(module, Conv1D, name)
    tapped = tap_linear(taps, module, name, transposed=True)
    if tapped is not None:
        module.forward = lambda x: tapped(x)
