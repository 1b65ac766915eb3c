"""Charts over training and of distributions: losses, composition, histograms, time of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inrun_megatron.report.charts.theme import (
    BEYOND,
    TERMS,
    Chart,
    Palette,
    label_of,
    phase_layers,
    spec,
    step_axis,
)
from inrun_megatron.report.tables import scale_of
from inrun_megatron.report.values.distribution import HISTOGRAM_END, HISTOGRAM_WIDTH


def loss_chart(figures: dict[str, Any], target: dict[str, Any]) -> Chart:
    """Loss of a target, and what the values predict from the beginning of each phase."""
    low = min(point["loss"] for point in target["curve"])
    high = max(point["loss"] for point in target["curve"])
    # A prediction far off the loss ends at the frame, with a triangle, rather than flattening the loss.
    low, high = low - 0.3 * (high - low), high + 0.15 * (high - low)
    lines, left = [], set()
    for point in target["curve"]:
        here = {"step": point["step"], "beyond": ""}
        lines.append(here | {"loss": point["loss"], "line": "measured", "run": 0})
        if point["run"] not in left:
            predicted = min(max(point["predicted"], low), high)
            beyond = "down" if point["predicted"] < low else "up" if point["predicted"] > high else ""
            lines.append(
                here | {"loss": predicted, "line": "predicted", "run": point["run"], "beyond": beyond}
            )
            if beyond:
                left.add(point["run"])
    y = {
        "field": "loss",
        "type": "quantitative",
        "title": "loss, nats per token",
        "scale": {"zero": False, "domain": [low, high], "nice": False},
    }
    encoding = {
        "x": step_axis(figures["steps"]["last"]),
        "y": y,
        "detail": {"field": "run"},
        "tooltip": [
            {"field": "line"},
            {"field": "step", "title": "step"},
            {"field": "loss", "format": ".4f", "title": "loss"},
        ],
    }
    layers = [
        {
            "transform": [{"filter": {"field": "line", "equal": line}}],
            "mark": {"type": "line", "style": style, "point": len(target["curve"]) < 3},
            "encoding": encoding,
        }
        for line, style in (("predicted", "predicted"), ("measured", "realised"))
    ]
    layers.append(
        {
            "transform": [{"filter": "datum.beyond !== ''"}],
            "mark": {
                "type": "point",
                "style": "predicted",
                "filled": True,
                "opacity": 1,
                "size": 90,
                "strokeDash": [],
            },
            "encoding": encoding | {"shape": BEYOND},
        }
    )
    return Chart(
        "loss",
        f"Loss of target {target['name']}: measured (solid), predicted by the values from each phase's start (dashed)",
        spec(
            220,
            data={"values": lines},
            layer=[*phase_layers(figures["phases"][1:], figures["steps"]["last"]), *layers],
        ),
        target["name"],
    )


def training_chart(figures: dict[str, Any]) -> Chart:
    """Training loss."""
    return Chart(
        "training",
        "Training loss",
        spec(
            160,
            data={"values": figures["training"]},
            mark={"type": "line", "strokeWidth": 1.4, "tooltip": True},
            encoding={
                "x": step_axis(figures["steps"]["last"]),
                "y": {
                    "field": "train_loss",
                    "type": "quantitative",
                    "title": "loss, nats per token",
                    "scale": {"zero": False},
                },
                "tooltip": [
                    {"field": "step"},
                    {"field": "train_loss", "format": ".4f", "title": "training loss"},
                    {"field": "lr", "format": ".3g", "title": "learning rate"},
                ],
            },
        ),
    )


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


def timing_chart(figures: dict[str, Any]) -> Chart:
    """Seconds of a step, training and scoring."""
    data = [
        {
            "step": point["step"],
            "part": part,
            "seconds": point[part],
            "first": point["first"],
            "last": point["last"],
        }
        for point in figures["timing"]["curve"]
        for part in ("training", "scoring")
    ]
    return Chart(
        "timing",
        "Time of a scored step",
        spec(
            200,
            data={"values": data},
            mark={"type": "area", "line": False, "tooltip": True},
            encoding={
                "x": step_axis(figures["steps"]["last"]),
                "y": {
                    "field": "seconds",
                    "type": "quantitative",
                    "title": "seconds per step",
                    "stack": "zero",
                },
                "color": {
                    "field": "part",
                    "type": "nominal",
                    "scale": {"domain": ["training", "scoring"], "range": [TERMS[2], TERMS[0]]},
                },
                "order": {"field": "part", "sort": "descending"},
            },
        ),
    )
