"""Figures of documents and groups against their definition, sample by sample, on ledgers of several shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from inrun_megatron.ledger import Ledger
from inrun_megatron.report.documents import parts as draw_parts
from inrun_megatron.report.documents import sums
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.documents.moments import ranges_of_steps
from inrun_megatron.report.documents.sums import Leading
from inrun_megatron.report.phases import Phase, whole_run
from inrun_megatron.report.query import Query
from inrun_megatron.report.values.ranking import Level, RankBy, create_figures, ranked
from tests import document_figures
from tests.document_figures import (
    LATE,
    assert_figures_are_defined,
    assert_sql_gives_the_same,
    write_cut_run,
)
from tests.synthetic_ledger import TARGETS

once, epochs = document_figures.once, document_figures.epochs  # fixtures

ONE = draw_parts.PIECE_PARTS  # all draws in one piece


@pytest.fixture(scope="module")
def cut(once: Path, epochs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Ledger]:
    """By granularity and shape: the data of `once` and `epochs` in runs whose samples are cut."""
    return {
        (granularity, shape): write_cut_run(
            tmp_path_factory.mktemp("cut"), Ledger(source).datasets, granularity
        )
        for granularity in ("document", "token")
        for shape, source in (("once", once), ("epochs", epochs))
    }


@pytest.mark.parametrize(
    ("phase", "shape", "spans"),
    [
        pytest.param(whole_run(60), "once", ONE, id="whole run-once-one piece"),
        pytest.param(whole_run(60), "epochs", 5, id="whole run-epochs-small pieces"),
        pytest.param(LATE, "once", 5, id="late-once-small pieces"),
        pytest.param(LATE, "epochs", ONE, id="late-epochs-one piece"),
    ],
)
def test_documents(
    shape: str, phase: Phase, spans: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw_parts, "PIECE_PARTS", spans)
    assert_figures_are_defined(Ledger(request.getfixturevalue(shape)), phase)


@pytest.mark.parametrize("shape", ["once", "epochs"])
def test_documents_of_several_ranges_of_steps(
    shape: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "DRAW_BYTES", 50 * (sums.BYTES_PER_DRAW + 8 * len(TARGETS)))
    ledger = Ledger(request.getfixturevalue(shape))
    with Query(ledger) as query:
        limit = sums.draws_at_a_time(len(TARGETS)) * len(TARGETS)
        assert len(list(query.step_ranges(1, 60, limit))) == 10
    assert_figures_are_defined(ledger, LATE)


@pytest.mark.parametrize("spans", [40, 1 << 19], ids=["small pieces", "one piece"])
@pytest.mark.parametrize("shape", ["once", "epochs"])
def test_groups(
    shape: str, spans: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw_parts, "PIECE_PARTS", spans)
    assert_figures_are_defined(Ledger(request.getfixturevalue(shape)), LATE, "source")


@pytest.mark.parametrize(
    ("granularity", "shape", "parts"),
    [
        # Each granularity has its own way to documents, and a document that is read once ends at the edge of a piece or
        # goes on in the next one.
        pytest.param("sample", "once", 40, id="sample-once-small pieces"),
        pytest.param("sample", "epochs", ONE, id="sample-epochs-one piece"),
        pytest.param("document", "once", 40, id="document-once-small pieces"),
        pytest.param("document", "once", ONE, id="document-once-one piece"),
        pytest.param("document", "epochs", 40, id="document-epochs-small pieces"),
        pytest.param("token", "once", 40, id="token-once-small pieces"),
        pytest.param("token", "epochs", ONE, id="token-epochs-one piece"),
    ],
)
def test_sql_gives_the_same(
    granularity: str,
    shape: str,
    parts: int,
    cut: dict[tuple[str, str], Ledger],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(draw_parts, "PIECE_PARTS", parts)
    ledger = Ledger(request.getfixturevalue(shape)) if granularity == "sample" else cut[granularity, shape]
    assert_sql_gives_the_same(ledger, Phase("late", 11, 30))


def test_ranges_of_steps_are_of_rows_where_samples_are_cut(cut: dict[tuple[str, str], Ledger]) -> None:
    with Query(cut["token", "once"]) as query:
        ranges = ranges_of_steps(query, Phase("late", 11, 30), 3 * 8 * 64 * len(TARGETS))
    assert ranges == [(11, 13), (14, 16), (17, 19), (20, 22), (23, 25), (26, 28), (29, 30)]


def test_the_leading_documents_are_those_of_all(once: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw_parts, "PIECE_PARTS", 40)
    ledger = Ledger(once)
    documents = Documents(ledger)
    with Query(ledger) as query:
        for measure in RankBy:
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


def test_documents_without_a_loss_token_do_not_lead_per_token() -> None:
    columns = {"value": np.array([5.0, 1.0, -1.0, 0.0]), "tokens": np.array([0, 10, 10, 0])}
    assert Leading("per_token", 1).of(columns).tolist() == [False, True, True, False]
