"""Run functions on several gloo ranks of this machine, from a test.

    run_distributed(fn, 4, argument)      spawns 4 processes, runs fn(rank, 4, argument) in each
    run_cases(fn, 4, cases)               one spawn for many cases: fn(rank, 4, case) for each of them
    with Workers(4) as workers: ...       the same processes for several calls

Functions must be importable (defined at the top level of a module) and results picklable. Processes are forked from one
that has imported what most of them need (preloaded.py): by themselves they would spend ten seconds each on that. Where
there is a GPU, which a forked process cannot use, they are spawned.

The rendezvous store lives in the parent, on a port the kernel gave it, so two runs never compete for a port.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

from tests.rank import serve

DEFAULT_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "MASTER_ADDR": "127.0.0.1",
    # The parent serves the store (see Workers): rank 0 must not try to.
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
if sys.platform == "linux":
    # Without it gloo resolves the host's name, which hangs or fails on machines without a name server.
    DEFAULT_ENVIRONMENT["GLOO_SOCKET_IFNAME"] = "lo"

LOG_LINES = 40
# After the first rank's failure, how long the others have to answer before they count as stuck in a collective.
GRACE_SECONDS = 5.0
# Cases that one group of processes runs. A DeepSpeed engine keeps itself alive through hooks on its last loss
# (`_backward_prologue_per_tensor`), and its process groups with it; their threads spin once another rank closed its end.
CASES_PER_SPAWN = 8


class DistributedError(RuntimeError):
    """A rank failed, died or did not answer in time; the message holds its traceback and the end of its log.

    Attributes:
        rank: the rank that failed first; the lowest silent one after a time-out.
        alive: whether every rank answered, so that the group can be used again.
    """

    def __init__(self, message: str, rank: int, alive: bool) -> None:
        super().__init__(message)
        self.rank = rank
        self.alive = alive


@dataclass(frozen=True)
class CaseResult:
    """What one case of `run_cases` gave: results by rank, or the error."""

    case: Any
    results: list[Any] | None
    error: DistributedError | None


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 600.0,
    env: Mapping[str, str] | None = None,
    initialise: bool = True,
) -> list[Any]:
    """Run `fn(rank, world_size, *args)` on `world_size` new processes and return the results by rank.

    `timeout` seconds count from the spawn. With `initialise`, torch.distributed is initialised with gloo before `fn`
    is called; without it, only the environment variables are there. DistributedError when a rank fails.
    """
    with Workers(world_size, env=env, initialise=initialise) as workers:
        return workers.run(fn, *args, timeout=timeout)


def run_cases(
    fn: Callable[[int, int, Any], Any],
    world_size: int,
    cases: Sequence[Any],
    *,
    timeout: float = 600.0,
    env: Mapping[str, str] | None = None,
) -> list[CaseResult]:
    """Run `fn(rank, world_size, case)` for every case on one group of processes; failures are collected.

    Between cases all process groups but the world are destroyed and the global state of megatron-core and DeepSpeed
    is reset; after CASES_PER_SPAWN cases new processes take over. A case that leaves a rank stuck or dead costs a new
    spawn for the ones after it. `timeout` is per case.
    """
    outcomes: list[CaseResult] = []
    with Workers(world_size, env=env) as workers:
        for number, case in enumerate(cases):
            if number and number % CASES_PER_SPAWN == 0:
                workers.close()
            try:
                outcomes.append(CaseResult(case, workers.run(fn, case, timeout=timeout), None))
            except DistributedError as error:
                outcomes.append(CaseResult(case, None, error))
    return outcomes


def assert_cases(outcomes: Sequence[CaseResult]) -> list[list[Any]]:
    """Results of all cases; one AssertionError that names every failed case."""
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    text = "\n\n".join(f"=== {outcome.case}\n{outcome.error}" for outcome in failed)
    if failed:
        raise AssertionError(f"{len(failed)} of {len(outcomes)} cases failed\n{text}")
    return [outcome.results for outcome in outcomes if outcome.results is not None]


class Workers:
    """A group of processes, one per rank, that stays up between calls; a context manager.

    The processes start at the first call. After a failure that left a rank stuck or dead the next call starts new
    ones; after one that every rank answered (all raised, say) the same ones go on.
    """

    def __init__(
        self, world_size: int, *, env: Mapping[str, str] | None = None, initialise: bool = True
    ) -> None:
        self.world_size = world_size
        self._environment = {**DEFAULT_ENVIRONMENT, **(env or {})}
        self._initialise = initialise
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._logs: Path | None = None
        self._store: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 600.0) -> list[Any]:
        """`fn(rank, world_size, *args)` on every rank; results by rank. DistributedError when a rank fails."""
        deadline = time.monotonic() + timeout
        if not self._processes:
            self._start()
        request = pickle.dumps((fn, args, timeout))
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # a dead rank is reported below
                pipe.send_bytes(request)
        answers, errors = self._collect(deadline)
        alive = len(answers) == self.world_size
        if not errors and alive:
            return [answers[rank] for rank in range(self.world_size)]
        message, rank = self._describe(answers, errors, timeout)
        if not alive or len(errors) < self.world_size:
            # Ranks that disagree about the outcome may have left messages behind in their groups.
            self.close()
        raise DistributedError(message, rank, alive)

    def close(self) -> None:
        """End all processes; the idle ones by closing their pipe, the others by a signal."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=0.5)
            if process.is_alive():
                process.kill()
                process.join()
        if self._store is not None:
            # What DeepSpeed leaves: see training/distributed.py: release_shared_memory.
            for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{self._store.port}_*"):
                left.unlink(missing_ok=True)
        if self._logs is not None:
            shutil.rmtree(self._logs, ignore_errors=True)
        self._processes, self._pipes, self._logs, self._store = [], [], None, None

    def _start(self) -> None:
        from torch.distributed import TCPStore

        self._logs = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        processes = _processes()
        for rank in range(self.world_size):
            ours, theirs = processes.Pipe()
            environment = {
                **os.environ,
                **self._environment,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.world_size),
                "LOCAL_WORLD_SIZE": str(self.world_size),
                "MASTER_PORT": str(self._store.port),
            }
            arguments = (rank, self.world_size, environment, theirs, str(self._log(rank)), self._initialise)
            process = processes.Process(target=serve, args=arguments)
            with _environment(environment):  # inherited by a spawned one, before it imports anything
                process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self, deadline: float) -> tuple[dict[int, Any], dict[int, str]]:
        """Answers by rank (None for a failed one), and errors by rank in the order in which they came."""
        answers: dict[int, Any] = {}
        errors: dict[int, str] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting and (left := deadline - time.monotonic()) > 0:
            came: dict[int, str] = {}
            for pipe in wait(list(waiting), timeout=left):
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    failed, answer = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(timeout=5.0)
                    errors[rank] = f"the process ended with exit code {self._processes[rank].exitcode}"
                    continue
                answers[rank] = None if failed else answer
                if failed:
                    came[rank] = answer
            # Of what comes together on a busy machine, a rank that died is the cause of what others say.
            errors |= came
            if errors:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers, errors

    def _describe(self, answers: dict[int, Any], errors: dict[int, str], timeout: float) -> tuple[str, int]:
        silent = [rank for rank in range(self.world_size) if rank not in answers and rank not in errors]
        if errors:
            rank, error = next(iter(errors.items()))
            others = [other for other in errors if other != rank]
            head = f"rank {rank} of {self.world_size} failed first"
            head += f"; ranks {others} failed after it" if others else ""
            head += f"; ranks {silent} did not answer any more" if silent else ""
            return f"{head}\n{error}\n{self._log_tail(rank)}", rank
        logs = "\n".join(self._log_tail(rank) for rank in silent)
        return f"ranks {silent} of {self.world_size} did not answer within {timeout:g} s\n{logs}", silent[0]

    def _log(self, rank: int) -> Path:
        assert self._logs is not None
        return self._logs / f"rank{rank}.log"

    def _log_tail(self, rank: int) -> str:
        path = self._log(rank)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join([f"--- end of rank {rank}'s log", *lines[-LOG_LINES:]])


def _processes() -> Any:
    """How processes are started."""
    import torch

    if torch.cuda.is_available() or sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.preloaded"])
    return server


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
