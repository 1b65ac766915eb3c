"""SQL over the committed parts, with DuckDB in this process: it reads the Parquet files lazily and spills to disk.

Relations that every query can use (report/sql.py has their SQL):

    ledger_values(step, dataset, sample, segment, target, tokens, value)   rows of values/, as they are
    ledger_steps(step, target, realised)
    scored(step, dataset, sample, target, tokens, value, normalised, relative)     finite values, one row per sample
    parts(... with segment ...)                                   the same, one row per segment of a sample
    cells(step, dataset, target, n, tokens, total, absolute, negatives)   one row per step, dataset and target
    scales(step, target, factor, per_change)
    datasets(dataset, name), targets(target, position)

**Normalised value.** phi_i of step t divided by the mean of |phi_j| over the samples j of that step (same target):

    nu_i = phi_i * n_t / sum_j |phi_j|

Values shrink by orders of magnitude as the loss flattens and the learning rate falls, so that sums over a run are sums
over its first steps. In nu every step weighs the same, a typical sample has |nu| = 1, and the sign stays. Segments of a
sample have the factor of their step, so that their normalised values add up to the sample's.

**Relative value.** phi_i divided by the size of the step's realised loss change, |realised_t|; null where that is not
known or zero. It comes near zero and changes sign from step to step, so that single steps may rule sums of it: judge by
normalised values, and use this one for single steps and to compare with other work.
"""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import duckdb
import pyarrow as pa

from inrun_megatron.errors import UserError
from inrun_megatron.ledger.read import Ledger
from inrun_megatron.ledger.schema import VALUES, VALUES_SCHEMA
from inrun_megatron.report import sql
from inrun_megatron.wording import one_line

MEMORY_LIMIT = "2GB"
"""DuckDB spills to a temporary directory (under TMPDIR) beyond this. Arrow tables on their way in and out come on top."""

RANGE_ROWS = 1 << 22
"""Rows of a range of steps that is worked on at a time."""


class Query:
    """A DuckDB session on one ledger; a context manager (it owns a temporary directory).

    Raises UserError when a part cannot be read.
    """

    def __init__(self, ledger: Ledger, memory_limit: str = MEMORY_LIMIT) -> None:
        self.ledger, self._memory_limit = ledger, memory_limit
        self._spill = tempfile.TemporaryDirectory(prefix="inrun-")
        self._connection = duckdb.connect(
            ":memory:",
            config={
                "temp_directory": self._spill.name,
                "memory_limit": memory_limit,
                "preserve_insertion_order": False,
            },
        )
        paths = ledger.paths(VALUES)
        try:
            self._create_values(paths)
            self.register("ledger_steps", ledger.steps().select(["step", "target", "realised"]))
            self.register("datasets", _names("dataset", pa.int16(), ledger.dataset_names))
            self.register("targets", _positions(ledger.target_names))
            cut = ledger.granularity != "sample"
            for kind, name, select in (
                ("VIEW", "samples", sql.CUT_SAMPLES if cut else sql.SAMPLES),
                ("TABLE", "cells", sql.CELLS),
                ("TABLE", "scales", sql.SCALES),
                ("VIEW", "scored", sql.SCORED),
                ("VIEW", "parts", sql.PARTS),
            ):
                self._connection.execute(f"CREATE TEMP {kind} {name} AS {select}")
        except duckdb.Error as error:
            self.close()
            raise self._failure(error) from error

    def _create_values(self, paths: list[str]) -> None:
        columns = "step, dataset, sample, segment, CAST(target AS VARCHAR) AS target, tokens, value"
        if not paths:
            self.register("no_values", VALUES_SCHEMA.empty_table())
            self._connection.execute(f"CREATE TEMP VIEW ledger_values AS SELECT {columns} FROM no_values")
            return
        self._connection.execute(
            f"CREATE TEMP VIEW ledger_values AS SELECT {columns} FROM {parquet_files(paths)}"
        )

    def register(self, name: str, table: pa.Table) -> None:
        """Make an Arrow table a relation of this session."""
        self._connection.register(name, table)

    def run(self, statement: str) -> None:
        """Execute a statement that returns nothing."""
        try:
            self._connection.execute(statement)
        except duckdb.Error as error:
            raise self._failure(error) from error

    def drop(self, kind: str, name: str) -> None:
        """Drop a TABLE or VIEW of this session if it is there."""
        found = self.rows(
            f"SELECT table_type FROM information_schema.tables WHERE table_name = {quoted(name)} "
            "AND table_catalog = 'temp'"
        )
        if found and (found[0]["table_type"] == "VIEW") == (kind == "VIEW"):
            self.run(f"DROP {kind} {name}")

    def copy(self, statement: str) -> int:
        """Execute a COPY ... TO; returns the number of rows written."""
        try:
            written = self._connection.execute(statement).fetchone()
        except duckdb.Error as error:
            raise self._no_room(error) or UserError(f"the export failed: {one_line(error)[:300]}") from error
        return int(written[0]) if written else 0

    def table(self, statement: str) -> pa.Table:
        """The result of a SELECT."""
        try:
            return self._connection.sql(statement).to_arrow_table()
        except duckdb.Error as error:
            raise self._failure(error) from error

    def rows(self, statement: str) -> list[dict[str, Any]]:
        """The result of a SELECT as one dict per row."""
        return self.table(statement).to_pylist()

    def require_relative(self, first: int, last: int) -> None:
        """UserError where the steps [first, last] have samples, and the realised loss change of none of them is known."""
        known = self.rows(
            f"SELECT count(*) AS steps, count(per_change) AS known FROM scales WHERE step BETWEEN {first} AND {last}"
        )[0]
        if known["steps"] and not known["known"]:
            raise UserError(
                f"{self.ledger.directory}: no relative values in steps {first}-{last}: they are divided by the step's "
                "realised loss change, which is known where the next step took its target losses as well (neither with "
                "--shapley-interval nor with --shapley-refresh above 1); use normalised values"
            )

    def step_ranges(self, first: int, last: int, rows: int = RANGE_ROWS) -> Iterator[tuple[int, int]]:
        """Consecutive ranges of steps, both ends included, of at most `rows` scored samples times targets (or one step)."""
        start, held, end = first, 0, first
        for row in self.rows(
            f"SELECT step, CAST(sum(n) AS BIGINT) AS n FROM cells WHERE step BETWEEN {first} AND {last} "
            "GROUP BY step ORDER BY step"
        ):
            if held and held + row["n"] > rows:
                yield start, end
                start, held = row["step"], 0
            end, held = row["step"], held + row["n"]
        if held:
            yield start, end

    def _no_room(self, error: duckdb.Error) -> UserError | None:
        """What to say where neither memory nor the temporary directory could take the work, which is no fault of a part."""
        if not isinstance(error, duckdb.OutOfMemoryException) and self._spill.name not in str(error):
            return None
        place = Path(self._spill.name).parent
        return UserError(
            f"the query outgrew {self._memory_limit} of memory and the room in {place}: {one_line(error)[:200]}; name a "
            "directory with more room by TMPDIR, or choose fewer steps (--steps, --phase)"
        )

    def _failure(self, error: duckdb.Error) -> UserError:
        return self._no_room(error) or UserError(
            f"{self.ledger.directory} cannot be read: {one_line(error)[:300]}; "
            "`inrun verify` names damaged parts"
        )

    def close(self) -> None:
        self._connection.close()
        self._spill.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def limit(n: int) -> int:
    """`n` as SQL takes it in LIMIT: beyond int64 it means all rows."""
    return min(n, 2**63 - 1)


def quoted(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def parquet_files(paths: Sequence[str | Path]) -> str:
    """These files as a relation. DuckDB takes a path for a glob: the one of `web[1]` would read `web1`."""
    files = ", ".join(quoted(glob.escape(str(path))) for path in paths)
    return f"read_parquet([{files}], hive_partitioning = false)"


def _names(column: str, kind: pa.DataType, names: list[str]) -> pa.Table:
    return pa.table({column: pa.array(range(len(names)), kind), "name": pa.array(names, pa.string())})


def _positions(targets: list[str]) -> pa.Table:
    return pa.table(
        {"target": pa.array(targets, pa.string()), "position": pa.array(range(len(targets)), pa.int32())}
    )
