"""Figures of documents and groups by their definition, sample by sample, and ledgers of several shapes to compare on."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from inrun_megatron.data.identity import SampleResolver
from inrun_megatron.ledger import Ledger, LedgerWriter, commit, create_ledger
from inrun_megatron.report import sql
from inrun_megatron.report.documents.attribution import create_document_rows
from inrun_megatron.report.documents.groups import Groups
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.documents.moments import create_document_moments, create_group_moments
from inrun_megatron.report.phases import Phase
from inrun_megatron.report.query import Query
from inrun_megatron.report.values.ranking import Level, create_figures
from tests.synthetic_ledger import Shape, description, prepared_datasets, step_record, write_run

LATE = Phase("late", 21, 60)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch: each document has one place in the stream, and some are in several samples."""
    directory = tmp_path_factory.mktemp("once")
    table = prepared_datasets(directory / "data", samples=480, documents=160)
    write_run(directory / "shapley", Shape(), description(table))
    resolver = Documents(Ledger(directory)).resolver
    assert all(resolver.reads_once(dataset) for dataset in range(3))
    return directory


@pytest.fixture(scope="module")
def epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of several epochs of few documents: one is read again and again, at times twice in one sample."""
    directory = tmp_path_factory.mktemp("epochs")
    table = prepared_datasets(directory / "data", samples=700, documents=12)
    write_run(directory / "shapley", Shape(), description(table))
    resolver = Documents(Ledger(directory)).resolver
    assert not any(resolver.reads_once(dataset) for dataset in range(3))
    return directory


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


# What a group's documents have in each sample, and all of that in one step: samples of one step move together.
GROUP_DRAWS = """
WITH group_rows AS (
    SELECT r.step, r.dataset, r.sample, g.grp, r.target, sum(r.tokens) AS tokens, sum(r.value) AS value
    FROM document_rows r JOIN document_groups g ON r.dataset = g.dataset AND r.document = g.document
    GROUP BY r.step, r.dataset, r.sample, g.grp, r.target
)
SELECT step, grp, target, count(*) AS n, sum(CAST(tokens AS BIGINT)) AS tokens, sum(value) AS total,
       sum(CASE WHEN value < 0 THEN 1 ELSE 0 END) AS negatives
FROM group_rows GROUP BY step, grp, target
"""


def _groups_of_documents(ledger: Ledger, groups: Groups) -> pa.Table:
    """Columns dataset, document, grp."""
    tables = []
    for dataset in range(len(ledger.datasets)):
        group = groups.of(dataset)
        own = np.full(len(group), dataset, np.int16)
        tables.append(pa.table({"dataset": own, "document": np.arange(len(group)), "grp": group}))
    return pa.concat_tables(tables)


def assert_sql_gives_the_same(ledger: Ledger, phase: Phase) -> None:
    """Moments against the attribution in SQL that `inrun show` reads: rows joined with their samples' documents."""
    documents = Documents(ledger)
    groups = Groups(ledger, documents, "source")
    with Query(ledger) as query:
        create_document_rows(query, documents, f"step BETWEEN {phase.first} AND {phase.last}")
        query.register("document_groups", _groups_of_documents(ledger, groups))
        for keys, draws in (
            (["dataset", "document"], sql.rows_of(["dataset", "document"], "document_rows")),
            (["grp"], GROUP_DRAWS),
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
