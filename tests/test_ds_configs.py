"""Every file of ds_configs/ trains and scores, and its values are those that the flags alone give."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from inrun_megatron.data.prepare import prepare
from tests.cluster_cases import ROOT, ledger
from tests.distributed import DistributedError, Workers

FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --global-batch-size 8 "
    "--train-iters 5 --lr 1e-2 --eval-interval 0 --split 100,0,0 --clip-grad 0.5"
)
FILES = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    prepare([Path(os.__file__).parent / "heapq.py"], directory / "code")
    (directory / "small.txt").write_text("def target(x):\n    return x + 1\n" * 8)
    prepare([directory / "small.txt"], directory / "target")
    return directory


def _train(rank: int, world: int, argv: list[str]) -> None:
    from inrun_megatron.training.arguments import parse
    from inrun_megatron.training.run import prepare as settle
    from inrun_megatron.training.run import run

    run(settle(parse(argv), world))


def _values(two_ranks: Workers, data: Path, run: Path, *flags: str) -> np.ndarray:
    argv = [*FLAGS.split(), "--data-path", str(data / "code"), "--shapley-target", f"code={data / 'target'}"]
    two_ranks.run(_train, [*argv, "--save", str(run), *flags], timeout=300.0)
    values, steps = ledger(run)
    figures = steps.to_pydict()
    left, right = (np.array(figures[f"additivity_{side}"]) for side in ("lhs", "rhs"))
    scale = np.bincount(values["step"].to_numpy(), np.abs(values["value"].to_numpy()))[1:]
    precision = 2e-2 if "bf16" in run.name else 1e-4
    # Additivity is measured before clipping; values are after it.
    assert np.all(np.abs(left - right) * np.array(figures["clip_coefficient"]) <= precision * scale)
    assert set(figures["status"]) == {"scored"} and np.any(scale > 0)
    return values["value"].to_numpy()


@pytest.fixture(scope="module")
def plain(two_ranks: Workers, data: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return _values(two_ranks, data, tmp_path_factory.mktemp("plain"), "--zero-stage", "0")


@pytest.mark.parametrize("name", FILES)
def test_values_under_the_shipped_configuration(
    two_ranks: Workers, data: Path, plain: np.ndarray, tmp_path: Path, name: str
) -> None:
    from deepspeed.accelerator import get_accelerator

    file = ["--deepspeed_config", str(ROOT / "ds_configs" / f"{name}.json")]
    if name == "fp16" and not get_accelerator().is_fp16_supported():
        with pytest.raises(DistributedError, match="fp16 is not supported by this machine's cpu"):
            _values(two_ranks, data, tmp_path / name, *file, "--zero-stage", "1")
        return
    if name == "offload":
        _build_cpu_adam()
    if name in ("bf16", "fp16"):
        flags = [f"--{name}", "--zero-stage", "1"]
        same = _values(two_ranks, data, tmp_path / f"flags-{name}", *flags)
        assert np.array_equal(_values(two_ranks, data, tmp_path / name, *file, "--zero-stage", "1"), same)
        return
    values = _values(two_ranks, data, tmp_path / name, *file)
    error = np.abs(values - plain).max() / np.abs(plain).max()
    print(f"{name}: largest difference from the flags alone at stage 0: {error:.1e} of the largest value")
    assert error < 1e-4


def test_the_table_says_when_to_take_every_file() -> None:
    table = (ROOT / "ds_configs" / "README.md").read_text()
    assert sorted(re.findall(r"^\| `(\w+)\.json` \|.+\|.+\|$", table, flags=re.M)) == FILES


def _build_cpu_adam() -> None:
    """DeepSpeed compiles it at first use, which takes longer than a rank may keep the others waiting."""
    code = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
