"""How a module of a type without an entry of its own is tapped: by what it holds."""

from __future__ import annotations

from typing import Any

from torch import nn

from .attach import Taps, register
from .huggingface_experts import is_experts, tap_experts
from .own_linear import is_linear, tap_own_linear
from .vectors import tap_vectors


@register(nn.Module)
def _any_module(taps: Taps, module: Any, name: str) -> None:
    if is_experts(module):
        tap_experts(taps, module, name)
    elif is_linear(module):
        tap_own_linear(taps, module, name)
    else:
        tap_vectors(taps, module, name)
