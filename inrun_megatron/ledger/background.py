"""A thread that works through jobs in order, so that the training thread never waits for a file system."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from inrun_megatron.ledger.files import refused

Job = Callable[[], None]


class Background:
    """One daemon thread and a bounded backlog of jobs.

    limit: weight of unfinished jobs up to which `submit` returns at once. Beyond it `submit` waits: memory is
    bounded, and a file system that is slower than the run for good slows the run instead of filling its memory.

    After a job has failed the ones behind it are dropped, since they may build on it; `check` raises the failure.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._name, self._limit = name, limit
        self._changed = threading.Condition()
        self._jobs: deque[tuple[Job, int]] = deque()
        self._weight = 0  # of the jobs that wait and of the one that runs
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def busy(self) -> bool:
        """Is a job waiting or running?"""
        return self._weight > 0

    @property
    def failed(self) -> bool:
        """Has a job raised? `check` says what."""
        return self._error is not None

    def submit(self, job: Job, weight: int = 1) -> None:
        """Run `job` after the earlier ones. Waits only while the backlog is over its limit."""
        assert weight > 0 and not self._closed
        with self._changed:
            if self._thread is None:
                # Daemon: a file system that hangs must not keep a run from ending.
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            self._changed.wait_for(lambda: self._weight == 0 or self._weight + weight <= self._limit)
            self._jobs.append((job, weight))
            self._weight += weight
            self._changed.notify_all()

    def wait(self) -> None:
        """Until every job is done. Raises what `check` raises."""
        with self._changed:
            self._changed.wait_for(lambda: self._weight == 0)
        self.check()

    def check(self) -> None:
        """Raise the error of the first job that failed, if any did: a UserError when the file system refused."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread after the jobs it has."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._jobs) or self._closed)
                if not self._jobs:
                    return
                job, weight = self._jobs.popleft()
            if self._error is None:
                try:
                    job()
                except OSError as error:
                    self._error = refused(error.filename or "the ledger", error)
                except BaseException as error:  # it must stop the run, not just the thread
                    self._error = error
            del job
            with self._changed:
                self._weight -= weight
                self._changed.notify_all()
