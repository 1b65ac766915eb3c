"""In-Run Data Shapley values at Megatron scale.

The names below are imported when they are first used: the `inrun` commands need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import UserError
    from .keeping.run_ledger import RunLedger
    from .parallel import Layout
    from .shapley.in_run import InRunShapley
    from .shapley.pipeline import PipelineShapley
    from .shapley.result import ShapleyTarget, StepResult
    from .taps import Consumer, Emission, Pass, Site, attach_taps

_HOMES = {
    "Consumer": ".taps",
    "Emission": ".taps",
    "InRunShapley": ".shapley.in_run",
    "Layout": ".parallel",
    "Pass": ".taps",
    "PipelineShapley": ".shapley.pipeline",
    "RunLedger": ".keeping.run_ledger",
    "ShapleyTarget": ".shapley.result",
    "Site": ".taps",
    "StepResult": ".shapley.result",
    "UserError": ".errors",
    "attach_taps": ".taps",
}

__all__ = [
    "Consumer",
    "Emission",
    "InRunShapley",
    "Layout",
    "Pass",
    "PipelineShapley",
    "RunLedger",
    "ShapleyTarget",
    "Site",
    "StepResult",
    "UserError",
    "attach_taps",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
