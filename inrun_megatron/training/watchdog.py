"""Ends the whole job with one line when a rank dies, hangs or cannot be reached.

A collective waits for a lost rank until its own timeout, minutes later, and then fails on every other rank with a
traceback that names none. So every rank writes a heartbeat into a store that rank 0 serves, and watches others:

    who watches                whom                       how it is noticed                               after
    every rank                 ranks of its own host      the kernel reports their end (pidfd)            at once
    rank 0                     all ranks                  their heartbeat stands still                    heartbeat timeout
    every rank                 rank 0                     its connection closes / it stops answering      at once / heartbeat timeout
    rank 0                     all main threads           none has moved                                  collective timeout

The first to notice gives the verdict (verdict.py). Nothing committed can be lost by it: commits and checkpoints are
complete at any instant (docs/ledger.md).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, Self

import torch.distributed as dist

from inrun_megatron.errors import UserError
from inrun_megatron.keeping.agreement import AgreedError
from inrun_megatron.training.exit_codes import FAILED, RANK_LOST
from inrun_megatron.training.stacks import MainThread, odd_ones_out
from inrun_megatron.training.verdict import Verdict, Verdicts

_SUSPICION = "suspicion"
_TOGETHER = 0.2
"""Seconds after the end of a rank before it is told: a launcher that ends all ranks ends this one within them."""
_COMMUNICATION = ("gloo", "nccl", "connection closed by peer", "connection reset", "timed out", "broken pipe")
"""What errors of a collective say when its peer is gone."""


@dataclass(frozen=True)
class Rank:
    """Where a rank lives. `namespace` tells equal process numbers of two containers on one host apart."""

    host: str
    process: int
    namespace: str


class Watchdog:
    """Watches from `__enter__` to `__exit__`; both are collective over the world.

    timeout: seconds without a sign of life after which a rank counts as lost.
    stall: seconds after which a job whose main threads all stand still is given up.

    Heartbeats are judged between `arm()` and the end only: before that, a long call that holds the interpreter (building
    the index of a large dataset) may silence a rank that is well.
    """

    def __init__(self, timeout: float, stall: float) -> None:
        self._timeout, self._stall = timeout, stall
        self._interval = min(2.0, timeout / 10)
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._armed = False
        self._closing = threading.Event()
        self._answered = False
        self._main = MainThread()
        self._threads: list[threading.Thread] = []
        self._ranks: list[Rank] = []
        self._store: Any = None
        self._verdicts: Any = None
        self._seen: dict[int, tuple[str, int]] = {}

    # --- beginning and end -------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._world == 1:
            return self
        own = Rank(socket.gethostname(), os.getpid(), os.readlink("/proc/self/ns/pid"))
        ranks: list[Any] = [None] * self._world
        dist.all_gather_object(ranks, own)
        self._ranks = ranks
        self._store = self._connect()
        self._verdicts = Verdicts(self._store, self._rank, self._world, self._interval)
        self._store.set(str(self._rank), self._beat(0))
        self._wake = os.eventfd(0)
        dist.barrier()
        for body in (self._beat_and_judge, self._watch_siblings):
            self._threads.append(threading.Thread(target=body, name=body.__name__, daemon=True))
            self._threads[-1].start()
        return self

    def _connect(self) -> dist.TCPStore:
        """A store of its own: the one of the process group may be busy waiting for the main thread's sake."""
        port: list[Any] = [None]
        store = None
        if self._rank == 0:
            store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            port = [store.port]
        dist.broadcast_object_list(port, src=0)
        return store or dist.TCPStore(
            os.environ["MASTER_ADDR"], port[0], is_master=False, wait_for_workers=False
        )

    def arm(self) -> None:
        """From here on every rank's heartbeat counts. Local."""
        self._armed = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._world == 1:
            return
        agreed = error is None or isinstance(error, AgreedError)
        if error is not None and not agreed:
            self._report(error)
        # Before the barrier: whoever comes out of it first may end its process at once.
        self._stop_watching()
        if agreed:
            dist.barrier()
        for thread in self._threads:
            thread.join(timeout=self._timeout)

    def _stop_watching(self) -> None:
        if not self._closing.is_set():
            self._closing.set()
            os.eventfd_write(self._wake, 1)

    def _report(self, error: BaseException) -> None:
        """This rank's main thread failed: end the others, or learn that the cause lies with another rank."""
        words = f"{type(error).__name__}: {error}".lower()
        if isinstance(error, RuntimeError) and any(word in words for word in _COMMUNICATION):
            # The peer is lost rather than this rank wrong. The heartbeat thread ends this process with the verdict.
            with contextlib.suppress(Exception):
                self._store.set(_SUSPICION, str(self._rank))
            time.sleep(self._timeout + 4 * self._interval)
        text = (
            "" if isinstance(error, UserError) else f"{self._name([self._rank])} failed: {_first_line(error)}"
        )
        self._stop_watching()
        with contextlib.suppress(Exception):
            verdict = self._verdicts.claim(Verdict(text, FAILED, self._rank, []))
            if verdict.by != self._rank:
                self._verdicts.leave(verdict)
            if text:
                print(f"error: {text}", file=sys.stderr, flush=True)
            self._verdicts.wait_for_readers(verdict)

    # --- heartbeats --------------------------------------------------------------------------------------------------

    def _beat(self, count: int) -> str:
        return json.dumps([count, self._armed, self._main.still(), self._main.place()])

    def _beat_and_judge(self) -> None:
        """Thread. Every call on the store may block for ever when the network is cut: `_watch_siblings` notices."""
        count = 0
        while not self._closing.wait(self._interval):
            count += 1
            self._main.look()
            try:
                self._store.set(str(self._rank), self._beat(count))
                if (verdict := self._verdicts.given()) is not None:
                    if self._closing.is_set():  # the main thread is about to leave with it
                        return
                    self._verdicts.leave(verdict)
                if self._rank == 0:
                    self._judge(range(1, self._world))
                    self._judge_stall()
                else:
                    self._judge([0])
            except RuntimeError:  # torch's errors of a closed connection are subclasses
                self._store_lost("its process is gone")
                return
            self._answered = True

    def _judge(self, ranks: Any) -> None:
        """Count the looks at which a rank's heartbeat had not moved; a look of ours that is late counts for none."""
        # A collective has failed already: no need for patience.
        suspicion = bool(self._rank == 0 and self._store.check([_SUSPICION]))
        limit = min(self._timeout, 5 * self._interval) if suspicion else self._timeout
        quiet = {}
        for rank, beat in zip(ranks, self._store.multi_get([str(rank) for rank in ranks]), strict=True):
            text = beat.decode()
            before, looks = self._seen.get(rank, ("", 0))
            looks = looks + 1 if text == before else 0
            self._seen[rank] = (text, looks)
            if suspicion or json.loads(text)[1]:
                quiet[rank] = looks * self._interval
        if any(seconds > limit for seconds in quiet.values()):
            lost = [rank for rank, seconds in quiet.items() if seconds > limit / 2]
            self._end(f"{self._name(lost)} gave no sign of life for {max(quiet.values()):.0f} s", lost)

    def _judge_stall(self) -> None:
        """A main thread that waits in a collective stands still, and so does the one that all wait for."""
        beats = [json.loads(self._seen[rank][0]) for rank in range(1, self._world)]
        beats.insert(0, json.loads(self._beat(0)))
        if not all(armed for _, armed, _, _ in beats) or min(still for *_, still, _ in beats) <= self._stall:
            return
        places = [place for *_, place in beats]
        odd = odd_ones_out(places)
        text = "; ".join(f"{self._name(odd[place])} stands in {place}" for place in odd)
        self._end(f"no rank has moved for {self._stall:.0f} s: {text}", [])

    # --- the own host ------------------------------------------------------------------------------------------------

    def _watch_siblings(self) -> None:
        """Thread: the end of another rank of this host, and a store that has stopped answering."""
        poll, siblings = select.poll(), {}
        poll.register(self._wake, select.POLLIN)
        own = self._ranks[self._rank]
        for rank, other in enumerate(self._ranks):
            if rank != self._rank and (other.host, other.namespace) == (own.host, own.namespace):
                with contextlib.suppress(OSError):  # gone already: its heartbeat will tell
                    descriptor = os.pidfd_open(other.process)
                    siblings[descriptor] = rank
                    poll.register(descriptor, select.POLLIN)
        unanswered = 0
        while not self._closing.is_set():
            events = poll.poll(self._interval * 1000)
            if self._closing.is_set():
                break
            if events:
                time.sleep(_TOGETHER)
                ended = [siblings[descriptor] for descriptor, _ in poll.poll(0) if descriptor in siblings]
                self._end(f"{self._name(ended)} died", ended)
            unanswered = 0 if self._answered or not self._armed else unanswered + 1
            self._answered = False
            if unanswered * self._interval > self._timeout:
                self._store_lost(f"it gave no sign of life for {self._timeout:.0f} s")
        for descriptor in (*siblings, self._wake):
            os.close(descriptor)

    # --- ending the job ----------------------------------------------------------------------------------------------

    def _name(self, ranks: list[int]) -> str:
        """`rank 2 (node2)`, or `ranks 2, 3 (node2)`."""
        hosts = list(dict.fromkeys(self._ranks[rank].host for rank in ranks))
        numbers = ", ".join(str(rank) for rank in ranks)
        return f"{'rank' if len(ranks) == 1 else 'ranks'} {numbers} ({', '.join(hosts)})"

    def _end(self, text: str, lost: list[int]) -> None:
        """End the job; the first to say so in the store prints it. The store may not answer: rank 0 is lost then too."""
        own, claimed = Verdict(text, RANK_LOST, self._rank, lost), queue.SimpleQueue[Verdict]()

        def claim() -> None:
            with contextlib.suppress(RuntimeError):
                claimed.put(self._verdicts.claim(own))

        if 0 not in lost:
            threading.Thread(target=claim, name="claim", daemon=True).start()
            try:
                self._verdicts.leave(claimed.get(timeout=2 * self._interval))
            except queue.Empty:
                self._store_lost("it does not answer")
        self._without_store(text, lost)

    def _store_lost(self, reason: str) -> None:
        host = self._ranks[self._rank].host
        self._without_store(f"{self._name([0])} cannot be reached from {host}: {reason}", [0])

    def _without_store(self, text: str, lost: list[int]) -> None:
        """Without the store ranks cannot agree on who speaks: the lowest one left on each host does."""
        if self._closing.is_set():
            return
        host = self._ranks[self._rank].host
        left = [rank for rank, other in enumerate(self._ranks) if other.host == host and rank not in lost]
        if self._rank != min(left, default=self._rank):
            # A launcher ends what is left at the first exit: let the speaker be first.
            time.sleep(2 * self._interval)
        self._verdicts.leave(Verdict(text, RANK_LOST, min(left, default=self._rank), lost))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
