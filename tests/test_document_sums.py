"""Figures of documents and groups against their definition, sample by sample, on ledgers of several shapes."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from inrun_megatron.data.identity import SampleResolver
from inrun_megatron.errors import UserError
from inrun_megatron.ledger import (
    Ledger,
    LedgerWriter,
    StepRecord,
    commit,
    create_ledger,
    open_ledger,
    rollback,
)
from inrun_megatron.report import document_sums, group_sums, sql
from inrun_megatron.report.attribution import create_document_rows
from inrun_megatron.report.document_sums import Leading
from inrun_megatron.report.documents import Documents
from inrun_megatron.report.domains import domain_figures
from inrun_megatron.report.draws import in_order, read_draws
from inrun_megatron.report.groups import Groups
from inrun_megatron.report.moments import _ranges, create_document_moments, create_group_moments
from inrun_megatron.report.phases import Phase, whole_run
from inrun_megatron.report.query import Query
from inrun_megatron.report.ranking import Level, Measure, create_figures, ranked
from tests.synthetic_ledger import (
    TARGETS,
    Shape,
    description,
    prepared_datasets,
    step_record,
    values_of,
    write_run,
)

LATE = Phase("late", 21, 60)


def definition(
    ledger: Ledger, documents: Documents, phase: Phase, group: str | None = None
) -> dict[Any, dict[str, Any]]:
    """Figures by (key, target) from the rows one by one; key: (dataset, document), or the value of the field `group`."""
    rows = [row for row in ledger.values().to_table().to_pylist() if np.isfinite(row["value"])]
    scale: dict[tuple[int, str], list[float]] = defaultdict(list)
    for row in rows:
        scale[row["step"], row["target"]].append(abs(row["value"]))
    realised = {(row["step"], row["target"]): row["realised"] for row in ledger.steps().to_pylist()}
    # One draw is one sample for a document, and all samples of one step for a group.
    draws: dict[Any, dict[Any, list[tuple[float, int, float, float | None]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    steps: dict[Any, set[int]] = defaultdict(set)
    for row in rows:
        if not phase.first <= row["step"] <= phase.last:
            continue
        step = (row["step"], row["target"])
        spans = documents.spans(row["dataset"], row["sample"])
        length = sum(span.end - span.start for span in spans)
        parts: dict[Any, int] = defaultdict(int)
        for span in spans:
            key: Any = (row["dataset"], span.document)
            if group is not None:
                key = documents.metadata(*key)[group]
            parts[key] += span.end - span.start
        for key, tokens in parts.items():
            value = row["value"] * tokens / length
            change = value / abs(realised[step]) if realised[step] else None
            draw = row["step"] if group is not None else (row["step"], row["sample"])
            nu = value / float(np.mean(scale[step]))
            draws[key, row["target"]][draw].append((value, tokens, nu, change))
            steps[key, row["target"]].add(row["step"])
    return {key: _figures(list(own.values()), steps[key]) for key, own in draws.items()}


def _figures(draws: list[list[tuple[float, int, float, float | None]]], steps: set[int]) -> dict[str, Any]:
    samples = [sample for draw in draws for sample in draw]
    total, n = np.array([sum(s[0] for s in draw) for draw in draws]), np.array([len(draw) for draw in draws])
    mean, count = total.sum() / n.sum(), len(draws)
    error = np.sqrt(count / (count - 1) * ((total - n * mean) ** 2).sum()) / n.sum() if count > 1 else None
    changes = [sample[3] for sample in samples if sample[3] is not None]
    return {
        "samples": len(samples),
        "tokens": sum(sample[1] for sample in samples),
        "first_step": min(steps),
        "last_step": max(steps),
        "value": total.sum(),
        "mean": mean,
        "standard_error": error,
        "negative_share": np.mean([sample[0] < 0 for sample in samples]),
        "per_token": total.sum() / sum(sample[1] for sample in samples),
        "normalised": sum(sample[2] for sample in samples),
        "relative": sum(changes) if changes else None,
    }


def assert_figures_are_defined(ledger: Ledger, phase: Phase, group: str | None = None) -> None:
    documents = Documents(ledger)
    expected = definition(ledger, documents, phase, group)
    with Query(ledger) as query:
        create_figures(query, Level.document if group is None else group, phase, documents)
        found = query.rows("SELECT * FROM figures")
    names = ["name"] if group else ["dataset", "document"]
    keyed = {
        ((row["name"] if group else (row["dataset"], row["document"])), row["target"]): row for row in found
    }
    assert len(found) == len(keyed) == len(expected) > 10
    for key, row in keyed.items():
        assert set(row) - {"target", "dataset_name", *names} == set(expected[key])
        for name, value in expected[key].items():
            # An error of nearly 0 is the root of a difference of nearly equal sums.
            near = pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value
            assert row[name] == near, (key, name)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch: each document has one place in the stream, and some are in several samples."""
    directory = tmp_path_factory.mktemp("once")
    table = prepared_datasets(directory / "data", samples=480, documents=160)
    write_run(directory / "shapley", Shape(), description(table))
    resolver = Documents(Ledger(directory)).resolver
    assert all(resolver.reads_once(dataset) for dataset in range(3))
    return directory


@pytest.fixture(scope="module")
def epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several epochs of few documents: a document is read again and again, at times twice in one sample."""
    directory = tmp_path_factory.mktemp("epochs")
    table = prepared_datasets(directory / "data", samples=700, documents=12)
    write_run(directory / "shapley", Shape(), description(table))
    resolver = Documents(Ledger(directory)).resolver
    assert not any(resolver.reads_once(dataset) for dataset in range(3))
    return directory


@pytest.mark.parametrize("spans", [5, 1 << 19], ids=["small pieces", "one piece"])
@pytest.mark.parametrize("shape", ["once", "epochs"])
@pytest.mark.parametrize("phase", [whole_run(60), LATE], ids=["whole run", "late"])
def test_documents(
    shape: str, phase: Phase, spans: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_sums, "PIECE_PARTS", spans)
    assert_figures_are_defined(Ledger(request.getfixturevalue(shape)), phase)


@pytest.mark.parametrize("shape", ["once", "epochs"])
def test_documents_of_several_ranges_of_steps(
    shape: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_sums, "DRAW_BYTES", 50 * (document_sums.BYTES_PER_DRAW + 8 * len(TARGETS)))
    ledger = Ledger(request.getfixturevalue(shape))
    with Query(ledger) as query:
        limit = document_sums.draws_at_a_time(len(TARGETS)) * len(TARGETS)
        assert len(list(query.step_ranges(1, 60, limit))) == 10
    assert_figures_are_defined(ledger, LATE)


@pytest.mark.parametrize("spans", [40, 1 << 19], ids=["small pieces", "one piece"])
@pytest.mark.parametrize("shape", ["once", "epochs"])
def test_groups(
    shape: str, spans: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_sums, "PIECE_PARTS", spans)
    assert_figures_are_defined(Ledger(request.getfixturevalue(shape)), LATE, "source")


def assert_sql_gives_the_same(ledger: Ledger, phase: Phase) -> None:
    """Moments against the attribution in SQL that `inrun show` reads: rows joined with their samples' documents."""
    documents = Documents(ledger)
    groups = Groups(ledger, documents, "source")
    with Query(ledger) as query:
        create_document_rows(query, documents, f"step BETWEEN {phase.first} AND {phase.last}")
        query.register("document_groups", groups.documents())
        for keys, draws in (
            (["dataset", "document"], sql.rows_of(["dataset", "document"], "document_rows")),
            (["grp"], sql.steps_of(["grp"], f"({sql.GROUP_ROWS})")),
        ):
            if keys == ["grp"]:
                create_group_moments(query, phase, None, documents, groups)
            else:
                create_document_moments(query, phase, None, documents, None)
            order = f"ORDER BY {', '.join(keys)}, target"
            found = query.rows(f"SELECT * FROM moments {order}")
            expected = query.rows(f"SELECT * FROM ({sql.moments(keys, draws)}) {order}")
            assert len(found) == len(expected) > 10
            for one, other in zip(found, expected, strict=True):
                assert one == {
                    name: pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value
                    for name, value in other.items()
                }


def write_cut_run(directory: Path, table: list[dict[str, Any]], granularity: str, seed: int = 3) -> Ledger:
    """A run scored by document or by token: 30 steps of 8 samples, a row for each segment and target."""
    generator = np.random.default_rng(seed)
    resolver = SampleResolver(table)
    with create_ledger(directory / "shapley", description(table, shapley={"granularity": granularity})):
        writers = [LedgerWriter(directory / "shapley", number) for number in range(2)]
        losses = np.array([5.0, 5.0])
        for step in range(1, 31):
            dataset, sample = np.arange(8) % 3, 3 * step + np.arange(8) // 3
            counts = np.full(8, 64)
            if granularity == "document":
                for row, (d, k) in enumerate(zip(dataset, sample, strict=True)):
                    tokens = resolver.tokens(int(d), int(k))[:63]
                    counts[row] = 1 + (tokens == resolver.end_of_document(int(d))).sum()
            segment = np.concatenate([np.arange(count) for count in counts])
            values = generator.normal(size=(len(segment), 2)) * 1e-3
            writers[0].append_step(step_record(step, values, losses, 8 * step))
            losses = losses - 0.9 * values.sum(0)
            sample, dataset = np.repeat(sample, counts), np.repeat(dataset, counts)
            half = int(counts[:4].sum())
            for writer, own in zip(writers, (slice(half), slice(half, None)), strict=True):
                n = len(segment[own])
                writer.append(
                    step, dataset[own], sample[own], [64 // 8] * n, values[own], segment=segment[own]
                )
            if step % 10 == 0:
                commit(directory / "shapley", step, [p for writer in writers for p in writer.write_parts()])
    return Ledger(directory)


@pytest.mark.parametrize("parts", [40, 1 << 19], ids=["small pieces", "one piece"])
@pytest.mark.parametrize("shape", ["once", "epochs"])
@pytest.mark.parametrize("granularity", ["sample", "document", "token"])
def test_sql_gives_the_same(
    granularity: str,
    shape: str,
    parts: int,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (document_sums, group_sums):
        monkeypatch.setattr(module, "PIECE_PARTS", parts)
    ledger = Ledger(request.getfixturevalue(shape))
    if granularity != "sample":
        ledger = write_cut_run(tmp_path, ledger.datasets, granularity)
    assert_sql_gives_the_same(ledger, Phase("late", 11, 30))


def test_ranges_of_steps_are_of_rows_where_samples_are_cut(once: Path, tmp_path: Path) -> None:
    ledger = write_cut_run(tmp_path, Ledger(once).datasets, "token")
    with Query(ledger) as query:
        ranges = _ranges(query, Phase("late", 11, 30), 3 * 8 * 64 * len(TARGETS))
    assert ranges == [(11, 13), (14, 16), (17, 19), (20, 22), (23, 25), (26, 28), (29, 30)]


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


def test_the_leading_documents_are_those_of_all(once: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_sums, "PIECE_PARTS", 40)
    ledger = Ledger(once)
    documents = Documents(ledger)
    with Query(ledger) as query:
        for measure in Measure:
            found: list[list[dict[str, Any]]] = []
            counts = []
            for leading in (None, Leading(measure.name, 3)):
                create_figures(query, Level.document, LATE, documents, leading=leading)
                counts.append(query.rows("SELECT count(*) AS n FROM figures")[0]["n"])
                found.append(
                    [
                        row
                        for target in TARGETS
                        for worst in (False, True)
                        for row in ranked(query, Level.document, target, measure, worst, 3)
                    ]
                )
            assert counts[1] < counts[0]
            assert len(found[0]) == 12
            assert [(row["dataset"], row["document"]) for row in found[1]] == [
                (row["dataset"], row["document"]) for row in found[0]
            ]


def test_ties_and_unknown_measures_are_not_left_out() -> None:
    columns = {
        "value": np.array([3.0, 1.0, 2.0, 2.0, 2.0, 0.0, 0.5]),
        "relative": pa.array([None, 1.0, None, 2.0, None, 3.0, 4.0]),
    }
    assert Leading("value", 2).of(columns).tolist() == [True, False, True, True, True, True, True]
    assert Leading("relative", 1).of(columns)[[1, 6]].all()
    assert Leading("value", 7).of(columns).all()


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


def test_a_sample_of_two_steps_is_two_draws(once: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    with create_ledger(tmp_path / "shapley", description(Ledger(once).datasets)):
        writer = LedgerWriter(tmp_path / "shapley", 0)
        for step in (1, 2, 3):
            values = generator.normal(size=(20, 2))
            writer.append(step, [0] * 20, range(20), [64] * 20, values)
            writer.append_step(step_record(step, values, np.array([5.0, 5.0]), 20))
        commit(tmp_path / "shapley", 3, writer.write_parts())
    assert_figures_are_defined(Ledger(tmp_path), whole_run(3))
    with Query(ledger := Ledger(tmp_path)) as query:
        create_figures(query, Level.document, whole_run(3), Documents(ledger), "code")
        assert {row["target"] for row in query.rows("SELECT * FROM figures")} == {"code"}


def test_a_damaged_part_is_named(once: Path, tmp_path: Path) -> None:
    ledger = rewritten(once, tmp_path, lambda table: table)
    path = Path(ledger.paths("values")[1])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"{path.name} cannot be read: .*inrun verify"):
        read_draws(ledger, TARGETS, 1, 60)


def test_results_come_in_order_and_workers_do_not_run_far_ahead() -> None:
    taken: list[int] = []

    def items() -> Any:
        for number in range(50):
            taken.append(number)
            yield number

    for position, result in enumerate(in_order(lambda number: number * 2, items())):
        assert result == 2 * position and len(taken) <= position + 10

    def fail(number: int) -> int:
        raise UserError(f"no {number}")

    with pytest.raises(UserError, match="no 0"):
        list(in_order(fail, range(5)))


def test_documents_without_a_loss_token_do_not_lead_per_token() -> None:
    columns = {"value": np.array([5.0, 1.0, -1.0, 0.0]), "tokens": np.array([0, 10, 10, 0])}
    assert Leading("per_token", 1).of(columns).tolist() == [False, True, True, False]


def test_nan_is_left_out_where_statistics_do_not_show_it(tmp_path: Path) -> None:
    """A part without infinities: by the statistics of its file every value is small."""
    directory = tmp_path / "ledger"
    with create_ledger(directory, description()):
        writer = LedgerWriter(directory, 0)
        for step, first in ((1, 1.0), (2, np.nan)):
            writer.append(step, [0, 0], [3, 3 + step], [64, 64], [[first, 2.0], [-1.0, -1.0]])
            writer.append_step(StepRecord(step, target_loss=[3.0 / first, 3.0]))
        commit(directory, 2, writer.write_parts())
        writer.close()
    with Query(Ledger(directory)) as query:
        code, prose = domain_figures(query, [whole_run(2)])
        create_figures(query, Level.sample, whole_run(2))
        best = [ranked(query, Level.sample, target)[0] for target in TARGETS]
    assert (code.samples, code.sum, code.negative_share) == (3, -1.0, 2 / 3)
    assert (prose.samples, prose.sum) == (4, 2.0)
    assert best[0]["relative"] is None  # nor is a loss change that is not finite
    # Although the first target has the sample in one step only.
    assert [(row["sample"], row["samples"], row["value"]) for row in best] == [(3, 1, 1.0), (3, 2, 4.0)]
