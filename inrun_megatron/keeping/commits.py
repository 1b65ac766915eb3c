"""When rows become part of the ledger. The training step never waits for a file system; a checkpoint does.

Every writer's thread writes its own parts; the commit that names all of them is made once all are durable. Ranks
agree on that, and on failures, by one small all-reduce per step that is started at the end of a step and read at
the end of the next, so that nobody waits for it either.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from inrun_megatron.keeping.agreement import all_ranks
from inrun_megatron.ledger.run import commit
from inrun_megatron.ledger.schema import PartInfo
from inrun_megatron.ledger.write import LedgerWriter


class Commits:
    """The commits of one run. Every method is a collective over the world.

    writer: this rank's, None on ranks that do not write. device: where the backend reduces tensors.
    """

    def __init__(self, directory: Path, writer: LedgerWriter | None, device: torch.device) -> None:
        self._directory, self._writer, self._device = directory, writer, device
        self._due: int | None = None  # rows up to this step are handed over and not named by a commit
        self._vote: tuple[dist.Work, torch.Tensor] | None = None

    def after_step(self, iteration: int, due: bool) -> None:
        """At the end of every step; `due`: begin a commit of everything up to it.

        The commit is made some steps later, when all parts are there. AgreedError on every rank, one step after it
        happened, when a writer's thread failed.
        """
        failed, writing = self._read_vote()
        if failed:
            all_ranks(self._check)
        if self._due is not None and not writing:
            self._name_parts(self._due, None)
            self._due = None
        if due:
            self._due = iteration
            if self._writer is not None:
                self._writer.hand_over()
        self._cast_vote()

    def now(self, iteration: int, checkpoint: str | None, *, identity: str | None = None) -> None:
        """Commit everything up to `iteration` and wait for it: before the checkpoint `checkpoint`, and at the end.

        `identity`, of rank 0: there is a record of that name even if nothing was scored and no checkpoint follows."""
        self._read_vote()
        self._due = None
        parts: list[PartInfo] = all_ranks(
            lambda: self._writer.write_parts() if self._writer is not None else []
        )
        self._name_parts(iteration, checkpoint, parts, identity)

    def close(self) -> None:
        """End the writing threads; at the end of a run that went well."""
        self._read_vote()
        if self._writer is not None:
            self._writer.close()

    def _name_parts(
        self,
        step: int,
        checkpoint: str | None,
        own: list[PartInfo] | None = None,
        identity: str | None = None,
    ) -> None:
        """Rank 0 writes the commit: on its thread, or here and now where a list of parts is given."""
        wait = own is not None
        if own is None:
            own = self._writer.take_parts(step) if self._writer is not None else []
        gathered: list[list[PartInfo] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        parts = [part for written in gathered for part in written or []]

        def name_them() -> None:
            if parts or checkpoint is not None or identity is not None:
                commit(self._directory, step, parts, checkpoint, identity)

        if wait:
            all_ranks(lambda: name_them() if dist.get_rank() == 0 else None)
        elif dist.get_rank() == 0:
            assert self._writer is not None, "rank 0 writes"
            self._writer.in_background(name_them)

    def _check(self) -> None:
        if self._writer is not None:
            self._writer.check()

    def _cast_vote(self) -> None:
        writer = self._writer
        vote = [writer.failed, writer.busy] if writer is not None else [False, False]
        tensor = torch.tensor(vote, dtype=torch.int32, device=self._device)
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._vote = (work, tensor)

    def _read_vote(self) -> tuple[bool, bool]:
        """(a thread has failed, a thread is writing), as of the end of the step before."""
        if self._vote is None:
            return False, True
        work, tensor = self._vote
        self._vote = None
        work.wait()
        failed, writing = tensor.tolist()
        return bool(failed), bool(writing)
