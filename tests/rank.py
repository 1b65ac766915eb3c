"""One rank of a `Workers` group (distributed.py): it answers calls, and begins each with nothing left of the one before."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import sys
import threading
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait


def serve(
    rank: int, world_size: int, environment: dict[str, str], pipe: Connection, log: str, initialise: bool
) -> None:
    """Body of a rank: answer calls until the parent closes the pipe or dies."""
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    clean = True
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            # Skip interpreter shutdown: destructors of half-destroyed groups may wait for other ranks.
            os._exit(0)
        if not clean:
            _reset_parallel_state()
        clean = False
        try:
            fn, args, timeout = pickle.loads(request)
            # The stacks of a rank that hangs go to its log just before the parent gives up.
            faulthandler.dump_traceback_later(max(timeout - 2.0, timeout * 0.8))
            if initialise:
                _initialise_world(timeout)
            answer = pickle.dumps((False, fn(rank, world_size, *args)))
        except BaseException:
            answer = pickle.dumps((True, traceback.format_exc()))
        finally:
            faulthandler.cancel_dump_traceback_later()
        sys.stdout.flush()
        sys.stderr.flush()
        pipe.send_bytes(answer)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _initialise_world(timeout: float) -> None:
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))


def _forget_engines() -> None:
    """Empty what DeepSpeed left. Autograd's hooks on its last loss and on parameters hold engine and optimizer, which hold
    them: a circle that Python cannot see. Their process groups would live on, a dozen threads each, which spin once another
    rank has closed its end: after ten runs in one process there were a thousand."""
    if "deepspeed.runtime.engine" not in sys.modules:
        return
    from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
    from deepspeed.runtime.engine import DeepSpeedEngine

    for left in [
        held for held in gc.get_objects() if issubclass(type(held), (DeepSpeedEngine, DeepSpeedOptimizer))
    ]:
        vars(left).clear()


def _reset_parallel_state() -> None:
    """Put megatron-core, DeepSpeed and torch.distributed back to where only the world group exists."""
    import torch
    import torch.distributed as dist

    if (state := sys.modules.get("megatron.core.parallel_state")) is not None:
        state.destroy_model_parallel()
    if (random := sys.modules.get("megatron.core.tensor_parallel.random")) is not None:
        tracker = vars(random)["_CUDA_RNG_STATE_TRACKER"]
        if tracker is not None:
            tracker.reset()  # its streams are named; adding one twice is an error
    if (groups := sys.modules.get("deepspeed.utils.groups")) is not None:
        # It keeps mpu and groups in module globals with no way to unset them; executing it again does.
        importlib.reload(groups)
    _forget_engines()
    gc.collect()
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
    torch.set_default_dtype(torch.float32)
