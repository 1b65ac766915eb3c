"""The benchmarks' own arithmetic: ideals, cases, tables and the growth plot. What they time is not judged anywhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import gpu, growth, operations, overhead, profile
from benchmarks.cases import Case
from benchmarks.pairs import Pairs, outcome
from benchmarks.profile import Phases

BASE = Case("base", 64, 2, 64, 16, 2, 4, 2)


def test_ideals() -> None:
    """The validation pass, once per target and node; through a pipeline the stream that it makes longer."""
    assert BASE.ideal == BASE.work == 1 + 2 / 16
    assert replace(BASE, targets=4).work == 1 + 8 / 16
    assert replace(BASE, dp=4).work == 1 + 4 / 16  # every replica runs a sequence
    assert replace(BASE, estimator="simpson").work == 2 + 3 * 2 / 16
    assert replace(BASE, estimator="midpoint").work == pytest.approx(2 + 4 / 3 * 2 / 16)
    stages = replace(BASE, pp=2, micro_batch=2)
    assert (stages.accumulation, stages.validation_microbatches) == (8, 1)
    assert stages.ideal == (1 + 8 + 1) / (8 + 1)
    with pytest.raises(ValueError, match="16 sequences a step are no multiple of 3 replicas x 4"):
        _ = replace(BASE, dp=3).accumulation


def test_processor_time_is_that_of_all_ranks() -> None:
    ranks = [Pairs([(1.0, 2.0)] * 3, [(1.0, 1.0)] * 3), Pairs([(9.0, 9.0)] * 3, [(1.0, 2.0)] * 3)]
    found = outcome(BASE, [ranks], 5.0)
    assert (found.ratio, found.cpu_ratio, found.plain_cpu_s, found.peak_rss_mb) == (2.0, 1.5, 2.0, 5.0)


def test_starts_are_pooled_and_their_fastest_steps_kept_apart() -> None:
    """The second process has one undisturbed step of each kind, in different pairs."""
    starts = [[Pairs([seconds] * 2, [seconds] * 2)] for seconds in ((2.0, 3.0), (2.0, 2.5))]
    starts[1][0].wall.extend([(1.0, 9.0), (9.0, 2.0)])
    found = outcome(BASE, starts, 5.0)
    assert found.fastest == [1.5, 2.0] and found.pairs == 6 and found.ratio == (1.25 + 1.5) / 2


def test_the_matrix_changes_one_setting_at_a_time() -> None:
    """And every case of it is one that can run."""
    base = overhead.MATRIX["base"]
    assert base == {} and set(overhead.SMOKE) <= set(overhead.MATRIX)
    for case in overhead.chosen_cases(BASE, overhead.MATRIX):
        assert case.accumulation >= 1 and case.work > 1.0 and case.tp * case.dp * case.pp <= 2


def test_the_smoke_subset_runs_and_prints_its_ratios() -> None:
    """One case of it, one pair of steps, in a process of its own."""
    [found] = overhead.measure_together([replace(BASE, train=8, hidden=32)], pairs=1, vocab=64)
    assert found.cpu_ratio > 0 and found.pairs == 1 and found.name == "base"


def test_operations_are_compared_by_their_smallest_times() -> None:
    """One that only scored steps have lies above the ideal with all of it."""
    plain, scored = {"mm": [9.0, 8.0]}, {"mm": [9.0, 10.0], "dot": [2.0, 1.5]}
    found = operations.compare(plain, scored, 1.125)
    assert [(o.name, o.plain_ms, o.scored_ms, o.above_ms) for o in found] == [
        ("dot", 0.0, 1.5, 1.5),
        ("mm", 8.0, 9.0, 0.0),
    ]


def test_operations_of_real_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """Running dots are what scoring adds."""
    operations.main(hidden=32, layers=1, seq_length=16, train=8, vocab=64, pairs=1, as_json=True)
    found = {o["name"]: o for o in json.loads(capsys.readouterr().out)["operations"]}
    assert found["aten::dot"]["plain_ms"] == 0.0 < found["aten::dot"]["scored_ms"]
    assert found[operations.WHOLE]["scored_ms"] > 0.0 and "LinearTapBackward" in found


def test_plain_steps_are_compared_with_plain_ones(capsys: pytest.CaptureFixture[str]) -> None:
    overhead.main(
        hidden=32, layers=1, train=8, vocab=64, pairs=1, threads=1, only="seq256 8:1", same=True, as_json=True
    )
    [found] = json.loads(capsys.readouterr().out)["cases"]
    assert (found["name"], found["ideal"], found["pairs"]) == ("seq256 8:1, plain", 1.0, 1)


@pytest.mark.parametrize("benchmark", [overhead, gpu])
def test_an_unknown_case_is_refused(benchmark: ModuleType) -> None:
    app = typer.Typer()
    app.command()(benchmark.main)
    answer = CliRunner().invoke(app, ["--smoke", "--only", "nothing"])
    assert answer.exit_code == 2 and "no case's name contains 'nothing'" in answer.output


def test_a_step_of_unequal_microbatches_is_refused() -> None:
    app = typer.Typer()
    app.command()(gpu.main)
    answer = CliRunner().invoke(app, ["--smoke", "--train", "6"])
    assert answer.exit_code == 2 and "6 is no multiple of 4, the largest microbatch" in answer.output


def test_the_cases_of_a_gpu_run_in_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    """In miniature, on whatever device there is."""
    assert [len(own) for own in gpu.cases(smoke=False).values()] == [6, 6, 6]
    gpu.main(pairs=1, only="microbatch 4", train=8, validation=4, smoke=True, as_json=True)
    [found] = json.loads(capsys.readouterr().out)["cases"]
    assert found["error"] is None and found["ratio"] > 0 and found["ideal"] == 1.5
    assert found["limit_mib"] == pytest.approx(2 * found["parameters"] / 2**20)


def test_time_inside_a_phase_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    clock = SimpleNamespace(perf_counter=lambda: now, process_time=lambda: 2 * now)
    monkeypatch.setattr(profile, "time", clock)
    phases = Phases()
    with phases.timed("outer"):
        now += 1.0
        with phases.timed("inner"):
            now += 4.0
        now += 2.0
    with phases.timed("inner"):
        now += 8.0
    assert phases.spent == {"outer": [3.0, 6.0], "inner": [12.0, 24.0]}


def test_growth_has_a_table_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of made-up times: the formula at the plain step's rate, beside the limit."""

    def measured(found: list[Case], **options: object) -> list[object]:
        seconds = [(1.0, 1.1)] * 3
        return [
            outcome(case, [[Pairs(seconds, seconds)] * (case.tp * case.dp * case.pp)], 1.0) for case in found
        ]

    monkeypatch.setattr(growth, "measure_together", measured)
    points = [point for axis in growth.AXES for point in growth.measure_axis(axis, pairs=1, vocab=512)]
    growth.plot(points, tmp_path / "out" / "growth.png")
    assert (tmp_path / "out" / "growth.png").read_bytes()[:4] == b"\x89PNG"
    for point in points:
        assert point.predicted > point.limit > 0 and point.extra == pytest.approx(0.1)
    by_targets = [point.predicted for point in points if point.axis == "targets"]
    assert by_targets == sorted(by_targets)
    assert json.dumps([point.size for point in points])
