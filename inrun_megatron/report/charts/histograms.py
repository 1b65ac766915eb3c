"""The charts of how normalised values are distributed."""

from __future__ import annotations

from typing import Any

from inrun_megatron.report.charts.pieces import Chart, Palette, label_of, spec
from inrun_megatron.report.values.distribution import HISTOGRAM_END, HISTOGRAM_WIDTH


def histograms(figures: dict[str, Any], palette: Palette) -> list[Chart]:
    """Distribution of normalised values by domain, one chart per phase and target; each domain's bins add up to 1."""
    charts = []
    for phase in figures["phases"]:
        for target in figures["targets"]:
            counts: dict[str, dict[int, int]] = {}
            for row in figures["distribution"]:
                if row["phase"] == phase["name"] and row["target"] == target["name"]:
                    domain = counts.setdefault(palette.key(row["dataset"]), {})
                    for index, n in row["bins"]:
                        domain[index] = domain.get(index, 0) + n
            if counts:
                spec_ = _histogram(counts, palette)
                title = f"Distribution of normalised values towards {target['name']}, {label_of(phase)}"
                charts.append(Chart("distribution", title, spec_, target["name"], phase["name"]))
    return charts


def _histogram(counts: dict[str, dict[int, int]], palette: Palette) -> dict[str, Any]:
    used = [index for bins in counts.values() for index in bins]
    low, high = min([*used, -4]) - 1, max([*used, 3]) + 1
    data = []
    for domain, bins in counts.items():
        total = sum(bins.values())
        for index in range(low, high + 1):
            start = index * HISTOGRAM_WIDTH
            end = start + HISTOGRAM_WIDTH
            span = f"{start:+.2f} to {end:+.2f}"
            if end >= HISTOGRAM_END:
                span = f"{start:+.2f} and above"
            elif start <= -HISTOGRAM_END:
                span = f"below {end:+.2f}"
            n = bins.get(index, 0)
            row = {"domain": domain, "at": start, "share": n / total, "n": n, "span": span}
            data.append(row | {"middle": start + HISTOGRAM_WIDTH / 2})
    x = {
        "field": "at",
        "type": "quantitative",
        "title": "normalised value",
        "scale": {"domain": [low * HISTOGRAM_WIDTH, (high + 1) * HISTOGRAM_WIDTH], "nice": False},
        "axis": {"grid": False, "tickCount": 9},
    }
    y = {
        "field": "share",
        "type": "quantitative",
        "title": "share of the domain",
        "stack": None,
        "axis": {"format": ".0%", "tickCount": 4},
    }
    layers = [
        {
            "mark": {
                "type": "area",
                "interpolate": "step-after",
                "fillOpacity": 0.16,
                "line": {"strokeWidth": 1.8},
            },
            "encoding": {"x": x, "y": y, "color": palette.encoding()},
        },
        {"mark": {"type": "rule", "style": "zero"}, "encoding": {"x": {"datum": 0}}},
        {
            "mark": {"type": "point", "opacity": 0, "size": 120, "filled": True},
            "encoding": {
                "x": {"field": "middle", "type": "quantitative"},
                "y": y,
                "tooltip": [
                    {"field": "domain"},
                    {"field": "span", "title": "normalised value"},
                    {"field": "share", "format": ".1%"},
                    {"field": "n", "title": "samples", "format": ","},
                ],
            },
        },
    ]
    return spec(200, data={"values": data}, layer=layers)
