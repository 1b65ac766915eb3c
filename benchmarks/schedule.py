"""Half-steps of DeepSpeed's 1F1B schedule, counted: one scored step with validation in front, and with a flush.

A half-step is one forward or one backward of one microbatch on one stage. Every stage runs its own instructions in the
order of its schedule, each as soon as what it needs is there: a forward needs the forward of the stage before, a
backward that of the stage after. Sending costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, OptimizerStep, TrainSchedule


class FlushedSchedule:
    """The validation microbatches as a phase of their own, then the training ones; for ``engine._exec_schedule``."""

    def __init__(self, validation: int, training: int, stages: int, stage: int) -> None:
        self._phases = [TrainSchedule(n, stages, stage) for n in (validation, training)]

    def __iter__(self) -> Iterator[list[Any]]:
        first, second = ([list(commands) for commands in phase] for phase in self._phases)
        # The first phase ends with its last backward: gradients are reduced and stepped once, after the second.
        first[-1] = [c for c in first[-1] if isinstance(c, (ForwardPass, BackwardPass))]
        return chain(first, second)

    def num_pipe_buffers(self) -> int:
        return max(int(phase.num_pipe_buffers()) for phase in self._phases)


@dataclass(frozen=True)
class Timeline:
    """What a schedule came to, in half-steps, by stage.

    Attributes:
        length: until the last stage is done.
        waits: how long the first training backward waits for what crosses stages, all else being there.
    """

    length: int
    waits: list[int]


def timeline(validation: int, training: int, stages: int, *, flush: bool, crosses: bool) -> Timeline:
    """Count a step of ``validation`` and ``training`` microbatches on ``stages`` stages.

    Args:
        flush: validation as a phase of its own.
        crosses: something of all stages' last validation backwards is needed before a training backward: the norms,
            or the halves of a tied weight.
    """
    orders = [_order(validation, training, stages, stage, flush) for stage in range(stages)]
    ends: dict[tuple[type, int, int], int] = {}  # (kind, stage, microbatch) -> end
    free, done, waits = [0] * stages, [0] * stages, [0] * stages
    while any(done[s] < len(orders[s]) for s in range(stages)):
        progressed = False
        for s in range(stages):
            while done[s] < len(orders[s]):
                kind, m = orders[s][done[s]]
                neighbour = s - 1 if kind is ForwardPass else s + 1
                needed = [(kind, neighbour, m)] if 0 <= neighbour < stages else []
                across = [(BackwardPass, other, validation - 1) for other in range(stages)]
                across = across if crosses and kind is BackwardPass and m == validation > 0 else []
                if not all(key in ends for key in (*needed, *across)):
                    break
                ready = max([free[s], *(ends[key] for key in needed)])
                start = max([ready, *(ends[key] for key in across)])
                waits[s] += start - ready
                free[s] = ends[kind, s, m] = start + 1
                done[s] += 1
                progressed = True
        assert progressed, "the schedule cannot go on"
    return Timeline(max(free), waits)


def _order(
    validation: int, training: int, stages: int, stage: int, flush: bool
) -> list[tuple[type[ForwardPass] | type[BackwardPass], int]]:
    """(kind, microbatch) of a stage's instructions; microbatches are counted through both phases."""
    schedule: Any = (
        FlushedSchedule(validation, training, stages, stage)
        if flush
        else TrainSchedule(validation + training, stages, stage)
    )
    commands = [c for step in schedule for c in step]
    assert sum(isinstance(c, OptimizerStep) for c in commands) == 1
    counts = {ForwardPass: 0, BackwardPass: 0}
    order = []
    for command in commands:
        kind = type(command)
        if kind in counts:
            order.append((kind, counts[kind]))
            counts[kind] += 1
    return order
