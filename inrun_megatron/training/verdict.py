"""How a job ends: one verdict, which the first rank to notice writes into a store, and prints.

The others leave silently, after all have read it: a launcher ends what is left at the first exit, and an end without a
known reason would be reported once more. Leaving is `os._exit`, because the main thread may wait in a collective for ever.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

_VERDICT = "verdict"
_READ = "read "
_GONE = "gone"
"""Never set: whoever looks for it learns whether the store is still served."""


@dataclass(frozen=True)
class Verdict:
    """Why the job ends, the rank that says so, and ranks that cannot read it any more.

    An empty text: the rank that failed has said it itself.
    """

    text: str
    code: int
    by: int
    lost: list[int]


class Verdicts:
    """A rank's part in ending the job.

    store: served by rank 0. interval: seconds between two looks of a rank at it.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, interval: float) -> None:
        self._store, self._rank, self._world, self._interval = store, rank, world, interval
        self._leaving = threading.Lock()

    def claim(self, verdict: Verdict) -> Verdict:
        """The verdict that counts: this one, unless another rank was first."""
        text = self._store.compare_set(_VERDICT, "", json.dumps(asdict(verdict))).decode()
        return Verdict(**json.loads(text))

    def given(self) -> Verdict | None:
        """The verdict that counts, once there is one. RuntimeError where the store is gone, as from `claim`."""
        if not self._store.check([_VERDICT]):
            return None
        return Verdict(**json.loads(self._store.get(_VERDICT)))

    def leave(self, verdict: Verdict) -> None:
        """The end of this process. The lock is never given back: both threads may notice the same."""
        self._leaving.acquire()
        if verdict.by == self._rank and verdict.text:
            _say(verdict.text)
        if 0 not in verdict.lost:
            self.wait_for_readers(verdict)
        os._exit(verdict.code)

    def wait_for_readers(self, verdict: Verdict) -> None:
        """Rank 0 serves the store, so it leaves first, when all have read the verdict; nobody waits for ever."""

        def others_read() -> None:
            with contextlib.suppress(RuntimeError):  # rank 0, and with it the store, is gone
                if self._rank == 0:
                    readers = set(range(1, self._world)) - set(verdict.lost)
                    self._store.wait([_READ + str(rank) for rank in readers], 2 * patience)
                else:
                    self._store.set(_READ + str(self._rank), "")
                    while not self._store.check([_GONE]):
                        time.sleep(0.05)

        patience = timedelta(seconds=6 * self._interval)
        thread = threading.Thread(target=others_read, name="readers", daemon=True)
        thread.start()  # a call on the store may block when the network is cut
        thread.join(patience.total_seconds())


def _say(text: str) -> None:
    print(f"error: {text}; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
