"""Between host and device: the one read for which a scored step makes the host wait, copies for which it does not, and how
long the device takes for what the host has only started."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_host(**figures: Tensor | None) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """The figures that there are as fp64 arrays of the same shapes, by name, in a single copy."""
    given = {name: figure.detach() for name, figure in figures.items() if figure is not None}
    flat = torch.cat([figure.reshape(-1).double() for figure in given.values()]).cpu().numpy()
    parts = np.split(flat, np.cumsum([figure.numel() for figure in given.values()])[:-1])
    return {name: part.reshape(given[name].shape) for name, part in zip(given, parts, strict=True)}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``, in a copy that the host does not wait for; itself on a CPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Later:
    """A copy on the host of what the device computes now. On a GPU it is on its way when it is made, and ``read`` waits for it
    only if it is read before it has come."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._copy = tensor
        if tensor.is_cuda:
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Tensor:
        """The copy."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._copy


class Stopwatch:
    """Seconds that stretches of a step take; on a GPU those of the current stream, which works behind the host."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._stretches: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """What happens inside counts."""
        started = _now() if self._on_gpu else time.perf_counter()
        try:
            yield
        finally:
            if isinstance(started, float):
                self._seconds += time.perf_counter() - started
            else:
                self._stretches.append((started, _now()))

    def read(self) -> float:
        """Of all stretches; once the host has read something that was computed after the last one."""
        self._seconds += sum(start.elapsed_time(stop) for start, stop in self._stretches) / 1000.0
        self._stretches.clear()
        return self._seconds


def _now() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
