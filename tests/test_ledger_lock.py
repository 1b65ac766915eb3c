"""Who may write: one run per directory, whatever became of the last one."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from inrun_megatron.errors import UserError
from inrun_megatron.ledger import (
    Ledger,
    create_ledger,
    lock,
    open_ledger,
)
from tests.synthetic_ledger import description

HOLDER = """
import os, sys, time
from pathlib import Path
from inrun_megatron.ledger import open_ledger
ledger = open_ledger(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
time.sleep(60)
"""


def test_a_second_run_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    create_ledger(tmp_path, description()).close()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(
            UserError, match=f"is being written by another run .process {holder.pid} on"
        ) as refusal:
            open_ledger(tmp_path)
        assert "\n" not in str(refusal.value)
        Ledger(tmp_path)  # readers need no lock
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # a worker of the killed run still lives and must not hold the directory
        open_ledger(tmp_path).close()
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def test_a_dead_hosts_lock_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    create_ledger(tmp_path, description()).close()
    path = tmp_path / "LOCK"
    path.write_text(json.dumps({"host": "node7", "pid": 5, "created": "then"}))
    with open(path) as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.2)
        with pytest.raises(UserError, match="process 5 on node7"):
            open_ledger(tmp_path)
        monkeypatch.setattr(lock, "PATIENCE_SECONDS", 20.0)
        server = threading.Timer(0.5, fcntl.flock, (theirs, fcntl.LOCK_UN))  # forgets the dead host
        server.start()
        capsys.readouterr()
        open_ledger(tmp_path).close()
        server.join()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "process 5 on node7" in lines[0] and lines[0].endswith("waiting 20 s")


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """As on a read-only file system, which a test may not be allowed to mount."""
    (tmp_path / "LOCK").mkdir()
    with pytest.raises(
        UserError, match="LOCK: Is a directory; free or repair the file system, or choose another"
    ):
        create_ledger(tmp_path, description())


def test_one_process_cannot_open_a_directory_twice(tmp_path: Path) -> None:
    with create_ledger(tmp_path, description()):
        with pytest.raises(UserError, match="already open for writing in this process"):
            open_ledger(tmp_path)
    open_ledger(tmp_path).close()
