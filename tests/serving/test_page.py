"""The page, used as people use it: in a headless Chromium, with mouse and keyboard, wide and narrow."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib import resources

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.serving.service import Loaded, Service

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NOT_RUN = "the page was NOT tested: there is no Chromium on this machine (Debian: apt-get install chromium)"
PROMPT = "class TestCase(unittest.TestCase):\n    def "


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip(NOT_RUN)
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield found
        found.close()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, browser: Browser, served: Service) -> Iterator[Page]:
    """The page, open; whatever it asked of anybody else or complained about fails the test."""
    width, height = request.param
    opened = browser.new_page(viewport={"width": width, "height": height})
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text) if "400 (Bad Request)" not in message.text else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda asked: asked.url.startswith((served.url, "data:")) or complaints.append(asked.url))
    opened.goto(served.url)
    expect(opened.locator("#decoding option")).to_have_count(3)
    yield opened
    assert complaints == []
    opened.close()


def generate(page: Page, threshold: float = 0.5, tokens: int = 24) -> None:
    page.fill("#prompt", PROMPT)
    page.fill("#tokens", str(tokens))
    page.locator("#threshold").fill(str(threshold))
    page.click("#start")
    expect(page.locator("#full .token")).to_have_count(tokens)
    expect(page.locator("#start")).to_be_enabled()


def layers(page: Page, panel: str) -> list[int]:
    return [int(token.get_attribute("data-layer")) for token in page.locator(f"#{panel} .token").all()]


def test_tokens_are_shown_with_their_layers_beside_full_depth(page: Page, model: Loaded) -> None:
    generate(page)
    alone, full = model.alone(PROMPT, 24, threshold=0.5), model.alone(PROMPT, 24, "full")
    assert layers(page, "early") == [token.exit_layer for token in alone.tokens]
    assert layers(page, "full") == [12] * 24
    for panel, text in (("early", alone.text), ("full", full.text)):
        written = page.locator(f"#{panel} .token").evaluate_all("all => all.map(one => one.firstChild.textContent).join('')")
        assert written.replace("↵\n", "\n") == text
    saved = 1 - sum(layers(page, "early")) / (24 * 12)
    assert page.inner_text("#early .figures").split("\n")[-1] == f"{100 * saved:.0f} %"
    assert float(page.inner_text("#early .figures dd >> nth=0")) > 0
    looks = {
        layer: page.locator(f"#early .token[data-layer='{layer}']").first.evaluate(
            "one => { const style = getComputedStyle(one); return style.backgroundColor + '|' + style.borderBottomStyle; }"
        )
        for layer in set(layers(page, "early"))
    }
    assert len(looks) > 2
    for part in (0, 1):
        assert len({look.split("|")[part] for look in looks.values()}) == len(looks), "told apart by colour, and by rule alone"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"


def test_pointing_at_a_token_tells_its_confidence_and_alternatives(page: Page, model: Loaded) -> None:
    generate(page)
    token = model.alone(PROMPT, 24, threshold=0.5).tokens[5]
    page.locator("#early .token").nth(5).hover()
    about = page.locator("#early .about")
    expect(about).to_contain_text(f"exit after layer {token.exit_layer}" if token.exit_layer < 12 else "all 12 layers")
    expect(about).to_contain_text(f"confidence {100 * token.confidence:.0f} %")
    expect(about.locator("tr")).to_have_count(5)


def test_everything_by_keyboard(page: Page) -> None:
    page.focus("#prompt")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "threshold"
    before = float(page.input_value("#threshold"))
    page.keyboard.press("ArrowLeft")
    assert float(page.inner_text("#threshold-value")) == pytest.approx(before - 0.01)
    for wanted in ("decoding", "tokens", "temperature", "start"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == wanted
    page.fill("#tokens", "12")
    page.focus("#start")
    page.keyboard.press("Enter")
    expect(page.locator("#full .token")).to_have_count(12)
    expect(page.locator("#start")).to_be_enabled()
    page.focus("#compare")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    chosen = page.locator("#early .token.chosen")
    expect(chosen).to_be_focused()
    assert chosen.evaluate("one => [...one.parentNode.querySelectorAll('.token')].indexOf(one)") == 2
    expect(page.locator("#early .about")).to_contain_text("confidence")


def test_a_mistake_is_told_and_stop_stops(page: Page, served: Service) -> None:
    page.fill("#prompt", "x " * 300)
    with page.expect_response("**/v1/completions"):
        page.click("#start")
    expect(page.locator("#error")).to_contain_text("255 are allowed")
    page.fill("#prompt", PROMPT)
    page.fill("#tokens", "200")
    page.click("#start")
    page.locator("#early .token").nth(3).wait_for()
    page.click("#stop")
    expect(page.locator("#start")).to_be_enabled()
    served.wait_for(lambda load: load["running"] == 0)
    assert page.locator("#early .token").count() < 200


def test_the_page_is_one_file_that_needs_no_other() -> None:
    source = (resources.files("eellm.serving") / "page.html").read_text(encoding="utf-8")
    assert not any(word in source for word in ("http://", "https://", "src=", "@import", "url("))
