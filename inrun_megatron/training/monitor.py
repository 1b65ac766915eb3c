"""Figures of a run for TensorBoard, CSV files and Weights & Biases, through DeepSpeed's monitor."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inrun_megatron.errors import UserError
from inrun_megatron.training.engine import MONITOR_SECTIONS

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}


def check_available(deepspeed_config: Mapping[str, Any]) -> None:
    """UserError when a monitor is asked for whose package is not installed."""
    for section, package in _PACKAGES.items():
        asked = (deepspeed_config.get(section) or {}).get("enabled")
        if asked and importlib.util.find_spec(package) is None:
            raise UserError(f"the {section} monitor needs the package {package}: pip install {package}")


class Monitor:
    """Writes named figures per training step. Silent where no monitor is configured; only rank 0 writes.

    Names: `train/...`, `targets/<target>`, `validation/loss`, `values/<target>/<domain>` (mean value per sample of the
    last logging interval, nats per token), `audit/...`.
    """

    def __init__(self, deepspeed_config: Mapping[str, Any]) -> None:
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster

        sections = {key: dict(deepspeed_config[key]) for key in MONITOR_SECTIONS if key in deepspeed_config}
        self._master = MonitorMaster(get_monitor_config(sections))
        _go_on(self._master.csv_monitor)

    @property
    def enabled(self) -> bool:
        """Whether any monitor is configured; the same on all ranks."""
        return bool(self._master.enabled)

    def write(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Write those of `figures` that are known, at `step`."""
        if self.enabled:
            self._master.write_events(
                [(name, value, step) for name, value in figures.items() if value is not None]
            )


def _go_on(monitor: Any) -> None:
    """A start that goes on in CSV files writes no second headline into them.

    deepspeed 0.19 (monitor/csv_monitor.py) writes one wherever a file is not among `filenames`, those of this process.
    """
    if getattr(monitor, "log_dir", None) is not None:
        monitor.filenames += [
            file.stem for file in Path(monitor.log_dir).glob("*.csv") if file.stat().st_size
        ]
