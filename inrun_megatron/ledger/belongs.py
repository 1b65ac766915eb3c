"""Whose ledger is it? Asked before a start takes one back to its checkpoint, which deletes what was committed later."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from inrun_megatron.errors import UserError
from inrun_megatron.ledger.checks import setting
from inrun_megatron.ledger.commit_records import commit_files, step_of
from inrun_megatron.ledger.description import Starts
from inrun_megatron.ledger.files import read_json
from inrun_megatron.ledger.run import OpenLedger


@dataclass(frozen=True)
class ResumePoint:
    """What a start goes on from: a checkpoint, or nothing."""

    step: int = 0
    """Of the checkpoint; 0 without one."""
    ledger: str | None = None
    """run_id of the ledger that holds the rows up to it; None without scored steps."""
    ledger_step: int = 0
    """The last commit at that time."""

    def rows_up_to(self, run_id: str) -> int:
        """The step up to which the ledger `run_id` holds rows of what led to the checkpoint.

        Before its own step where the last steps were trained with --no-shapley: a run that died after the commit may
        have left rows of them, by settings that another start has changed since.
        """
        return self.ledger_step if self.ledger == run_id else self.step


def require_none_lost(directory: Path, point: ResumePoint) -> None:
    """UserError where the checkpoint's ledger should lie in `directory`, which holds none."""
    if point.ledger is not None:
        raise UserError(
            f"{directory} holds no ledger, but the checkpoint of step {point.step} belongs to that of run {point.ledger}: "
            "give its --shapley-dir, restore it from a copy, or begin another one with a new --shapley-dir"
        )


def require_own(
    ledger: OpenLedger, starts: Starts, point: ResumePoint, *, save: str | None, train_iters: int
) -> None:
    """UserError unless `ledger` is what `point` left, or what a start from it left that died before its first checkpoint.

    save: this start's --save where the ledger lies elsewhere (--shapley-dir); None: its place says whose it is.
    """
    commits = [(step_of(path), _checkpoint(path)) for path in commit_files(ledger.directory)]
    last = max((step for step, _ in commits), default=0)
    before = any(step <= point.step for step, _ in commits)
    if point.ledger == ledger.run_id:
        if last < point.ledger_step:
            raise UserError(
                f"{ledger.directory} ends at step {last}, but the checkpoint of step {point.step} follows its commit of "
                f"step {point.ledger_step}: restore the ledger from a copy, or choose another directory (--shapley-dir)"
            )
        return
    theirs = setting(starts.last(), "save", group="checkpoint")
    saved = [name for step, name in commits if step < last and name is not None]
    until = setting(starts.last(), "train_iters", group="training")
    if save is not None and theirs is not None and Path(theirs).resolve() != Path(save).resolve():
        why = f"of --save {theirs}"
    elif before:
        why = f"with rows up to step {point.step}"
    elif last in {train_iters, until}:
        why = f"finished after step {last}"
    elif saved:
        why = f"that has saved {saved[-1]}"
    elif until is None and commits:
        why = "of a loop of its own"  # which need not name its checkpoints
    else:
        return  # a crash before the first checkpoint leaves no more
    found = f"the checkpoint of step {point.step} is not its own" if point.step else "no checkpoint is loaded"
    raise UserError(
        f"{ledger.directory} holds the ledger of run {ledger.run_id}, {why}, but {found}, so that its commits up to step "
        f"{last} would be lost: --load that run's checkpoint, or choose another directory (--shapley-dir)"
    )


def _checkpoint(path: Path) -> str | None:
    """The checkpoint that a commit was made for; unknown (None) where the record is damaged."""
    try:
        name = read_json(path).get("checkpoint")
    except UserError:
        return None
    return None if name is None else str(name)
