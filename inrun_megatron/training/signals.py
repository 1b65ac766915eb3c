"""Stopping on request: SIGTERM or SIGUSR1 on any rank ends the run on all ranks after the same step."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:  # torch takes its time, and a rank listens before that (training/main.py)
    import torch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGTERM: launchers, `kill`, `scancel`. SIGUSR1: what `sbatch --signal` is usually asked to send before the time is up."""
_RANK_BITS = 32


@dataclass(frozen=True)
class StopRequest:
    """The signal that stops the run and the rank that it reached (the highest of several)."""

    signal: signal.Signals
    rank: int

    def __str__(self) -> str:
        return f"{self.signal.name} on rank {self.rank}"


class StopSignals:
    """While open (a context manager), the signals only leave a note; `agreed` shares it.

    After an error they still do: the process is about to end by itself, with its reason.

    The handlers are Python's, so they run in the main thread, which must be the one that opens this. A SIGTERM that
    arrives before ends the process: there is nothing to save yet.
    """

    def __init__(self) -> None:
        self._received = 0
        self._before: dict[signal.Signals, Any] = {}

    def note_early(self) -> None:
        """SIGUSR1 leaves a note from now on. Under launch/slurm it would be ignored until here, and the request lost."""
        signal.signal(signal.SIGUSR1, self._note)

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error the notes go on: a lost peer fails this rank's collective and makes the launcher send SIGTERM at
        # the same moment, and this rank must live to say whom it lost (training/watchdog.py).
        if kind is not None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._received = number

    def agreed(self, device: torch.device) -> StopRequest | None:
        """Whether any rank was signalled; the same answer on every rank. Collective over the world.

        device: where the world group's backend reduces (the GPU under nccl).

        One all-reduce of eight bytes. It cannot ride on the training loss: that is reduced over replicas only, and
        tensor-parallel ranks or stages of one replica would disagree.
        """
        import torch
        import torch.distributed as dist

        note = self._received << _RANK_BITS | dist.get_rank() if self._received else 0
        notes = torch.tensor([note], dtype=torch.int64, device=device)
        dist.all_reduce(notes, op=dist.ReduceOp.MAX)
        highest = int(notes)
        if not highest:
            return None
        return StopRequest(signal.Signals(highest >> _RANK_BITS), highest & (1 << _RANK_BITS) - 1)
