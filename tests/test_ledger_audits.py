"""`verify` judges additivity, efficiency and coverage, each step by the settings that made it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inrun_megatron.errors import UserError
from inrun_megatron.ledger import Check, Ledger, LedgerWriter, StepRecord, commit, create_ledger, open_ledger
from inrun_megatron.ledger.audits import judge_efficiency, precision_of
from inrun_megatron.ledger.description import Starts
from tests.command_line import inrun
from tests.synthetic_ledger import TARGETS, description, failed, step_record


def audited(directory: Path, change: Callable[[StepRecord], Any], **configuration: Any) -> dict[str, Check]:
    """Verify a run of 30 steps whose records `change` has altered."""
    generator = np.random.default_rng(0)
    losses = np.array([5.0, 6.0])
    with create_ledger(directory, description(**configuration)):
        writer = LedgerWriter(directory, 0)
        for step in range(1, 31):
            values = generator.normal(0.01, 0.02, size=(4, len(TARGETS)))
            record = step_record(step, values, losses, 4 * step)
            losses = losses - values.sum(0)
            change(record)
            writer.append(step, [0] * 4, np.arange(4) + 4 * step, [64] * 4, values)
            writer.append_step(record)
        commit(directory, 30, writer.write_parts())
    return failed(directory)


def off_by(share: float) -> Callable[[StepRecord], None]:
    def change(record: StepRecord) -> None:
        if record.step == 17:
            assert record.additivity_rhs and record.additivity_lhs
            first, second = record.additivity_lhs
            assert first is not None
            record.additivity_rhs = [first + share * abs(first), second]

    return change


@pytest.mark.parametrize(
    ("share", "training", "ok"),
    [
        (1e-6, {}, True),
        (1e-2, {}, False),
        (1e-2, {"bf16": True}, True),
        (0.5, {"bf16": True}, False),
        (1e-2, {"fp16": True}, True),
        (float("nan"), {}, False),
    ],
)
def test_additivity(tmp_path: Path, share: float, training: dict[str, bool], ok: bool) -> None:
    found = audited(tmp_path, off_by(share), training={"optimizer": "adam"} | training)
    assert ("additivity" not in found) == ok
    if not ok:
        assert found["additivity"].figures["failed_steps"] == [17]
        assert "(step 17)" in found["additivity"].detail


def started_again(directory: Path, step: int, ledger_step: int | None = None, **configuration: Any) -> None:
    with open_ledger(directory) as ledger:
        Starts(directory, ledger.run).append(step, description(**configuration), ledger_step)


def test_a_step_is_judged_by_the_settings_that_made_it(tmp_path: Path) -> None:
    """Precision and interval after a resume are those of the resumed run."""
    assert "additivity" in audited(tmp_path, off_by(1e-2))  # step 17, in fp32
    bf16: dict[str, Any] = {"training": {"bf16": True}}
    started_again(tmp_path, 17, **bf16)
    assert "additivity" in failed(tmp_path)
    started_again(tmp_path, 16, **bf16)
    assert "additivity" not in failed(tmp_path)
    starts = json.loads((tmp_path / "starts.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [16]  # the other start's steps were taken back

    for damaged in ("3", '["x"]', "[{}]"):
        (tmp_path / "starts.json").write_text(f'{{"starts": {damaged}}}')
        with pytest.raises(UserError, match="holds a start without its step; restore it"):
            Ledger(tmp_path)

    with create_ledger(tmp_path / "sparse", description()):
        writer = LedgerWriter(tmp_path / "sparse", 0)
        for step in (1, 2, 3, 4, 6, 8):
            writer.append_step(StepRecord(step=step, status="skipped: overflow"))
        commit(tmp_path / "sparse", 8, writer.write_parts())
    assert failed(tmp_path / "sparse")["steps"].figures["missing_steps"] == [5, 7]
    started_again(tmp_path / "sparse", 4, shapley={"interval": 2})
    assert "steps" not in failed(tmp_path / "sparse")
    started_again(tmp_path / "sparse", 6, shapley={"interval": 1})
    assert failed(tmp_path / "sparse")["steps"].figures["missing_steps"] == [7]
    started_again(tmp_path / "sparse", 7, 6, shapley={"interval": 1})  # step 7 with --no-shapley
    assert "steps" not in failed(tmp_path / "sparse")


def test_additivity_must_be_recorded(tmp_path: Path) -> None:
    def forget(record: StepRecord) -> None:
        record.additivity_lhs = record.additivity_rhs = None

    assert "no figures recorded" in audited(tmp_path, forget)["additivity"].detail


def test_precision() -> None:
    assert precision_of({"configuration": {"training": {"bf16": True, "fp16": False}}}) == "bf16"
    assert precision_of({"configuration": {"precision": "fp16"}}) == "fp16"
    assert precision_of({"configuration": {}}) == "fp32"


@pytest.mark.parametrize("factor", [-1.0, 1000.0, 1e-3, float("nan")])
def test_efficiency_fails_on_absurd_figures_only(tmp_path: Path, factor: float) -> None:
    def scale_losses(record: StepRecord) -> None:
        # The realised change comes from the losses; here the losses move by another factor than the values say.
        assert record.target_loss is not None
        record.target_loss = [5.0 + (loss - 5.0) / factor for loss in record.target_loss]  # type: ignore[operator]

    found = audited(tmp_path / "bad", scale_losses)
    assert "efficiency" in found
    proxy = {"shapley": {"optimizer": "sgd", "interval": 1}, "training": {"optimizer": "adam"}}
    if np.isfinite(factor):
        assert "efficiency" not in audited(tmp_path / "proxy", scale_losses, **proxy)


@pytest.mark.parametrize(
    ("factor", "estimator", "remedy"),
    [(2.4, "first_order", "midpoint or"), (0.4, "first_order", "midpoint or"), (2.4, "midpoint", ". smaller"), (1.8, "", "")],
)  # fmt: skip
def test_efficiency_notes_a_scale_that_is_off(
    tmp_path: Path, factor: float, estimator: str, remedy: str
) -> None:
    def scale_losses(record: StepRecord) -> None:
        assert record.target_loss is not None
        record.target_loss = [5.0 + (loss - 5.0) * 1.09 / factor for loss in record.target_loss]  # type: ignore[operator]

    setting = {"shapley": {"estimator": estimator or "first_order", "interval": 1}}
    assert audited(tmp_path, scale_losses, **setting) == {}
    (check,) = [check for check in Ledger(tmp_path).verify() if check.name == "efficiency"]
    assert check.figures["targets"]["code"]["explained_fraction"] == pytest.approx(factor)
    assert check.note == check.figures["targets"]["code"]["off_scale"] == bool(estimator)
    assert ("not as sizes" in check.detail) == bool(estimator) and remedy in check.detail
    for command in (["verify"], ["summary", "-n", "0"]):
        result = inrun(*command, tmp_path)
        assert result.code == 0
        assert bool(re.search(r"efficiency +note ", result.out)) == bool(estimator)


def test_efficiency_judges_trends() -> None:
    steps = np.arange(100)
    falling = np.full(100, 1e-2)
    entry, fault = judge_efficiency(1.5 * falling, falling, proxy=False)
    assert fault is None and entry["explained_fraction"] == pytest.approx(1.5)
    up_and_down = np.where(steps % 2 == 0, 1.0, -1.0) * 1e-2
    assert judge_efficiency(-falling, up_and_down, proxy=False)[1] is None
    assert "opposite signs" in str(judge_efficiency(-falling, falling, proxy=False)[1])
    assert judge_efficiency(-falling[:5], falling[:5], proxy=False)[1] is None


def test_coverage(tmp_path: Path) -> None:
    described = description()
    described.coverage = {"parameters": 10, "tapped": 9, "missing": ["decoder.router.weight"]}
    create_ledger(tmp_path, described).close()
    assert "9 of 10 trainable parameters have a tap; without: decoder.router.weight" in (
        failed(tmp_path)["coverage"].detail
    )


def test_steps_without_rows_are_counted(tmp_path: Path) -> None:
    def skip(record: StepRecord) -> None:
        if record.step == 1:
            record.status, record.samples = "unscored: no state yet", 0

    found = audited(tmp_path / "rows", skip)  # rows of an unscored step
    assert "step 1 target code: 4 rows, 0 recorded" in found["steps"].detail
    with create_ledger(tmp_path / "none", description()):
        writer = LedgerWriter(tmp_path / "none", 0)
        writer.append_step(StepRecord(step=1, status="skipped: overflow"))
        commit(tmp_path / "none", 1, writer.write_parts())
    checks = {check.name: check for check in Ledger(tmp_path / "none").verify()}
    assert checks["steps"].ok and checks["steps"].figures["statuses"] == {"skipped: overflow": 1}
