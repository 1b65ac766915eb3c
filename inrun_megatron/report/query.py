"""SQL over the committed parts, with DuckDB in this process: it reads the Parquet files lazily and spills to disk.

Relations that every query can use:

    ledger_values(step, dataset, sample, segment, target, tokens, value)   rows of values/, as they are
    parts(... the same ..., normalised)                           finite rows, with their normalised value
    scored(step, dataset, sample, target, tokens, value, normalised)   the same by sample: sums over its segments
    cells(step, dataset, target, n, tokens, total, absolute, negatives)   one row per step, dataset and target
    datasets(dataset, name), targets(target, position)

**Normalised value.** phi_i of step t divided by the mean of |phi_j| over the samples j of that step (same target):

    nu_i = phi_i * n_t / sum_j |phi_j|

Values shrink by orders of magnitude as the loss flattens and the learning rate falls, so that sums over a run are sums
over its first steps. In nu every step weighs the same, a typical sample has |nu| = 1, and the sign stays. Dividing by
the step's realised loss change (as the paper's authors suggest) or by sum_j phi_j would do the same on average, but both
come near zero and change sign from step to step, so single steps would rule the result again. Segments of a sample have
the factor of their step, so that their normalised values add up to the sample's.
"""

from __future__ import annotations

import tempfile
from types import TracebackType
from typing import Any, Self

import duckdb
import pyarrow as pa

from inrun_megatron.errors import UserError
from inrun_megatron.ledger.read import Ledger, one_line
from inrun_megatron.ledger.schema import VALUES, VALUES_SCHEMA

MEMORY_LIMIT = "3GB"
"""DuckDB spills to a temporary directory beyond this."""

_CELLS = """
CREATE TEMP TABLE cells AS
SELECT step, dataset, target, count(*) AS n, sum(CAST(tokens AS BIGINT)) AS tokens,
       sum(value) AS total, sum(abs(value)) AS absolute,
       sum(CASE WHEN value < 0 THEN 1 ELSE 0 END) AS negatives
FROM {samples} WHERE isfinite(value) GROUP BY step, dataset, target
"""

# By sample: the rows themselves where samples are not cut.
_SAMPLES = """
CREATE TEMP VIEW sample_values AS
SELECT step, dataset, sample, target, sum(CAST(tokens AS BIGINT)) AS tokens, sum(value) AS value
FROM ledger_values WHERE isfinite(value) GROUP BY step, dataset, sample, target
"""

_SCALES = """
CREATE TEMP TABLE scales AS
SELECT step, target, CASE WHEN sum(absolute) > 0 THEN sum(n) / sum(absolute) ELSE 0 END AS factor
FROM cells GROUP BY step, target
"""

_SCORED = """
CREATE TEMP VIEW {name} AS
SELECT v.*, v.value * s.factor AS normalised
FROM {values} v JOIN scales s ON v.step = s.step AND v.target = s.target
WHERE isfinite(v.value)
"""


class Query:
    """A DuckDB session on one ledger; a context manager (it owns a temporary directory).

    Raises UserError when a part cannot be read.
    """

    def __init__(self, ledger: Ledger, memory_limit: str = MEMORY_LIMIT) -> None:
        self.ledger = ledger
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
            self.register("datasets", _names("dataset", pa.int16(), ledger.dataset_names))
            self.register("targets", _positions(ledger.target_names))
            samples = "ledger_values" if ledger.granularity == "sample" else "sample_values"
            for statement in (
                _SAMPLES,
                _CELLS.format(samples=samples),
                _SCALES,
                _SCORED.format(name="parts", values="ledger_values"),
                _SCORED.format(name="scored", values=samples),
            ):
                self._connection.execute(statement)
        except duckdb.Error as error:
            self.close()
            raise self._failure(error) from error

    def _create_values(self, paths: list[str]) -> None:
        columns = "step, dataset, sample, segment, CAST(target AS VARCHAR) AS target, tokens, value"
        if not paths:
            self.register("no_values", VALUES_SCHEMA.empty_table())
            self._connection.execute(f"CREATE TEMP VIEW ledger_values AS SELECT {columns} FROM no_values")
            return
        files = ", ".join(quoted(path) for path in paths)
        self._connection.execute(
            f"CREATE TEMP VIEW ledger_values AS SELECT {columns} "
            f"FROM read_parquet([{files}], hive_partitioning = false)"
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

    def copy(self, statement: str) -> int:
        """Execute a COPY ... TO; returns the number of rows written."""
        try:
            written = self._connection.execute(statement).fetchone()
        except duckdb.Error as error:
            raise UserError(f"the export failed: {one_line(error)[:300]}") from error
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

    def _failure(self, error: duckdb.Error) -> UserError:
        return UserError(
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


def quoted(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def _names(column: str, kind: pa.DataType, names: list[str]) -> pa.Table:
    return pa.table({column: pa.array(range(len(names)), kind), "name": pa.array(names, pa.string())})


def _positions(targets: list[str]) -> pa.Table:
    return pa.table(
        {"target": pa.array(targets, pa.string()), "position": pa.array(range(len(targets)), pa.int32())}
    )
