"""Settings from a few flags, as the launcher parses them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from inrun_megatron.config import Config
from inrun_megatron.training.arguments import parse

BASE = shlex.split(
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --data-path a "
    "--micro-batch-size 2 --train-iters 10 --lr 1e-3 --no-shapley"
)


def config(*flags: str) -> Config:
    return parse([*BASE, *flags])


def write_json(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)
