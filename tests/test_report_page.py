"""The page of `inrun report` in a headless browser, offline: it opens, answers, sorts, searches and fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from inrun_megatron.report.page.figures import build_figures
from inrun_megatron.report.page.html import write_page
from tests.browser import browser
from tests.report_runs import write_reported_run

__all__ = ["browser"]  # a fixture

PATIENCE_MS = 60_000
WIDTHS = {"desktop": (1280, 900), "narrow": (390, 844)}

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reported")
    write_reported_run(directory)
    path = directory / "report.html"
    write_page(build_figures(directory, documents=10), path)
    return path


@pytest.fixture
def opened(browser: Browser, page_file: Path) -> Iterator[Open]:
    """Opens the page; at the end nothing may have been complained about or asked of a network."""
    contexts, complaints = [], []

    def open_page(width: str = "desktop", scheme: str = "light") -> Page:
        size = WIDTHS[width]
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            color_scheme=scheme,  # type: ignore[arg-type]
            offline=True,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if _foreign(request.url) else None)
        page.goto(page_file.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def _foreign(url: str) -> bool:
    return not url.startswith(("file:", "data:", "blob:"))


def shown(page: Page, column: int) -> list[str]:
    """The cells of a column of the documents that are shown."""
    rows = "[...document.querySelectorAll('#document-table tbody tr:not([hidden])')]"
    return page.evaluate(f"{rows}.map(row => row.cells[{column}].innerText.trim())")


def numbers(cells: list[str]) -> list[float]:
    return [float(cell.replace(",", "")) for cell in cells]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_opens_and_fits(opened: Open, width: str, scheme: str) -> None:
    page = opened(width, scheme)
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width][0]
    drawn = page.evaluate("""[...document.querySelectorAll('.chart')].map(place => {
        const box = place.querySelector('svg')?.getBoundingClientRect() ?? {width: 0, height: 0};
        return [place.dataset.slot, box.width, box.height, place.querySelectorAll('svg path').length];
    })""")
    slots = [slot for slot, *_ in drawn]
    # two targets; training loss, heat map and time are one chart each
    assert {slot: slots.count(slot) for slot in slots} == {
        "training": 1, "loss": 2, "explained": 2, "heat": 1, "value": 2, "composition": 2, "distribution": 2, "timing": 1,
    }  # fmt: skip
    cut = "[...document.querySelectorAll('table.explained')].map(t => t.offsetWidth > t.parentElement.clientWidth)"
    assert page.evaluate(cut) == [False, False]
    for slot, chart_width, height, paths in drawn:
        assert 250 < chart_width <= WIDTHS[width][0] and height > 60 and paths > 3, slot
    ink, paper = (
        page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
    )
    assert (brightness(ink) < brightness(paper)) == (scheme == "light")


def brightness(colour: str) -> int:
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")[:3])


def test_documents_sort(opened: Open) -> None:
    page = opened()
    best = numbers(shown(page, 1))  # opens with the best towards the first target
    assert len(best) == 10 and best == sorted(best, reverse=True) and best[0] > best[-1] > 0
    page.select_option("#list", "w1")
    worst = numbers(shown(page, 2))
    assert len(worst) > 3 and worst == sorted(worst) and worst[0] < worst[-1] < 0
    page.select_option("#list", "")
    everything = len(shown(page, 0))
    assert everything > len(worst)
    page.click("#document-table th:nth-child(4) button")
    tokens = numbers(shown(page, 3))
    assert tokens == sorted(tokens, reverse=True) and len(set(tokens)) > 1
    page.click("#document-table th:nth-child(4) button")
    assert numbers(shown(page, 3)) == sorted(tokens)
    assert page.get_attribute("#document-table th:nth-child(4)", "aria-sort") == "ascending"
    assert page.get_attribute("#document-table th:nth-child(2)", "aria-sort") is None


def test_documents_search_and_open(opened: Open) -> None:
    page = opened()
    page.select_option("#list", "")
    page.fill("#search", "prose DOCUMENT")
    found = shown(page, 0)
    assert found and all(cell.startswith("prose:") for cell in found)
    assert page.inner_text("#count").startswith(f"{len(found)} of ")
    row = page.locator("#document-table tbody tr:visible").first
    assert not row.locator("pre").is_visible()
    row.locator("summary").click()
    assert "text" in row.locator("pre").inner_text() and "prose/" in row.locator(".about").inner_text()
    page.fill("#search", "no such words")
    assert shown(page, 0) == [] and page.is_visible("#none")
    page.fill("#search", "")
    page.select_option("#domain", "code")
    assert all(cell.startswith("code:") for cell in shown(page, 0)) and shown(page, 0)


def test_links_lead_to_sources_and_nowhere_else(opened: Open) -> None:
    page = opened()
    links = page.evaluate("[...document.querySelectorAll('#document-table a')].map(link => link.href)")
    assert any(link.startswith("https://example.org/") for link in links)
    assert {link.split(":")[0] for link in links} == {
        "https",
        "file",
    }  # an address that is a script is no address


def test_text_of_documents_stays_text(opened: Open) -> None:
    page = opened()
    assert page.title().startswith("In-run values")
    page.select_option("#list", "")
    page.fill("#search", "onerror")
    assert len(shown(page, 0)) == 1
    page.locator("#document-table tbody tr:visible summary").click()
    text = page.locator("#document-table tbody tr:visible pre").inner_text()
    assert text.startswith("</script></details><script>") and "\\u202e" in text
    assert page.locator("#document-table img").count() == 0


def test_controls(opened: Open) -> None:
    page = opened()
    labels = "[...document.querySelectorAll('.chart[data-slot=heat] .role-mark text')].map(text => text.textContent)"
    late = page.evaluate(labels)
    assert len(late) == 6 and any(text.startswith("−") for text in late)
    page.click(".bar label:has(input[value=early])")
    page.wait_for_function("document.querySelector('[data-slot=heat]').dataset.drawn.includes('early')")
    early = page.evaluate(labels)
    assert early != late and "steps 1 to 10" in page.inner_text("#domains .lead")
    page.click("label:has(input[value=nats])")
    page.wait_for_function("document.querySelector('[data-slot=heat]').dataset.drawn.includes('nats')")
    assert "nats" in page.inner_text("#domains .lead") and page.evaluate(labels) != early
    cards = page.locator("[data-target-card=code]:visible").count()
    page.click(".bar label:has(input[value=code])")
    assert cards > 3 and page.locator("[data-target-card=code]:visible").count() == 0
    page.click("#theme")
    page.click("#theme")
    page.wait_for_function("document.querySelector('[data-slot=heat]').dataset.drawn.endsWith('dark')")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.inner_text("#theme") == "Theme: dark"  # kept


def test_audits_and_overhead_are_there(opened: Open) -> None:
    page = opened()
    assert page.locator(".audits li.good").count() == 10 and page.locator(".audits li.bad").count() == 0
    cost = page.inner_text("#cost")
    assert "200 ms" in cost and "30 ms" in cost and "+17.6%" in cost  # 0.2 s a step, 0.03 s of it for scoring
