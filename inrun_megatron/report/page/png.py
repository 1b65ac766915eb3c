"""The charts of a report as PNG files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import vl_convert

from inrun_megatron.errors import UserError
from inrun_megatron.report.charts.collection import default_charts
from inrun_megatron.report.charts.theme import theme

WIDTH, SCALE = 720, 2


def write_png(figures: dict[str, Any], directory: Path) -> list[str]:
    """The charts that the page shows when it is opened, as PNG files. Returns their names."""
    names = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for chart in default_charts(figures):
            sized = chart.spec | {"width": WIDTH, "title": chart.title}
            image = vl_convert.vegalite_to_png(
                sized, config=theme("light") | {"background": "white"}, scale=SCALE
            )
            name = re.sub(r"[^\w.-]+", "_", chart.name) + ".png"
            (directory / name).write_bytes(image)
            names.append(name)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}; choose another --png") from error
    return names
