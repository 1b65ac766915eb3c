"""A Slurm of two nodes on the hosts of tests/hosts.py: slurmctld on node1, slurmd on both, two partitions."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.hosts import Hosts, environment, wait_for

GRACE = 300
"""Seconds that a pre-empted job has; one that has saved leaves at once."""
PMIX = Path("/usr/lib/x86_64-linux-gnu/pmix2/lib")
"""Where Debian's Slurm looks for the library of `srun --mpi=pmix` (package libpmix2)."""

# No munge and no cgroups: neither exists in a container. Jobs of `high` pre-empt those of `low`.
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
AuthInfo=cred_expire=10
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
KillWait=20
MinJobAge=7200
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
StateSaveLocation=/run/slurm-state
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
NodeName=node[1-2] CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=2000 State=UNKNOWN
PartitionName=low Nodes=node[1-2] Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} OverSubscribe=NO
PartitionName=high Nodes=node[1-2] MaxTime=60 PriorityTier=10 OverSubscribe=NO
"""


class Slurm:
    """Slurm's commands, as typed on node1 in the directory `cwd`. pmix: offer `srun --mpi=pmix`."""

    def __init__(self, hosts: Hosts, directory: Path, cwd: Path, pmix: bool = False) -> None:
        self.hosts, self.directory, self.cwd = hosts, directory, cwd
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "slurm.conf").write_text(_CONFIGURATION.format(directory=directory, grace=GRACE))
        # Without a cgroup mount it must be told which kind it does not use.
        (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self.environment = environment(SLURM_CONF=str(directory / "slurm.conf"))
        if pmix:
            # It asks for a name that only the package for developers has.
            shutil.copytree(PMIX, directory / "pmix", symlinks=True)
            (directory / "pmix" / "libpmix.so").symlink_to("libpmix.so.2")
        self._pmix = pmix
        self._command(1, "mkdir", "-p", "/run/slurm-state")
        self._command(1, "slurmctld", "-c")
        for host in range(1, hosts.count + 1):
            self.join(host)
        wait_for(
            lambda: self("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", 180.0, "two idle nodes"
        )

    def join(self, host: int) -> None:
        """Make the host a node; again after it was switched off and on."""
        if self._pmix:
            self._command(host, "mount", "--bind", str(self.directory / "pmix"), str(PMIX))
        self._command(host, "mkdir", "-p", "/run/slurmd")
        self._command(host, "slurmd")

    def __call__(self, *argv: str) -> str:
        """The stdout of one of Slurm's commands on node1."""
        return self._command(1, *argv)

    def _command(self, host: int, *argv: str) -> str:
        return self.hosts.run(host, argv, self.cwd, self.environment)

    def submit(self, *argv: str) -> str:
        """sbatch; the job's number."""
        return self("sbatch", "--parsable", *argv).strip()

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED, ..."""
        return self._field(job, "JobState")

    def restarts(self, job: str) -> int:
        return int(self._field(job, "Restarts"))

    def _field(self, job: str, name: str) -> str:
        text = self("scontrol", "show", "job", job)
        return next(word.split("=")[1] for word in text.split() if word.startswith(f"{name}="))
