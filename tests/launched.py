"""Runs under the real launcher, to watch, kill and start again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import psutil

from inrun_megatron.ports import free_port
from tests.real_text import ROOT

DEADLINE = 600.0
"""Seconds until a run that makes no progress fails its test."""

ENDS_WITHIN = 150.0
"""Seconds within which the loss of one rank ends the whole job of a machine: 30 (docs/ledger.md), and five times that on
a machine that has other work. Most of it is the launcher's own patience."""


class Launched:
    """`deepspeed --num_accelerators 2 launch/pretrain.py ...`; a context manager that leaves no process behind."""

    def __init__(self, argv: list[str], log: Path, ranks: int = 2) -> None:
        deepspeed = str(Path(sys.executable).parent / "deepspeed")
        start = [
            sys.executable,
            deepspeed,
            "--num_accelerators",
            str(ranks),
            "--master_port",
            str(free_port()),
        ]
        environment = {
            key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
        self._log = log
        self._file: IO[bytes] = open(log, "wb")  # noqa: SIM115  (closed with the job)
        self.process = subprocess.Popen(
            [*start, str(ROOT / "launch" / "pretrain.py"), *argv],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=self._file,
            start_new_session=True,
        )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._family():
            process.kill()
        self.process.kill()
        self.process.wait()
        self._file.close()

    def _family(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def ranks(self) -> list[psutil.Process]:
        """The training processes, by rank. Their children (data loaders) are not among them."""
        found = []
        for process in self._family():
            try:
                line = process.cmdline()
                rank = [word.split("=")[1] for word in line if word.startswith("--local_rank=")]
                if rank and any(word.endswith("pretrain.py") for word in line):
                    found.append((int(rank[0]), process))
            except psutil.NoSuchProcess:
                continue
        return [process for _, process in sorted(found, key=lambda pair: pair[0])]

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def errors(self) -> list[str]:
        return [line for line in self.log.splitlines() if line.startswith("error: ")]

    @property
    def step(self) -> int:
        """The last step that rank 0 reported, 0 before the first."""
        steps = re.findall(r"^step (\d+)/\d+ \| loss", self.log, re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait for `condition`; False when the job ended before."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            if self.process.poll() is not None:
                return condition()
            assert time.monotonic() < deadline, f"nothing happens\n{self.log[-3000:]}"
            time.sleep(0.002)
        return True

    def wait(self, timeout: float = DEADLINE) -> int:
        return self.process.wait(timeout)
