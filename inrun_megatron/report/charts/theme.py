"""How charts look: Vega-Lite configurations for light and dark."""

from __future__ import annotations

from typing import Any

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Helvetica, Arial, sans-serif"

# Ten hues told apart with the usual colour deficiencies (after Okabe and Ito's set), then the grey of other domains.
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

TERM_COLOURS = ["#5f7388", "#c3a995", "#bcc5ce"]
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
