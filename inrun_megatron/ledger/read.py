"""Reading a ledger: the committed parts, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from inrun_megatron.errors import UserError
from inrun_megatron.ledger.commit_records import read_commits
from inrun_megatron.ledger.description import Starts, read_run
from inrun_megatron.ledger.schema import (
    DEFAULT_SUBDIRECTORY,
    RUN_FILE,
    STEPS,
    STEPS_SCHEMA,
    VALUES,
    VALUES_SCHEMA,
    PartInfo,
    granularity_of,
)
from inrun_megatron.ledger.step_table import with_realised
from inrun_megatron.wording import one_line

if TYPE_CHECKING:
    from inrun_megatron.ledger.checks import Check


def locate(run: Path | str) -> Path:
    """The ledger directory of `run`, which is that directory or a run directory with `shapley/` in it."""
    path = Path(run)
    for directory in (path, path / DEFAULT_SUBDIRECTORY):
        if (directory / RUN_FILE).is_file():
            return directory
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run directory or its ledger directory")
    raise UserError(
        f"{path} holds no ledger (no {RUN_FILE} in it or in its {DEFAULT_SUBDIRECTORY}/); give the run directory, "
        "or the run's --shapley-dir"
    )


class Ledger:
    """A snapshot of a ledger: what was committed when it was opened. Safe beside a run that is writing.

    run: the run directory or the ledger directory.

    Attributes: `directory`; `run`, the content of run.json; `starts`, the settings in force at every step; `commits`, (step, parts) in order; `damaged`,
    commit records that cannot be read or are missing, with the reason. Raises UserError when there is no ledger or its schema
    is another one.
    """

    def __init__(self, run: Path | str) -> None:
        self.directory = locate(run)
        self.run: dict[str, Any] = read_run(self.directory)
        self.starts = Starts(self.directory, self.run)
        records = read_commits(self.directory)
        self.commits = [(record.step, record.parts) for record in records.found]
        self.damaged = records.faults

    @property
    def run_id(self) -> str:
        """Of the run that the ledger belongs to, as its checkpoints name it."""
        return str(self.run["run_id"])

    @property
    def targets(self) -> list[dict[str, Any]]:
        """The targets' descriptions, in order; each has `name`."""
        return list(self.run["targets"])

    @property
    def target_names(self) -> list[str]:
        """In the order of the targets' descriptions."""
        return [str(target["name"]) for target in self.run["targets"]]

    @property
    def datasets(self) -> list[dict[str, Any]]:
        """The dataset table; entry d describes the rows with dataset = d."""
        return list(self.run["datasets"])

    @property
    def dataset_names(self) -> list[str]:
        """By dataset index; the index itself where a dataset has no name."""
        return [str(dataset.get("name", index)) for index, dataset in enumerate(self.run["datasets"])]

    @property
    def granularity(self) -> str:
        """What a row of `values/` is of: `sample`, `document` or `token`."""
        return granularity_of(self.run)

    @property
    def last_step(self) -> int:
        """The last committed step, 0 when nothing is committed."""
        return max((part.last_step for _, parts in self.commits for part in parts), default=0)

    def parts(self, table: str | None = None) -> list[PartInfo]:
        """Committed parts, of `values` or `steps` or both, in the order of their commits.

        Raises UserError when a commit record is damaged or missing: its parts would be missing silently.
        """
        if self.damaged:
            raise UserError(next(iter(self.damaged.values())))
        return [part for _, parts in self.commits for part in parts if table in (None, part.table)]

    def paths(self, table: str) -> list[str]:
        """Absolute paths of the committed parts of `values` or `steps`, for any Parquet reader."""
        directory = self.directory.resolve()  # once: it asks the file system about every folder on the way
        return [f"{directory}/{part.file}" for part in self.parts(table)]

    def values(self) -> ds.Dataset:
        """All committed rows of `values/`, as a dataset that reads lazily."""
        paths = self.paths(VALUES)
        if not paths:
            return ds.dataset(VALUES_SCHEMA.empty_table())
        return ds.dataset(paths, schema=VALUES_SCHEMA, format="parquet")

    def steps(self) -> pa.Table:
        """All committed rows of `steps/`, ordered by step and target.

        `realised` is filled in where the next step's `target_loss` is there: L_k(w_t) - L_k(w_{t+1}).
        """
        paths = self.paths(STEPS)
        if not paths:
            return STEPS_SCHEMA.empty_table()
        try:
            tables = [pq.read_table(path, partitioning=None).cast(STEPS_SCHEMA) for path in paths]
        except (OSError, ValueError) as error:  # Arrow's own are ValueErrors
            raise UserError(
                f"a part of {self.directory / STEPS} cannot be read: {one_line(error)}; run inrun verify"
            ) from error
        table = pa.concat_tables(tables).unify_dictionaries()
        return with_realised(table, self.target_names)

    def verify(self) -> list[Check]:
        """Integrity checks and audits; `inrun verify` prints them. See inrun_megatron/ledger/verify.py."""
        from inrun_megatron.ledger.verify import verify_ledger

        return verify_ledger(self)
