"""What a ledger says of its run: run.json for its first start, starts.json for those that resumed it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inrun_megatron.errors import UserError
from inrun_megatron.ledger.files import read_json, write_json
from inrun_megatron.ledger.schema import RUN_FILE, RunDescription, check_version, now

STARTS_FILE = "starts.json"


def read_run(directory: Path) -> dict[str, Any]:
    """The content of run.json. UserError when it is of another schema or lacks what rows refer to."""
    path = directory / RUN_FILE
    run = read_json(path)
    check_version(run.get("schema_version"), path)
    for key in ("targets", "datasets"):
        entries = run.get(key)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path} has no list of {key}, which rows refer to; restore it from a copy")
    if "run_id" not in run or not all("name" in target for target in run["targets"]):
        raise UserError(f"{path} lacks the run's id or a target's name; restore it from a copy")
    return run


class Starts:
    """The settings in force at every step: a resume may change precision, interval, layout.

    starts.json is replaced in one step at every resume; a run that never resumed has none.
    """

    def __init__(self, directory: Path, run: Mapping[str, Any]) -> None:
        self._path, self._first = directory / STARTS_FILE, run
        self._later: list[dict[str, Any]] = []
        if self._path.exists():
            self._later = read_json(self._path).get("starts", [])
            if not isinstance(self._later, list) or not all(
                isinstance(start, dict) and isinstance(start.get("step"), int) for start in self._later
            ):
                raise UserError(f"{self._path} holds a start without its step; restore it from a copy")

    def at(self, step: int) -> Mapping[str, Any]:
        """What run.json would say of the start that made `step`: the last one from before it."""
        number = bisect_left(self._later, step, key=lambda start: start["step"])
        return self._later[number - 1] if number else self._first

    def all(self) -> list[Mapping[str, Any]]:
        """The settings of every start, the first one's first."""
        return [self._first, *self._later]

    def numbers(self, steps: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of `all` made each step ``[n]``."""
        return np.searchsorted([start["step"] for start in self._later], steps, side="left")

    def resumed(self) -> list[dict[str, Any]]:
        """The starts that resumed the run, in order."""
        return list(self._later)

    def last(self) -> Mapping[str, Any]:
        """What the newest start said of itself."""
        return self._later[-1] if self._later else self._first

    def without_scoring(self, step: int) -> bool:
        """Was `step` made by a start that scored nothing (--no-shapley), between two that did?"""
        return any(first <= step <= last for first, last in self.stretches_without_scoring())

    def stretches_without_scoring(self) -> list[tuple[int, int]]:
        """First and last step of each such stretch."""
        stretches = ((start["ledger_step"] + 1, start["step"]) for start in self._later)
        return [(first, last) for first, last in stretches if first <= last]

    def append(self, step: int, description: RunDescription, ledger_step: int | None = None) -> None:
        """A start that goes on after `step`, once the ledger is taken back to it. Rank 0 only.

        ledger_step: the last commit before it (default: `step`); what lies between was trained without scoring.
        """
        record = description.to_dict()
        start = {"step": step, "ledger_step": step if ledger_step is None else ledger_step, "created": now()}
        start |= {key: record[key] for key in ("configuration", "versions", "layout")}
        self._later = [earlier for earlier in self._later if earlier["step"] < step] + [start]
        write_json(self._path, {"starts": self._later})
