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
import uuid
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
from .agreement import AgreedError, all_ranks, rank0_then_all, require_same
from .commits import Commits
from .description import coverage_of_model, sizes, versions
from .finished_steps import FinishedSteps
from .resume_state import ResumeState

if TYPE_CHECKING:
    from ..shapley.in_run import InRunShapley

GRANULARITIES = ("sample", "document", "token")


class RunLedger:
    """Keeps every value of ``shapley``'s steps from here on. Every method is a collective over the world.

    Every optimizer step goes through ``shapley.step``, numbered one after the other.

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
        self.directory = Path(directory).absolute() / DEFAULT_SUBDIRECTORY
        table, state = all_ranks(lambda: _checked(shapley, datasets, granularity, resume))
        require_same("resume is", state, "all ranks load the same checkpoint")
        require_same("granularity and datasets are", (granularity, table), "give all ranks the same")
        description = RunDescription(
            targets=[
                {"name": target.name, "num_tokens": float(target.num_tokens)} for target in shapley.targets
            ],
            datasets=table,
            configuration=_settings(shapley, granularity, configuration or {}),
            versions=versions(),
            layout=sizes(layout),
            coverage=coverage_of_model(shapley.taps.coverage(), layout),
        )
        self._shapley = shapley
        self._writer: LedgerWriter | None = None
        self._held: OpenLedger | None = None
        self._closed = self._failed = False
        self._steps = FinishedSteps(self.directory, 0 if state is None else state.step)
        first = dist.get_rank() == 0
        try:
            self._held = all_ranks(lambda: self._open(description, state) if first else None)
            run_id = rank0_then_all(lambda: None if self._held is None else self._held.run_id)
            self._writer = all_ranks(
                lambda: (
                    LedgerWriter(self.directory, layout.dp_rank, cut=granularity != "sample")
                    if layout.writes_ledger
                    else None
                )
            )
            # Every rank sees the directory: now something may be taken back.
            all_ranks(lambda: self._take_back(description, state) if state is not None else None)
        except BaseException:
            self._let_go()
            raise
        self._commits = Commits(self.directory, self._writer, shapley.device)
        self._state = state or ResumeState(str(run_id), 0, None)  # of the last commit
        shapley.ledger, shapley.keeper = self._writer, self._steps
        if state is not None:
            shapley.expire_direction()  # it may be of the steps that were taken back
        atexit.register(self._say_what_is_lost)

    @property
    def run_id(self) -> str:
        """Of the ledger, over all resumes."""
        return self._state.run_id

    def _open(self, description: RunDescription, state: ResumeState | None) -> OpenLedger:
        """Hold the directory; nothing of an existing ledger is changed. Rank 0."""
        if state is None:
            try:
                return create_ledger(self.directory, description)
            except UserError as error:
                if f"{self.directory} holds the ledger" not in str(error):
                    raise
                last = max((step_of(path) for path in commit_files(self.directory)), default=0)
                raise UserError(
                    f"{self.directory} holds a ledger, up to step {last}: give resume= what commit() returned before the checkpoint "
                    f"that is loaded; of a run that left no checkpoint, remove the directory to begin anew"
                ) from error
        ledger = open_ledger(self.directory, description)
        try:
            state.require(self.directory, ledger.run_id)
            Starts(self.directory, ledger.run)  # refuses a damaged file
        except BaseException:
            ledger.close()
            raise
        return ledger

    def _take_back(self, description: RunDescription, state: ResumeState) -> None:
        """Go on after ``state``: what was committed later is removed. Rank 0 does it."""
        if self._held is None:
            return
        last = max((step_of(path) for path in commit_files(self.directory)), default=0)
        rollback(self.directory, state.step)
        if last > state.step:
            print(
                f"{self.directory}: values of steps {state.step + 1} to {last} were taken back, as these steps come again",
                file=sys.stderr,
                flush=True,
            )
        Starts(self.directory, self._held.run).append(state.step, description)

    def commit(self, checkpoint: str | None = None) -> dict[str, Any]:
        """Every finished step becomes part of the ledger; returns when that is durable. Before a checkpoint is saved.

        It also ends a stale direction (``refresh``): a run that is resumed from here has none.

        Args:
            checkpoint: name of the checkpoint that follows, for the record.

        Returns:
            What ``resume`` takes: save it in the checkpoint.

        Raises:
            UserError: a file system refuses, on every rank; the ledger is then what it was at the last commit, for good. Or a
                step is not finished, or not on all ranks.
        """
        all_ranks(self._require_fit)
        return self._commit(checkpoint)

    def _commit(self, checkpoint: str | None = None) -> dict[str, Any]:
        remedy = "an error on one of them is not to be caught; start again from the last checkpoint"
        require_same("the last finished step is", self._steps.finished, remedy)
        step = self._steps.finished
        if step > self._state.step:
            identity = rank0_then_all(lambda: uuid.uuid4().hex)
            self._failed = True
            self._commits.now(step, checkpoint, identity=identity)
            self._failed, self._state = False, ResumeState(self.run_id, step, identity)
        self._shapley.expire_direction()
        return self._state.to_dict()

    def _require_fit(self) -> None:
        """A checkpoint may follow."""
        if self._closed:
            raise UserError(f"{self.directory} was closed: make another RunLedger with resume=")
        self._require_whole()
        self._require_between_steps()
        if self._shapley.closed:
            raise UserError(
                f"{self.directory}: its InRunShapley was closed, and values of another one are not in it: close() this ledger, which "
                f"commits what is finished, and go on with RunLedger(other, ..., resume=) from a checkpoint of then"
            )
        self._steps.require_none_lost()

    def _require_whole(self) -> None:
        if self._failed:
            raise UserError(
                f"{self.directory}: a commit has failed, and its values are lost: start again from the last checkpoint"
            )

    def _require_between_steps(self) -> None:
        if (running := self._shapley.running) is not None:
            raise UserError(f"step {running} is not finished: commit or close after its `with` block")

    def close(self) -> None:
        """Commit what is left, and release the directory. Again: nothing.

        Raises:
            UserError: as ``commit``; or its ``InRunShapley`` was closed before, after what is finished was committed.
        """
        if self._closed:
            return
        all_ranks(self._require_between_steps)  # before anything is let go
        try:
            all_ranks(self._require_whole)
            self._commit()
        finally:
            self._let_go()
        if self._shapley.closed:
            raise AgreedError(
                f"{self.directory} is closed after its InRunShapley: steps up to {self._state.step} are in it, and none of another "
                f"InRunShapley (close the ledger first)"
            )

    def _say_what_is_lost(self) -> None:
        """At the end of a loop that did not close, or not in peace."""
        if (
            self._writer is not None
            and self._writer.writer == 0
            and self._writer.last_step > self._state.step
        ):
            print(
                f"{self.directory}: what was scored after step {self._state.step}, up to step {self._writer.last_step}, is in no "
                f"commit and is lost (close() commits what is left)",
                file=sys.stderr,
                flush=True,
            )

    def _let_go(self) -> None:
        atexit.unregister(self._say_what_is_lost)
        if self._shapley.keeper is self._steps:
            self._shapley.ledger = self._shapley.keeper = None
        self._closed = True
        if self._writer is not None:
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


def _checked(
    shapley: InRunShapley,
    datasets: Sequence[str | Mapping[str, Any]],
    granularity: str,
    resume: Mapping[str, Any] | None,
) -> tuple[list[dict[str, Any]], ResumeState | None]:
    """What this rank was given: the table of datasets, and where to go on."""
    if shapley.ledger is not None or shapley.keeper is not None:
        raise UserError("these values are kept in a ledger already: close() it first")
    if shapley.closed:
        raise UserError("this InRunShapley was closed: make another one for the ledger")
    if shapley.running is not None:
        raise UserError(f"step {shapley.running} is not finished: open a ledger before a step")
    if granularity not in GRANULARITIES:
        raise UserError(f"granularity {granularity!r} is none of {', '.join(GRANULARITIES)}")
    given = [] if isinstance(datasets, str) else list(datasets)
    table = [{"index": i, **({"name": d} if isinstance(d, str) else d)} for i, d in enumerate(given)]
    names = [str(dataset.get("name", "")) for dataset in table]
    if not names or len(set(names)) < len(names):
        raise UserError(f"datasets={datasets!r} is no list of distinct names")
    return table, None if resume is None else ResumeState.of(resume)


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
