"""Where a ledger goes on: what a commit returned, and a checkpoint carried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..ledger.commit_records import commit_files, read_commit, step_of
from ..ledger.schema import commit_name


@dataclass(frozen=True)
class ResumeState:
    """The ledger of `run_id` up to `step`. commit: identity of the commit of that step, None before the first one."""

    run_id: str
    step: int
    commit: str | None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> ResumeState:
        """UserError where `given` is not what `to_dict` made."""
        try:
            state = cls(**given)
        except TypeError:
            state = None
        texts = state is not None and isinstance(state.run_id, str) and isinstance(state.commit, str | None)
        if state is None or not texts or type(state.step) is not int or state.step < 0:
            raise UserError(
                f"resume={given!r} is not what commit() returned, a mapping of run_id, step and commit"
            )
        return state

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint carries: text and numbers."""
        return {"run_id": self.run_id, "step": self.step, "commit": self.commit}

    def require(self, directory: Path, run_id: str) -> None:
        """UserError unless the ledger of `run_id` in `directory` holds the commit that this state follows."""
        if run_id != self.run_id:
            raise UserError(
                f"{directory} holds the ledger of run {run_id}, but the checkpoint belongs to that of run {self.run_id}: "
                f"give the directory of that run, or resume=None and another directory"
            )
        if self.step == 0:
            return
        path = directory / commit_name(self.step)
        if not path.exists():
            last = max((step_of(other) for other in commit_files(directory)), default=0)
            raise UserError(
                f"{directory} has no commit of step {self.step}, which the checkpoint follows, and ends at step {last}: restore "
                f"the ledger from a copy, or give resume=None and another directory"
            )
        if read_commit(path).identity != self.commit:
            raise UserError(
                f"the commit of step {self.step} in {directory} is not the one that the checkpoint follows: the run went on from "
                f"an earlier checkpoint since, and made another; load a checkpoint from after that, or an earlier one"
            )
