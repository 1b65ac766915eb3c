"""Ranges of training steps: phases of a run and what --steps and --phase mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from inrun_megatron.errors import UserError

DEFAULT_CUTS = (Fraction(1, 6), Fraction(1, 3))
"""Early, middle, and the last two thirds. Losses fall fast at first, when nearly all data help; what tells data apart is
the rest."""

NAMES = ("early", "middle", "late")


@dataclass(frozen=True)
class Phase:
    """Steps `first` to `last`, both included."""

    name: str
    first: int
    last: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return asdict(self)


def whole_run(last_step: int) -> Phase:
    return Phase("whole run", 1, last_step)


def with_whole_run(phases: Sequence[Phase], last_step: int) -> list[Phase]:
    """The whole run, then its phases where it has several: what figures are given for."""
    return [whole_run(last_step), *(phases if len(phases) > 1 else [])]


def phases_of(last_step: int, cuts: Sequence[Fraction] = DEFAULT_CUTS) -> list[Phase]:
    """Cut steps 1..last_step at the given fractions of the run; empty phases (short runs) are left out.

    Raises UserError when the cuts are not increasing numbers between 0 and 1.
    """
    if not all(0 < cut < 1 for cut in cuts) or list(cuts) != sorted(set(cuts)):
        given = ",".join(str(cut) for cut in cuts)
        raise UserError(
            f"--phases {given}: cuts must be increasing fractions between 0 and 1, such as 1/6,1/3"
        )
    ends = [int(cut * last_step) for cut in cuts] + [last_step]
    starts = [1] + [end + 1 for end in ends[:-1]]
    ranges = [(first, last) for first, last in zip(starts, ends, strict=True) if first <= last]
    names = NAMES if len(ranges) == 3 else [f"phase {i + 1}" for i in range(len(ranges))]
    return [Phase(name, first, last) for name, (first, last) in zip(names, ranges, strict=True)]


def parse_cuts(text: str) -> list[Fraction]:
    """`1/6,1/3` or `0.5` -> fractions. Raises UserError on anything else."""
    try:
        return [Fraction(piece.strip()) for piece in text.split(",")]
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"--phases {text!r} is not a list of fractions; give cuts such as 1/6,1/3") from error


def parse_steps(text: str, last_step: int) -> Phase:
    """`A:B` (both included; either may be left out) -> Phase. Raises UserError on no such range or an empty one."""
    first_text, colon, last_text = text.partition(":")
    try:
        first = int(first_text) if first_text.strip() else 1
        last = (int(last_text) if last_text.strip() else last_step) if colon else first
    except ValueError as error:
        raise UserError(f"--steps {text!r} is not a range; give FIRST:LAST, such as 100:300") from error
    if first < 1 or last < first:
        raise UserError(
            f"--steps {text!r} holds no step; give 1 <= FIRST <= LAST (the ledger ends at {last_step})"
        )
    if first > last_step:
        raise UserError(f"--steps {text!r} begins after the ledger's last step {last_step}")
    return Phase("steps", first, min(last, last_step))


def parse_phase(text: str, last_step: int) -> Phase:
    """`early`, `middle`, `late` as in the summary, or `K/N`: the K-th of N equal parts of the run. Raises UserError on
    anything else."""
    if text in NAMES:
        found = {phase.name: phase for phase in phases_of(last_step)}.get(text)
        if found is None:
            raise UserError(
                f"--phase {text}: {last_step} steps are too few for {', '.join(NAMES)}; give --steps A:B"
            )
        return found
    k_text, slash, n_text = text.partition("/")
    try:
        k, n = int(k_text), int(n_text)
    except ValueError as error:
        raise UserError(
            f"--phase {text!r} is not {', '.join(NAMES)} or K/N; late is the last two thirds of the run, 3/3 the last third"
        ) from error
    if not slash or not 1 <= k <= n:
        raise UserError(f"--phase {text!r} needs 1 <= K <= N; 3/3 is the last third of the run")
    first, last = (k - 1) * last_step // n + 1, k * last_step // n
    if last < first:
        raise UserError(f"--phase {text!r} holds no step: the ledger has {last_step}")
    return Phase(f"phase {k}/{n}", first, last)


def choose_steps(steps: str | None, phase: str | None, last_step: int) -> Phase:
    """The range that --steps or --phase names; the whole run without either. Raises UserError on both."""
    if steps is not None and phase is not None:
        raise UserError(f"--steps {steps} and --phase {phase} both name a range; give one of them")
    if last_step < 1:
        raise UserError("the ledger has no committed step: no step is scored, or none committed yet")
    if steps is not None:
        return parse_steps(steps, last_step)
    if phase is not None:
        return parse_phase(phase, last_step)
    return whole_run(last_step)
