"""The chart of the efficiency audit over training: what part of the measured change of a loss the terms predict."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from inrun_megatron.report.charts.pieces import BEYOND, Chart, clipped, phase_layers, spec, step_axis
from inrun_megatron.report.charts.theme import TERM_COLOURS


def explained_chart(figures: dict[str, Any], target: dict[str, Any]) -> Chart:
    """Explained fraction of a target's measured loss change over training (a line; 1: all of it), and the parts of it
    that samples, momentum and weight decay predict (bands that add up to it)."""
    words = {"values": "samples", "momentum": "momentum", "decay": "decay"}
    data = [
        {"first": point["first"], "last": point["last"], "step": point["step"], "realised": point["realised"]}
        | {"fraction": point["explained_fraction"]}
        | {words[term]: point[term] / point["realised"] for term in words}
        for point in target["explained_curve"]
    ]
    banded = [band for point in data for band in _bands(point, list(words.values()))]
    low, high = _axis([band["y1"] for band in banded] + [point["fraction"] for point in data])
    for point in data:
        point["at"], point["beyond"] = clipped(point["fraction"], low, high)
    y = {
        "type": "quantitative",
        "title": "predicted / measured change",
        "axis": {"format": ".0%", "tickCount": 6},
        "scale": {"domain": [low, high], "nice": False},
    }
    x = step_axis(figures["steps"]["last"])
    percent = {"type": "quantitative", "format": ".0%"}
    tooltip = [
        {"field": "first", "title": "from step"},
        {"field": "last", "title": "to step"},
        {"field": "fraction", "title": "explained"} | percent,
        *({"field": word, "title": f"by {word}"} | percent for word in words.values()),
        {"field": "realised", "title": "measured, nats per token", "format": "+.4f"},
    ]
    bands = {
        "data": {"values": banded},
        "mark": {"type": "rect", "clip": True, "opacity": 0.6},
        "encoding": {
            "x": x | {"field": "first"},
            "x2": {"field": "last"},
            "y": y | {"field": "y0"},
            "y2": {"field": "y1"},
            "color": {
                "field": "part",
                "type": "nominal",
                "scale": {"domain": list(words.values()), "range": TERM_COLOURS},
            },
            "tooltip": tooltip,
        },
    }
    line = {
        "mark": {"type": "line", "style": "realised"},
        "encoding": {"x": x, "y": y | {"field": "at"}},
    }
    points = {
        "mark": {"type": "point", "style": "realised", "filled": True, "opacity": 1},
        "encoding": {
            "x": x,
            "y": y | {"field": "at"},
            "shape": BEYOND,
            "size": {"condition": {"test": "datum.beyond !== ''", "value": 90}, "value": 30},
            "tooltip": tooltip,
        },
    }
    rules = [
        {
            "mark": {"type": "rule", "style": style},
            "encoding": {"y": {"datum": at, "type": "quantitative", "scale": y["scale"]}},
        }
        for at, style in ((0.0, "zero"), (1.0, "predicted"))
    ]
    return Chart(
        "explained",
        f"Share of the change of the loss of {target['name']} that samples, momentum and decay predict "
        "(line: together; triangles: beyond the axis)",
        spec(
            170,
            data={"values": data},
            layer=[
                bands,
                *rules,
                line,
                points,
                *phase_layers(figures["phases"][1:], figures["steps"]["last"]),
            ],
        ),
        target["name"],
    )


def _axis(ends: list[float]) -> tuple[float, float]:
    """An axis from 0 to above 1 at least, in halves, that holds all but the outermost twentieth of `ends` on each side:
    where the loss hardly changed a fraction means nothing, and would flatten the rest."""
    low, high = np.quantile(ends, [0.05, 0.95])
    return min(0.0, math.floor(2 * low) / 2), max(1.5, math.ceil(2 * high) / 2)


def _bands(point: dict[str, Any], parts: list[str]) -> list[dict[str, Any]]:
    """The parts as bands from y0 to y1: positive ones stacked up from 0, negative ones down."""
    bands, ends = [], {True: 0.0, False: 0.0}
    for part in parts:
        up = point[part] >= 0
        bands.append(point | {"part": part, "y0": ends[up], "y1": ends[up] + point[part]})
        ends[up] += point[part]
    return bands
