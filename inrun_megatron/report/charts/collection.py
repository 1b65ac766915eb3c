"""Every chart of a report, in the order of the page, and those that it shows when it is opened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from inrun_megatron.report.charts.composition import composition_chart
from inrun_megatron.report.charts.domains import bar_charts, heat_map
from inrun_megatron.report.charts.explained import explained_chart
from inrun_megatron.report.charts.histograms import histograms
from inrun_megatron.report.charts.losses import loss_chart, training_chart
from inrun_megatron.report.charts.pieces import Chart, Palette
from inrun_megatron.report.charts.timing import timing_chart

MEASURES = ("normalised", "nats")


def all_charts(figures: dict[str, Any]) -> list[Chart]:
    """Every chart of `build_figures`'s figures, in the order of the page."""
    names = [dataset["name"] for dataset in figures["datasets"]]
    samples = [0] * len(names)
    for entry in figures["domains"]:
        if entry["phase"] == figures["phases"][0]["name"]:
            samples[entry["dataset"]] = max(samples[entry["dataset"]], entry["samples"])
    palette = Palette(names, samples)
    charts = [training_chart(figures)] if figures["training"] else []
    charts += [loss_chart(figures, target) for target in figures["targets"] if target["curve"]]
    charts += [explained_chart(figures, target) for target in figures["targets"] if target["explained_curve"]]
    for phase in figures["phases"]:
        rows = [entry for entry in figures["domains"] if entry["phase"] == phase["name"]]
        for measure in MEASURES if rows else ():
            charts.append(heat_map(rows, figures, phase, measure))
            charts += bar_charts(rows, figures, phase, measure, palette)
    for target in figures["targets"]:
        rows = [row for row in figures["composition"] if row["target"] == target["name"]]
        for measure in MEASURES if rows else ():
            charts.append(composition_chart(rows, figures, target["name"], measure, palette))
    charts += histograms(figures, palette)
    if figures["timing"]["curve"]:
        charts.append(timing_chart(figures))
    return charts


def default_charts(figures: dict[str, Any]) -> Iterator[Chart]:
    """The charts that the page shows when it is opened: the last phase, normalised."""
    for chart in all_charts(figures):
        if chart.phase in (None, figures["phases"][-1]["name"]) and chart.measure in (None, MEASURES[0]):
            yield chart
