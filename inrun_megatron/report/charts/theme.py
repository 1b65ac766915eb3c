"""How charts look: Vega-Lite configurations for light and dark, and the pieces that several charts share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Helvetica, Arial, sans-serif"

COLOURED = 10
"""Domains that have a colour of their own; the others share the palette's last one, a grey."""

OTHER = "other domains"

# Ten hues told apart with the usual colour deficiencies (after Okabe and Ito's set), then the grey of OTHER.
_CATEGORY = {
    "light": [
        "#2c6fbb",
        "#e08214",
        "#1b9e77",
        "#c2408f",
        "#7b61c9",
        "#3fa7c4",
        "#a6761d",
        "#d1495b",
        "#6a8f1f",
        "#4d4d8f",
        "#9aa3ad",
    ],
    "dark": [
        "#6aa9f0",
        "#f5a953",
        "#4cc9a0",
        "#e87bbd",
        "#a996ee",
        "#6fcfe6",
        "#d3a95a",
        "#f0808c",
        "#a9cf5a",
        "#9d9de0",
        "#7d8792",
    ],
}

TERMS = ["#5f7388", "#c3a995", "#bcc5ce"]
"""What is no domain has none of a domain's colours, in neither theme: these are muted, dark enough and light enough for both.
Of samples, momentum and decay; of scoring and training, the first and the last."""

_INK = {
    "light": {
        "text": "#1d2530",
        "muted": "#5d6875",
        "grid": "#e6e9ee",
        "axis": "#aab3bf",
        "accent": "#1d2530",
    },
    "dark": {
        "text": "#e8ecf2",
        "muted": "#a3aebb",
        "grid": "#2b333e",
        "axis": "#55616f",
        "accent": "#f2f5f9",
    },
}

_PREDICTED = {"light": "#d1495b", "dark": "#f0808c"}

_DIVERGING = {"light": ["#c0492b", "#f3f4f6", "#2565ae"], "dark": ["#c4532f", "#232a34", "#2f74c9"]}


def theme(mode: str) -> dict[str, Any]:
    """The Vega-Lite configuration of `light` or `dark`."""
    ink = _INK[mode]
    return {
        "background": "transparent",
        "font": FONT,
        "view": {"stroke": None},
        "padding": 4,
        "range": {"category": _CATEGORY[mode], "diverging": _DIVERGING[mode]},
        "axis": {
            "labelColor": ink["muted"],
            "titleColor": ink["muted"],
            "titleFontWeight": "normal",
            "labelFontSize": 11,
            "titleFontSize": 11,
            "gridColor": ink["grid"],
            "domainColor": ink["axis"],
            "tickColor": ink["axis"],
            "labelLimit": 150,
        },
        # A label that is pushed inwards at the end of an axis would run into its neighbour.
        "axisXQuantitative": {"labelFlush": False, "labelOverlap": "greedy", "labelSeparation": 4},
        "axisY": {"domain": False, "ticks": False, "labelPadding": 6},
        "legend": {
            "orient": "top",
            "title": None,
            "titleColor": ink["muted"],
            "titleFontWeight": "normal",
            "titleLimit": 300,
            "labelColor": ink["text"],
            "labelFontSize": 12,
            "symbolType": "square",
            "symbolStrokeWidth": 0,
            "labelLimit": 180,
            "columns": 4,
        },
        "title": {"color": ink["text"], "subtitleColor": ink["muted"], "anchor": "start", "fontSize": 14},
        "text": {"color": ink["text"], "fontSize": 11},
        "rule": {"color": ink["axis"]},
        "style": {
            "realised": {"color": ink["accent"], "strokeWidth": 2.2},
            "predicted": {"color": _PREDICTED[mode], "strokeWidth": 1.8, "strokeDash": [5, 3]},
            "zero": {"color": ink["muted"], "strokeWidth": 1},
            "phase": {"color": ink["axis"], "strokeDash": [2, 3], "strokeWidth": 1},
            "phase-name": {"color": ink["muted"], "fontSize": 10},
            "whisker": {"color": ink["text"], "strokeWidth": 1.4},
        },
    }


@dataclass(frozen=True)
class Chart:
    """One chart as a Vega-Lite spec without theme; None where it does not depend on target, phase or measure."""

    slot: str
    title: str
    spec: dict[str, Any]
    target: str | None = None
    phase: str | None = None
    measure: str | None = None

    @property
    def name(self) -> str:
        """Unique among the charts of a report."""
        return "-".join(part for part in (self.slot, self.target, self.phase, self.measure) if part)


def spec(height: int, **parts: Any) -> dict[str, Any]:
    """A spec as wide as its container."""
    sized = {"$schema": SCHEMA, "width": "container", "height": height}
    return sized | {"autosize": {"type": "fit-x", "contains": "padding"}} | parts


class Palette:
    """Colours of domains, the same in every chart: the COLOURED ones with the most samples, in run.json's order.

    names: of all datasets. samples: of each.
    """

    def __init__(self, names: Sequence[str], samples: Sequence[int]) -> None:
        largest = sorted(range(len(names)), key=lambda index: -samples[index])
        limit = COLOURED if len(names) > COLOURED + 1 else len(names)
        self.indices = sorted(largest[:limit])
        self.names = list(names)
        self.keys = [names[index] for index in self.indices]
        if limit < len(names):
            self.keys.append(OTHER)

    def key(self, dataset: int) -> str:
        """The legend's entry of a dataset."""
        return self.names[dataset] if dataset in self.indices else OTHER

    def encoding(self, legend: bool = True) -> dict[str, Any]:
        """The colour channel of rows that have `domain`, a key of the legend."""
        channel: dict[str, Any] = {"field": "domain", "type": "nominal", "scale": {"domain": self.keys}}
        return channel | ({} if legend else {"legend": None})


def phase_layers(phases: Sequence[dict[str, Any]], last_step: int) -> list[dict[str, Any]]:
    """Lines where phases begin, and their names above the plot. phases: without the whole run."""
    begins = [{"at": phase["first"], "name": phase["name"]} for phase in phases]
    position = step_axis(last_step) | {"field": "at"}
    return [
        {
            "data": {"values": [entry for entry in begins if entry["at"] > 1]},
            "mark": {"type": "rule", "style": "phase"},
            "encoding": {"x": position},
        },
        {
            "data": {"values": begins},
            "mark": {"type": "text", "style": "phase-name", "align": "left", "dx": 3, "dy": -6},
            "encoding": {"x": position, "y": {"value": 0}, "text": {"field": "name"}},
        },
    ]


BEYOND = {
    "field": "beyond",
    "type": "nominal",
    "scale": {"domain": ["", "up", "down"], "range": ["circle", "triangle-up", "triangle-down"]},
    "legend": None,
}
"""The shape of a point: a triangle at the frame where the figure lies beyond the axis."""


def step_axis(last_step: int) -> dict[str, Any]:
    """The channel of training steps."""
    return {
        "field": "step",
        "type": "quantitative",
        "title": "training step",
        "scale": {"domain": [1, max(last_step, 2)], "nice": False},
        "axis": {"grid": False, "tickCount": 6, "format": "~s" if last_step >= 10_000 else "d"},
    }


def label_of(phase: dict[str, Any]) -> str:
    """`late, steps 101-300`."""
    return f"{phase['name']}, steps {phase['first']}-{phase['last']}"
