"""Build the one operator that DeepSpeed compiles on a machine without a GPU, before any run waits for it.

    python launch/build_ops.py

DeepSpeed builds its shared-memory all-reduce when the first process initialises. A process that is killed meanwhile leaves
a lock behind, and every later run waits for that lock silently (torch/utils/file_baton.py). So it is built once,
by one process, into a folder of this environment (TORCH_EXTENSIONS_DIR), and a stale lock is removed first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("**/lock"):
        lock.unlink()
    world = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # any that is free: nobody else will look for it
    }
    os.environ.update(world)
    import deepspeed
    import torch

    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
