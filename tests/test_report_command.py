"""`inrun report`: what its page holds, the files it writes, and what it does not replace."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inrun_megatron.report.page.figures import build_figures
from inrun_megatron.report.page.html import render, write_page
from inrun_megatron.report.page.png import write_png
from tests.command_line import inrun
from tests.report_runs import HOSTILE, record, short_ledger, write_reported_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("run")
    rows = write_reported_run(directory)
    return directory, rows, build_figures(directory, documents=4)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attributes:
            if name in ("src", "srcset", "data", "poster") or (name == "href" and tag == "link"):
                self.loads.append(value or "")


def test_the_page_loads_nothing_and_keeps_text_as_text(
    run: tuple[Path, np.ndarray, dict[str, Any]], tmp_path: Path
) -> None:
    figures = run[2]
    assert any(d["text"].startswith(HOSTILE[:20]) for d in figures["documents"])
    html = render(figures)
    page = _Page()
    page.feed(html)
    assert page.loads == ["data:,"] and page.scripts == 3
    assert "@import" not in html and not re.search(r"url\((?!['\"]?data:)", html.split("</style>")[0])
    charts = json.loads(
        re.findall(r'<script type="application/json" id="charts">(.*?)</script>', html, re.S)[0]
    )
    assert {chart["slot"] for chart in charts["charts"].values()} >= {"loss", "heat", "value", "composition"}


def test_a_failed_audit_is_red_and_missing_data_are_said(
    run: tuple[Path, np.ndarray, dict[str, Any]], tmp_path: Path
) -> None:
    directory, _, figures = run
    bad = dict(
        figures["audits"]["checks"][0], name="additivity", ok=False, detail="12 steps beyond the tolerance"
    )
    html = render(
        figures | {"audits": {"full": False, "checks": [bad]}, "documents": None, "documents_error": "gone"}
    )
    assert html.count('<li class="bad">') == 2 and "✗ 1 failed" in html and "✗ failed" in html
    assert f"inrun verify {directory}" in html and "Documents cannot be shown: gone" in html
    noted = render(figures | {"audits": {"full": True, "checks": [bad | {"ok": True, "note": True}]}})
    assert '<li class="bad">' not in noted and "! note" in noted and "with a note: additivity" in noted
    assert "✓ ok" not in noted


def test_short_and_bare_ledgers_make_a_page(tmp_path: Path) -> None:
    short_ledger(tmp_path / "one", [record(1, 3.0, None, "unscored: no optimizer state")])
    html = render(build_figures(tmp_path / "one"))
    assert "No scored samples" in html and "No times recorded" in html


def test_command_writes_page_charts_and_json(
    run: tuple[Path, np.ndarray, dict[str, Any]], tmp_path: Path
) -> None:
    directory, _, figures = run
    result = inrun("report", directory, "-n", 4, "--png", tmp_path / "png")
    assert result.code == 0
    assert "report.html" in result.out and (directory / "report.html").stat().st_size > 500_000
    images = {path.name: path.read_bytes() for path in (tmp_path / "png").iterdir()}
    assert (
        len(images) == 13
        and "explained-code.png" in images
        and "value-code-late-normalised.png" in images
        and "loss-prose.png" in images
    )
    assert all(image.startswith(b"\x89PNG") and len(image) > 5000 for image in images.values())
    result = inrun("report", directory, "-n", 4, "--json")
    assert result.code == 0
    printed = result.json
    assert set(printed) == set(figures)
    # DuckDB's threads add in no fixed order.
    assert [row["sum"] for row in printed["domains"]] == pytest.approx(
        [row["sum"] for row in figures["domains"]]
    )
    assert printed["audits"]["full"] is True
    result = inrun("report", directory, "-n", 0, "--no-verify", "--json", "-o", tmp_path / "page.html")
    assert result.code == 0
    audits = result.json["audits"]
    assert [check["name"] for check in audits["checks"]] == ["coverage", "additivity", "efficiency"]
    assert (tmp_path / "page.html").exists()


def test_it_replaces_reports_only(run: tuple[Path, np.ndarray, dict[str, Any]], tmp_path: Path) -> None:
    directory, _, figures = run
    page, foreign = tmp_path / "page.html", tmp_path / "notes.html"
    write_page(figures, page)
    write_page(figures, page)
    foreign.write_text("<p>notes")
    for arguments, message in (
        (("-o", foreign), "is no earlier report"),
        (("-o", tmp_path), "is a directory"),
        (("-o", tmp_path / "no" / "page.html"), "cannot write"),
        (("--png", foreign), "cannot write to"),
        (("-n", -1), "-n -1 is no number"),
        (("--phases", "x"), "not a list of fractions"),
    ):
        result = inrun("report", directory, *arguments)
        assert result.code == 1
        assert message in result.err
    assert foreign.read_text() == "<p>notes" and sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.html", "page.html",
    ]  # fmt: skip


def test_png_names_are_file_names(run: tuple[Path, np.ndarray, dict[str, Any]], tmp_path: Path) -> None:
    target = run[2]["targets"][0] | {"name": "a/b c"}
    names = write_png(
        run[2] | {"targets": [target], "distribution": [], "domains": [], "composition": []}, tmp_path
    )
    assert "loss-a_b_c.png" in names
