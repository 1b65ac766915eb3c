"""The progress of a run on rank 0's stderr: a bar on a terminal, a line every few steps elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TextIO

from tqdm import tqdm


@dataclass
class StepFigures:
    """What one step looked like; None where unknown."""

    iteration: int
    loss: float
    lr: float
    tokens: int
    seconds: float
    consumed_samples: int = 0
    seconds_scoring: float = 0.0
    gradient_norm: float | None = None
    targets: Mapping[str, float] = field(default_factory=dict)
    skipped: bool = False


class ProgressBar:
    """Shows steps as they finish. Does nothing unless `enabled` (rank 0)."""

    def __init__(
        self, total: int, done: int, log_interval: int, *, enabled: bool = True, stream: TextIO | None = None
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._enabled, self._interval, self._total = enabled, log_interval, total
        self._bar: tqdm | None = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(total=total, initial=done, unit="step", file=self._stream, dynamic_ncols=True)
        self._tokens = 0
        self._seconds = self._scoring = 0.0
        self._targets: dict[str, float] = {}
        self._since = time.perf_counter()

    def step(self, figures: StepFigures) -> None:
        """One more step is done. Rates are means since the last line (terminal: since the last redraw window)."""
        if not self._enabled:
            return
        self._tokens += figures.tokens
        self._seconds += figures.seconds
        self._scoring += figures.seconds_scoring
        self._targets.update(figures.targets)
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(figures), refresh=False)
            self._bar.update()
        elif figures.iteration % self._interval == 0 or figures.iteration == self._total:
            self.write(f"step {figures.iteration}/{self._total} | {self._text(figures)}")
        if figures.iteration % self._interval == 0:
            self._tokens, self._seconds, self._scoring = 0, 0.0, 0.0

    def _text(self, figures: StepFigures) -> str:
        parts = [f"loss {figures.loss:.4f}"]
        parts += [f"{name} {loss:.4f}" for name, loss in self._targets.items()]
        parts += [f"lr {figures.lr:.2e}"]
        if figures.gradient_norm is not None:
            parts.append(f"grad norm {figures.gradient_norm:.2f}")
        seconds = max(self._seconds, 1e-9)
        parts.append(f"{self._tokens / seconds:,.0f} tokens/s")
        if self._targets:
            parts.append(f"scoring {self._scoring / seconds:.0%}")
        if figures.skipped:
            parts.append("skipped: overflow")
        return " | ".join(parts)

    def write(self, text: str) -> None:
        """A line that does not tear the bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.close()
