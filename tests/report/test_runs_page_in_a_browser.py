"""The page of many runs as Chromium lays it out: nothing is cut, on a small screen, a large one and on paper."""

from __future__ import annotations

import io
import json
import re
import shutil

import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from eellm.report.runs.page import runs_page
from tests.analysis.example_study import write_example_study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PAPER = 718
"""Pixels of the width of A4 less its margins."""
EDGE = 4
STICKING_OUT = """() => [...document.querySelectorAll("main *")].filter(part => {
  const box = part.getBoundingClientRect(), scroll = part.parentElement.closest(".scroll");
  const room = scroll && getComputedStyle(scroll).overflowX === "auto" ? 1e6 : document.documentElement.clientWidth;
  return box.width && (box.left < -0.5 || box.right > room + 0.5);
}).map(part => `${part.tagName} ${part.className} ${part.textContent.slice(0, 40)}`)"""
CUT_CELLS = """() => [...document.querySelectorAll("tr")].flatMap(row => [...row.cells]).filter(cell => {
  const next = cell.nextElementSibling, text = document.createRange(), box = cell.getBoundingClientRect();
  text.selectNodeContents(cell);
  const inside = [...text.getClientRects()].every(part => part.left >= box.left - 1 && part.right <= box.right + 1
    && part.top >= box.top - 1 && part.bottom <= box.bottom + 1);
  return !inside || (next && next.getBoundingClientRect().left < box.right - 1);
}).map(cell => cell.innerText)"""
CUT_TEXTS_OF_FIGURES = """() => [...document.querySelectorAll("figure svg text")].filter(text => {
  const box = text.getBoundingClientRect(), figure = text.closest("figure").getBoundingClientRect();
  return box.left < figure.left || box.right > figure.right || box.top < figure.top || box.bottom > figure.bottom;
}).map(text => text.textContent)"""
HIDDEN_ROWS = """() => [...document.querySelectorAll("tr, h2, h3, figure, details > *")].filter(
  part => !part.checkVisibility() || !part.getBoundingClientRect().height).map(part => part.textContent.slice(0, 40))"""

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium on this machine: the page was not tried in a browser"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_example_study(folder / "runs")
    for file in (folder / "runs").glob("weight_*/metrics.json"):  # a table of more columns than fit into any width
        heads, values = ("exit_02", "exit_04", "exit_06", "final"), ("perplexity", "accuracy", "agreement", "calibration_error")
        more = {f"eval/{value}/{head}": 0.5 for head in heads for value in values}
        file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    (folder / "report.html").write_text(runs_page(str(folder / "runs"), folder), encoding="utf-8")
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


def opened(browser, page, width):
    tab = browser.new_page(viewport={"width": width, "height": 900})
    tab.goto(page)
    return tab


def assert_whole(tab):
    assert tab.evaluate(STICKING_OUT) == []
    assert tab.evaluate(CUT_CELLS) == []
    assert tab.evaluate(CUT_TEXTS_OF_FIGURES) == []


@pytest.mark.parametrize("width", [400, 1600])
def test_on_a_screen_nothing_is_cut(browser, page, width):
    tab = opened(browser, page, width)
    tab.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert tab.locator("table").count() >= 6
    assert_whole(tab)
    picture = Image.open(io.BytesIO(tab.screenshot(full_page=True))).convert("RGB")
    assert picture.width == width
    for left in (0, width - EDGE):
        edge = picture.crop((left, 0, left + EDGE, picture.height))
        assert len(edge.getcolors()) == 1, "the margin is empty from top to bottom"
    assert len(picture.getcolors(1 << 24)) > 100


def test_on_a_small_screen_differences_over_seeds_are_seen_without_scrolling(browser, page):
    tab = opened(browser, page, 400)
    tab.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    heads = tab.locator("table.wraps thead th")
    ends = {head.inner_text().strip(): head.bounding_box() for head in heads.all()}
    box = ends["within noise"]
    assert box["x"] + box["width"] <= 400


def test_on_paper_nothing_is_missing_and_nothing_is_cut(browser, page):
    tab = opened(browser, page, PAPER)
    tab.emulate_media(media="print")
    assert tab.evaluate(HIDDEN_ROWS), "tables begin folded"
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate(HIDDEN_ROWS) == []
    assert tab.evaluate("document.documentElement.scrollWidth") == PAPER
    assert_whole(tab)


def test_a_print_holds_what_is_folded_on_the_screen(browser, page):
    """The same page without what unfolds it is shorter."""
    printed = []
    for unfolding in (True, False):
        tab = opened(browser, page, PAPER)
        if not unfolding:
            tab.evaluate("document.querySelectorAll('details').forEach(part => part.replaceWith(part.firstElementChild))")
        printed.append(len(re.findall(rb"/Type /Page\b", tab.pdf(format="A4"))))
        assert tab.locator("details[open]").count() == 0, "folded again afterwards"
    assert printed[0] >= printed[1] + 3
