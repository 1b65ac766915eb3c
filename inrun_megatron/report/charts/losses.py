"""The charts of losses over training: the training loss, and each target's with what the values predict."""

from __future__ import annotations

from typing import Any

from inrun_megatron.report.charts.pieces import (
    BEYOND,
    Chart,
    clipped,
    phase_layers,
    spec,
    step_axis,
)


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
            predicted, beyond = clipped(point["predicted"], low, high)
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
