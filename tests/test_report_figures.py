"""The report's figures against plain numpy on the same rows, and its charts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inrun_megatron.ledger import Ledger
from inrun_megatron.report.charts.collection import all_charts
from inrun_megatron.report.charts.composition import stacked
from inrun_megatron.report.charts.explained import explained_chart
from inrun_megatron.report.charts.losses import loss_chart
from inrun_megatron.report.charts.pieces import OTHER, Palette
from inrun_megatron.report.charts.theme import TERM_COLOURS, theme
from inrun_megatron.report.overview import describe_targets
from inrun_megatron.report.page.figures import build_figures
from inrun_megatron.report.page.html import render
from inrun_megatron.report.values.distribution import HISTOGRAM_WIDTH
from tests.report_runs import write_reported_run
from tests.synthetic_ledger import DOMAINS, TARGETS


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("run")
    rows = write_reported_run(directory)
    return directory, rows, build_figures(directory, documents=4)


def normalised(rows: np.ndarray, target: str) -> np.ndarray:
    """phi_i n_t / sum_j |phi_j|."""
    total = {step: np.abs(rows[target][rows["step"] == step]).mean() for step in np.unique(rows["step"])}
    return rows[target] / np.array([total[step] for step in rows["step"]])


def test_a_mean_has_one_error_on_the_whole_page(run: tuple[Path, np.ndarray, dict[str, Any]]) -> None:
    figures = run[2]
    best = figures["findings"][0]["best"]
    said = f"{best['normalised_mean']:+.2f} ± {best['normalised_standard_error']:.2f}"
    (chart,) = [c for c in all_charts(figures) if c.name == "value-code-late-normalised"]
    (bar,) = [row for row in chart.spec["data"]["values"] if row["name"] == best["name"]]
    assert bar["label"] == said
    assert bar["high"] - bar["low"] == pytest.approx(4 * best["normalised_standard_error"])
    signs = re.sub(r"<[^>]+>", "", render(figures).split('<section id="run">')[0])
    assert said in signs


def test_composition(run: tuple[Path, np.ndarray, dict[str, Any]]) -> None:
    _, rows, figures = run
    bins = {(entry["first_step"], entry["last_step"]) for entry in figures["composition"]}
    covered = sorted(step for first, last in bins for step in range(first, last + 1))
    assert covered == list(range(1, 61)) and len(bins) == 40
    for target in TARGETS:
        nu = normalised(rows, target)
        for first, last in bins:
            inside = (rows["step"] >= first) & (rows["step"] <= last)
            of_domain = [nu[inside & (rows["dataset"] == domain)].sum() for domain in range(len(DOMAINS))]
            scale = np.abs(of_domain).sum()
            for entry in figures["composition"]:
                if entry["target"] == target and entry["first_step"] == first:
                    own = rows[target][inside & (rows["dataset"] == entry["dataset"])]
                    assert entry["value"] == pytest.approx(own.sum() / (last - first + 1), rel=1e-9)
                    assert entry["share"] == pytest.approx(of_domain[entry["dataset"]] / scale, rel=1e-9)


def test_areas_stack_positive_up_and_negative_down(run: tuple[Path, np.ndarray, dict[str, Any]]) -> None:
    rows = [row for row in run[2]["composition"] if row["target"] == "code"]
    palette = Palette(DOMAINS, [3, 2, 1])
    bands = stacked(rows, "share", 1.0, palette)
    signs: dict[tuple[int, str], set[str]] = {(band["first"], band["domain"]): set() for band in bands}
    for band in bands:
        signs[band["first"], band["domain"]].add(band["sign"])
        assert band["y1"] >= band["y0"] >= 0 if band["sign"] == "+" else band["y1"] <= band["y0"] <= 0
        assert band["y1"] - band["y0"] in (0.0, pytest.approx(band["value"]))
    assert all(both == {"+", "-"} for both in signs.values())  # an area ends at 0 where its sign changes
    heights = {band["first"]: 0.0 for band in bands}
    for band in bands:
        heights[band["first"]] += abs(band["y1"] - band["y0"])
    assert all(height == pytest.approx(1.0) for height in heights.values())
    assert any(band["value"] < 0 for band in bands) and any(band["value"] > 0 for band in bands)


def test_domains_beyond_the_palette_share_one_colour() -> None:
    names = [f"d{number}" for number in range(14)]
    palette = Palette(names, list(range(14)))
    assert palette.keys == [*names[4:], OTHER] and palette.key(0) == OTHER and palette.key(13) == "d13"
    row = {"first_step": 1, "last_step": 2}
    bands = stacked([row | {"dataset": index, "value": 1.0} for index in range(14)], "value", 1.0, palette)
    assert {band["domain"]: band["value"] for band in bands} == dict.fromkeys(palette.keys, 1.0) | {
        OTHER: 4.0
    }


def test_distribution(run: tuple[Path, np.ndarray, dict[str, Any]]) -> None:
    _, rows, figures = run
    ranges = {phase["name"]: (phase["first"], phase["last"]) for phase in figures["phases"]}
    assert list(ranges) == ["whole run", "early", "middle", "late"]
    assert len(figures["distribution"]) == len(ranges) * len(TARGETS) * len(DOMAINS)
    for entry in figures["distribution"]:
        first, last = ranges[entry["phase"]]
        own = (rows["dataset"] == entry["dataset"]) & (rows["step"] >= first) & (rows["step"] <= last)
        index = np.clip(np.floor(normalised(rows, entry["target"])[own] / HISTOGRAM_WIDTH), -24, 23)
        expected = [[int(bin_), int(n)] for bin_, n in zip(*np.unique(index, return_counts=True))]
        assert entry["bins"] == expected and entry["n"] == own.sum()


def test_documents(run: tuple[Path, np.ndarray, dict[str, Any]]) -> None:
    _, _, figures = run
    for target in TARGETS:
        for kind, sign in (("best", 1), ("worst", -1)):
            listed = sorted(
                (d["lists"][kind][target], d["values"][target]["value"]) for d in figures["documents"]
                if target in d["lists"][kind]
            )  # fmt: skip
            values = [sign * value for _, value in listed]
            assert [rank for rank, _ in listed] == list(range(1, len(listed) + 1)) and 1 <= len(listed) <= 4
            assert values == sorted(values, reverse=True) and values[-1] > 0
            unlisted = [
                sign * d["values"][target]["value"]
                for d in figures["documents"]
                if target not in d["lists"][kind]
            ]
            assert max(unlisted) <= values[-1]
    assert all(list(d["values"]) == list(TARGETS) and d["text"] for d in figures["documents"])


def test_losses_explained_agree_with_the_summary(run: tuple[Path, np.ndarray, dict[str, Any]]) -> None:
    directory, rows, figures = run
    ledger = Ledger(directory)
    for target, described in zip(figures["targets"], describe_targets(ledger, ledger.steps())):
        whole, *phases = target["explained"]
        assert whole["intervals"] == 59 == sum(phase["intervals"] for phase in phases)
        for name, other in (("realised", "realised"), ("values", "sum_values"), ("momentum", "momentum_term"),
                            ("decay", "decay_term"), ("explained_fraction", "explained_fraction")):  # fmt: skip
            assert whole[name] == pytest.approx(described[other], rel=1e-9)
        assert whole["values"] == pytest.approx(rows[target["name"]][rows["step"] < 60].sum(), rel=1e-9)
        curve = {point["step"]: point for point in target["curve"]}
        for start in (1, 11, 21):  # the phases
            assert curve[start]["predicted"] == curve[start]["loss"]
        late = phases[-1]
        predicted = late["values"] + late["momentum"] + late["decay"]
        assert curve[21]["predicted"] - curve[60]["predicted"] == pytest.approx(predicted, rel=1e-9)


def test_the_explained_fraction_over_the_run_adds_up_to_that_of_the_whole(
    run: tuple[Path, np.ndarray, dict[str, Any]],
) -> None:
    for target in run[2]["targets"]:
        whole, curve = target["explained"][0], target["explained_curve"]
        assert len(curve) == 20 and (curve[0]["first"], curve[-1]["last"]) == (1, 60)
        assert sum(stretch["intervals"] for stretch in curve) == whole["intervals"]
        for term in ("realised", "values", "momentum", "decay"):
            assert sum(stretch[term] for stretch in curve) == pytest.approx(whole[term], rel=1e-9)
        for stretch in curve:
            predicted = stretch["values"] + stretch["momentum"] + stretch["decay"]
            assert stretch["explained_fraction"] == pytest.approx(predicted / stretch["realised"])


def test_what_lies_beyond_an_axis_is_marked_and_stays_in_the_frame(
    run: tuple[Path, np.ndarray, dict[str, Any]],
) -> None:
    figures, target = run[2], run[2]["targets"][0]
    curve = [dict(point) for point in target["explained_curve"]]
    curve[3] |= {"explained_fraction": 40.0}
    curve[7] |= {"explained_fraction": -30.0}
    spec = explained_chart(figures, target | {"explained_curve": curve}).spec
    low, high = spec["layer"][0]["encoding"]["y"]["scale"]["domain"]
    points = spec["data"]["values"]
    assert low < 0 < 1 < high < 4 and all(low <= point["at"] <= high for point in points)
    assert {i: point["beyond"] for i, point in enumerate(points) if point["beyond"]} == {3: "up", 7: "down"}
    off = [point | {"predicted": point["loss"] - point["step"]} for point in target["curve"]]
    spec = loss_chart(figures, target | {"curve": off}).spec
    low, high = spec["layer"][-1]["encoding"]["y"]["scale"]["domain"]
    lines = [point for point in spec["data"]["values"] if point["line"] == "predicted"]
    assert all(low <= point["loss"] <= high for point in lines)
    for part in {point["run"] for point in lines}:  # a line ends at its triangle
        assert [point["beyond"] for point in lines if point["run"] == part][-1] == "down"
    assert [point["beyond"] for point in lines].count("down") == len({point["run"] for point in lines})


def test_rows_stand_in_the_order_of_the_run_while_there_are_few(
    run: tuple[Path, np.ndarray, dict[str, Any]],
) -> None:
    def rows_of(figures: dict[str, Any]) -> list[list[str]]:
        charts = [chart for chart in all_charts(figures) if chart.name.endswith("late-normalised")]
        (heat,) = [chart.spec["encoding"]["y"]["sort"] for chart in charts if chart.slot == "heat"]
        bars = [chart.spec["data"]["values"] for chart in charts if chart.slot == "value"]
        return [heat, *([row["name"] for row in rows] for rows in bars)]

    figures = run[2]
    assert rows_of(figures) == [list(DOMAINS)] * 3
    more = [{"name": f"d{number}", "index": 3 + number} for number in range(9)]
    many = rows_of(figures | {"datasets": [*figures["datasets"], *more]})
    assert many[2] == ["prose", "code", "shuffled"]  # by value


def test_terms_and_times_have_no_colour_of_a_domain() -> None:
    domains = {colour for mode in ("light", "dark") for colour in theme(mode)["range"]["category"]}
    assert not domains & set(TERM_COLOURS) and len(set(TERM_COLOURS)) == 3
