"""The chart of what a step's time goes to."""

from __future__ import annotations

from typing import Any

from inrun_megatron.report.charts.pieces import Chart, spec, step_axis
from inrun_megatron.report.charts.theme import TERM_COLOURS


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
                    "scale": {"domain": ["training", "scoring"], "range": [TERM_COLOURS[2], TERM_COLOURS[0]]},
                },
                "order": {"field": "part", "sort": "descending"},
            },
        ),
    )
