"""Figures of the report on runs that were resumed with other settings of scoring, or trained without it for a while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inrun_megatron.ledger import Ledger, LedgerWriter, StepRecord, commit, open_ledger
from inrun_megatron.ledger.description import Starts
from inrun_megatron.report.overview import describe_run
from inrun_megatron.report.page.figures import build_figures
from inrun_megatron.report.page.html import render
from inrun_megatron.report.page.losses import loss_curve, target_series
from inrun_megatron.report.page.timing import timing
from inrun_megatron.report.phases import Phase
from tests.report_runs import record, short_ledger, terms
from tests.synthetic_ledger import description


def resumed_ledger(
    directory: Path, first: list[StepRecord], second: list[StepRecord], **shapley: Any
) -> Ledger:
    """`second` by a start that went on after step 10, from the commit of step 4, with these settings of scoring."""
    short_ledger(directory, first)
    changed = description(shapley={"estimator": "first_order"} | shapley)
    with open_ledger(directory, changed) as ledger:
        Starts(directory, ledger.run).append(10, changed, ledger_step=4)
        writer = LedgerWriter(directory, 0)
        for record in second:
            writer.append_step(record)
        commit(directory, second[-1].step, writer.write_parts(), "iter")
        writer.close()
    return Ledger(directory)


def test_a_stretch_without_scoring_has_no_prediction(tmp_path: Path) -> None:
    first, second = [record(3, 3.0, 0.1), record(4, 2.9, 0.1)], [record(11, 1.5, 0.1), record(12, 1.4, 0.1)]
    ledger = resumed_ledger(tmp_path, first, second, interval=1)
    values = terms(ledger)["values"]
    assert np.isnan(values[1]) and [values[0], values[2]] == pytest.approx([0.1, 0.1])
    curve = loss_curve(target_series(ledger, ledger.steps(), "code"), [Phase("all", 1, 12)])
    assert [point["run"] for point in curve] == [0, 0, 1, 1]


def test_a_resume_that_changes_the_interval_changes_what_steps_stand_for(tmp_path: Path) -> None:
    seconds: dict[str, Any] = {"seconds_total": 0.5, "seconds_scoring": 0.1, "samples": 10}
    first = [record(step, 3.0, 0.1, **seconds) for step in (3, 4)]
    second = [record(step, 3.0, 0.1, **seconds) for step in (14, 18)]
    second.append(record(22, 3.0, None, "skipped: overflow", seconds_total=0.5, seconds_scoring=0.1))
    ledger = resumed_ledger(tmp_path, first, second, interval=4, refresh=2)
    found = timing(ledger, ledger.steps())
    assert found["interval"] == pytest.approx(14 / 5)
    assert found["added"] == pytest.approx(0.25)
    assert found["added_over_run"] == pytest.approx(5 * 0.1 / (14 * 0.4))
    # a validation pass in five of the 14 steps; a skipped step scores none of its batch
    expected = {"sequences": 16, "samples": 10.0, "added_over_run": pytest.approx(1.6 * 5 / 14)}
    assert found["validation"] == expected
    assert "over the run, one step in 2.8 scored" in render(build_figures(tmp_path))
    scoring = describe_run(ledger)["scoring"]
    assert scoring.endswith(
        "every step; from step 11: first_order, by sample, every 4 steps, direction anew every 2 scored steps"
    )
