"""Random number generators as they were: a second pass over a batch must draw what the first one drew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Afterwards torch's generators (CPU and ``device``) and Megatron's tracker stand where they stood before."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    tracker = _tracker()
    streams = None if tracker is None else dict(tracker.get_states())
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        if tracker is not None and streams is not None:
            tracker.set_states(streams)


def _tracker() -> Any:
    """Megatron's tracker, or None where megatron-core is not installed."""
    try:
        from megatron.core.tensor_parallel import get_cuda_rng_tracker
    except ImportError:
        return None
    return get_cuda_rng_tracker()
