"""What the main thread is doing, seen from another thread, and which rank of a stuck job does something else."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

_PACKAGE = str(Path(__file__).resolve().parents[1])


class MainThread:
    """Position of the main thread's stack, and for how long it has not moved."""

    def __init__(self) -> None:
        self._position: tuple[tuple[int, int], ...] = ()
        self._since = time.monotonic()
        self._place = ""

    def look(self) -> None:
        """Take note of where it is. Call this regularly, from any other thread."""
        frames = _frames(sys._current_frames().get(threading.main_thread().ident or 0))
        position = tuple((id(frame.f_code), frame.f_lasti) for frame in frames)
        if position == self._position:
            return
        self._position, self._since = position, time.monotonic()
        self._place = _describe(frames)

    def still(self) -> float:
        """Seconds since the last look at which it had moved."""
        return time.monotonic() - self._since

    def place(self) -> str:
        """`loop.py:150 _mean_over_replicas > all_reduce`: the innermost line of this package, and what it called."""
        return self._place


def _frames(frame: FrameType | None) -> list[FrameType]:
    """Innermost first."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _describe(frames: list[FrameType]) -> str:
    if not frames:
        return "an unknown place"
    innermost = frames[0]
    own = next((frame for frame in frames if frame.f_code.co_filename.startswith(_PACKAGE)), innermost)
    text = f"{Path(own.f_code.co_filename).name}:{own.f_lineno} {own.f_code.co_name}"
    return text if own is innermost else f"{text} > {innermost.f_code.co_name}"


def odd_ones_out(places: Sequence[str]) -> dict[str, list[int]]:
    """Ranks by place, without the place of more than half of all ranks (if there is one and not all are there)."""
    ranks: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        ranks.setdefault(place, []).append(rank)
    if len(ranks) > 1:
        for place in [place for place, there in ranks.items() if 2 * len(there) > len(places)]:
            del ranks[place]
    return ranks
