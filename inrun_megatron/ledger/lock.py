"""One run per directory: an advisory lock that the kernel drops when the process dies, however it
dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
import weakref
from pathlib import Path
from typing import Any

from inrun_megatron.errors import UserError
from inrun_megatron.ledger.schema import LOCK_FILE, now

_HELD: dict[Path, DirectoryLock] = {}
"""Locks of this process by resolved directory: a lock lives until close() or the end of the process."""

PATIENCE_SECONDS = 180.0
"""How long a lock whose holder is on another host is asked for again: the servers of network file systems (NFSv4, Lustre)
keep a dead host's locks for 90 seconds or so."""

_WITHOUT_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class DirectoryLock:
    """Exclusive hold of a directory through flock(2) on its `LOCK` file; ``flag`` is the one that names the directory.

    The file names the holder (host, process id, time) for the error message only; the lock itself is the
    kernel's, so a killed run leaves nothing to clean up. On a file system without flock (Lustre mounted so)
    the holder's name in the file is all there is: a holder on this host that no longer lives is taken over,
    one on another host is refused. With flock, a holder on another host may be dead and not yet forgotten by the server:
    it is waited for (PATIENCE_SECONDS).

    Raises UserError, one line, when another run holds the directory.
    """

    def __init__(self, directory: Path, flag: str = "--shapley-dir") -> None:
        self.directory, self._flag = directory.resolve(), flag
        if self.directory in _HELD:
            raise UserError(f"{directory} is already open for writing in this process; close it first")
        self.path = self.directory / LOCK_FILE
        try:
            self._descriptor: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror or error}; free or repair the file system, or choose another "
                f"{flag}"
            ) from error
        try:
            self._acquire()
        except BaseException:
            os.close(self._descriptor)
            self._descriptor = None
            raise
        self._write_holder()
        _HELD[self.directory] = self
        _OPEN_LOCKS.add(self)

    def _acquire(self) -> None:
        assert self._descriptor is not None
        deadline = None
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno in _WITHOUT_FLOCK:
                    return self._check_named_holder()
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                refusal = self._refusal("stop that run")
            if self._holder().get("host") in (None, socket.gethostname()):
                raise refusal
            if deadline is None:
                deadline = time.monotonic() + PATIENCE_SECONDS
                print(f"{refusal}; waiting {PATIENCE_SECONDS:.0f} s", file=sys.stderr, flush=True)
            if time.monotonic() > deadline:
                raise refusal
            time.sleep(min(2.0, PATIENCE_SECONDS / 10))

    def _check_named_holder(self) -> None:
        holder = self._holder()
        if holder.get("host") is None:
            return
        if holder["host"] != socket.gethostname():
            raise self._refusal(
                f"stop that run, or remove {self.path} if it is dead (no flock on this file system)"
            )
        pid = int(holder.get("pid") or 0)
        if pid != os.getpid() and pid > 0 and _alive(pid):
            raise self._refusal("stop that run")

    def _refusal(self, remedy: str) -> UserError:
        holder = self._holder()
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')} since {holder.get('created', '?')}"
        return UserError(
            f"{self.directory} is being written by another run ({who}); {remedy}, or choose another {self._flag}"
        )

    def _holder(self) -> dict[str, Any]:
        try:
            record = json.loads(self.path.read_text() or "{}")
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def _write_holder(self) -> None:
        assert self._descriptor is not None
        # For error messages only: a disk that is still full does not keep a run from starting.
        record = {"host": socket.gethostname(), "pid": os.getpid(), "created": now()}
        os.ftruncate(self._descriptor, 0)
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, json.dumps(record).encode(), 0)

    def close(self) -> None:
        """Give the directory up; closing twice is harmless."""
        if self._descriptor is None:
            return
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
        self._forget()

    def _forget(self) -> None:
        self._descriptor = None
        _HELD.pop(self.directory, None)
        _OPEN_LOCKS.discard(self)

    def _close_in_child(self) -> None:
        # A flock belongs to the open file, which fork shares: without this a data-loader worker that outlives
        # a killed run would keep the directory locked. Closing one copy does not unlock the other.
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._forget()


_OPEN_LOCKS: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


def _close_locks_in_child() -> None:
    for lock in list(_OPEN_LOCKS):
        lock._close_in_child()


os.register_at_fork(after_in_child=_close_locks_in_child)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
