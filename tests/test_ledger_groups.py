"""Values by what is known of documents; rows that are segments; other engines on the same files and SQL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas
import polars
import pyarrow as pa
import pytest

from inrun_megatron.errors import UserError
from inrun_megatron.ledger import Ledger, LedgerWriter, commit, create_ledger
from inrun_megatron.report import sql
from inrun_megatron.report.documents.groups import NOT_GIVEN, Groups
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.phases import Phase, whole_run
from inrun_megatron.report.query import Query
from inrun_megatron.report.values.ranking import Level, create_figures
from tests.synthetic_ledger import (
    DOMAINS,
    TARGETS,
    Shape,
    description,
    prepared_datasets,
    step_record,
    write_run,
)
from tests.test_ledger_report import clustered_error, normalised


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    directory = tmp_path_factory.mktemp("run")
    table = prepared_datasets(directory / "data")
    return directory, write_run(directory / "shapley", Shape(), description(table))


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same rows in any order; floats to the rounding of sums in another order."""
    keys = ("target", "dataset", "document", "sample")
    pair = [sorted(rows, key=lambda row: [str(row.get(key)) for key in keys]) for rows in (found, expected)]
    assert len(found) == len(expected)
    for one, other in zip(*pair, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            close = pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value
            assert one[name] == close, (name, one, other)


def test_a_field_that_datasets_share_adds_up_as_datasets_do(run: tuple[Path, np.ndarray]) -> None:
    directory, rows = run
    late = rows[rows["step"] > 20]
    ledger = Ledger(directory)
    with Query(ledger) as query:
        create_figures(query, "domain", Phase("late", 21, 60), Documents(ledger))
        found = {(row["name"], row["target"]): row for row in query.rows("SELECT * FROM figures")}
        create_figures(query, Level.dataset, Phase("late", 21, 60))
        datasets = {(row["dataset_name"], row["target"]): row for row in query.rows("SELECT * FROM figures")}
    assert set(found) == set(datasets) == {(name, target) for name in DOMAINS for target in TARGETS}
    for key, row in found.items():
        own = late[late["dataset"] == DOMAINS.index(key[0])]
        assert row["samples"] == len(own) and row["negative_share"] == (own[key[1]] < 0).mean()
        assert row["tokens"] == 65 * len(own)  # with the label of the last position
        assert row["standard_error"] == pytest.approx(clustered_error(own[key[1]], own["step"]), rel=1e-6)
        for name in ("value", "mean", "standard_error", "negative_share", "normalised", "relative"):
            assert row[name] == pytest.approx(datasets[key][name], rel=1e-9), name
        mine = normalised(late, key[1])[late["dataset"] == DOMAINS.index(key[0])]
        assert row["normalised"] == pytest.approx(mine.sum(), rel=1e-9)


def test_sources_are_the_sums_of_their_documents(run: tuple[Path, np.ndarray]) -> None:
    directory, _ = run
    ledger = Ledger(directory)
    documents = Documents(ledger)
    with Query(ledger) as query:
        create_figures(query, Level.document, whole_run(60), documents)
        expected: dict[tuple[str, str], float] = {}
        for row in query.rows("SELECT * FROM figures"):
            key = (documents.metadata(row["dataset"], row["document"])["source"], row["target"])
            expected[key] = expected.get(key, 0.0) + row["value"]
        whole = query.rows("SELECT sum(value) AS value, sum(normalised) AS normalised FROM figures")[0]
        create_figures(query, "source", whole_run(60), documents)
        found = {(row["name"], row["target"]): row["value"] for row in query.rows("SELECT * FROM figures")}
        sources = query.rows("SELECT sum(value) AS value, sum(normalised) AS normalised FROM figures")[0]
    assert len(found) == len(expected) > 2 * len(DOMAINS)
    assert found == pytest.approx(expected, rel=1e-9) and sources == pytest.approx(whole, rel=1e-9)


def test_ranges_of_steps_do_not_change_the_result(
    run: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = run
    ledger, select = Ledger(directory), "SELECT * FROM figures ORDER BY dataset, document, target"
    with Query(ledger) as query:
        assert list(query.step_ranges(1, 60)) == [(1, 60)]
        create_figures(query, Level.document, whole_run(60), Documents(ledger))
        whole = query.rows(select)
        ranges = list(query.step_ranges(1, 60, rows=50))
        assert len(ranges) == 20 and ranges[:2] == [(1, 3), (4, 6)] and ranges[-1][1] == 60
        monkeypatch.setattr(query, "step_ranges", lambda first, last, rows=0: ranges)
        create_figures(query, Level.document, whole_run(60), Documents(ledger))
        parts = query.rows(select)
    assert_same(parts, whole)


def test_an_unknown_field_names_the_known_ones(run: tuple[Path, np.ndarray]) -> None:
    ledger = Ledger(run[0])
    with pytest.raises(
        UserError, match=r"no dataset .* 'url' \(fields: domain, file, source\); keep it with"
    ):
        Groups(ledger, Documents(ledger), "url")


def test_documents_without_the_field_are_a_group(run: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    from inrun_megatron.data.corpora import write_corpus
    from inrun_megatron.data.tokenizers import ByteTokenizer
    from inrun_megatron.data.train import build_datasets

    records = [
        {"text": "words " * 30, "language": language} for language in ("en", None, "de", "en", None) * 4
    ]
    with_field = write_corpus(tmp_path / "mixed", records, "bytes")
    train, _ = build_datasets(
        data_path=["1", with_field, "1", Ledger(run[0]).datasets[0]["path_prefix"]],
        split="100,0,0",
        seq_length=64,
        train_samples=40,
        valid_samples=0,
        seed=1,
        tokenizer=ByteTokenizer(),
    )
    described = description([entry.to_dict() for entry in train.table])
    with create_ledger(tmp_path / "shapley", described):
        writer = LedgerWriter(tmp_path / "shapley", 0)
        writer.append(1, [0] * 9 + [1] * 3, [*range(9), *range(3)], [64] * 12, np.ones((12, 2)))
        commit(tmp_path / "shapley", 1, writer.write_parts())
    ledger = Ledger(tmp_path / "shapley")
    with Query(ledger) as query:
        create_figures(query, "language", whole_run(1), Documents(ledger), target="code")
        found = {row["name"]: row["value"] for row in query.rows("SELECT * FROM figures")}
    assert set(found) == {"en", "de", NOT_GIVEN} and sum(found.values()) == pytest.approx(12)
    assert found[NOT_GIVEN] > 3  # all of the other dataset, and its share of this one


def segmented(directory: Path) -> np.ndarray:
    """Three steps of four samples, cut into 1 to 3 segments. Returns the segments' values [12 samples, 3, K], 0 padded."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(12, 3, len(TARGETS)))
    for sample in range(12):
        values[sample, 1 + sample % 3 :] = 0
    with create_ledger(directory, description(shapley={"granularity": "document"})):
        writer = LedgerWriter(directory, 0)
        for step in (1, 2, 3):
            own = range(4 * step - 4, 4 * step)
            where = [(sample, segment) for sample in own for segment in range(1 + sample % 3)]
            sample, segment = np.array(where).T
            writer.append(
                step, sample % 2, sample, [16] * len(where), values[sample, segment], segment=segment
            )
            total = values[list(own)].sum(1)
            writer.append_step(step_record(step, total, np.array([6.0 - step, 5.0]), 4 * step))
        commit(directory, 3, writer.write_parts())
    return values


def test_cut_samples_count_as_samples(tmp_path: Path) -> None:
    values = segmented(tmp_path)
    totals = values.sum(1)[:, 0]
    with Query(Ledger(tmp_path)) as query:
        cells = query.rows("SELECT * FROM cells WHERE target = 'code' ORDER BY step, dataset")
        assert [cell["n"] for cell in cells] == [2] * 6
        create_figures(query, Level.sample, whole_run(3), target="code")
        found = {row["sample"]: row for row in query.rows("SELECT * FROM figures")}
        parts = query.rows("SELECT count(*) AS n, sum(normalised) AS normalised FROM parts")[0]
        scored = query.rows("SELECT count(*) AS n, sum(normalised) AS normalised FROM scored")[0]
        create_figures(query, Level.dataset, whole_run(3), target="code")
        datasets = query.rows("SELECT * FROM figures ORDER BY dataset")
    assert [found[sample]["value"] for sample in range(12)] == pytest.approx(totals.tolist())
    assert [found[sample]["tokens"] for sample in range(12)] == [
        16 * (1 + sample % 3) for sample in range(12)
    ]
    assert (scored["n"], parts["n"]) == (12 * 2, (1 + 2 + 3) * 4 * 2)
    assert scored["normalised"] == pytest.approx(parts["normalised"])
    for index, row in enumerate(datasets):
        own = totals[index::2]
        assert row["samples"] == 6 and row["negative_share"] == (own < 0).mean()
        assert row["mean"] == pytest.approx(own.mean())


def test_relative_values_are_shares_of_the_realised_change(tmp_path: Path) -> None:
    """Target code falls by 1 in steps 1 and 2, prose stays where it is: nothing to relate to."""
    values = segmented(tmp_path).sum(1)
    with Query(Ledger(tmp_path)) as query:
        rows = query.rows("SELECT * FROM scored ORDER BY target, sample")
    for row in rows:
        known = row["target"] == "code" and row["step"] < 3
        assert row["relative"] == (pytest.approx(values[row["sample"], 0] / 1.0) if known else None)


# --- other engines ---------------------------------------------------------------------------------------------------


def expected_sums(rows: np.ndarray) -> dict[str, float]:
    return {target: float(rows[target].sum()) for target in TARGETS}


def test_pandas_and_polars_read_the_files(run: tuple[Path, np.ndarray]) -> None:
    directory, rows = run
    glob = str(directory / "shapley" / "values" / "*.parquet")
    frame = pandas.read_parquet(directory / "shapley" / "values")
    assert frame.groupby("target", observed=True)["value"].sum().to_dict() == pytest.approx(
        expected_sums(rows)
    )
    assert str(frame["value"].dtype) == "float64" and str(frame["sample"].dtype) == "int64"
    lazy = polars.scan_parquet(glob).group_by("target").agg(polars.col("value").sum()).collect()
    found = {str(row["target"]): row["value"] for row in lazy.to_dicts()}
    assert found == pytest.approx(expected_sums(rows))
    steps = pandas.read_parquet(directory / "shapley" / "steps")
    assert len(steps) == 60 * len(TARGETS) and set(steps["status"]) == {"scored"}


@pytest.mark.long
def test_spark_runs_the_same_sql(run: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """The reports' SELECTs, relation by relation, against DuckDB's results."""
    import shutil

    pyspark = pytest.importorskip("pyspark.sql")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    directory, _ = run
    ledger = Ledger(directory)
    keys = ["dataset", "sample"]
    statements = {
        "domains": sql.DOMAINS.format(first=1, last=60),
        "figures": sql.figures(
            "m.dataset", f"({sql.moments(['dataset'], 'SELECT * FROM cells WHERE step > 20')}) m"
        ),
        "samples": sql.moments(keys, sql.rows_of(keys, "(SELECT * FROM samples WHERE step < 9)")),
    }
    with Query(ledger) as query:
        expected = {name: query.table(text) for name, text in statements.items()}
        steps = query.table("SELECT * FROM ledger_steps")
    spark = (
        pyspark.SparkSession.builder.master("local[1]")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.shuffle.partitions", "1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .getOrCreate()
    )
    try:
        spark.read.parquet(*ledger.paths("values")).createOrReplaceTempView("ledger_values")
        rows = [tuple(row.values()) for row in steps.to_pylist()]
        spark.createDataFrame(rows, "step int, target string, realised double").createOrReplaceTempView(
            "ledger_steps"
        )
        for name, text in (
            ("samples", sql.SAMPLES),
            ("cells", sql.CELLS),
            ("scales", sql.SCALES),
            ("scored", sql.SCORED),
            ("parts", sql.PARTS),
        ):
            spark.sql(text).createOrReplaceTempView(name)
        for name, text in statements.items():
            found = [row.asDict() for row in spark.sql(text).collect()]
            assert_same(found, expected[name].to_pylist())
    finally:
        spark.stop()


def test_an_empty_range_gives_no_figures(run: tuple[Path, np.ndarray]) -> None:
    ledger = Ledger(run[0])
    with Query(ledger) as query:
        for level in (Level.document, "domain"):
            create_figures(query, level, Phase("none", 900, 901), Documents(ledger))
            table = query.table("SELECT * FROM figures")
            assert isinstance(table, pa.Table) and table.num_rows == 0
