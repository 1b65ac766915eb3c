"""Two hosts with their own network: a rank killed, a stop asked for, a cable pulled. Other launchers and faults: `--long`.

Whatever happens, the ledger in the end is that of an undisturbed run on one host, bit for bit.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from inrun_megatron.training.exit_codes import RANK_LOST, STOPPED
from tests import hosts as hosts_module
from tests.cluster_cases import SCRIPT, TIMEOUT, Reference, committed_step, errors
from tests.host_jobs import AT_ONCE, SOON, Job
from tests.hosts import Hosts


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    hosts_module.require()
    with Hosts(tmp_path_factory.mktemp("hosts"), 2, tmp_path_factory.getbasetemp()) as running:
        yield running


@pytest.fixture
def job(hosts: Hosts, cluster_reference: Reference, tmp_path: Path) -> Iterator[Job]:
    started = Job(hosts, cluster_reference, tmp_path)
    yield started
    started.end()


def test_deepspeed_over_ssh_survives_a_killed_rank(job: Job) -> None:
    job.start("pdsh")
    job.fails_after(lambda: job.hosts.signal_rank(3, signal.SIGKILL, SCRIPT), AT_ONCE, "rank 3 (node2) died")
    job.start("pdsh")
    job.finishes()


@pytest.mark.slow
def test_mpirun_stops_on_a_signal_and_goes_on(job: Job) -> None:
    job.start("mpirun")
    job.wait_for_step(10)
    job.hosts.signal_rank(2, signal.SIGUSR1, SCRIPT)
    job.ended(AT_ONCE)
    assert "stopped by SIGUSR1 on rank 2 after step" in job.text(), job.text()[-3000:]
    assert job.codes() == [STOPPED] and 10 <= committed_step(job.run) < 40
    job.start("mpirun")
    job.finishes()


@pytest.mark.slow
def test_a_cut_link_ends_the_job_on_both_sides(job: Job) -> None:
    job.start("no_ssh")
    try:
        job.fails_after(
            lambda: job.hosts.cut(2),
            SOON,
            "ranks 2, 3 (node2) gave no sign of life for",
            "rank 0 (node1) cannot be reached from node2",
        )
    finally:
        job.hosts.mend(2)
    assert job.codes() == [RANK_LOST, RANK_LOST], job.text()[-5000:]
    job.start("no_ssh")
    job.finishes()


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["openmpi", "torchrun"])
def test_a_stopped_rank_ends_the_job(job: Job, launcher: str) -> None:
    """SIGSTOP: the process is there and its connections stand, but it does nothing more."""
    job.start(launcher)
    job.fails_after(
        lambda: job.hosts.signal_rank(3, signal.SIGSTOP, SCRIPT),
        SOON,
        "rank 3 (node2) gave no sign of life for",
    )
    job.start(launcher)
    job.finishes()


@pytest.mark.long
def test_torchrun_starts_all_ranks_again_after_one_was_killed(job: Job) -> None:
    job.start("torchrun-elastic")
    job.wait_for_step(10)
    job.hosts.signal_rank(3, signal.SIGKILL, SCRIPT)
    job.finishes()
    assert [line.split(";")[0] for line in errors(job.log)] == ["error: rank 3 (node2) died"], job.text()[
        -5000:
    ]
    assert "resumed from" in job.text()


@pytest.mark.long
def test_torchrun_goes_on_with_the_hosts_that_are_left(job: Job) -> None:
    """Half of the replicas is lost with its host: the others resume, in a smaller layout, with the same samples."""
    job.start("torchrun-shrinking")
    job.wait_for_step(10)
    try:
        job.hosts.power_off(2)
        assert job.launchers[0].wait(TIMEOUT) == 0, job.text()[-5000:]
    finally:
        job.hosts.power_on(2)
    assert "written in another layout after step" in job.text(), job.text()[-5000:]
    job.reference.agrees_on_samples(job.run, bitwise_until=8)


@pytest.mark.long
def test_a_host_without_power_ends_the_job_on_the_other(job: Job) -> None:
    job.start("no_ssh")
    try:
        job.fails_after(lambda: job.hosts.power_off(2), SOON, "ranks 2, 3 (node2) gave no sign of life for")
    finally:
        job.hosts.power_on(2)
    job.start("no_ssh")
    job.finishes()
