"""What a writer puts on disk, and that it comes back as it was."""

from __future__ import annotations

import itertools
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from inrun_megatron.errors import UserError
from inrun_megatron.ledger import Ledger, LedgerWriter, StepRecord, commit, create_ledger
from inrun_megatron.ledger.schema import STEPS_SCHEMA, VALUES_SCHEMA
from tests.committed_ledger import sorted_values
from tests.synthetic_ledger import DOMAINS, TARGETS, Shape, description, write_run


def test_rows_come_back_bit_for_bit(tmp_path: Path) -> None:
    rows = write_run(tmp_path / "run" / "shapley")
    ledger = Ledger(tmp_path / "run")
    table = sorted_values(ledger)
    rows = np.sort(rows, order=["step", "dataset", "sample"])
    assert table.num_rows == len(rows) * len(TARGETS)
    assert table["sample"].to_numpy()[:: len(TARGETS)].tolist() == rows["sample"].tolist()
    for position, name in enumerate(TARGETS):  # TARGETS are in alphabetical order
        assert np.array_equal(table["value"].to_numpy()[position :: len(TARGETS)], rows[name])
    assert ledger.values().schema.equals(VALUES_SCHEMA)
    assert ledger.steps().schema.equals(STEPS_SCHEMA)
    assert ledger.last_step == 60 and [step for step, _ in ledger.commits] == [20, 40, 60]


def test_other_readers_open_the_parts(tmp_path: Path) -> None:
    rows = write_run(tmp_path)
    query = f"SELECT sum(value) FROM '{tmp_path}/values/*.parquet' WHERE target = 'code'"
    assert duckdb.execute(query).fetchall()[0][0] == pytest.approx(rows["code"].sum(), rel=1e-12)
    metadata = pq.read_schema(next((tmp_path / "values").iterdir())).metadata
    assert metadata[b"inrun.schema_version"] == b"3"
    assert metadata[b"inrun.run_id"].decode() == Ledger(tmp_path).run_id


def test_realised_is_filled_from_the_next_step(tmp_path: Path) -> None:
    write_run(tmp_path, Shape(steps=6))
    steps = [row for row in Ledger(tmp_path).steps().to_pylist() if row["target"] == "prose"]
    for now, following in itertools.pairwise(steps):
        assert now["realised"] == now["target_loss"] - following["target_loss"]
    assert steps[-1]["realised"] is None


def test_a_full_buffer_is_written_between_steps_and_named_by_the_next_commit(tmp_path: Path) -> None:
    with create_ledger(tmp_path, description()):
        writer = LedgerWriter(tmp_path, 0, buffer_rows=10)
        for step in range(1, 6):
            for _ in range(2):  # two calls in one step must land in one part
                writer.append(step, [0, 1, 2], [step * 10, 1, 2], [64] * 3, np.ones((3, 2)))
        parts = writer.write_parts()
        assert [(part.first_step, part.last_step) for part in parts] == [
            (1, 1),
            (2, 2),
            (3, 3),
            (4, 4),
            (5, 5),
        ]
        assert writer.write_parts() == []
        commit(tmp_path, 5, parts)
    assert Ledger(tmp_path).values().count_rows() == 5 * 2 * 3 * 2


def test_an_empty_ledger_reads_as_empty(tmp_path: Path) -> None:
    create_ledger(tmp_path, description()).close()
    ledger = Ledger(tmp_path)
    assert ledger.values().to_table().num_rows == 0 and ledger.steps().num_rows == 0 and ledger.last_step == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0], [1], [64], np.ones((1, 3))), r"shape \(1, 3\), expected \(1, 2\)"),
        (([0, 1], [1], [64], np.ones((1, 2))), "2 datasets"),
        (
            ([len(DOMAINS)], [1], [64], np.ones((1, 2))),
            r"datasets 3 to 3, but the ledger was opened with 3 datasets",
        ),
        (
            ([0], np.array([2**63], np.uint64), [64], np.ones((1, 2))),
            "sample numbers 9223372036854775808 to .*; numbers go",
        ),
        (([70000], [1], [64], np.ones((1, 2))), r"datasets 70000 to 70000"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, arguments: tuple, message: str) -> None:
    with create_ledger(tmp_path, description()):
        with pytest.raises(ValueError, match=message):
            LedgerWriter(tmp_path, 0).append(1, *arguments)


def test_steps_may_not_go_back_and_records_need_all_targets(tmp_path: Path) -> None:
    with create_ledger(tmp_path, description()):
        writer = LedgerWriter(tmp_path, 0)
        writer.append(5, [0], [1], [64], np.ones((1, 2)))
        with pytest.raises(ValueError, match="step 4 appended after step 5"):
            writer.append(4, [0], [1], [64], np.ones((1, 2)))
        with pytest.raises(ValueError, match="target_loss has 1 entries for 2 targets"):
            writer.append_step(StepRecord(step=5, target_loss=[1.0]))


def test_a_part_is_never_replaced(tmp_path: Path) -> None:
    with create_ledger(tmp_path, description()):
        for expected in (None, "exists already"):
            writer = LedgerWriter(tmp_path, 0)
            writer.append(1, [0], [1], [64], np.ones((1, 2)))
            if expected is None:
                writer.write_parts()
            else:
                with pytest.raises(UserError, match=expected):
                    writer.write_parts()


@contextmanager
def file_size_limit(bytes_: int) -> Iterator[None]:
    """Writes beyond `bytes_` fail with EFBIG: the same path through the code as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_clear_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with create_ledger(tmp_path, description()):
        writer = LedgerWriter(tmp_path, 0)
        writer.append(1, [0], [1], [64], np.ones((1, 2)))
        commit(tmp_path, 1, writer.write_parts())
        writer.append(
            2, [0] * 5000, np.arange(5000), [64] * 5000, np.random.default_rng(0).normal(size=(5000, 2))
        )
        with (
            file_size_limit(4096),
            pytest.raises(UserError, match="File too large; what was committed before"),
        ):
            writer.write_parts()
        assert len(list((tmp_path / "values").iterdir())) == 1
        writer.append(3, [0], [1], [64], np.ones((1, 2)))
        with pytest.raises(UserError, match="File too large"):  # a writer that lost rows writes no later ones
            writer.write_parts()
        resumed = LedgerWriter(tmp_path, 0)  # space is back: the run repeats what was not committed
        resumed.append(2, [0], [2], [64], np.ones((1, 2)))
        commit(tmp_path, 2, resumed.write_parts())
    assert sorted_values(Ledger(tmp_path))["sample"].to_pylist() == [1, 1, 2, 2]


def test_writer_without_a_ledger(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.json does not exist"):
        LedgerWriter(tmp_path, 0)
