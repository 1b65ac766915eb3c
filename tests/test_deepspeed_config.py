"""DeepSpeed's JSON beside the flags; every file of ds_configs/ trains, and its values are those of the flags alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from inrun_megatron.data.prepare import prepare
from inrun_megatron.errors import UserError
from inrun_megatron.training.deepspeed_config import merge
from tests.cluster_cases import ROOT, ledger
from tests.distributed import DistributedError, Workers
from tests.flags import config, write_json

FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --global-batch-size 8 "
    "--train-iters 5 --lr 1e-2 --eval-interval 0 --split 100,0,0 --clip-grad 0.5"
)
FILES = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))


def test_auto_values_are_filled_from_the_flags(tmp_path: Path) -> None:
    path = write_json(
        tmp_path / "auto.json",
        {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": {"stage": "auto", "reduce_bucket_size": 1000},
        },
    )
    run, merged, batch = merge(
        config("--deepspeed_config", path, "--global-batch-size", "16", "--zero-stage", "2", "--bf16"), 2
    )
    assert (batch.micro, batch.accumulation, batch.data_parallel, batch.size) == (2, 4, 2, 16)
    assert merged["train_micro_batch_size_per_gpu"] == 2 and merged["gradient_accumulation_steps"] == 4
    assert merged["train_batch_size"] == 16 and merged["gradient_clipping"] == 1.0
    assert merged["bf16"]["enabled"] is True and merged["fp16"]["enabled"] is False
    assert merged["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert run.training.global_batch_size == 16 and run.training.clip_grad == 1.0
    # What is resolved resolves to itself: a replayed run means the same.
    again, merged_again, _ = merge(run, 2)
    assert again == run and merged_again == merged


def test_the_json_decides_what_the_flags_leave_open(tmp_path: Path) -> None:
    path = write_json(
        tmp_path / "x.json",
        {"gradient_clipping": 0.25, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}},
    )
    run, merged, _ = merge(config("--deepspeed_config", path), 1)
    assert run.training.clip_grad == 0.25 and run.training.bf16 and run.parallel.zero_stage == 3
    assert merged["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("flags", "content", "values"),
    [
        ("--zero-stage 1", {"zero_optimization": {"stage": 2}}, ("--zero-stage is 1", "x.json is 2")),
        ("", {"train_micro_batch_size_per_gpu": 4}, ("--micro-batch-size is 2", "is 4")),
        ("--global-batch-size 8", {"gradient_accumulation_steps": 3}, ("--global-batch-size 8", "is 3")),
        ("", {"train_batch_size": 64}, ("--global-batch-size is 4", "is 64")),
        ("--clip-grad 1.0", {"gradient_clipping": 0.5}, ("--clip-grad is 1.0", "is 0.5")),
        ("--bf16", {"bf16": {"enabled": False}}, ("--bf16 is True", "is false")),
        ("--fp16 --loss-scale 128", {"fp16": {"loss_scale": 64}}, ("--loss-scale is 128.0", "is 64")),
        (
            "--tensorboard-dir mine",
            {"tensorboard": {"enabled": True, "output_path": "theirs"}},
            ("--tensorboard-dir is mine", '"tensorboard.output_path" in', 'is "theirs"'),
        ),
        ("--csv-dir mine", {"csv_monitor": {"enabled": False}}, ("--csv-dir", "is false")),
        ("--wandb-project mine", {"wandb": {"project": "theirs"}}, ("--wandb-project is mine", "theirs")),
    ],
)
def test_a_contradiction_names_both_values(
    tmp_path: Path, flags: str, content: dict, values: tuple[str, str]
) -> None:
    path = write_json(tmp_path / "x.json", content)
    with pytest.raises(UserError) as caught:
        merge(config("--deepspeed_config", path, *flags.split()), 2)
    assert all(value in str(caught.value) for value in values), str(caught.value)


def test_a_monitor_of_the_flags_keeps_what_the_json_says_of_it(tmp_path: Path) -> None:
    """Such as the team, which no flag names."""
    content = {"wandb": {"enabled": True, "team": "us", "project": "p"}, "csv_monitor": {"job_name": "mine"}}
    path = write_json(tmp_path / "x.json", content)
    flags = "--wandb-project p --wandb-exp-name e --csv-dir c --tensorboard-dir t"
    _, merged, _ = merge(config("--deepspeed_config", path, *flags.split()), 1)
    assert merged["wandb"] == {"enabled": True, "team": "us", "project": "p", "group": "e"}
    assert merged["csv_monitor"] == {"enabled": True, "output_path": "c", "job_name": "mine"}
    assert merged["tensorboard"] == {"enabled": True, "output_path": "t", "job_name": "train"}


@pytest.mark.parametrize(
    ("flags", "content", "message"),
    [
        ("--wandb-exp-name e", {}, "--wandb-exp-name e needs --wandb-project"),
        ("--global-batch-size 6", {}, "6 is no multiple of --micro-batch-size 2 x 2 data-parallel ranks = 4"),
        ("--fp16", {"bf16": {"enabled": True}}, "both bf16 and fp16"),
        ("", {"optimizer": {"type": "Adam"}}, "give --optimizer"),
        (
            "",
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
            "zero_optimization.reduce_bucket_size",
        ),
        ("--loss-scale 2", {}, "needs --fp16"),
        ("--fp16 --initial-loss-scale 100", {}, "100.0 is no power of 2"),
        ("--fp16 --initial-loss-scale inf", {}, "inf is no power of 2"),
        ("--fp16 --loss-scale inf", {}, "--loss-scale is inf: it must be positive and finite"),
        ("--fp16", {"fp16": {"enabled": True, "loss_scale_window": 0}}, "--loss-scale-window is 0: it must"),
        ("", {"gradient_clipping": "abc"}, '"gradient_clipping" in .*x.json is "abc": write a number'),
        ("", {"bf16": {"enabled": "yes"}}, '"bf16.enabled" in .*x.json is "yes": write true or false'),
        ("", {"zero_optimization": {"stage": True}}, "is true: write a number"),
        ("--fp16", {"fp16": {"hysteresis": [2]}}, "write a number"),
        ("", {"checkpoint": {"writer": {"decoupled": True}}}, "checkpoint.writer.decoupled.* remove it"),
        ("", {"checkpoint": {"checkpoint_serialization": False}}, "checkpoint_serialization.* remove it"),
        ("", {"datastates_ckpt": {}}, "datastates_ckpt.* remove it"),
        ("", {"managed_gradient_accumulation": False}, "every microbatch would be an optimizer step"),
        ("", {"bfloat16": {"enabled": True}}, 'write "bf16"'),
        ("", {"zero_optimization": {"stage": 2, "cpu_offload": True}}, 'write "offload_optimizer"'),
        ("", {"data_efficiency": {"enabled": True}}, "data_efficiency.* would be ignored"),
        ("", {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, 'torch_autocast.* use "bf16"'),
        (
            "--zero-stage 3 --tensor-model-parallel-size 2",
            {"zero_optimization": {"zero_hpz_partition_size": 2}},
            "zero_hpz_partition_size.* is 2 with --tensor-model-parallel-size 2: .* remove it",
        ),
        (
            "--pipeline-model-parallel-size 2",
            {"pipeline": {"activation_checkpoint_interval": 1}},
            "activation_checkpoint_interval.* is 1: .* give --recompute-granularity full",
        ),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, flags: str, content: dict, message: str) -> None:
    path = write_json(tmp_path / "x.json", content)
    with pytest.raises(UserError, match=message):
        merge(config("--deepspeed_config", path, *flags.split()), 2)


def test_a_broken_json_is_refused(tmp_path: Path) -> None:
    for content in (b"{", b"\xff\xfe"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(UserError, match="is not JSON"):
            merge(config("--deepspeed_config", str(tmp_path / "x.json")), 1)
    with pytest.raises(UserError, match="No such file"):
        merge(config("--deepspeed_config", str(tmp_path / "y.json")), 1)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_deepspeed_configurations_resolve(path: Path) -> None:
    run, merged, _ = merge(config("--deepspeed_config", str(path)), 2)
    stage = int(path.stem[-1]) if path.stem.startswith("zero") else {"offload": 2}.get(path.stem, 0)
    assert merged["zero_optimization"]["stage"] == run.parallel.zero_stage == stage
    assert run.training.bf16 == (path.stem == "bf16") and run.training.fp16 == (path.stem == "fp16")
    assert "auto" not in json.dumps(merged)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    prepare([Path(os.__file__).parent / "heapq.py"], directory / "code")
    (directory / "small.txt").write_text("def target(x):\n    return x + 1\n" * 8)
    prepare([directory / "small.txt"], directory / "target")
    return directory


def _train(rank: int, world: int, argv: list[str]) -> None:
    from inrun_megatron.training.arguments import parse
    from inrun_megatron.training.run import prepare, run

    run(prepare(parse(argv), world))


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
