"""Pretrain a GPT and value every training sample in the same run.

    deepspeed --num_gpus 8 launch/pretrain.py --tensor-model-parallel-size 2 --sequence-parallel ...
    torchrun --nproc-per-node 8 launch/pretrain.py ...
    mpirun -np 8 python launch/pretrain.py ...

`--help` lists the flags; docs/flags.md explains them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if not any((Path(entry) / "inrun_megatron").is_dir() for entry in sys.path if entry):
    # started from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Where launch/build_ops.py left the operator that DeepSpeed would compile again.
if (built := Path(sys.prefix) / "torch_extensions").is_dir():
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(built))

from inrun_megatron.training.main import main

if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # Without waiting for process groups in which other ranks may still be.
        os._exit(code)
