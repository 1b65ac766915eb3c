"""The chart of where the value comes from, over training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inrun_megatron.report.charts.pieces import Chart, Palette, phase_layers, spec, step_axis
from inrun_megatron.report.tables import scale_of


def composition_chart(
    rows: Sequence[dict[str, Any]], figures: dict[str, Any], target: str, measure: str, palette: Palette
) -> Chart:
    """Value by domain over training: positive parts stacked up from 0, negative ones down. rows: the target's."""
    if measure == "normalised":
        field, unit, title, number = "share", 1.0, "share of the step's |value|", ".0%"
    else:
        field, number = "value", ".2f"
        unit, name = scale_of([row["value"] for row in rows])
        title = f"value per step, nats {name}".strip()
    data = stacked(rows, field, unit, palette)
    last = figures["steps"]["last"]
    ends = [band["y1"] for band in data]
    scale = {"domain": [min(ends), max(ends) or 1.0], "nice": False}
    y = {
        "field": "y0",
        "type": "quantitative",
        "title": title,
        "axis": {"format": number, "tickCount": 6},
        "scale": scale,
    }
    tooltip = [
        {"field": "domain"},
        {"field": "first", "title": "from step"},
        {"field": "last", "title": "to step"},
        {"field": "value", "title": title, "format": "+" + number},
    ]
    areas = [
        {
            "transform": [{"filter": {"field": "sign", "equal": sign}}],
            "mark": {"type": "area", "interpolate": "linear", "line": False},
            "encoding": {
                "x": step_axis(last),
                "y": y,
                "y2": {"field": "y1"},
                "color": palette.encoding(),
                "detail": {"field": "domain"},
            },
        }
        for sign in "+-"
    ]
    # An area knows its figures only as a whole: invisible rectangles answer the pointer bin by bin.
    hover = {
        "mark": {"type": "rect", "opacity": 0},
        "encoding": {
            "x": {"field": "first", "type": "quantitative"},
            "x2": {"field": "last"},
            "y": y,
            "y2": {"field": "y1"},
            "tooltip": tooltip,
        },
    }
    zero = {"mark": {"type": "rule", "style": "zero"}, "encoding": {"y": {"datum": 0}}}
    return Chart(
        "composition",
        f"Where the value towards {target} comes from, over training",
        spec(
            240,
            data={"values": data},
            layer=[*areas, zero, *phase_layers(figures["phases"][1:], figures["steps"]["last"]), hover],
        ),
        target,
        None,
        measure,
    )


def stacked(
    rows: Sequence[dict[str, Any]], field: str, unit: float, palette: Palette
) -> list[dict[str, Any]]:
    """Rows of `composition` of one target as bands from y0 to y1: one per bin, entry of the legend and sign.

    Every entry has both a `+` and a `-` band in each bin, so that its areas go through 0 where its sign changes.
    """
    bins: dict[tuple[int, int], dict[str, float]] = {}
    for row in rows:
        here = bins.setdefault((row["first_step"], row["last_step"]), dict.fromkeys(palette.keys, 0.0))
        here[palette.key(row["dataset"])] += row[field] / unit
    bands = []
    for (first, last), values in sorted(bins.items()):
        for sign in "+-":
            base = 0.0
            for domain, value in values.items():
                top = base + (max(value, 0.0) if sign == "+" else min(value, 0.0))
                where = {"first": first, "last": last + 1, "step": (first + last) / 2}
                bands.append(where | {"domain": domain, "sign": sign, "y0": base, "y1": top, "value": value})
                base = top
    return bands
