"""Figures of documents where a ledger was resumed, rewritten, spoilt or damaged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from inrun_megatron.errors import UserError
from inrun_megatron.ledger import Ledger, LedgerWriter, commit, open_ledger, rollback
from inrun_megatron.report.documents.draws import read_draws
from inrun_megatron.report.phases import Phase, whole_run
from inrun_megatron.report.query import Query
from tests import document_figures
from tests.document_figures import (
    LATE,
    assert_figures_are_defined,
    assert_sql_gives_the_same,
    write_cut_run,
)
from tests.synthetic_ledger import TARGETS, Shape, description, step_record, values_of, write_run

once, epochs = document_figures.once, document_figures.epochs  # fixtures


def test_a_resumed_run(once: Path, tmp_path: Path) -> None:
    """A run that was set back to step 20, with a part that no commit names, and went on with another number of writers."""
    table = Ledger(once).datasets
    directory = tmp_path / "shapley"
    write_run(directory, Shape(steps=40), description(table))
    stray = directory / "values" / "part-0000000041-0000000041-w0.parquet"
    stray.write_bytes((directory / Ledger(directory).parts("values")[0].file).read_bytes())
    rollback(directory, 20)
    generator, losses = np.random.default_rng(7), np.array([5.0, 5.0])
    with open_ledger(directory, description(table)):
        writers = [LedgerWriter(directory, number) for number in range(3)]
        for step in range(21, 61):
            dataset = np.arange(6) % 3
            values = values_of(generator, step, dataset)
            writers[0].append_step(step_record(step, values, losses, step * 6))
            losses = losses - 0.9 * values.sum(0)
            for number, writer in enumerate(writers):
                own = slice(2 * number, 2 * number + 2)
                writer.append(
                    step, dataset[own], (60 + 2 * step + np.arange(6) // 3)[own] % 160, [64] * 2, values[own]
                )
            if step % 10 == 0:
                commit(directory, step, [part for writer in writers for part in writer.write_parts()])
    ledger = Ledger(directory)
    assert ledger.last_step == 60 and not stray.exists()
    for phase in (whole_run(60), Phase("across", 15, 33)):
        assert_figures_are_defined(ledger, phase)
        assert_figures_are_defined(ledger, phase, "source")


def rewritten(source: Path, directory: Path, change: Any) -> Ledger:
    """A copy of a ledger whose parts of values/ are `change`d; readers do not look at hashes, `inrun verify` does."""
    shutil.copytree(source / "shapley", directory / "shapley")
    ledger = Ledger(directory)
    for path in ledger.paths("values"):
        table = pq.read_table(path, partitioning=None)
        pq.write_table(change(table), path, row_group_size=50)
    return ledger


def test_rows_in_another_order_give_the_same(once: Path, tmp_path: Path) -> None:
    def by_target(table: pa.Table) -> pa.Table:
        order = [("step", "ascending"), ("target", "descending"), ("value", "ascending")]
        plain = table.set_column(4, "target", pc.cast(table["target"], pa.string()))
        return table.take(pc.sort_indices(plain, sort_keys=order))

    ledger = rewritten(once, tmp_path, by_target)
    assert len(read_draws(ledger, TARGETS, 1, 60).step) == 60 * 8 * len(TARGETS)  # each row for itself
    assert len(read_draws(Ledger(once), TARGETS, 1, 60).step) == 60 * 8
    assert_figures_are_defined(ledger, LATE)
    assert_figures_are_defined(ledger, LATE, "source")


@pytest.mark.parametrize("shape", ["once", "epochs"])
def test_values_that_are_not_finite_count_for_no_target_but_their_own(
    shape: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    def spoilt(table: pa.Table) -> pa.Table:
        value = table["value"].to_numpy().copy()
        value[::7], value[3::22] = np.nan, np.inf
        return table.set_column(
            table.schema.get_field_index("value"), table.schema.field("value"), pa.array(value)
        )

    ledger = rewritten(request.getfixturevalue(shape), tmp_path, spoilt)
    with Query(ledger) as query:
        n = query.rows("SELECT sum(n) AS n FROM cells")[0]["n"]
    assert 0.7 < n / (60 * 8 * len(TARGETS)) < 0.9
    assert_figures_are_defined(ledger, LATE)
    assert_figures_are_defined(ledger, LATE, "source")


def test_segments_in_another_order_and_not_finite(once: Path, tmp_path: Path) -> None:
    def changed(table: pa.Table) -> pa.Table:
        value = table["value"].to_numpy().copy()
        value[::9] = np.nan
        table = table.set_column(
            table.schema.get_field_index("value"), table.schema.field("value"), pa.array(value)
        )
        order = [("step", "ascending"), ("segment", "descending"), ("value", "ascending")]
        return table.take(pc.sort_indices(table.select(["step", "segment", "value"]), sort_keys=order))

    write_cut_run(tmp_path / "run", Ledger(once).datasets, "document")
    (tmp_path / "copy").mkdir()
    assert_sql_gives_the_same(rewritten(tmp_path / "run", tmp_path / "copy", changed), Phase("late", 11, 30))


def test_a_damaged_part_is_named(once: Path, tmp_path: Path) -> None:
    ledger = rewritten(once, tmp_path, lambda table: table)
    path = Path(ledger.paths("values")[1])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"{path.name} cannot be read: .*inrun verify"):
        read_draws(ledger, TARGETS, 1, 60)
