"""What several charts are made of: colours of domains, the axis of steps, the beginnings of phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"

COLOURED = 10
"""Domains that have a colour of their own; the others share the palette's last one, a grey."""

OTHER = "other domains"


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


def clipped(number: float, low: float, high: float) -> tuple[float, str]:
    """`number` within an axis, and where it lies beyond (an entry of BEYOND)."""
    return min(max(number, low), high), "up" if number > high else "down" if number < low else ""


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
