"""Series of steps: losses and what explains them, scored steps that stand for others, times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inrun_megatron.report.overview import describe_targets
from inrun_megatron.report.page.figures import build_figures
from inrun_megatron.report.page.html import render
from inrun_megatron.report.page.losses import (
    POINTS,
    explained,
    explained_curve,
    loss_curve,
    target_series,
    thinned,
)
from inrun_megatron.report.page.timing import timing
from inrun_megatron.report.phases import Phase
from tests.report_runs import record, short_ledger, terms


def test_stretches_without_a_prediction_have_no_explained_fraction(tmp_path: Path) -> None:
    records = [record(1, 3.0, 0.1), record(2, 2.9, None, "unscored: no optimizer state"), record(3, 2.5, 0.2)]
    series = target_series(ledger := short_ledger(tmp_path, records), ledger.steps(), "code")
    assert [(stretch["first"], stretch["last"]) for stretch in explained_curve(series)] == [(1, 2)]
    assert explained_curve(series)[0]["explained_fraction"] == pytest.approx((0.1 + 0.01 - 0.001) / 0.1)


def test_a_scored_step_stands_for_its_interval(tmp_path: Path) -> None:
    ledger = short_ledger(
        tmp_path, [record(5, 3.0, 0.1), record(10, 2.4, 0.1), record(20, 1.0, 0.1)], interval=5
    )
    assert terms(ledger)["values"] == pytest.approx([0.5, 1.0])
    assert terms(ledger)["momentum"] == pytest.approx([0.25, 1.0])
    assert explained(target_series(ledger, ledger.steps(), "code"), [], 20)[0]["realised"] == pytest.approx(
        2.0
    )


def test_at_the_drift_point_momentum_and_decay_are_those_of_the_later_step(tmp_path: Path) -> None:
    records = [record(step, 3.0 - step, 0.1, base="drift") for step in (1, 2, 3)]
    assert terms(short_ledger(tmp_path, records))["momentum"] == pytest.approx([0.02, 0.03])


def test_trajectory_credit_is_taken_out_again(tmp_path: Path) -> None:
    records = [record(step, 3.0 - step, 0.4, credit_factor=4.0) for step in (1, 2)]
    assert terms(short_ledger(tmp_path, records, credit="trajectory"))["values"] == pytest.approx([0.1])


def test_skipped_steps_change_nothing_and_unscored_ones_are_not_known(tmp_path: Path) -> None:
    skipped = record(2, 2.9, None, "skipped: overflow")
    unscored = record(3, 2.9, None, "unscored: no optimizer state")
    ledger = short_ledger(
        tmp_path, [record(1, 3.0, 0.1), skipped, unscored, record(4, 2.0, 0.1), record(5, 1.9, 0.1)]
    )
    series = target_series(ledger, ledger.steps(), "code")
    assert np.array_equal(np.isnan(series.terms["values"]), [False, False, True, False])
    assert series.terms["values"][1] == 0.0
    curve = loss_curve(series, [Phase("all", 1, 5)])
    assert [point["run"] for point in curve] == [0, 0, 0, 1, 1]
    assert [curve[i]["predicted"] == curve[i]["loss"] for i in (0, 3)] == [True, True]
    assert explained(series, [], 5)[0]["intervals"] == 3


def test_directions_of_earlier_steps_took_no_validation_pass(tmp_path: Path) -> None:
    seconds: dict[str, Any] = {"seconds_total": 0.5, "seconds_scoring": 0.1, "samples": 10}
    records = [record(step, 3.0, 0.1, direction_age=int(step == 2), **seconds) for step in (1, 2, 3, 4)]
    ledger = short_ledger(tmp_path, records, refresh=2)
    assert timing(ledger, ledger.steps())["validation"]["added_over_run"] == pytest.approx(1.2)


def test_losses_that_are_not_finite_are_not_known(tmp_path: Path) -> None:
    """A run that diverged for a step has a page all the same; the audit of efficiency fails."""
    losses = [3.0, np.nan, 2.5, 2.4, np.inf, -np.inf]
    ledger = short_ledger(tmp_path, [record(step, loss, 0.1) for step, loss in enumerate(losses, start=1)])
    series = target_series(ledger, ledger.steps(), "code")
    assert series.step.tolist() == [1, 3, 4] and np.isnan(series.terms["values"]).tolist() == [True, False]
    assert explained(series, [], 6)[0]["realised"] == pytest.approx(0.1)
    described = describe_targets(ledger, ledger.steps())[0]
    assert (described["first_loss"], described["last_loss"]) == (3.0, 2.4)
    assert described["realised"] == pytest.approx(0.1) and described["steps_judged"] == 1
    figures = build_figures(tmp_path)
    assert render(figures) and len(figures["targets"][0]["explained_curve"]) == 1
    (efficiency,) = [check for check in figures["audits"]["checks"] if check["name"] == "efficiency"]
    assert not efficiency["ok"] and "figures are not finite" in efficiency["detail"]


def test_timing_is_spread_over_the_interval(tmp_path: Path) -> None:
    seconds: dict[str, Any] = {"seconds_total": 0.5, "seconds_scoring": 0.1, "samples": 10}
    ledger = short_ledger(tmp_path, [record(step, 3.0, 0.1, **seconds) for step in (4, 8)], interval=4)
    found = timing(ledger, ledger.steps())
    assert found["added"] == pytest.approx(0.25) and found["added_over_run"] == pytest.approx(0.0625)
    assert found["samples_per_second"] == pytest.approx(20.0) and len(found["curve"]) == 2
    # two targets of 8 sequences to a batch of 10, in one step of four
    assert found["validation"] == {"sequences": 16, "samples": 10.0, "added_over_run": pytest.approx(0.4)}
    html = render(build_figures(tmp_path))
    assert (
        "+6%" in html
        and "+40% by the size of the validation pass alone (16 target sequences to a batch of 10)" in html
    )


def test_the_share_of_the_validation_pass_is_that_of_first_order_alone(tmp_path: Path) -> None:
    seconds: dict[str, Any] = {"seconds_total": 0.5, "seconds_scoring": 0.1, "samples": 10}
    ledger = short_ledger(
        tmp_path, [record(step, 3.0, 0.1, **seconds) for step in (1, 2)], estimator="midpoint"
    )
    assert timing(ledger, ledger.steps())["validation"] is None
    assert "of the validation pass alone" not in render(build_figures(tmp_path))


def test_curves_are_thinned_and_keep_their_ends() -> None:
    kept = thinned(100_000)
    assert len(kept) == POINTS and kept[0] == 0 and kept[-1] == 99_999
    assert thinned(3).tolist() == [0, 1, 2] and thinned(0).tolist() == []
