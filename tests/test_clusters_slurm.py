"""The shipped Slurm templates through sbatch on a real Slurm of two nodes: pre-empted, requeued, resumed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from inrun_megatron.training.exit_codes import STOPPED
from tests import hosts as hosts_module
from tests.cluster_cases import ROOT, SCRIPT, TIMEOUT, Reference, committed_step, edited, errors
from tests.hosts import Hosts, wait_for, wait_for_line
from tests.slurm import Slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    hosts_module.require()
    with Hosts(tmp_path_factory.mktemp("hosts"), 2, tmp_path_factory.getbasetemp()) as hosts:
        yield Slurm(hosts, tmp_path_factory.mktemp("slurm"), ROOT)


class Job:
    """The reference's job through launch/slurm/pretrain.sbatch, with only its marked lines edited."""

    def __init__(self, slurm: Slurm, reference: Reference, directory: Path, **values: str) -> None:
        self.slurm, self.reference, self.directory = slurm, reference, directory
        self.run, self.log = directory / "run", directory / "log"
        bin_directory = Path(sys.executable).parent
        extensions = os.environ["TORCH_EXTENSIONS_DIR"]
        lines = {
            "#SBATCH --nodes": "#SBATCH --nodes=2",
            "#SBATCH --gpus-per-node": "",
            "#SBATCH --cpus-per-task": "#SBATCH --cpus-per-task=2",
            "#SBATCH --time": "#SBATCH --time=20",
            "#SBATCH --signal": "#SBATCH --signal=B:USR1@20",
            "source ": f"export PATH={bin_directory}:$PATH DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR={extensions}",
            "RANKS=": "RANKS=2",
            "RUN=runs": f"RUN={self.run}",
            "export NCCL_SOCKET_IFNAME": "export NCCL_SOCKET_IFNAME=eth0",
            "export OMP_NUM_THREADS": "export OMP_NUM_THREADS=1",
            "--config": " ".join(reference.flags(self.run)[:-4]),
            **values,
        }
        self.script = edited(ROOT / "launch/slurm/pretrain.sbatch", lines, directory / "pretrain.sbatch")
        self.number = slurm.submit(f"--output={self.log}", str(self.script))

    def wait_for_step(self, step: int, timeout: float = TIMEOUT) -> None:
        wait_for_line(self.log, rf"step {step}/\d+ \| loss", None, timeout)

    def wait_for_state(self, *states: str) -> None:
        wait_for(
            lambda: self.slurm.state(self.number) in states, TIMEOUT, f"{states}:\n{self.text()[-5000:]}"
        )

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def completes(self, restarts: int) -> None:
        self.wait_for_state("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        assert self.slurm.state(self.number) == "COMPLETED", self.text()[-5000:]
        assert self.slurm.restarts(self.number) == restarts
        self.reference.agrees(self.run)


def test_a_preempted_job_saves_is_requeued_and_goes_on(
    slurm: Slurm, cluster_reference: Reference, tmp_path: Path
) -> None:
    job = Job(slurm, cluster_reference, tmp_path)
    job.wait_for_step(10)
    urgent = slurm.submit("--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
    job.wait_for_state("PENDING", "COMPLETED")
    assert "stopped by SIGUSR1 on rank " in job.text(), job.text()[-5000:]
    assert f"exit code {STOPPED}" in job.text() and "ranks left with code" in job.text()
    saved = committed_step(job.run)
    assert 10 <= saved < 40 and errors(job.log) == []
    job.completes(restarts=1)
    assert f"resumed from {job.run}/checkpoints/iter_{saved:07d}" in job.text()
    assert slurm.state(urgent) == "COMPLETED"


@pytest.mark.long
def test_a_lost_rank_is_named_and_the_job_requeued(
    slurm: Slurm, cluster_reference: Reference, tmp_path: Path
) -> None:
    job = Job(slurm, cluster_reference, tmp_path)
    job.wait_for_step(10)
    slurm.hosts.signal_rank(2, signal.SIGKILL, SCRIPT)
    job.completes(restarts=1)
    assert [line.split(";")[0] for line in errors(job.log)] == ["error: rank 2 (node2) died"]


@pytest.mark.long
def test_torchrun_per_node_stops_when_the_time_is_nearly_up(
    slurm: Slurm, cluster_reference: Reference, tmp_path: Path
) -> None:
    """`scancel --signal` is what Slurm does before the limit, without the wait."""
    job = Job(slurm, cluster_reference, tmp_path, **{"LAUNCHER=": "LAUNCHER=torchrun"})
    job.wait_for_step(10)
    slurm("scancel", "--signal=USR1", "--batch", job.number)
    job.completes(restarts=1)
    assert "stopped by SIGUSR1 on rank " in job.text()
