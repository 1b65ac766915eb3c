"""The ledger of a training loop of one's own, on any number of ranks.

    ledger = RunLedger(shapley, "runs/own", ["web"])          on every rank, before the first step
    state = ledger.commit()                                   on every rank, before a checkpoint, which takes it along
    ledger.close()                                            on every rank, at the end

Rows are written by the ranks with ``layout.writes_ledger``, each its own files; rank 0 holds the directory and names what
counts. An error of any rank is raised by all of them. ``launch/pretrain.py`` does the same from its flags
(training/scoring.py), and commits between checkpoints without waiting for a file.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist

from ..errors import UserError
from ..ledger.commit_records import commit_files, step_of
from ..ledger.description import Starts
from ..ledger.schema import DEFAULT_SUBDIRECTORY, RunDescription
from ..ledger.write import LedgerWriter, OpenLedger, create_ledger, open_ledger, rollback
from .agreement import all_ranks, rank0_then_all
from .commits import Commits
from .description import coverage_of_model, sizes, versions

if TYPE_CHECKING:
    from ..shapley.in_run import InRunShapley

GRANULARITIES = ("sample", "document", "token")


class RunLedger:
    """Keeps every value of ``shapley``'s steps from here on. Every method is a collective over the world.

    Args:
        shapley: ``InRunShapley`` or ``PipelineShapley``.
        directory: of the run, which all ranks see; the ledger lies in its ``shapley/``, where ``inrun summary`` looks.
        datasets: what ``dataset=`` of ``samples()`` counts: names, or a ``DatasetDescription.to_dict()`` of each.
        granularity: what ``segments=`` of ``samples()`` are: ``sample`` where there are none, ``document``, ``token``.
        resume: what ``commit`` returned before the checkpoint that is loaded: the ledger goes on after it, and later commits
            are taken back. None: a new ledger.
        configuration: further settings for ``run.json``, by group.

    Raises:
        UserError: the directory holds a ledger, or not the one of ``resume``; on every rank.
    """

    def __init__(
        self,
        shapley: InRunShapley,
        directory: Path | str,
        datasets: Sequence[str | Mapping[str, Any]],
        *,
        granularity: str = "sample",
        resume: Mapping[str, Any] | None = None,
        configuration: Mapping[str, Any] | None = None,
    ) -> None:
        layout = shapley.layout
        self.directory = Path(directory) / DEFAULT_SUBDIRECTORY
        if granularity not in GRANULARITIES:
            raise UserError(f"granularity {granularity!r} is none of {', '.join(GRANULARITIES)}")
        all_ranks(lambda: _require_free(shapley))
        after = 0 if resume is None else _step_of(resume)
        description = RunDescription(
            targets=[{"name": target.name} for target in shapley.targets],
            datasets=_table(datasets),
            configuration=_settings(shapley, granularity, configuration or {}),
            versions=versions(),
            layout=sizes(layout),
            coverage=coverage_of_model(shapley.taps.coverage(), layout),
        )
        self._shapley = shapley
        self._writer: LedgerWriter | None = None
        self._held: OpenLedger | None = None
        first = dist.get_rank() == 0
        try:
            self._held = all_ranks(lambda: self._open(description, resume) if first else None)
            run_id = rank0_then_all(lambda: None if self._held is None else self._held.run_id)
            self._writer = all_ranks(
                lambda: (
                    LedgerWriter(self.directory, layout.dp_rank, after=after, whole=granularity == "sample")
                    if layout.writes_ledger
                    else None
                )
            )
        except BaseException:
            self._let_go()
            raise
        self._commits = Commits(self.directory, self._writer, shapley.device)
        self.run_id, self._step = str(run_id), after  # of the last commit
        self._failed = False
        shapley.ledger = self._writer
        atexit.register(self._say_what_is_lost)

    def _open(self, description: RunDescription, resume: Mapping[str, Any] | None) -> OpenLedger:
        if resume is None:
            try:
                return create_ledger(self.directory, description)
            except UserError as error:
                if f"{self.directory} holds the ledger" in str(error) and not commit_files(self.directory):
                    remedy = "it has no commit, of a run that died early: remove it to begin anew"
                    raise UserError(f"{error} ({remedy})") from error
                raise
        ledger = open_ledger(self.directory, description)
        try:
            step, own = _step_of(resume), str(resume["run_id"])
            if ledger.run_id != own:
                raise UserError(
                    f"{self.directory} holds the ledger of run {ledger.run_id}, but the checkpoint belongs to that of run {own}: "
                    f"give the directory of that run, or resume=None and another directory"
                )
            last = max((step_of(path) for path in commit_files(self.directory)), default=0)
            if last < step:
                raise UserError(
                    f"{self.directory} ends at step {last}, but the checkpoint follows its commit of step {step}: restore the "
                    f"ledger from a copy, or give resume=None and another directory"
                )
            if last > step:
                print(
                    f"{self.directory}: values of steps {step + 1} to {last} are taken back, as these steps come again",
                    file=sys.stderr,
                    flush=True,
                )
            rollback(self.directory, step)
            Starts(self.directory, ledger.run).append(step, description)
        except BaseException:
            ledger.close()
            raise
        return ledger

    def commit(self, checkpoint: str | None = None) -> dict[str, Any]:
        """Every finished step becomes part of the ledger; returns when that is durable. Before a checkpoint is saved.

        It also ends a stale direction (``refresh``): a run that is resumed from here has none.

        Args:
            checkpoint: name of the checkpoint that follows, for the record.

        Returns:
            What ``resume`` takes: save it in the checkpoint.

        Raises:
            UserError: a file system refuses, on every rank; the ledger is then what it was at the last commit, for good.
        """
        if self._failed:
            raise UserError(
                f"{self.directory}: a commit has failed, and its values are lost: start again from the last checkpoint"
            )
        step = self._shapley.iteration
        if step > self._step:
            self._failed = True
            self._commits.now(step, checkpoint, always=True)
            self._failed, self._step = False, step
        self._shapley.expire_direction()
        return {"run_id": self.run_id, "step": self._step}

    def close(self) -> None:
        """Commit what is left, and release the directory."""
        try:
            self.commit()
        finally:
            self._let_go()

    def _say_what_is_lost(self) -> None:
        """At the end of a loop that did not close, or not in peace."""
        if self._writer is not None and self._writer.writer == 0 and self._writer.last_step > self._step:
            print(
                f"{self.directory}: what was scored after step {self._step}, up to step {self._writer.last_step}, is in no "
                f"commit and is lost (close() commits what is left)",
                file=sys.stderr,
                flush=True,
            )

    def _let_go(self) -> None:
        atexit.unregister(self._say_what_is_lost)
        if self._writer is not None:
            if self._shapley.ledger is self._writer:
                self._shapley.ledger = None
            self._writer.close()
        if self._held is not None:
            self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Close; after an exception, of which other ranks may know nothing, commit nothing."""
        if kind is None:
            self.close()
        else:
            self._say_what_is_lost()
            self._let_go()


def _require_free(shapley: InRunShapley) -> None:
    """Ranks that write know."""
    if shapley.ledger is not None:
        raise UserError("these values are kept in a ledger already: close() it first")


def _step_of(resume: Mapping[str, Any]) -> int:
    """Looked at on every rank, before one of them opens anything."""
    if not isinstance(resume, Mapping) or not {"run_id", "step"} <= resume.keys():
        raise UserError(f"resume={resume!r} is not what commit() returned, a mapping with run_id and step")
    return int(resume["step"])


def _table(datasets: Sequence[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
    given = [] if isinstance(datasets, str) else list(datasets)
    table = [{"index": i, **({"name": d} if isinstance(d, str) else d)} for i, d in enumerate(given)]
    names = [str(dataset.get("name", "")) for dataset in table]
    if not names or len(set(names)) < len(names):
        raise UserError(f"datasets={datasets!r} is no list of distinct names")
    return table


def _settings(
    shapley: InRunShapley, granularity: str, further: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """What readers ask of a run's configuration, and what else the loop says of it."""
    dtype = next((p.dtype for p in shapley.engine.module.parameters()), None)
    own = {
        "shapley": {
            "granularity": granularity,
            "estimator": shapley.estimator.name,
            "credit": shapley.credit,
            "optimizer": "sgd" if shapley.preparation.proxy else "auto",
            "interval": shapley.interval,
            "refresh": shapley.refresh.every,
        },
        "training": {
            "precision": {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32"),  # type: ignore[arg-type]
            "micro_batch_size": shapley.engine.train_micro_batch_size_per_gpu(),
            "global_batch_size": shapley.engine.train_batch_size(),
            "optimizer": type(shapley.adapter.inner).__name__.lower(),
        },
        "parallel": {"zero_stage": shapley.adapter.stage},
    }
    return {group: {**further.get(group, {}), **own.get(group, {})} for group in {**further, **own}}
