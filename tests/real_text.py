"""Whole runs on real text: their data, flags, and how two of them are compared."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from inrun_megatron.data.prepare import prepare as prepare_data
from tests.distributed import DistributedError, Workers

ROOT = Path(__file__).resolve().parents[1]
MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 "
    "--global-batch-size 8 --train-iters 4 --lr 1e-2 --lr-warmup-iters 1 --eval-interval 2 --eval-iters 1 "
    "--log-interval 1 --split 80,20"
)
TARGETS = ("--shapley-target", "code={data}/target", "--shapley-target", "prose={data}/prose:3")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training datasets and a target, from the standard library."""
    directory = tmp_path_factory.mktemp("data")
    library = Path(os.__file__).parent
    modules = ("abc", "bisect", "copy", "heapq", "keyword", "queue", "sched", "stat")
    prepare_data([library / f"{name}.py" for name in modules], directory / "code")
    lines = [json.dumps({"text": text}) for _, text in sorted(topics.items())[:40]]
    (directory / "prose.jsonl").write_text("\n".join(lines) + "\n")
    prepare_data([directory / "prose.jsonl"], directory / "prose")
    (directory / "small.txt").write_text("def target(x):\n    return x + 1\n" * 8)
    prepare_data([directory / "small.txt"], directory / "target")
    return directory


def arguments(data: Path, *flags: str) -> list[str]:
    text = [*MODEL.split(), "--data-path", "0.6", "{data}/code", "0.4", "{data}/prose", *flags]
    return [argument.replace("{data}", str(data)) for argument in text]


def run_here(rank: int, world: int, argv: list[str]) -> None:
    """A run in the ranks of `Workers`."""
    from inrun_megatron.training.arguments import parse
    from inrun_megatron.training.run import prepare, run

    run(prepare(parse(argv), world))


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two checkpoint structures differ, bit for bit."""
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{path}: keys"]
        return [text for key in one for text in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{path}: length"]
        return [text for i, pair in enumerate(zip(one, other)) for text in differences(*pair, f"{path}/{i}")]
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [path]
    if type(one).__name__.endswith("LossScaler"):
        return differences(vars(one), vars(other), path)
    plain = isinstance(one, (bool, int, float, str, type(None)))
    return [f"{path}: {one} {other}"] if plain and one != other else []


def checkpoint_differences(one: Path, other: Path) -> list[str]:
    files = sorted(path.name for path in one.glob("*.pt"))
    assert files == sorted(path.name for path in other.glob("*.pt")) and len(files) >= 3
    return [
        text
        for name in files
        for text in differences(
            torch.load(one / name, weights_only=False), torch.load(other / name, weights_only=False), name
        )
    ]


def ledger(directory: Path, table: str) -> list[dict[str, Any]]:
    """Rows that the commits name, in order, without the times."""
    rows: list[dict[str, Any]] = []
    for commit in sorted((directory / "shapley" / "commits").glob("*.json")):
        parts = sorted(part["file"] for part in json.loads(commit.read_text())["parts"])
        for part in parts:
            if part.startswith(table):
                rows += pq.read_table(directory / "shapley" / part).to_pylist()
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


def refused(two_ranks: Workers, argv: list[str], run: Callable[..., None] = run_here) -> str:
    """The message that both ranks raise."""
    with pytest.raises(DistributedError) as caught:
        two_ranks.run(run, argv)
    assert caught.value.alive, f"a rank did not answer: {caught.value}"
    return str(caught.value)
