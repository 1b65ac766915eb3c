"""The report's figures against plain numpy on the same rows, and what the command writes."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inrun_megatron.ledger import Ledger
from inrun_megatron.report.charts import all_charts
from inrun_megatron.report.charts_explained import explained_chart
from inrun_megatron.report.charts_theme import OTHER, TERMS, Palette, theme
from inrun_megatron.report.charts_training import loss_chart, stacked
from inrun_megatron.report.overview import describe_targets
from inrun_megatron.report.page import render, write_page, write_png
from inrun_megatron.report.page_figures import build_figures
from inrun_megatron.report.page_series import (
    POINTS,
    explained,
    explained_curve,
    loss_curve,
    target_series,
    thinned,
    timing,
)
from inrun_megatron.report.page_values import HISTOGRAM_WIDTH
from inrun_megatron.report.phases import Phase
from tests.command_line import inrun
from tests.report_runs import HOSTILE, record, short_ledger, terms, write_reported_run
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
    signs = {(band["first"], band["domain"]): set() for band in bands}
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
    assert all(set(d["values"]) == set(TARGETS) and d["text"] for d in figures["documents"])


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
    seconds = {"seconds_total": 0.5, "seconds_scoring": 0.1, "samples": 10}
    records = [record(step, 3.0, 0.1, direction_age=int(step == 2), **seconds) for step in (1, 2, 3, 4)]
    ledger = short_ledger(tmp_path, records, refresh=2)
    assert timing(ledger, ledger.steps())["validation"]["added_over_run"] == pytest.approx(1.2)


def test_terms_and_times_have_no_colour_of_a_domain() -> None:
    domains = {colour for mode in ("light", "dark") for colour in theme(mode)["range"]["category"]}
    assert not domains & set(TERMS) and len(set(TERMS)) == 3


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
    seconds = {"seconds_total": 0.5, "seconds_scoring": 0.1, "samples": 10}
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
    seconds = {"seconds_total": 0.5, "seconds_scoring": 0.1, "samples": 10}
    ledger = short_ledger(
        tmp_path, [record(step, 3.0, 0.1, **seconds) for step in (1, 2)], estimator="midpoint"
    )
    assert timing(ledger, ledger.steps())["validation"] is None
    assert "of the validation pass alone" not in render(build_figures(tmp_path))


def test_curves_are_thinned_and_keep_their_ends() -> None:
    kept = thinned(100_000)
    assert len(kept) == POINTS and kept[0] == 0 and kept[-1] == 99_999
    assert thinned(3).tolist() == [0, 1, 2] and thinned(0).tolist() == []


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attributes:
            if name in ("src", "srcset", "data", "poster") or (name == "href" and tag == "link"):
                self.loads.append(value or "")


def test_the_page_loads_nothing_and_keeps_text_as_text(
    run: tuple[Path, np.ndarray, dict[str, Any]], tmp_path: Path
) -> None:
    figures = run[2]
    assert any(d["text"].startswith(HOSTILE[:20]) for d in figures["documents"])
    html = render(figures)
    page = _Page()
    page.feed(html)
    assert page.loads == ["data:,"] and page.scripts == 3
    assert "@import" not in html and not re.search(r"url\((?!['\"]?data:)", html.split("</style>")[0])
    charts = json.loads(
        re.findall(r'<script type="application/json" id="charts">(.*?)</script>', html, re.S)[0]
    )
    assert {chart["slot"] for chart in charts["charts"].values()} >= {"loss", "heat", "value", "composition"}


def test_a_failed_audit_is_red_and_missing_data_are_said(
    run: tuple[Path, np.ndarray, dict[str, Any]], tmp_path: Path
) -> None:
    directory, _, figures = run
    bad = dict(
        figures["audits"]["checks"][0], name="additivity", ok=False, detail="12 steps beyond the tolerance"
    )
    html = render(
        figures | {"audits": {"full": False, "checks": [bad]}, "documents": None, "documents_error": "gone"}
    )
    assert html.count('<li class="bad">') == 2 and "✗ 1 failed" in html and "✗ failed" in html
    assert f"inrun verify {directory}" in html and "Documents cannot be shown: gone" in html
    noted = render(figures | {"audits": {"full": True, "checks": [bad | {"ok": True, "note": True}]}})
    assert '<li class="bad">' not in noted and "! note" in noted and "with a note: additivity" in noted
    assert "✓ ok" not in noted


def test_short_and_bare_ledgers_make_a_page(tmp_path: Path) -> None:
    short_ledger(tmp_path / "one", [record(1, 3.0, None, "unscored: no optimizer state")])
    html = render(build_figures(tmp_path / "one"))
    assert "No scored samples" in html and "No times recorded" in html


def test_command_writes_page_charts_and_json(
    run: tuple[Path, np.ndarray, dict[str, Any]], tmp_path: Path
) -> None:
    directory, _, figures = run
    result = inrun("report", directory, "-n", 4, "--png", tmp_path / "png")
    assert result.code == 0
    assert "report.html" in result.out and (directory / "report.html").stat().st_size > 500_000
    images = {path.name: path.read_bytes() for path in (tmp_path / "png").iterdir()}
    assert (
        len(images) == 13
        and "explained-code.png" in images
        and "value-code-late-normalised.png" in images
        and "loss-prose.png" in images
    )
    assert all(image.startswith(b"\x89PNG") and len(image) > 5000 for image in images.values())
    result = inrun("report", directory, "-n", 4, "--json")
    assert result.code == 0
    printed = result.json
    assert set(printed) == set(figures)
    # DuckDB's threads add in no fixed order.
    assert [row["sum"] for row in printed["domains"]] == pytest.approx(
        [row["sum"] for row in figures["domains"]]
    )
    assert printed["audits"]["full"] is True
    result = inrun("report", directory, "-n", 0, "--no-verify", "--json", "-o", tmp_path / "page.html")
    assert result.code == 0
    audits = result.json["audits"]
    assert [check["name"] for check in audits["checks"]] == ["coverage", "additivity", "efficiency"]
    assert (tmp_path / "page.html").exists()


def test_it_replaces_reports_only(run: tuple[Path, np.ndarray, dict[str, Any]], tmp_path: Path) -> None:
    directory, _, figures = run
    page, foreign = tmp_path / "page.html", tmp_path / "notes.html"
    write_page(figures, page)
    write_page(figures, page)
    foreign.write_text("<p>notes")
    for arguments, message in (
        (("-o", foreign), "is no earlier report"),
        (("-o", tmp_path), "is a directory"),
        (("-o", tmp_path / "no" / "page.html"), "cannot write"),
        (("--png", foreign), "cannot write to"),
        (("-n", -1), "-n -1 is no number"),
        (("--phases", "x"), "not a list of fractions"),
    ):
        result = inrun("report", directory, *arguments)
        assert result.code == 1
        assert message in result.err
    assert foreign.read_text() == "<p>notes" and sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.html", "page.html",
    ]  # fmt: skip


def test_png_names_are_file_names(run: tuple[Path, np.ndarray, dict[str, Any]], tmp_path: Path) -> None:
    target = run[2]["targets"][0] | {"name": "a/b c"}
    names = write_png(
        run[2] | {"targets": [target], "distribution": [], "domains": [], "composition": []}, tmp_path
    )
    assert "loss-a_b_c.png" in names
