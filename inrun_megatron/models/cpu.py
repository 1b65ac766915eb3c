"""What megatron-core needs to run on a machine without CUDA.

Two things in megatron-core (0.16 to 0.19) ask for CUDA although nothing in the computation does:

* `RotaryEmbedding.get_emb` (megatron/core/models/common/embeddings/rotary_pos_embedding.py) and the collectives of
  megatron/core/tensor_parallel/mappings.py pass `torch.cuda.current_device()` as the device of a new tensor. Without
  CUDA that call raises; here it answers the CPU device.
* `get_cuda_rng_tracker().fork()` (megatron/core/tensor_parallel/random.py) swaps the state of the CUDA generator. It is
  entered under sequence parallelism and around attention dropout. Here a tracker with the same interface swaps the
  state of the CPU generator.

`tests/test_models.py` holds a canary for each: it fails when upstream moves or no longer needs it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import random as megatron_random

_original_current_device = torch.cuda.current_device


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def install() -> bool:
    """Make megatron-core usable without CUDA. Does nothing where CUDA is available.

    Returns True when the process runs on CPU with the replacements in place. Safe to call again.
    """
    if torch.cuda.is_available():
        return False
    torch.cuda.current_device = _cpu_device  # type: ignore[assignment]
    if not isinstance(megatron_random._CUDA_RNG_STATE_TRACKER, CpuRngTracker):
        megatron_random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
        megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    return True


def uninstall() -> None:
    """Undo `install`: for tests that need upstream's own behaviour."""
    torch.cuda.current_device = _original_current_device
    if isinstance(megatron_random._CUDA_RNG_STATE_TRACKER, CpuRngTracker):
        megatron_random._CUDA_RNG_STATE_TRACKER = None
        megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False


class CpuRngTracker(megatron_random.CudaRNGStatesTracker):
    """Megatron's tracker of named RNG streams, on the CPU generator.

    `get_states`, `set_states` and `reset` are upstream's. `fork` may be nested, as upstream's: the state of the outer
    stream is kept while the inner one runs.
    """

    _current_state_name: str

    def add(self, name: str, seed: int) -> None:
        """Start the stream `name` from `seed`. ValueError when the name or the seed is taken."""
        self._is_initialized = True
        if seed in self.seeds_:
            raise ValueError(f"RNG seed {seed} is already used by another stream")
        if name in self.states_:
            raise ValueError(f"RNG stream {name!r} already exists")
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Draw from the stream `name` inside the block; the default stream goes on unchanged after it."""
        if name not in self.states_:
            raise ValueError(f"RNG stream {name!r} does not exist: call seed_everything first")
        outer_name, outer_state = self._current_state_name, torch.get_rng_state()
        if outer_name != "default-rng":
            self.states_[outer_name] = outer_state
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            # The same stream may have been forked inside itself: then its newest state is the inner one's.
            torch.set_rng_state(self.states_[outer_name] if outer_name != "default-rng" else outer_state)
            self._current_state_name = outer_name


def seed_everything(seed: int, *, tp_rank: int, dp_rank: int, pp_rank: int = 0) -> None:
    """Seed the default and the model-parallel RNG streams of this rank.

    The default stream (dropout outside tensor-parallel regions) is the same on all tensor-parallel ranks and differs
    between data-parallel replicas and pipeline stages; the tracker's streams differ between all ranks. Same roles as
    `model_parallel_cuda_manual_seed` (megatron/core/tensor_parallel/random.py); the numbers differ, because adding
    ranks to the seed gives equal streams to different ranks. Model parameters do not depend on any of this: see
    models/initialise.py.
    """

    def stream(*key: int) -> int:
        return int(np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)[0] >> np.uint64(1))

    torch.manual_seed(stream(0, pp_rank, dp_rank))
    np.random.seed(stream(0, pp_rank, dp_rank) % 2**32)
    tracker = megatron_random.get_cuda_rng_tracker()
    tracker.reset()
    # Upstream's data-parallel stream continues the default one's role inside model-parallel regions.
    tracker.add(megatron_random._DATA_PARALLEL_RNG_TRACKER_NAME, stream(1, pp_rank, dp_rank))
    tracker.add(megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME, stream(2, pp_rank, dp_rank, tp_rank))


def rng_state() -> dict[str, Any]:
    """Everything a resumed rank needs to draw the same numbers: default, CUDA, numpy and tracker streams."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": np.random.get_state(),
        "tracker": megatron_random.get_cuda_rng_tracker().get_states(),
    }


def set_rng_state(state: dict) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])
    megatron_random.get_cuda_rng_tracker().set_states(state["tracker"])
