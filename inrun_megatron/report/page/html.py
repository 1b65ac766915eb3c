"""From the figures of a run to its page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from inrun_megatron.errors import UserError
from inrun_megatron.ledger.files import replacing
from inrun_megatron.ledger.schema import SCORED
from inrun_megatron.report.charts.collection import MEASURES, all_charts
from inrun_megatron.report.charts.theme import theme
from inrun_megatron.report.documents.attribution import IN_WORDS
from inrun_megatron.report.tables import decimals_of, figure, json_ready, scale_near, scale_of
from inrun_megatron.report.text import printable, shorten

CHECKS = {
    "commits": "Every commit record can be read.",
    "files": "Every committed file is there, with the bytes that were committed.",
    "uncommitted": "Files that no commit names; readers pass over them.",
    "rows": "Every value is finite and belongs to a known target, dataset, sample and step.",
    "duplicates": "No row is there twice.",
    "steps": "Rows add up to what each step recorded.",
    "datasets": "The training data are still those of the run.",
    "coverage": "Every trainable parameter took part in the scores.",
    "additivity": "The samples' values add up to what the optimizer's own gradient gives, step by step.",
    "efficiency": "The predicted loss change beside the measured one: its sign, and its scale to a factor of 2.",
}

GENERATOR = '<meta name="generator" content="inrun report">'
"""Marks our pages, so that --output replaces those and no other file."""

SNIPPET_CHARACTERS = 180


def render(figures: dict[str, Any]) -> str:
    """The page of `build_figures`'s figures: one HTML text without anything that is loaded from elsewhere."""
    loader = PackageLoader("inrun_megatron.report.page")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": figure, "snippet": _snippet, "seconds": _seconds}
    environment.globals["decimals_of"] = decimals_of
    environment.globals["source"] = lambda name: Markup(loader.get_source(environment, name)[0])
    charts = {chart.name: vars(chart) | {"name": chart.name} for chart in all_charts(figures)}
    domain_unit, domain_unit_name = scale_of([row["mean"] for row in figures["domains"]])
    unit, unit_name = scale_near(
        [value["value"] for entry in figures["documents"] or [] for value in entry["values"].values()],
        (domain_unit, domain_unit_name),
    )
    return environment.get_template("report.html.j2").render(
        f=figures,
        generator=Markup(GENERATOR),
        slots={(chart["slot"], chart["target"]) for chart in charts.values()},
        charts=_embedded({"charts": charts, "themes": {mode: theme(mode) for mode in ("light", "dark")}}),
        library=_library(),
        measures=MEASURES,
        last_phase=figures["phases"][-1],
        checks=CHECKS,
        scored=SCORED,
        documents_in_words=IN_WORDS[figures["run"]["granularity"]],
        documents=[_document(entry, figures) for entry in figures["documents"] or []],
        document_unit=unit,
        document_unit_name=unit_name,
        domain_unit=domain_unit,
        domain_unit_name=domain_unit_name,
    )


def write_page(figures: dict[str, Any], path: Path) -> None:
    """Render to `path`, replacing an earlier report only. Raises UserError when it cannot be written."""
    if path.is_dir():
        raise UserError(
            f"{path} is a directory; give --output the name of a file, such as {path / 'report.html'}"
        )
    try:
        if path.exists() and GENERATOR.encode() not in path.read_bytes()[:2048]:
            raise UserError(f"{path} exists and is no earlier report; choose another --output")
        with replacing(path) as temporary:
            temporary.write_text(render(figures), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --output") from error


def _embedded(record: Any) -> Markup:
    """JSON inside a script element: nothing in it can end the element."""
    text = json.dumps(json_ready(record), separators=(",", ":"), default=str)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _library() -> Markup:
    """vega, vega-lite and vega-embed, as vl-convert bundles them."""
    code = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # optional, not so in its stubs
    # Inside string literals and regular expressions these mean the same; in HTML they would end or hide the script.
    return Markup(re.sub(r"<(?=/script|!--)", r"\\x3c", code, flags=re.IGNORECASE))


def _document(entry: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    """A document's row: its lists as marks (b0: best towards target 0), metadata in words, a link to its source."""
    position = {target["name"]: index for index, target in enumerate(figures["targets"])}
    marks = [f"{kind[0]}{position[target]}" for kind, ranks in entry["lists"].items() for target in ranks]
    prefix = figures["datasets"][entry["dataset"]]["path_prefix"]
    metadata = {
        name: value
        for name, value in entry["metadata"].items()
        if name not in ("document", "tokens") and value is not None
    }
    return entry | {"marks": " ".join(marks), "metadata": metadata, "link": _link(entry["metadata"], prefix)}


def _link(metadata: dict[str, Any], prefix: str | None) -> str | None:
    """The document's own web address if it has one, else its input file where that is at hand: at the path that was
    given to `inrun prepare`, or beside the dataset's prefix."""
    url, file = metadata.get("url"), metadata.get("file")
    if isinstance(url, str) and urlsplit(url).scheme in ("http", "https"):
        return url
    if not isinstance(file, str):
        return None
    places = [Path(file)] + ([Path(prefix).parent / Path(file).name] if prefix else [])
    return next((path.absolute().as_uri() for path in places if path.is_file()), None)


def _snippet(text: str) -> str:
    return shorten(printable(" ".join(text.split())), SNIPPET_CHARACTERS)


def _seconds(number: float | None) -> str:
    """`85 ms`, `1.25 s`, `3 min 20 s`, `2 h 5 min`."""
    if number is None:
        return "-"
    if number < 1:
        return f"{number * 1000:.0f} ms"
    if number < 120:
        return f"{number:.3g} s"
    minutes, seconds = divmod(round(number), 60)
    return f"{minutes} min {seconds} s" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"
