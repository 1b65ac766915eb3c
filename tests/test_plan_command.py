"""`inrun plan` as a command: its tables, a run's config.yaml, and input that it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from inrun_megatron.data.corpora import tiny_corpus
from inrun_megatron.data.indexed import IndexedFile
from inrun_megatron.plan.presets import PRESETS
from inrun_megatron.training.arguments import parse, write_yaml
from tests.command_line import inrun


def test_the_command(tmp_path: Path) -> None:
    names = [text for preset in list(PRESETS)[:3] for text in ("--preset", preset)]
    code, out, _ = inrun("plan", *names)
    assert code == 0 and "16,384" in out and max(map(len, out.splitlines())) <= 100 and "…" not in out
    plan = inrun("plan", "--preset", "7b", "--targets", "3", "--json").json
    assert plan["memory"]["directions"] == 3 * 4 * plan["parameters_per_rank"]
    half = inrun("plan", "--preset", "7b", "--targets", "3", "--direction-dtype", "bf16", "--json").json
    assert half["memory"]["directions"] == half["memory"]["sums"] == plan["memory"]["directions"] // 2
    assert half["communication"]["bytes"] < plan["communication"]["bytes"]
    shape = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --vocab-size 512 --seq-length 128"
    rest = (
        "--world-size 4 --global-batch-size 16 --zero-stage 3 --precision fp32 --llama --num-query-groups 2"
    )
    code, out, _ = inrun("plan", *shape.split(), *rest.split())
    assert code == 0 and "fill directions" in out
    config = tmp_path / "config.yaml"
    config.write_text(
        "model: {num_layers: 2, hidden_size: 64, num_attention_heads: 4}\n"
        "data: {data_path: [x], seq_length: 128, vocab_size: 512}\n"
        "training: {micro_batch_size: 2, global_batch_size: 16, train_iters: 50, lr: 1e-3}\n"
        "shapley: {target: ['code=x:24'], interval: 5, estimator: simpson}\n"
    )
    plan = inrun("plan", "--config", str(config), "--world-size", "4", "--json").json
    assert plan["ledger"]["rows"] == 10 * 16 and plan["job"]["target_sequences"] == 24
    assert plan["job"]["parameter_bytes"] == 4 and plan["memory"]["batch_gradient"] > 0
    assert inrun("plan", "--config", str(config)).err == "inrun plan: the plan needs --world-size\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--target-micro-batch-size 0", "--target-micro-batch-size is 0: it must be positive; leave it out"),
        ("--num-query-groups 3", "--num-query-groups 3 does not divide --num-attention-heads 32"),
        ("--num-query-groups 0", "--num-query-groups is 0: it must be positive"),
        ("--hidden-size 4100", "--num-attention-heads 32 does not divide --hidden-size 4100"),
        ("--tensor-model-parallel-size 64", "64 does not divide --num-attention-heads 32"),
    ],
)
def test_what_a_run_refuses_has_no_plan(flags: str, message: str) -> None:
    code, out, error = inrun("plan", "--preset", "7b", *flags.split())
    assert (code, out) == (1, "") and message in error and error.count("\n") == 1


def test_the_vocabulary_of_a_run_is_that_of_its_data(tmp_path: Path) -> None:
    """A run's config.yaml names no vocabulary size where the flag was not given."""
    path, data = tmp_path / "config.yaml", tiny_corpus(tmp_path / "c", documents=3)
    argv = f"--data-path {data} --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --lr 1e-3"
    rest = "--micro-batch-size 2 --global-batch-size 16 --train-iters 50 --tensor-model-parallel-size 2"
    write_yaml(parse([*argv.split(), *rest.split()]), path)
    arguments = ("--config", str(path), "--world-size", "4", "--json")
    assert inrun("plan", *arguments).json["job"]["vocab_size"] == 512  # 257 in steps of 128 x 2
    Path(f"{data}.json").unlink()
    code, _, err = inrun("plan", *arguments)
    assert code == 1 and "give --vocab-size" in err and err.count("\n") == 1
    assert inrun("plan", *arguments, "--vocab-size", "300").json["job"]["vocab_size"] == 300


def test_rows_are_those_of_the_runs_granularity(tmp_path: Path) -> None:
    """Documents per sample are counted in the run's data: two corpora, of which one has documents four times as long."""
    prefixes = [
        tiny_corpus(tmp_path / name, documents=400, words=words) for name, words in (("a", 10), ("b", 40))
    ]
    argv = f"--data-path 0.75 {prefixes[0]} 0.25 {prefixes[1]} --num-layers 2 --hidden-size 64 --num-attention-heads 4"
    rest = "--seq-length 128 --lr 1e-3 --micro-batch-size 2 --global-batch-size 16 --train-iters 50"
    parts = []
    for prefix in prefixes:
        file = IndexedFile(prefix)
        rows = np.concatenate([file.sequence(i) for i in range(file.num_sequences)])
        rows = rows[: len(rows) // 128 * 128].reshape(-1, 128)
        parts.append(1 + (rows[:, :-1] == 256).sum(1).mean())
    for granularity, expected in (("token", 128.0), ("document", 0.75 * parts[0] + 0.25 * parts[1])):
        path = tmp_path / "config.yaml"
        write_yaml(parse([*argv.split(), *rest.split(), "--shapley-granularity", granularity]), path)
        plan = inrun("plan", "--config", str(path), "--world-size", "4", "--json").json
        assert plan["job"]["segments"] == pytest.approx(expected, rel=0.01)
        assert plan["ledger"]["rows"] == pytest.approx(50 * 16 * expected, rel=0.01)
    Path(f"{prefixes[1]}.idx").unlink()
    code, _, err = inrun("plan", "--config", str(path), "--world-size", "4", "--vocab-size", "300")
    assert code == 1 and "give --segments" in err and err.count("\n") == 1
    arguments = (
        "--config",
        str(path),
        "--world-size",
        "4",
        "--vocab-size",
        "300",
        "--segments",
        "3",
        "--json",
    )
    assert inrun("plan", *arguments).json["job"]["segments"] == 3


def test_the_table_of_the_documentation_is_the_commands() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "scaling.md").read_text()
    names = [text for preset in PRESETS for text in ("--preset", preset)]
    table = inrun("plan", *names, "--markdown").out
    assert f"inrun plan {' '.join(names)} --markdown\n\n{table}\n" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the plan needs --num-layers, --hidden-size"),
        (("--preset", "1t"), "--preset '1t' does not exist; use 7b, 70b, 405b, 8x7b"),
        (("--preset", "7b", "--world-size", "63"), "63 GPUs are no multiple of"),
        (("--preset", "7b", "--global-batch-size", "1000"), "--global-batch-size 1000 is no multiple"),
        (("--preset", "70b", "--zero-stage", "3"), "ZeRO stage 3 does not work with 4 pipeline stages"),
        (
            ("--preset", "7b", "--refresh", "2", "--estimator", "simpson"),
            "--refresh 2 with --estimator simpson",
        ),
        (("--preset", "7b", "--targets", "0"), "--targets is 0: it must be positive"),
        (("--preset", "7b", "--segments", "nan"), "--segments is nan: it must be positive and finite"),
        (("--preset", "7b", "--tflops", "inf"), "--tflops inf must be a positive number"),
        (("--preset", "7b", "--config", "x"), "give one of them"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    code, out, err = inrun("plan", *arguments)
    assert code == 1 and out == "" and message in err and err.count("\n") == 1
