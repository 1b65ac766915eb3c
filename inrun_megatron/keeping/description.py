"""What a ledger says of the run that writes it, beside what its flags or its loop say."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch.distributed as dist

from ..parallel import Layout
from ..taps import Coverage

_PACKAGES = ("inrun-megatron", "torch", "deepspeed", "megatron-core", "numpy", "pyarrow")


def versions() -> dict[str, str]:
    """Versions of what decides the values: Python and the packages."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def sizes(layout: Layout) -> dict[str, int]:
    """Ranks of each kind."""
    return {"tp": layout.tp_size, "dp": layout.dp_size, "pp": layout.pp_size}


def coverage_of_model(own: Coverage, layout: Layout) -> dict[str, Any]:
    """Coverage of the whole model, from that of this rank's stage. Collective over a pipeline."""
    stages: list[Any] = [own]
    if layout.pp_size > 1:
        stages = [None] * layout.pp_size
        dist.all_gather_object(stages, own, group=layout.pp_group)
    return Coverage.together(stages).to_dict()
