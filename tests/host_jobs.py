"""The reference's job over the hosts of tests/hosts.py, under each of the launchers."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests import hosts as hosts_module
from tests.cluster_cases import (
    HEARTBEAT,
    ROOT,
    SCRIPT,
    TIMEOUT,
    Reference,
    committed_step,
    edited,
    environment,
    errors,
)
from tests.hosts import Hosts, wait_for_line

ADDRESS, PORT = "10.77.0.1", "29500"
SLOTS = 2
# Ends of a job after a fault: what the documentation promises (a launcher's own patience, the heartbeat timeout), and a
# loaded machine's share. Nobody waits that long unless a test fails.
AT_ONCE, SOON = 150.0, HEARTBEAT + 150.0


class Job:
    """One run of the reference's job over both hosts, started as often as needed."""

    def __init__(self, hosts: Hosts, reference: Reference, directory: Path) -> None:
        self.hosts, self.reference, self.directory = hosts, reference, directory
        self.run = directory / "run"
        self.log = directory / "log"
        self.launchers: list[subprocess.Popen[bytes]] = []
        self.environment = environment(directory, PDSH_RCMD_TYPE="ssh")
        self.hostfile = directory / "hostfile"
        self.hostfile.write_text("".join(f"{name} slots={SLOTS}\n" for name in hosts.names))

    def end(self) -> None:
        """Nothing of this job may run on: hosts that still have ranks are switched off and on."""
        for process in self.launchers:
            if process.poll() is None:
                process.kill()
            process.wait()
        if self.hosts.ranks(SCRIPT):
            for host in (1, 2):
                self.hosts.power_off(host)
                self.hosts.power_on(host)

    def start(self, launcher: str, *extra: str) -> None:
        """Start over both hosts with one of LAUNCHERS."""
        self.log.write_text("")
        self.launchers = LAUNCHERS[launcher](self, [*self.reference.flags(self.run), *extra])

    def on(self, host: int, *argv: str) -> subprocess.Popen[bytes]:
        return self.hosts.start(host, argv, self.log, ROOT, self.environment)

    def wait_for_step(self, step: int) -> None:
        wait_for_line(self.log, rf"step {step}/\d+ \| loss", self.launchers[0], TIMEOUT)

    def ended(self, timeout: float) -> float:
        """Seconds until every launcher and every rank of the job is gone; AssertionError after `timeout`."""
        started = time.monotonic()

        def gone() -> bool:
            return all(p.poll() is not None for p in self.launchers) and not self.hosts.ranks(SCRIPT)

        hosts_module.wait_for(gone, timeout, f"the end of the job:\n{self.text()[-3000:]}")
        return time.monotonic() - started

    def codes(self) -> list[int]:
        return [process.wait() for process in self.launchers]

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def finishes(self) -> None:
        """The run comes to its end, and its ledger is the reference's."""
        self.ended(TIMEOUT)
        assert self.codes() == [0] * len(self.launchers), self.text()[-3000:]
        self.reference.agrees(self.run)

    def fails_after(self, fault: Callable[[], None], timeout: float, *names: str) -> None:
        """`fault` ends the job in time, with a line for each of `names` (how it begins); nothing is lost."""
        self.wait_for_step(10)
        fault()
        seconds = self.ended(timeout)
        found = errors(self.log)
        print(f"ended after {seconds:.1f} s, codes {self.codes()}: {found}")
        said = sorted(line.removeprefix("error: ") for line in found)
        assert len(said) == len(names) and all(map(str.startswith, said, sorted(names))), self.text()[-5000:]
        assert any(self.codes())
        assert committed_step(self.run) >= 8


def _pdsh(job: Job, flags: list[str]) -> list[subprocess.Popen[bytes]]:
    return [job.on(1, "deepspeed", "--hostfile", str(job.hostfile), "--master_port", PORT, SCRIPT, *flags)]


def _openmpi(job: Job, flags: list[str]) -> list[subprocess.Popen[bytes]]:
    launcher = ["--launcher", "openmpi", "--launcher_args=--allow-run-as-root"]
    command = ["deepspeed", "--hostfile", str(job.hostfile), "--master_port", PORT, *launcher, SCRIPT, *flags]
    return [job.on(1, *command)]


def _no_ssh(job: Job, flags: list[str]) -> list[subprocess.Popen[bytes]]:
    where = ["--hostfile", str(job.hostfile), "--no_ssh", "--master_addr", ADDRESS, "--master_port", PORT]
    return [job.on(host, "deepspeed", *where, f"--node_rank={host - 1}", SCRIPT, *flags) for host in (1, 2)]


def _mpirun(job: Job, flags: list[str]) -> list[subprocess.Popen[bytes]]:
    values = {
        "PYTHON=": f"PYTHON={Path(hosts_module.sys.executable)}",
        "HOSTS=": f"HOSTS=node1:{SLOTS},node2:{SLOTS}",
        "EXTRA=": 'EXTRA="--map-by slot --allow-run-as-root"',
        "export NCCL_SOCKET_IFNAME": "export NCCL_SOCKET_IFNAME=eth0",
    }
    return [job.on(1, "bash", str(_template(job, "mpi.sh", values)), *flags)]


def _torchrun(
    job: Job, flags: list[str], restarts: int = 0, nodes: str = "2"
) -> list[subprocess.Popen[bytes]]:
    values = {
        "NODES=": f"NODES={nodes}",
        "TORCHRUN=": f"TORCHRUN={Path(hosts_module.sys.executable).parent / 'torchrun'}",
        "RANKS=": f"RANKS={SLOTS}",
        "RESTARTS=": f"RESTARTS={restarts}",
        "JOB=": f"JOB={job.directory.name}",
        "export NCCL_SOCKET_IFNAME": "export NCCL_SOCKET_IFNAME=eth0",
    }
    script = _template(job, "torchrun.sh", values)
    return [job.on(host, "bash", str(script), *flags) for host in (1, 2)]


def _torchrun_elastic(job: Job, flags: list[str]) -> list[subprocess.Popen[bytes]]:
    return _torchrun(job, flags, restarts=2)


def _torchrun_shrinking(job: Job, flags: list[str]) -> list[subprocess.Popen[bytes]]:
    return _torchrun(job, flags, restarts=2, nodes="1:2")


LAUNCHERS = {
    "pdsh": _pdsh,
    "openmpi": _openmpi,
    "no_ssh": _no_ssh,
    "mpirun": _mpirun,
    "torchrun": _torchrun,
    "torchrun-elastic": _torchrun_elastic,
    "torchrun-shrinking": _torchrun_shrinking,
}


def _template(job: Job, name: str, values: dict[str, str]) -> Path:
    """A template of launch/, edited, where it finds the repository as it does in launch/."""
    place = job.directory / "launch"
    place.mkdir(exist_ok=True)
    script = place / name
    if not script.exists():
        edited(ROOT / "launch" / name, values, script)
        (place / "pretrain.py").symlink_to(ROOT / SCRIPT)
    return script
