"""The shipped Slurm templates through sbatch on a real Slurm of two nodes: pre-empted, requeued, resumed. Their own
decisions by stubs of Slurm's commands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from inrun_megatron.training.exit_codes import RANK_LOST, STOPPED
from tests import hosts as hosts_module
from tests.cluster_cases import ROOT, SCRIPT, STEPS, TIMEOUT, Reference, edited, errors, ledger
from tests.hosts import Hosts, wait_for, wait_for_line
from tests.slurm import Slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    hosts_module.require()
    with Hosts(tmp_path_factory.mktemp("hosts"), 2, tmp_path_factory.getbasetemp()) as hosts:
        yield Slurm(hosts, tmp_path_factory.mktemp("slurm"), ROOT)


# What an administrator of these two nodes writes into the marked lines of a template.
SIZE = {
    "#SBATCH --gpus-per-node": "",
    "#SBATCH --cpus-per-task": "#SBATCH --cpus-per-task=2",
    "#SBATCH --time": "#SBATCH --time=60",
    "#SBATCH --signal": "#SBATCH --signal=B:USR1@20",
}


def settings(reference: Reference, run: Path) -> dict[str, str]:
    """Marked lines of launch/slurm/pretrain.sbatch below its header."""
    activate = {
        "PATH": f"{Path(sys.executable).parent}:$PATH",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": os.environ["TORCH_EXTENSIONS_DIR"],
    }
    return {
        "source ": "export " + " ".join(f"{name}={value}" for name, value in activate.items()),
        "RANKS=": "RANKS=2",
        "RUN=runs": f"RUN={run}",
        "export NCCL_SOCKET_IFNAME": "export NCCL_SOCKET_IFNAME=eth0",
        "export OMP_NUM_THREADS": "export OMP_NUM_THREADS=1",
        "--config": " ".join(reference.flags(run)[:-4]),
    }


class Job:
    """The reference's job through launch/slurm/pretrain.sbatch, with only its marked lines edited."""

    def __init__(self, slurm: Slurm, reference: Reference, directory: Path, **values: str) -> None:
        self.slurm, self.reference, self.directory = slurm, reference, directory
        self.run, self.log = directory / "run", directory / "log"
        lines = {**SIZE, "#SBATCH --nodes": "#SBATCH --nodes=2", **settings(reference, self.run), **values}
        self.script = edited(ROOT / "launch/slurm/pretrain.sbatch", lines, directory / "pretrain.sbatch")
        self.number = slurm.submit(f"--output={self.log}", str(self.script))

    def wait_for_step(self, step: int, timeout: float = TIMEOUT) -> None:
        wait_for_line(self.log, rf"step {step}/\d+ \| loss", None, timeout)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def completes(self, at_least: int = 1, at_most: int = 1) -> None:
        """The job comes to its end after so many restarts, and its ledger is the reference's."""
        completes(self.slurm, self.number, self.log)
        assert at_least <= self.slurm.restarts(self.number) <= at_most, self.text()[-5000:]
        self.reference.agrees(self.run)


def completes(slurm: Slurm, job: str, log: Path) -> None:
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_for(lambda: slurm.state(job) in over, TIMEOUT, f"the end of job {job}: {log}")
    assert slurm.state(job) == "COMPLETED", log.read_text(errors="replace")[-5000:]


# Slurm's commands as the templates call them: what they were given goes to CALLS, and srun ends with CODE, but not before
# CALLS has WAIT_FOR calls of scancel (or a minute has passed).
STUB = """#!/bin/bash
echo "${0##*/} $*" >> "$CALLS"
[ "${0##*/} $1" = "scontrol show" ] && echo node1
[ "${0##*/}" = srun ] || exit 0
until [ "$(grep -c ^scancel "$CALLS")" -ge "${WAIT_FOR:-0}" ] || [ $SECONDS -gt 60 ]; do sleep 0.1; done
exit "$CODE"
"""


class Stubs:
    """A template where Slurm's commands are stubs."""

    def __init__(self, directory: Path) -> None:
        self.run, self.calls, self._bin = directory / "run", directory / "calls", directory / "bin"
        self._bin.mkdir()
        for name in ("srun", "scontrol", "scancel"):
            (self._bin / name).write_text(STUB)
            (self._bin / name).chmod(0o755)
        values = {"source ": ":", "RUN=runs": f"RUN={self.run}", "RESTARTS=": "RESTARTS=2"}
        self.script = edited(ROOT / "launch/slurm/pretrain.sbatch", values, directory / "pretrain.sbatch")

    def start(self, script: Path, **variables: object) -> subprocess.Popen[str]:
        self.calls.write_text("")
        environment = hosts_module.environment(
            CALLS=str(self.calls), SLURM_JOB_ID="7", SLURM_JOB_NODELIST="node1"
        )
        environment |= {name: str(value) for name, value in variables.items()}
        environment["PATH"] = f"{self._bin}:{environment['PATH']}"
        return subprocess.Popen(["bash", str(script)], env=environment, stdout=subprocess.PIPE, text=True)

    def requeued(self, code: int, restarts: int) -> bool:
        """Whether a job is that was restarted so often and whose ranks leave with `code`."""
        process = self.start(self.script, CODE=code, SLURM_RESTART_COUNT=restarts)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == code and f"left with code {code}, restart {restarts}" in output
        return "scontrol requeue 7\n" in self.calls.read_text()


def test_only_lost_ranks_count_against_restarts(tmp_path: Path) -> None:
    stubs = Stubs(tmp_path)
    codes = [STOPPED, RANK_LOST, STOPPED, 137, STOPPED, RANK_LOST, STOPPED, 1, 0]
    found = [stubs.requeued(code, restarts) for restarts, code in enumerate(codes, start=5)]
    assert found == [True, True, True, True, True, False, True, False, False]
    assert len((stubs.run / "lost-7").read_text().splitlines()) == 3


def test_a_job_is_asked_until_it_hears(tmp_path: Path) -> None:
    """The first request may come before a launcher has started the ranks."""
    stubs = Stubs(tmp_path)
    process = stubs.start(stubs.script, CODE=STOPPED, WAIT_FOR=2)
    wait_for(lambda: "srun" in stubs.calls.read_text(), 60.0, "srun")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert output.count("asked to stop") == 1
    assert re.search(r"(scancel --signal=USR1 7\n){2}scontrol requeue 7\n", stubs.calls.read_text())


def test_a_cancelled_job_stays_cancelled(tmp_path: Path) -> None:
    """Slurm 22.05 does requeue a cancelled job whose script asks for it."""
    stubs = Stubs(tmp_path)
    for code in (STOPPED, 143):  # the ranks have saved; a launcher was faster
        process = stubs.start(stubs.script, CODE=code, WAIT_FOR=1)
        wait_for(lambda: "srun" in stubs.calls.read_text(), 60.0, "srun")
        process.send_signal(signal.SIGTERM)
        with stubs.calls.open("a") as calls:
            calls.write("scancel, by the user\n")
        output, _ = process.communicate(timeout=120)
        assert process.returncode == code and "cancelled: not requeued" in output
        assert "requeue" not in stubs.calls.read_text()
    assert not (stubs.run / "lost-7").exists()


@pytest.mark.parametrize("template", ["slurm/pretrain.sbatch", "mpi.sh"])
def test_a_step_has_the_job_s_processors(tmp_path: Path, template: str) -> None:
    stubs = Stubs(tmp_path)
    script = stubs.script if "sbatch" in template else ROOT / "launch" / template
    for variables, given in (({"SLURM_CPUS_PER_TASK": 12}, True), ({}, False)):
        assert stubs.start(script, CODE=0, **variables).wait(120) == 0
        step = next(line for line in stubs.calls.read_text().splitlines() if line.startswith("srun"))
        assert (" --cpus-per-task=12 " in step) == ("--cpus-per-task" in step) == given


@pytest.mark.slow
def test_a_preempted_job_saves_is_requeued_and_goes_on(
    slurm: Slurm, cluster_reference: Reference, tmp_path: Path
) -> None:
    job = Job(slurm, cluster_reference, tmp_path)
    job.wait_for_step(10)
    assert " CPUs=4 " in slurm("scontrol", "show", "step", f"{job.number}.0").replace("\n", " ")
    urgent = slurm.submit("--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
    job.completes()
    completes(slurm, urgent, job.log)
    found = re.search(
        r"stopped by SIGUSR1 on rank \d after step (\d+): saved (\S+); exit code (\d+)", job.text()
    )
    assert found, job.text()[-5000:]
    step = int(found[1])
    assert 10 <= step < STEPS and int(found[3]) == STOPPED
    assert f"resumed from {job.run}/checkpoints/iter_{step:07d} after step {step}" in job.text()
    assert "ranks left with code" in job.text() and errors(job.log) == []


@pytest.mark.long
def test_a_job_that_is_asked_in_start_up_goes_on_later(
    slurm: Slurm, cluster_reference: Reference, tmp_path: Path
) -> None:
    """Asked while launchers import torch and have no ranks yet: one step is taken and saved."""
    job = Job(slurm, cluster_reference, tmp_path)
    wait_for(lambda: (job.run / f"hostfile-{job.number}").exists(), TIMEOUT, "the start of the job")
    time.sleep(1.0)
    slurm("scancel", "--signal=USR1", "--batch", job.number)
    job.completes()
    assert re.search(r"stopped by SIGUSR1 on rank \d after step 1: saved", job.text()), job.text()[-5000:]


@pytest.mark.long
def test_a_lost_rank_is_named_and_the_job_requeued(
    slurm: Slurm, cluster_reference: Reference, tmp_path: Path
) -> None:
    job = Job(slurm, cluster_reference, tmp_path)
    job.wait_for_step(10)
    slurm.hosts.signal_rank(2, signal.SIGKILL, SCRIPT)
    job.completes()
    assert [line.split(";")[0] for line in errors(job.log)] == ["error: rank 2 (node2) died"]


@pytest.mark.long
def test_torchrun_per_node_stops_when_the_time_is_nearly_up(
    slurm: Slurm, cluster_reference: Reference, tmp_path: Path
) -> None:
    """`scancel --signal` is what Slurm does before the limit, without the wait."""
    job = Job(slurm, cluster_reference, tmp_path, **{"LAUNCHER=": "LAUNCHER=torchrun"})
    job.wait_for_step(10)
    slurm("scancel", "--signal=USR1", "--batch", job.number)
    job.completes()
    assert "stopped by SIGUSR1 on rank " in job.text()


@pytest.mark.long
def test_a_lost_node_is_waited_for(slurm: Slurm, cluster_reference: Reference, tmp_path: Path) -> None:
    """The job may be started on the dead node once or twice more before Slurm has noticed."""
    job = Job(slurm, cluster_reference, tmp_path)
    job.wait_for_step(10)
    slurm.hosts.power_off(2)
    wait_for(lambda: "down" in slurm("sinfo", "-h", "-n", "node2", "-o", "%T"), TIMEOUT, "node2 to be down")
    slurm.hosts.power_on(2)
    slurm.join(2)
    job.completes(at_most=5)
    assert "resumed from" in job.text()


@pytest.mark.long
def test_the_array_runs_every_variant(slurm: Slurm, cluster_reference: Reference, tmp_path: Path) -> None:
    place = tmp_path / "launch" / "slurm"
    place.mkdir(parents=True)
    (tmp_path / SCRIPT).symlink_to(ROOT / SCRIPT)
    lines = {**settings(cluster_reference, tmp_path / "not-used"), "RANKS=": "RANKS=4"}
    edited(ROOT / "launch/slurm/pretrain.sbatch", lines, place / "pretrain.sbatch")
    lines = {
        **SIZE,
        '"code --seed': '"plain --log-interval 1"',
        '"prose --seed': '"other --seed 7"',
        "RUNS=runs": f"RUNS={tmp_path}",
    }
    script = edited(ROOT / "launch/slurm/pretrain_array.sbatch", lines, place / "pretrain_array.sbatch")
    job = slurm.submit(f"--chdir={tmp_path}", f"--output={tmp_path}/log-%a", str(script))
    for element in (0, 1):
        completes(slurm, f"{job}_{element}", tmp_path / f"log-{element}")
    cluster_reference.agrees(tmp_path / "plain")
    rows, steps = ledger(tmp_path / "other")
    assert steps.num_rows == STEPS and not rows.equals(cluster_reference.rows)


PLAIN = """
import os
from inrun_megatron.training import distributed
_, promised = distributed.launched()
distributed._discover_mpi(promised)
print([os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")])
"""


@pytest.mark.parametrize(
    ("tasks", "expected"), [(4, ["3", "4", "1", "node1"]), (2, ["0", "1", "0", "127.0.0.1"])]
)
def test_slurm_s_pmi_of_another_mpi(tmp_path: Path, tasks: int, expected: list[str]) -> None:
    """The environment of rank 3 of 4 under `srun --mpi=pmi2`; and where the step's tasks are another launcher's daemons."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\nprintf 'node1\\nnode2\\n'\n")
    scontrol.chmod(0o755)
    slurm = {
        "STEP_NUM_TASKS": tasks,
        "PROCID": 3,
        "LOCALID": 1,
        "STEP_NODELIST": "x",
        "JOB_ID": 7,
        "STEP_ID": 0,
    }
    variables = {f"SLURM_{name}": str(value) for name, value in slurm.items()} | {
        "PMI_SIZE": "4",
        "PMI_RANK": "3",
    }
    environment = hosts_module.environment(**variables)
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    done = subprocess.run(
        [sys.executable, "-c", PLAIN], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.stdout == f"{expected}\n", done.stderr[-3000:]


@pytest.mark.long
def test_a_plain_srun_needs_no_mpi(slurm: Slurm, cluster_reference: Reference, tmp_path: Path) -> None:
    """Where the cluster's default is an MPI that is not ours."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = ["srun", "--nodes=2", "--ntasks-per-node=2", "--time=60", "--mpi=pmi2", sys.executable, SCRIPT]
    process = slurm.hosts.start(1, [*command, *cluster_reference.flags(run)], log, ROOT, slurm.environment)
    assert process.wait(TIMEOUT) == 0, log.read_text(errors="replace")[-5000:]
    cluster_reference.agrees(run)


@pytest.mark.long
def test_srun_starts_the_ranks_through_pmix(
    cluster_reference: Reference, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """launch/mpi.sh in an allocation."""
    hosts_module.require("libpmix2")
    place, run, log = tmp_path / "launch", tmp_path / "run", tmp_path / "log"
    place.mkdir()
    (tmp_path / SCRIPT).symlink_to(ROOT / SCRIPT)
    values = {
        "PYTHON=": f"PYTHON={sys.executable}",
        "export NCCL_SOCKET_IFNAME": "export NCCL_SOCKET_IFNAME=eth0",
    }
    script = edited(ROOT / "launch" / "mpi.sh", values, place / "mpi.sh")
    with Hosts(tmp_path_factory.mktemp("hosts"), 2, tmp_path_factory.getbasetemp()) as hosts:
        slurm = Slurm(hosts, tmp_path_factory.mktemp("slurm"), ROOT, pmix=True)
        allocation = ["salloc", "--nodes=2", "--ntasks-per-node=2", "--time=60", "bash", str(script)]
        process = hosts.start(1, [*allocation, *cluster_reference.flags(run)], log, ROOT, slurm.environment)
        assert process.wait(TIMEOUT) == 0, log.read_text(errors="replace")[-5000:]
    cluster_reference.agrees(run)
