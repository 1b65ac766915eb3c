"""Hosts of a cluster on this machine, for tests that use real launchers.

A host is a set of namespaces (network, host name, processes, IPC, mounts) with its own address, /tmp, /run, /dev/shm
and sshd; the rest of the file system is common to all hosts, and so are the directories named to `Hosts`:

    with Hosts(directory, 2) as hosts:
        process = hosts.start(1, ["deepspeed", "--hostfile", ...], log)
        hosts.cut(2)                            # pull its network cable
        hosts.power_off(2); hosts.power_on(2)   # every process on it is gone at once

Process namespaces matter for safety too: DeepSpeed's pdsh runner answers SIGTERM with a `pkill -f` on every host.
Traffic stays inside the hosts' own bridge. Everything ends with the context, or with this process.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pytest

PACKAGES = {"sshd": "openssh-server", "pdsh": "pdsh", "sbatch": "slurm-wlm", "ip": "iproute2"}
NETWORK = "10.77.0"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PREFIX = "irhost"
_NUMBERS = itertools.count()

# Process 1 of a host. $1: its name, $2: the scratch directory, from $3 on: directories of /tmp that all hosts see.
# /tmp is a host's own: Open MPI keeps its files in /tmp/ompi.PID there and gives up (a daemon that "failed to report back",
# exit status 213) when it finds a /tmp/ompi.PID/pmix.HOST.tool already. Process numbers repeat in new namespaces, so the
# files of a host that was switched off, or of another test's node1, would be met again and again.
_INIT = r"""
set -e
hostname "$1"
mount -t proc proc /proc
mkdir "$2/$1.mnt" 2> /dev/null || true
mount -t tmpfs -o mode=1777 tmpfs "$2/$1.mnt"
for shared in "${@:3}"; do
    mkdir -p "$2/$1.mnt/${shared#/tmp/}"
    mount --bind "$shared" "$2/$1.mnt/${shared#/tmp/}"
done
mount --move "$2/$1.mnt" /tmp
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/sshd
mount --bind "$2/hosts" /etc/hosts
mount -t tmpfs tmpfs /etc/ssh/ssh_config.d
cp "$2/ssh.conf" /etc/ssh/ssh_config.d/
/usr/sbin/sshd -D -e -f "$2/sshd_config" &
set +e
while :; do wait -n; sleep 0.2; done
"""


def require(*libraries: str) -> None:
    """Install what hosts need and packages of `libraries`; skip the test, saying why, where that cannot be."""
    if os.geteuid() != 0:
        pytest.skip("needs root: hosts are network and mount namespaces")
    missing = [package for command, package in PACKAGES.items() if shutil.which(command, path=_PATH) is None]
    missing += [
        name for name in libraries if subprocess.run(["dpkg", "-s", name], capture_output=True).returncode
    ]
    if missing:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        wait = ["-o", "DPkg::Lock::Timeout=300"]
        for command in (
            ["apt-get", *wait, "update", "-qq"],
            ["apt-get", *wait, "install", "-y", "-qq", "--no-install-recommends", *missing],
        ):
            try:
                done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
            except (OSError, subprocess.TimeoutExpired) as error:
                pytest.skip(f"{', '.join(missing)} cannot be installed: {error}")
            if done.returncode:
                pytest.skip(f"{', '.join(missing)} cannot be installed: {done.stderr.strip()[-200:]}")
    probe = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True
    )
    if probe.returncode:
        pytest.skip(f"this container may not create namespaces: {probe.stderr.strip()}")


def environment(**extra: str) -> dict[str, str]:
    """What a process on a host starts with: this interpreter's environment, no rank variables."""
    keep = ("HOME", "LANG", "DS_ACCELERATOR", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR")
    inherited = {key: os.environ[key] for key in keep if key in os.environ}
    root = str(Path(__file__).resolve().parents[1])
    path = f"{Path(sys.executable).parent}:{_PATH}"
    return {**inherited, "PATH": path, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1", **extra}


class Hosts:
    """`count` hosts, node1 = 10.77.0.1 and so on, reachable from each other by ssh without a password.

    directory: for keys and logs. shared: what else under /tmp the hosts have in common.
    """

    def __init__(self, directory: Path, count: int, *shared: Path) -> None:
        self.directory, self.count = directory, count
        used = [
            Path(__file__).parents[1],
            Path(sys.prefix),
            Path(os.environ.get("TORCH_EXTENSIONS_DIR", "/")),
        ]
        self._shared = [str(path) for path in (directory, *shared, *used) if path.is_relative_to("/tmp")]
        self._name = f"{_PREFIX}-{os.getpid()}-{next(_NUMBERS)}-"
        self._shells: dict[int, subprocess.Popen[bytes]] = {}
        self._pids: dict[int, int] = {}

    @property
    def names(self) -> list[str]:
        return [f"node{host}" for host in range(1, self.count + 1)]

    def __enter__(self) -> Self:
        _remove_stale()
        self._write_ssh()
        bridge = self._name + "sw"
        _run("ip", "netns", "add", bridge)
        _run("ip", "-n", bridge, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", bridge, "link", "set", "br0", "up")
        for host in range(1, self.count + 1):
            space = self._name + str(host)
            _run("ip", "netns", "add", space)
            _run(
                "ip", "-n", bridge, "link", "add", f"p{host}", "type", "veth", "peer", "eth0", "netns", space
            )
            _run("ip", "-n", bridge, "link", "set", f"p{host}", "master", "br0", "up")
            _run("ip", "-n", space, "addr", "add", f"{NETWORK}.{host}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _run("ip", "-n", space, "link", "set", device, "up")
            self.power_on(host)
        return self

    def __exit__(self, *_: object) -> None:
        for host in list(self._shells):
            self.power_off(host)
        for space in ("sw", *range(1, self.count + 1)):
            _run("ip", "netns", "del", f"{self._name}{space}")

    def _write_ssh(self) -> None:
        here = self.directory
        here.mkdir(parents=True, exist_ok=True)
        for key in ("id", "hostkey"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(here / key))
        shutil.copy(here / "id.pub", here / "authorized_keys")
        server = f"""HostKey {here}/hostkey
PidFile none
AuthorizedKeysFile {here}/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
"""
        # Keep-alives: without them pdsh waits for ever for a host whose cable was pulled.
        client = f"""Host node*
IdentityFile {here}/id
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
ConnectTimeout 60
ServerAliveInterval 10
ServerAliveCountMax 6
"""
        (here / "sshd_config").write_text(server)
        (here / "ssh.conf").write_text(client)
        table = [f"{NETWORK}.{i} {name}" for i, name in enumerate(self.names, start=1)]
        (here / "hosts").write_text("\n".join(["127.0.0.1 localhost", *table]) + "\n")

    def power_on(self, host: int) -> None:
        """Start the host and wait for its sshd."""
        log = self.directory / f"node{host}.log"
        inside = "unshare --uts --ipc --pid --fork --kill-child --mount --propagation private bash -c"
        start = f"setpriv --pdeathsig KILL ip netns exec {self._name}{host} {inside}".split()
        with log.open("wb") as stream:
            self._shells[host] = subprocess.Popen(
                [*start, _INIT, "init", f"node{host}", str(self.directory), *self._shared],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        shell = self._shells[host]
        children = Path(f"/proc/{shell.pid}/task/{shell.pid}/children")
        wait_for(lambda: "listening on 0" in log.read_text(), 180.0, f"sshd of node{host}: {log}")
        self._pids[host] = int(children.read_text().split()[0])

    def power_off(self, host: int) -> None:
        """Process 1 dies, and the kernel ends every other process of the host."""
        os.kill(self._pids.pop(host), 9)
        self._shells.pop(host).wait()

    def cut(self, host: int) -> None:
        """Pull the network cable: nothing is refused, nothing arrives."""
        _run("ip", "-n", self._name + "sw", "link", "set", f"p{host}", "down")

    def mend(self, host: int) -> None:
        _run("ip", "-n", self._name + "sw", "link", "set", f"p{host}", "up")

    def command(self, host: int, argv: Sequence[str], cwd: Path) -> list[str]:
        """`argv` as a command on the host."""
        spaces = ["--net", "--uts", "--ipc", "--pid", "--mount", "--root", f"--wdns={cwd}"]
        return ["nsenter", "-t", str(self._pids[host]), *spaces, "--", *argv]

    def start(
        self, host: int, argv: Sequence[str], log: Path, cwd: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command on the host; stdout and stderr go to the end of `log`."""
        with log.open("ab") as stream:
            return subprocess.Popen(
                self.command(host, argv, cwd),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=environment() if env is None else dict(env),
                start_new_session=True,
            )

    def run(
        self,
        host: int,
        argv: Sequence[str],
        cwd: Path,
        env: Mapping[str, str] | None = None,
        timeout: float = 180.0,
    ) -> str:
        """Run a command on the host; its stdout. AssertionError when it fails."""
        done = subprocess.run(
            self.command(host, argv, cwd),
            env=environment() if env is None else dict(env),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{shlex.join(argv)} on node{host}: {done.stderr}"
        return done.stdout

    def signal_rank(self, rank: int, number: int, script: str) -> None:
        """Send a signal to the process that runs `script` as `rank`, on whatever host it is."""
        for pid in self.ranks(script).get(rank, []):
            os.kill(pid, number)
            return
        raise AssertionError(f"rank {rank} of {script} does not run")

    def ranks(self, script: str) -> dict[int, list[int]]:
        """Processes (of this machine's numbering) by rank that run `script` on any of the hosts."""
        spaces = {os.readlink(f"/proc/{pid}/ns/pid") for pid in self._pids.values()}
        found: dict[int, list[int]] = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(process / "ns/pid") not in spaces:
                    continue
                command = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                variables = (process / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if not Path(command[0]).name.startswith("python") or not any(
                word.endswith(script) for word in command[1:4]
            ):
                continue
            for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID"):
                value = next((v for v in variables if v.startswith(f"{name}=")), None)
                if value is not None:
                    found.setdefault(int(value.split("=")[1]), []).append(int(process.name))
                    break
        return found


def wait_for(condition: Any, timeout: float, what: str) -> None:
    """Until `condition()` holds; AssertionError with `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s in vain for {what}"
        time.sleep(0.1)


def wait_for_line(log: Path, pattern: str, process: subprocess.Popen[bytes] | None, timeout: float) -> None:
    """Until a line of `log` matches; AssertionError with the log's end if `process` ends before."""

    def found() -> bool:
        text = log.read_text(errors="replace") if log.exists() else ""
        if re.search(pattern, text, flags=re.M):
            return True
        assert process is None or process.poll() is None, f"ended before {pattern!r}:\n{text[-3000:]}"
        return False

    try:
        wait_for(found, timeout, pattern)
    except AssertionError as error:
        text = log.read_text(errors="replace") if log.exists() else ""
        raise AssertionError(f"{error}\n{text[-3000:]}") from None


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, f"{shlex.join(argv)}: {done.stderr}"


def _remove_stale() -> None:
    """Network namespaces of test processes that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=60).stdout
    for name in re.findall(rf"^{_PREFIX}-(\d+)-(\S+)", listed, flags=re.M):
        if not Path(f"/proc/{name[0]}").exists():
            _run("ip", "netns", "del", f"{_PREFIX}-{name[0]}-{name[1]}")
