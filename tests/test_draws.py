"""Draws: a sample in one step is one, and workers take pieces of them in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inrun_megatron.errors import UserError
from inrun_megatron.ledger import Ledger, LedgerWriter, commit, create_ledger
from inrun_megatron.report.documents.draws import in_order
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.phases import whole_run
from inrun_megatron.report.query import Query
from inrun_megatron.report.values.ranking import Level, create_figures
from tests import document_figures
from tests.document_figures import assert_figures_are_defined
from tests.synthetic_ledger import description, step_record

once = document_figures.once  # a fixture


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
