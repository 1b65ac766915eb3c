"""The charts of what the domains are worth: bars by target, and a heat map of domains and targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inrun_megatron.report.charts.pieces import COLOURED, Chart, Palette, label_of, spec
from inrun_megatron.report.tables import decimals_of, scale_near, scale_of

ROWS = 40
"""Domains that a bar chart or heat map shows; of more, the first and the last in order of value."""


def bar_charts(
    rows: Sequence[dict[str, Any]],
    figures: dict[str, Any],
    phase: dict[str, Any],
    measure: str,
    palette: Palette,
) -> list[Chart]:
    """Mean value per sample by domain, one chart per target, with its standard error; whiskers of two of them."""
    mean, error, unit, title = measure_of(rows, figures, measure)
    charts = []
    for target in figures["targets"]:
        own = [row for row in rows if row["target"] == target["name"]]
        own.sort(key=lambda row: row["dataset"] if few(figures) else -row[mean])
        if not own:
            continue
        data = []
        for row in first_and_last(own):
            spread = (row[error] or 0.0) / unit
            value = row[mean] / unit
            digits = decimals_of(spread)
            label = f"{value:+.{digits}f}" + (f" ± {spread:.{digits}f}" if row[error] is not None else "")
            data.append(
                {"name": row["name"], "domain": palette.key(row["dataset"]), "value": value, "label": label}
                | {"low": value - 2 * spread, "high": value + 2 * spread, "samples": row["samples"]}
                | {"negative": row["negative_share"]}
            )
        y = {"field": "name", "type": "nominal", "sort": None, "title": None, "axis": {"domain": False}}
        x = {"type": "quantitative", "title": title, "axis": {"tickCount": 5}}
        tooltip = [
            {"field": "name", "title": "domain"},
            {"field": "label", "title": "mean ± s.e."},
            {"field": "negative", "title": "negative samples", "format": ".0%"},
            {"field": "samples", "title": "samples", "format": ","},
        ]
        layers = [
            {"mark": {"type": "rule", "style": "zero"}, "encoding": {"x": {"datum": 0}}},
            {
                "mark": {"type": "bar", "height": {"band": 0.62}, "cornerRadius": 2},
                "encoding": {
                    "x": {"field": "value"} | x,
                    "y": y,
                    "color": palette.encoding(legend=False),
                    "tooltip": tooltip,
                },
            },
            {
                "mark": {"type": "rule", "style": "whisker"},
                "encoding": {"x": {"field": "low"} | x, "x2": {"field": "high"}, "y": y},
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 8},
                "encoding": {"x": {"value": {"expr": "width"}}, "y": y, "text": {"field": "label"}},
            },
        ]
        made = spec(max(26 * len(data), 60), data={"values": data}, layer=layers)
        made["padding"] = {"left": 4, "top": 4, "bottom": 4, "right": 96}
        charts.append(
            Chart(
                "value",
                f"Value per sample towards {target['name']}, {label_of(phase)} (± standard error; whiskers: two)",
                made,
                target["name"],
                phase["name"],
                measure,
            )
        )
    return charts


def heat_map(
    rows: Sequence[dict[str, Any]], figures: dict[str, Any], phase: dict[str, Any], measure: str
) -> Chart:
    """Mean value per sample of each domain towards each target."""
    mean, error, unit, title = measure_of(rows, figures, measure)
    order: dict[str, float] = {}
    for row in rows:
        order[row["name"]] = order.get(row["name"], 0.0) + row["normalised_mean"]
    if few(figures):
        names = [dataset["name"] for dataset in figures["datasets"] if dataset["name"] in order]
    else:
        names = first_and_last(sorted(order, key=lambda name: -order[name]))
    largest = max((abs(row[mean]) / unit for row in rows), default=1.0) or 1.0
    data = [
        {
            "name": row["name"],
            "target": row["target"],
            "value": row[mean] / unit,
            "strong": abs(row[mean]) / unit / largest,
        }
        | {"error": (row[error] or 0.0) / unit}
        for row in rows
        if row["name"] in names
    ]
    x = {
        "field": "target",
        "type": "nominal",
        "sort": [target["name"] for target in figures["targets"]],
        "title": "target",
        "axis": {
            "orient": "top",
            "labelAngle": -30 if len(figures["targets"]) > 6 else 0,
            "ticks": False,
            "domain": False,
        },
    }
    y = {"field": "name", "type": "nominal", "sort": names, "title": "domain of the training data"}
    colour = {
        "field": "value",
        "type": "quantitative",
        "scale": {"domain": [-largest, 0, largest], "range": "diverging", "interpolate": "lab"},
        "legend": {
            "orient": "bottom",
            "title": title,
            "gradientLength": 220,
            "gradientThickness": 8,
            "tickCount": 5,
        },
    }
    layers = [
        {
            "mark": {"type": "rect", "cornerRadius": 3},
            "encoding": {
                "color": colour,
                "tooltip": [
                    {"field": "name", "title": "domain"},
                    {"field": "target"},
                    {"field": "value", "title": title, "format": "+.3f"},
                    {"field": "error", "title": "standard error", "format": ".3f"},
                ],
            },
        },
        {
            "mark": {"type": "text", "fontSize": 12},
            "encoding": {
                "text": {"field": "value", "format": "+.2f"},
                "color": {"condition": {"test": "datum.strong > 0.6", "value": "white"}},
            },
        },
    ]
    made = spec(34 * max(len(names), 1), data={"values": data}, encoding={"x": x, "y": y}, layer=layers)
    return Chart("heat", f"{title}, {label_of(phase)}", made, None, phase["name"], measure)


def measure_of(
    rows: Sequence[dict[str, Any]], figures: dict[str, Any], measure: str
) -> tuple[str, str, float, str]:
    """Fields of mean and error, unit, and the axis title of a measure."""
    if measure == "normalised":
        return "normalised_mean", "normalised_standard_error", 1.0, "mean normalised value per sample"
    unit, name = scale_near(
        [row["mean"] for row in rows], scale_of([row["mean"] for row in figures["domains"]])
    )
    return "mean", "standard_error", unit, f"mean value per sample, nats {name}".strip()


def few(figures: dict[str, Any]) -> bool:
    """Whether every domain has a colour of its own: then rows stand in the run's order, as legends do, else by value."""
    return len(figures["datasets"]) <= COLOURED + 1


def first_and_last(rows: Sequence[Any]) -> list[Any]:
    """All of them, or the first and last ROWS / 2."""
    return list(rows) if len(rows) <= ROWS else [*rows[: ROWS // 2], *rows[-ROWS // 2 :]]
