"""`verify`: green on a whole ledger; each kind of damage fails its own check and is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inrun_megatron.errors import UserError
from inrun_megatron.ledger import Ledger, LedgerWriter, StepRecord, commit, create_ledger, open_ledger, rows
from inrun_megatron.ledger.files import digest_of, sha256_of
from inrun_megatron.ledger.schema import PartInfo
from tests.synthetic_ledger import Shape, description, failed, write_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ledger") / "shapley"
    write_run(directory)
    return directory


@pytest.fixture
def ledger(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "shapley"))


def part_of(directory: Path, table: str = "values") -> Path:
    return sorted((directory / table).iterdir())[0]


def test_a_whole_ledger_passes(whole: Path) -> None:
    checks = Ledger(whole).verify()
    assert [check.name for check in checks if not check.ok] == []
    assert {check.name for check in checks} >= {
        "files",
        "rows",
        "duplicates",
        "steps",
        "coverage",
        "additivity",
    }
    json.dumps([check.to_dict() for check in checks])


def test_a_ledger_without_commits_says_that_nothing_is_in_it(tmp_path: Path) -> None:
    create_ledger(tmp_path / "shapley", description()).close()
    [commits] = [check for check in Ledger(tmp_path / "shapley").verify() if check.name == "commits"]
    assert commits.ok and commits.note and "none yet" in commits.detail


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "word"),
    [(truncate, "truncated"), (flip, "altered (sha256 differs)"), (Path.unlink, "missing")],
)
@pytest.mark.parametrize("table", ["values", "steps"])
def test_damaged_parts_are_named_with_their_rows(
    ledger: Path, damage: Callable[[Path], Any], word: str, table: str
) -> None:
    part = part_of(ledger, table)
    rows = pq.ParquetFile(part).metadata.num_rows
    damage(part)
    detail = failed(ledger)["files"].detail
    assert f"{table}/{part.name} {word}" in detail and f"{rows} rows of steps 1 to 20" in detail


def test_a_folder_in_the_place_of_a_part_is_one_line(ledger: Path) -> None:
    part = part_of(ledger, "steps")
    part.unlink()
    part.mkdir()
    assert f"steps/{part.name} " in failed(ledger)["files"].detail
    with pytest.raises(UserError, match=r"a part of .*steps cannot be read: .*; run inrun verify"):
        Ledger(ledger).steps()


def test_a_damaged_commit_record_is_named(ledger: Path) -> None:
    (ledger / "commits" / "0000000040.json").write_text('{"step": 40}')
    assert "commits/0000000040.json" in failed(ledger)["commits"].detail


def test_uncommitted_parts_are_named_and_no_fault(ledger: Path) -> None:
    with open_ledger(ledger):
        writer = LedgerWriter(ledger, 0)
        writer.append(61, [0], [9999], [64], np.ones((1, 2)))
        (part,) = writer.write_parts()
    check = next(check for check in Ledger(ledger).verify() if check.name == "uncommitted")
    assert check.ok and part.file in check.detail and check.figures["files"] == [part.file]


def rewrite(directory: Path, change: Callable[[pa.Table], pa.Table]) -> str:
    """Change a part's rows and make its commit agree, as a fault before the commit would."""
    path = part_of(directory)
    table = pq.read_table(path, partitioning=None)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)
    name = f"values/{path.name}"
    for record_path in (directory / "commits").iterdir():
        record = json.loads(record_path.read_text())
        for part in record["parts"]:
            if part["file"] == name:
                rows = pq.ParquetFile(path).metadata.num_rows
                part.update(rows=rows, bytes=path.stat().st_size, sha256=sha256_of(path))
        record_path.write_text(json.dumps(record))
    return name


def with_value(table: pa.Table, column: str, row: int, value: Any) -> pa.Table:
    values = table[column].to_pylist()
    values[row] = value
    field = table.schema.field(column)
    return table.set_column(table.schema.get_field_index(column), field, pa.array(values, field.type))


def test_values_that_are_not_finite(ledger: Path) -> None:
    name = rewrite(ledger, lambda table: with_value(table, "value", 3, float("nan")))
    check = failed(ledger)["rows"]
    assert f"{name}: 1 values that are not finite" in check.detail and check.figures["not_finite"] == 1


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [("dataset", 7, "unknown dataset indices"), ("step", 21, "steps outside the part's range")],
)
def test_rows_that_refer_to_nothing(ledger: Path, column: str, value: int, message: str) -> None:
    rewrite(ledger, lambda table: with_value(table, column, 3, value))
    assert message in failed(ledger)["rows"].detail


def test_duplicates_are_named(ledger: Path) -> None:
    rewrite(ledger, lambda table: pa.concat_tables([table, table.slice(5, 1)]))
    row = pq.read_table(part_of(ledger), partitioning=None).slice(5, 1).to_pylist()[0]
    found = failed(ledger)
    named = f"step {row['step']} dataset {row['dataset']} sample {row['sample']} segment 0 target {row['target']} (2 times)"
    assert named in found["duplicates"].detail and "steps" in found


def test_duplicates_in_another_part(ledger: Path) -> None:
    """What a resume without rollback would leave: the same steps again, by another writer."""
    table = pq.read_table(part_of(ledger), partitioning=None)
    path = ledger / "values" / "part-0000000001-0000000020-w7.parquet"
    pq.write_table(table, path)
    part = PartInfo(f"values/{path.name}", table.num_rows, path.stat().st_size, sha256_of(path), 1, 20)
    commit(ledger, 60, [part])
    assert failed(ledger)["duplicates"].figures["duplicates"] == table.num_rows


def test_the_search_for_duplicates_in_small_ranges(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inrun_megatron.ledger.rows.DUPLICATE_RANGE_ROWS", 20)
    assert failed(ledger) == {}
    rewrite(ledger, lambda table: pa.concat_tables([table, table.slice(table.num_rows - 1, 1)]))
    assert failed(ledger)["duplicates"].figures["duplicates"] == 1


def test_each_part_is_searched_once_for_each_range_that_it_reaches(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inrun_megatron.ledger.rows.DUPLICATE_RANGE_ROWS", 20)
    opened: list[int] = []

    def counted(paths: list[str], **options: Any) -> Any:
        opened.append(len(paths))
        return dataset(paths, **options)

    dataset = rows.ds.dataset
    monkeypatch.setattr(rows.ds, "dataset", counted)
    parts = len(Ledger(ledger).parts("values"))
    assert failed(ledger) == {}
    commits = len(Ledger(ledger).commits)
    assert len(opened) > parts and sum(opened) <= len(opened) * (parts / commits + 1), opened


def test_totals_do_not_depend_on_when_they_are_added_up(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Ledger(ledger)
    whole, _ = rows.check_contents(found, found.parts("values"))
    monkeypatch.setattr(rows, "SUMMED_ROWS", 3)
    pieces, _ = rows.check_contents(found, found.parts("values"))
    keys = [("step", "ascending"), ("target", "ascending")]
    one, other = whole.sort_by(keys), pieces.sort_by(keys)
    exact = ["step", "target", "rows", "samples"]
    assert one.select(exact).equals(other.select(exact)) and len(one) > 3
    gap = np.abs(one["total"].to_numpy() - other["total"].to_numpy())
    assert (gap <= 1e-12 * one["absolute"].to_numpy()).all()


def test_lost_rows_do_not_match_the_step_records(ledger: Path) -> None:
    rewrite(ledger, lambda table: table.slice(0, table.num_rows - 2))
    detail = failed(ledger)["steps"].detail
    assert "step 20 target code: 7 rows, 8 recorded" in detail


def test_changed_values_do_not_match_the_recorded_sums(ledger: Path) -> None:
    rewrite(ledger, lambda table: with_value(table, "value", 0, table["value"][0].as_py() + 1e-3))
    assert "rows sum to" in failed(ledger)["steps"].detail


def test_a_part_of_another_run(ledger: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "other")
    shutil.copy(part_of(tmp_path / "other"), part_of(ledger))
    rewrite(ledger, lambda table: table)
    assert "of another run" in failed(ledger)["files"].detail


def test_datasets_that_changed(tmp_path: Path) -> None:
    (tmp_path / "code.idx").write_bytes(b"index")
    row = {"name": "code", "index": 0, "path_prefix": str(tmp_path / "code")}
    row["idx_sha256"] = sha256_of(tmp_path / "code.idx")
    create_ledger(tmp_path / "ledger", description([row])).close()
    checks = {check.name: check for check in Ledger(tmp_path / "ledger").verify()}
    assert checks["datasets"].ok and checks["datasets"].figures["same"] == 1
    (tmp_path / "code.idx").write_bytes(b"other")
    assert "code.idx" in failed(tmp_path / "ledger")["datasets"].detail


def test_datasets_with_other_text_of_the_same_lengths(tmp_path: Path) -> None:
    (tmp_path / "code.idx").write_bytes(b"index")
    (tmp_path / "code.bin").write_bytes(b"text")
    row = {"name": "code", "index": 0, "path_prefix": str(tmp_path / "code")}
    row |= {"idx_sha256": sha256_of(tmp_path / "code.idx"), "bin_digest": digest_of(tmp_path / "code.bin")}
    create_ledger(tmp_path / "ledger", description([row])).close()
    assert "datasets" not in failed(tmp_path / "ledger")
    (tmp_path / "code.bin").write_bytes(b"TEXT")
    assert "code.bin" in failed(tmp_path / "ledger")["datasets"].detail


def test_missing_step_records(tmp_path: Path) -> None:
    with create_ledger(tmp_path, description()):
        writer = LedgerWriter(tmp_path, 0)
        for step in (4, 5, 8):  # a run may begin in the middle, from another one's checkpoint
            writer.append_step(StepRecord(step=step, status="skipped: overflow"))
        commit(tmp_path, 8, writer.write_parts())
        assert failed(tmp_path)["steps"].figures["missing_steps"] == [6, 7]
        commit(tmp_path, 10, [])  # a commit without its rows
    assert failed(tmp_path)["steps"].figures["missing_steps"] == [6, 7, 9, 10]


def test_a_larger_run_passes(tmp_path: Path) -> None:
    write_run(tmp_path, Shape(steps=30, batch=300, writers=3, commit_every=7))
    assert failed(tmp_path) == {}
